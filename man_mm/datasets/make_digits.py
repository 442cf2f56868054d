"""Make a small COCO-format detection data set without downloading anything.

Handwritten digits that scikit-learn ships are pasted on crops of photographs
that scikit-image ships. Training and validation share no digit sample and no
photograph.
"""

import colorsys
from pathlib import Path

import numpy as np
from PIL import Image
from rich.progress import track

from .coco_files import check_least, make_once, package_folder, write_split

RECIPE = 'man_mm digits 3'  # change it when the same settings give other pixels
# Photographs inside the scikit-image wheel: free to reuse, no legible writing.
PHOTOS = {
    'train': 'brick.png camera.png coffee.png grass.png hubble_deep_field.jpg '
    'ihc.png retina.jpg',
    'val': 'chelsea.png gravel.png rocket.jpg',
}
TRAIN_SHARE = 0.8  # of the digit samples
COUNTS = (2, 5)  # digits per image
SIDES = (1 / 6, 1 / 2)  # of a digit, as a share of the image side
MIN_CROP = 96  # pixels of a photograph, the strongest zoom
MAX_TURN = 15.0  # degrees
MAX_OVERLAP = 0.18  # of the smaller box, so the IoU of two stays below 0.1
DIM = 0.5  # of the photographs, so that every digit is brighter than its ground
MIN_CONTRAST = 140.0  # RGB distance between a digit and what lies under it
MIN_ALPHA = 0.15  # fainter ink is dropped, so that boxes fit what one can see
LICENSES = [
    {'id': 1, 'name': 'photographs: CC0 or public domain, from scikit-image'},
    {'id': 2, 'name': 'digits: CC BY 4.0, https://doi.org/10.24432/C50P49'},
]


def load_digits():
    """Return scikit-learn's digits: `images` (N, 8, 8) and `target` (N,)."""
    package_folder('sklearn')
    from sklearn import datasets

    return datasets.load_digits()


def load_photos(split):
    """Return the photographs of a split by name."""
    folder = package_folder('skimage') / 'data'
    names = PHOTOS[split].split()
    return {name: Image.open(folder / name).convert('RGB') for name in names}


def split_samples(target):
    """Return, for each split, the sample numbers of the digits 0 to 9."""
    order = np.random.default_rng(0).permutation(len(target))  # same for any seed
    cut = int(TRAIN_SHARE * len(order))
    parts = {'train': order[:cut], 'val': order[cut:]}
    return {k: [v[target[v] == d] for d in range(10)] for k, v in parts.items()}


def crop_photo(rng, photos, size):
    """Return the name and the pixels (size, size, 3) of a background."""
    name = list(photos)[rng.integers(len(photos))]
    photo = photos[name]
    side = int(np.exp(rng.uniform(np.log(MIN_CROP), np.log(min(photo.size)))))
    x, y = (int(rng.integers(length - side + 1)) for length in photo.size)
    crop = photo.resize((size, size), Image.LANCZOS, (x, y, x + side, y + side))
    return name, DIM * np.asarray(crop, float)[:, :: rng.choice((-1, 1))]


def draw_digit(pixels, side, turn):
    """Return the opacity, 0 to 1, cut to the box around the strokes."""
    # Two empty pixels all round leave room for the corners to turn.
    field = Image.fromarray((np.pad(pixels, 2) * 255 / 16).astype(np.uint8))
    length = round(side * 12 / 8)
    field = field.resize((length, length), Image.BICUBIC)
    alpha = np.asarray(field.rotate(turn, Image.BICUBIC), float) / 255
    alpha = np.clip((alpha - 0.2) / 0.5, 0, 1)  # crisp edges after enlarging
    alpha[alpha < MIN_ALPHA] = 0
    rows, cols = alpha.any(1).nonzero()[0], alpha.any(0).nonzero()[0]
    return alpha[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]


def _pick_colour(rng, under):
    """Return a bright colour far from the mean of the pixels `under` it."""
    hsv = rng.uniform((0, 0.1, 0.85), (1, 0.7, 1), (20, 3))
    colours = 255 * np.array([colorsys.hsv_to_rgb(*row) for row in hsv])
    contrast = np.linalg.norm(colours - under.mean(0), axis=1)
    # The first one with enough contrast, else the one with most.
    return colours[np.minimum(contrast, MIN_CONTRAST).argmax()]


