"""Make a COCO-format detection data set of Fashion-MNIST items on photographs.

Harder than the digits of make_digits: items of ten kinds that resemble each other,
from 12 pixels to almost the whole image, rotated, tinted, and in each other's way. The
items are those that make_fashion unpacks, the photographs those that scikit-image
and scikit-learn ship; training and validation share neither. Boxes, areas and masks
are those of the whole item, also where others hide a part of it; every annotation
tells which share of it is visible.
"""

import colorsys
import hashlib
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from rich.progress import track
from scipy.ndimage import gaussian_filter, grey_closing, grey_dilation

from .coco_files import check_least, make_once, package_folder, write_split

RECIPE = 'man_mm scenes 2'  # change it when the same settings give other pixels
FILES = {'train': 'train', 'val': 't10k'}  # of Fashion-MNIST
SIDE = 28  # pixels of its images
CLASSES = (
    'T-shirt/top, Trouser, Pullover, Dress, Coat, Sandal, Shirt, Sneaker, Bag, '
    'Ankle boot'
).split(', ')
# Photographs inside wheels: objects, textures and a landscape for either split.
PHOTOS = {
    'train': {
        'skimage': 'astronaut.png brick.png camera.png coffee.png grass.png '
        'hubble_deep_field.jpg ihc.png motorcycle_left.png retina.jpg',
        'sklearn.datasets': 'flower.jpg',
    },
    'val': {
        'skimage': 'chelsea.png gravel.png rocket.jpg',
        'sklearn.datasets': 'china.jpg',
    },
}
FOLDERS = {'skimage': 'data', 'sklearn.datasets': 'images'}
# How many items of a size an image may have, and the root of their area as a share of
# the image side: at 160 pixels 11 to 30, 32 to 72 and 98 to 128. Many items, none of
# them hard to see, so that a detector learns them from scratch in minutes.
SIZES = (
    ((3, 4, 5, 6, 7), (0.07, 0.19)),
    ((2, 3, 4), (0.2, 0.45)),
    ((0, 1), (0.61, 0.8)),
)
LEAST = 12  # pixels of the longer side of an item, before it turns
MAX_TURN = 15.0  # degrees
MIN_VISIBLE = 0.75  # of an item of which others hide a part
MIN_CROP = 120  # pixels of a photograph, the strongest zoom
MIN_CONTRAST = 120.0  # RGB distance between an item and what lies under it
TRIALS = 40  # places that are tried before an item is left out
LICENSES = [
    {'id': 1, 'name': 'items: Fashion-MNIST, MIT, Zalando SE'},
    {
        'id': 2,
        'name': 'photographs of scikit-image: CC0, public domain, no known '
        'restrictions, or not stated (motorcycle_left.png)',
    },
    {'id': 3, 'name': 'photographs of scikit-learn: CC BY 2.0'},
]


def load_photos(split):
    """Return the photographs of a split by name."""
    photos = {}
    for package, names in PHOTOS[split].items():
        folder = package_folder(package) / FOLDERS[package]
        for name in names.split():
            photos[name] = Image.open(folder / name).convert('RGB')
    return photos


def load_items(folder, split):
    """Return the images (N, 28, 28) and the labels (N,) of the items of a split."""
    parts = []
    for kind, rank in (('images-idx3', 3), ('labels-idx1', 1)):
        path = Path(folder) / f'{FILES[split]}-{kind}-ubyte'
        if not path.is_file():
            raise FileNotFoundError(
                f'{path} is missing: run make_fashion, or name its folder by --items'
            )
        data = np.frombuffer(path.read_bytes(), np.uint8)
        shape = data[4 : 4 + 4 * rank].view('>u4').astype(int)
        values = data[4 + 4 * rank :]
        if len(shape) != rank or values.size != shape.prod():
            raise ValueError(f'{path} is damaged: run make_fashion again')
        parts.append(values.reshape(shape))
    images, labels = parts
    if images.shape[1:] != (SIDE, SIDE):
        raise ValueError(
            f'--items {folder} holds images of {images.shape[1]} pixels: run '
            'make_fashion without --side'
        )
    return images, labels


def _digest(parts):
    return hashlib.sha256(b''.join(part.tobytes() for part in parts)).hexdigest()


def crop_photo(rng, photos, size):
    """Return the name and the pixels (size, size, 3) of a background."""
    name = list(photos)[rng.integers(len(photos))]
    photo = photos[name]
    side = int(np.exp(rng.uniform(np.log(MIN_CROP), np.log(min(photo.size)))))
    x, y = (int(rng.integers(length - side + 1)) for length in photo.size)
    crop = photo.resize((size, size), Image.LANCZOS, (x, y, x + side, y + side))
    gains = rng.uniform(0.5, 1.1) * rng.uniform(0.9, 1.1, 3)  # light and its colour
    return name, gains * np.asarray(crop, float)[:, :: rng.choice((-1, 1))]


def _cut_out(image):
    """Return grey values and opacity, 0 to 255, of an item (28, 28)."""
    # Dark specks inside are the item's; the hole below a handle is not.
    opacity = np.where(grey_closing(image, (3, 3)) > 32, 255.0, 0.0)
    # Grey values reach beyond the edge, so that no dark fringe comes from resizing.
    grey = np.where(opacity > 0, image, grey_dilation(image, (3, 3)))
    # Smooth, else one would see the pixels of 28 in the outline of large items.
    return grey, gaussian_filter(opacity, 0.6).astype(np.uint8)


def draw_item(image, root_area, turn, size):
    """Return grey values and opacity, 0 to 1, cut to the box of the item.

    `root_area` is reached unless the item would be longer than the image or LEAST.
    """
    parts = _cut_out(image)
    fill = (parts[1] > 127).mean()
    side = np.clip(root_area / np.sqrt(max(fill, 0.05)), LEAST, size)
    while True:
        # An empty border of a fifth leaves room for the corners to turn.
        length = round(side * 7 / 5)
        fields = []
        for part in parts:
            field = Image.fromarray(np.pad(part, SIDE // 5 + 1))
            field = field.resize((length, length), Image.BICUBIC)
            fields.append(np.asarray(field.rotate(turn, Image.BICUBIC), float) / 255)
        alpha = np.clip((fields[1] - 0.3) / 0.4, 0, 1)  # crisp after enlarging
        if (alpha > 0.5).sum() < LEAST and side < size:  # thin, and blurred away
            side *= 1.2
            continue
        rows, cols = ((alpha > 0.5).any(axis).nonzero()[0] for axis in (1, 0))
        box = np.s_[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]
        if max(alpha[box].shape) <= size:
            return fields[0][box], alpha[box]
        side, turn = 0.95 * side, turn / 2


def _pick_colours(rng, grey, under):
    """Return the RGB values of an item, far enough from the mean of what is `under`."""
    hsv = rng.uniform((0, 0, 0.3), (1, 0.7, 1), (12, 3))
    tints = 255 * np.array([colorsys.hsv_to_rgb(*row) for row in hsv])
    shade = rng.uniform(0.1, 0.4) + 0.6 * grey
    contrast = np.linalg.norm(shade.mean() * tints - under, axis=1)
    # The first one with enough contrast, else the one with most.
    return shade[..., None] * tints[np.minimum(contrast, MIN_CONTRAST).argmax()]


def _hides_too_much(top, ink, visible, areas):
    """Tell whether too little would be left of an item under new `ink`."""
    hidden = np.bincount(top[ink], minlength=len(areas))
    return (visible - hidden < MIN_VISIBLE * areas)[1:].any()


def make_scene(rng, photos, items, numbers, size):
    """Return pixels, the name of the photograph and the annotations.

    `numbers` is an iterator over the items (images, labels) to take.
    """
    name, canvas = crop_photo(rng, photos, size)
    roots = [
        rng.uniform(*np.log(limits), rng.choice(counts)) for counts, limits in SIZES
    ]
    roots = size * np.exp(np.concatenate(roots))
    # Large ones tend to lie below, else they would hide the others.
    order = np.argsort(-roots * np.exp(rng.normal(0, 0.5, len(roots))))
    top = np.zeros((size, size), int)  # number of the item that is seen there
    areas, visible, notes = np.zeros(1), np.zeros(1), []
    for root in roots[order]:
        number = int(next(numbers))
        image = items[0][number][:, :: rng.choice((-1, 1))]
        turn = rng.uniform(-MAX_TURN, MAX_TURN)
        grey, alpha = draw_item(image, root, turn, size)
        ink, (h, w) = alpha > 0.5, alpha.shape
        for _ in range(TRIALS):
            x, y = int(rng.integers(size - w + 1)), int(rng.integers(size - h + 1))
            place = np.s_[y : y + h, x : x + w]
            if not _hides_too_much(top[place], ink, visible, areas):
                break
        else:
            continue
        visible = visible - np.bincount(top[place][ink], minlength=len(areas))
        top[place][ink] = len(areas)
        areas, visible = (np.append(values, ink.sum()) for values in (areas, visible))
        colours = _pick_colours(rng, grey, canvas[place][ink].mean(0))
        canvas[place] += (colours - canvas[place]) * alpha[..., None]
        mask = np.zeros((size, size), np.uint8, order='F')
        mask[place] = ink
        code = coco_mask.encode(mask)
        notes.append(
            {
                'category_id': int(items[1][number]) + 1,
                'bbox': [x, y, w, h],
                'area': int(ink.sum()),
                'iscrowd': 0,
                'segmentation': {**code, 'counts': code['counts'].decode()},
                'item': number,
            }
        )
    for note, share in zip(notes, visible[1:] / areas[1:], strict=True):
        note['visible'] = round(float(share), 3)
    return np.rint(canvas.clip(0, 255)).astype(np.uint8), name, notes


def _write_split(out, split, count, items, size, seed):
    photos = load_photos(split)
    key = (seed, list(PHOTOS).index(split))
    header = {
        'info': {'description': f'{RECIPE}, {split}'},
        'licenses': LICENSES,
        'categories': [{'id': i, 'name': name} for i, name in enumerate(CLASSES, 1)],
    }
    # All items in new orders, one after the other, so that few are seen twice.
    most = count * sum(max(counts) for counts, _ in SIZES)
    rounds = np.tile(np.arange(len(items[1])), (-(-most // len(items[1])), 1))
    numbers = np.random.default_rng(key).permuted(rounds, axis=1).flat

    def make(number):
        rng = np.random.default_rng((*key, number))
        pixels, name, notes = make_scene(rng, photos, items, numbers, size)
        return pixels, {'photo': name}, notes

    images = track(range(1, count + 1), f'{split} images')
    write_split(out, split, map(make, images), header)


def make_scenes(
    out='data/scenes',
    items='data/fashion',
    num_train=4000,
    num_val=1000,
    size=160,
    seed=0,
) -> Path:
    """Make the data set, unless the folder already holds it.

    Layout: `train/000001.png`, `val/000001.png`, and boxes and masks in COCO's format
    in `annotations/instances_train.json` and `annotations/instances_val.json`. The
    same settings give the same files; other settings replace them. Training items are
    of the 60,000 of Fashion-MNIST for training, validation items of its 10,000 for
    testing; an item is seen twice only once all have been seen.

    Args:
        out (str | os.PathLike): Folder to write: new, empty or made by an
            earlier call. Defaults to `'data/scenes'`.
        items (str | os.PathLike): Folder that `make_fashion` has made. Defaults to
            `'data/fashion'`.
        num_train (int): Training images, 1 or more. Defaults to 4000.
        num_val (int): Validation images, 1 or more. Defaults to 1000.
        size (int): Image side in pixels, 64 or more. Defaults to 160.
        seed (int): Seed of all random choices, 0 or more. Defaults to 0.

    Returns:
        pathlib.Path: The folder `out`.

    Raises:
        ValueError: A number is too small, `out` holds other files, or `items` holds
            no images of 28×28 pixels.
        OSError: Items are missing, or `out` cannot be written.
    """
    out = Path(out)
    settings = {'recipe': RECIPE, 'num_train': num_train, 'num_val': num_val}
    settings.update(size=size, seed=seed)
    check_least(settings, {'num_train': 1, 'num_val': 1, 'size': 64, 'seed': 0})
    splits = {split: load_items(items, split) for split in PHOTOS}
    settings['items'] = {split: _digest(parts) for split, parts in splits.items()}
    return make_once(
        out,
        settings,
        lambda split, count: _write_split(out, split, count, splits[split], size, seed),
    )