def _is_free(box, notes):
    boxes = np.array([note['bbox'] for note in notes]).reshape(-1, 4)
    low = np.maximum(boxes[:, :2], box[:2])
    high = np.minimum(boxes[:, :2] + boxes[:, 2:], np.add(box[:2], box[2:]))
    least = np.minimum(boxes[:, 2:].prod(1), box[2] * box[3])
    return ((high - low).clip(0).prod(1) <= MAX_OVERLAP * least).all()


def make_scene(rng, photos, samples, pools, classes, size):
    """Return pixels, the name of the photograph and the annotations."""
    name, canvas = crop_photo(rng, photos, size)
    inked, notes = np.zeros((size, size), bool), []
    low, high = np.log(SIDES) + np.log(size)
    sides = np.exp(rng.uniform(low, high, rng.integers(COUNTS[0], COUNTS[1] + 1)))
    for side in np.sort(sides)[::-1]:  # large ones first: small ones still fit
        digit = int(next(classes))
        sample, turn = int(rng.choice(pools[digit])), rng.uniform(-MAX_TURN, MAX_TURN)
        for trial in range(300):
            if trial % 30 == 0:  # no room: shrink a little, to the least side
                scale = max(side * 0.85 ** (trial // 30), np.exp(low))
                alpha = draw_digit(samples[sample], scale, turn)
                h, w = alpha.shape
            x, y = int(rng.integers(size - w + 1)), int(rng.integers(size - h + 1))
            area, ink = np.s_[y : y + h, x : x + w], alpha > 0
            # Strokes never cover each other, so every box stays tight.
            if _is_free((x, y, w, h), notes) and not (inked[area] & ink).any():
                break
        else:
            continue
        inked[area] |= ink
        colour = _pick_colour(rng, canvas[area][ink])
        canvas[area] += (colour - canvas[area]) * alpha[..., None]
        note = {'category_id': digit + 1, 'bbox': [x, y, w, h], 'area': w * h}
        notes.append({**note, 'iscrowd': 0, 'segmentation': [], 'sample': sample})
    return np.rint(canvas.clip(0, 255)).astype(np.uint8), name, notes


def _write_split(out, split, count, size, seed):
    digits, photos = load_digits(), load_photos(split)
    pools = split_samples(digits.target)[split]
    key = (seed, list(PHOTOS).index(split))
    # Shuffled runs of the ten digits keep even a tiny data set balanced.
    decks = np.tile(np.arange(10), (count, 1))
    classes = iter(np.random.default_rng(key).permuted(decks, axis=1).flat)
    header = {
        'info': {'description': f'{RECIPE}, {split}'},
        'licenses': LICENSES,
        'categories': [{'id': d + 1, 'name': str(d)} for d in range(10)],
    }

    def make(number):
        rng = np.random.default_rng((*key, number))
        pixels, name, notes = make_scene(
            rng, photos, digits.images, pools, classes, size
        )
        return pixels, {'photo': name}, notes

    numbers = track(range(1, count + 1), f'{split} images')
    write_split(out, split, map(make, numbers), header)


def make_digits(
    out='data/digits', num_train=2000, num_val=250, size=96, seed=0
) -> Path:
    """Make the data set, unless the folder already holds it.

    Layout: `train/000001.png`, `val/000001.png`, and COCO boxes in pixels in
    `annotations/instances_train.json` and `annotations/instances_val.json`. The
    same settings give the same files; other settings replace them.

    Args:
        out (str | os.PathLike): Folder to write: new, empty or made by an
            earlier call. Defaults to `'data/digits'`.
        num_train (int): Training images, 1 or more. Defaults to 2000.
        num_val (int): Validation images, 1 or more. Defaults to 250.
        size (int): Image side in pixels, 64 or more. Defaults to 96.
        seed (int): Seed of all random choices, 0 or more. Defaults to 0.

    Returns:
        pathlib.Path: The folder `out`.

    Raises:
        ValueError: A number is too small, or `out` holds other files.
        OSError: `out` cannot be written, or a package is not installed.
    """
    out = Path(out)
    settings = {'recipe': RECIPE, 'num_train': num_train, 'num_val': num_val}
    settings.update(size=size, seed=seed)
    check_least(settings, {'num_train': 1, 'num_val': 1, 'size': 64, 'seed': 0})
    return make_once(
        out,
        settings,
        lambda split, count: _write_split(out, split, count, size, seed),
    )
