"""Make a super-resolution data set of photographs without downloading anything.

The photographs come from Python packages, from Debian packages or from folders
of your own. The files are laid out as mmagic's DIV2K configs read them. Training
and validation share no photograph. Licences of the photographs:

- packages, scikit-image: CC0, public domain or, in its words, 'no known copyright
  restrictions'. It states no licence for motorcycle_left.png, which is from the
  Middlebury stereo benchmark of 2014.
- packages, scikit-learn: CC BY 2.0. The authors are in its README.txt.
- debian, lomiri-wallpapers-16.04: CC BY 4.0, CC BY-SA 4.0 or, for seeding, CC0.
- debian, lomiri-wallpapers-20.04: CC BY-SA 3.0.
- debian, mate-backgrounds: GPL-2+.
- debian, plasma-workspace-wallpapers: GPL-2+ in its copyright file, LGPLv3 in the
  metadata of each photograph.

Who shares what is made of them must credit the authors that the copyright files
name.
"""

import contextlib
import hashlib
from importlib.util import find_spec
from pathlib import Path

from PIL import Image, ImageOps
from rich.progress import track

from .manifest import begin_manifest, finish_manifest, read_manifest

RECIPE = 'man_mm photos 1'  # change it when the same settings give other pixels
LONGEST = 1200  # pixels of a side; larger photographs are shrunk
MULTIPLE = 12  # of both sides: the least common multiple of the scales
TILE = 168  # side of a training tile, a multiple of 12 as well
SCALES = (2, 3, 4)
EVERY = 4  # of the photographs of a folder, the 2nd, 6th, 10th ... validate
SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp')
TILE_LIST = 'meta_info_DIV2K800sub_GT.txt'  # the name in mmagic's configs
SPLITS = ('train', 'val')
# Each package: where its photographs lie, those that train, those that validate.
# motorcycle_right.png is left out: it shows what motorcycle_left.png shows.
LISTED = {
    'packages': {
        'scikit-image': (
            'skimage/data/{}',
            'astronaut.png rocket.jpg hubble_deep_field.jpg retina.jpg ihc.png '
            'motorcycle_left.png',
            'chelsea.png coffee.png',
        ),
        'scikit-learn': ('sklearn/datasets/images/{}', 'flower.jpg', 'china.jpg'),
    },
    'debian': {
        'lomiri-wallpapers-16.04': (
            'usr/share/backgrounds/{}.jpg',
            'Bridge_by_Sander_Klootwijk Dragonfly_by_Bolly Picture_0B_by_freespace '
            'Picture_1A_by_freespace Wine_by_Jakkub_Mede free_by_Peter_Nerlich '
            'friends_by_Aitzol_Berasategi greentock_by_Peter_Nerlich '
            'picosdeeuropa_by_Aitzol_Berasategi seeding_by_Clements_Engelhardt '
            'sunset_by_Aitzol_Berasategi',
            'aitzgorri_by_Aitzol_Berasategi life_by_Aitzol_Berasategi',
        ),
        'lomiri-wallpapers-20.04': (
            'usr/share/backgrounds/{}.jpg',
            '',
            'Kleiber_by_Lukas_Baubkus',
        ),
        'plasma-workspace-wallpapers': (
            'usr/share/wallpapers/{}/contents/images/2560x1600.jpg',
            'BytheWater ColorfulCups FallenLeaf Grey Kite Path',
            'ColdRipple EveningGlow OneStandsOut',
        ),
        'mate-backgrounds': (
            'usr/share/backgrounds/mate/nature/{}.jpg',
            'Aqua Blinds Dune Garden GreenMeadow LadyBird TwoWings Wood YellowFlower',
            'FreshFlower RainDrops',
        ),
    },
}
LICENSES = {
    'packages': 'scikit-image: CC0, public domain, no known restrictions, or not '
    'stated (motorcycle_left.png); scikit-learn: CC BY 2.0',
    'debian': 'lomiri-wallpapers-16.04: CC BY 4.0, CC BY-SA 4.0, CC0; '
    'lomiri-wallpapers-20.04: CC BY-SA 3.0; mate-backgrounds: GPL-2+; '
    'plasma-workspace-wallpapers: GPL-2+ (copyright file), LGPLv3 (metadata); '
    'authors: usr/share/doc/PACKAGE/copyright',
    'folder': 'that of the photographs in the folder',
}


def _find_listed(source, root):
    """Return name, file and split of the photographs of Python or Debian packages."""
    found, lost = [], {}
    for package, (pattern, *parts) in LISTED[source].items():
        base = Path(root)
        if source == 'packages':
            module = find_spec(pattern.split('/')[0])
            base = Path(module.origin).parents[1] if module else None
        for split, stems in zip(SPLITS, parts, strict=True):
            for name in map(pattern.format, stems.split()):
                if base and (base / name).is_file():
                    found.append((name, base / name, split))
                else:
                    lost.setdefault(package, []).append(name)
    if lost:
        names, count = ' '.join(lost), sum(map(len, lost.values()))
        fix = f'pip install {names}'
        if source == 'debian':
            fix = f'apt-get install {names} (of Debian 12), or unpack them with '
            fix += f'dpkg -x and give that folder instead of --root {root}'
        first = next(iter(lost.values()))[0]
        raise FileNotFoundError(
            f'{count} photographs are missing (such as {first}): {fix}'
        )
    return sorted(found, key=lambda row: SPLITS.index(row[2]))


def _find_in_folders(folders, out):
    """Return name and file of the photographs below `folders`, sorted by name."""
    files = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise FileNotFoundError(f'--folder {folder} is not a folder')
        for path in sorted(folder.rglob('*')):
            inside = out.resolve() in path.resolve().parents  # made by this script
            if path.suffix.lower() in SUFFIXES and path.is_file() and not inside:
                files.setdefault(path.resolve(), path.relative_to(folder).as_posix())
    return sorted((name, file) for file, name in files.items())


@contextlib.contextmanager
def _opened(name, file):
    try:
        with Image.open(file) as image:
            yield image
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise OSError(f'{name} cannot be read as a picture: {error}') from error


def _shrink(size):
    return tuple(round(side * min(1, LONGEST / max(size))) for side in size)


def _measure(name, file):
    """Return the size after turning and shrinking, from the header alone."""
    with _opened(name, file) as image:
        turned = image.getexif().get(0x0112, 1) >= 5  # orientation: a quarter turn
        return _shrink(image.size[::-1] if turned else image.size)


def _describe(source, rows):
    """Return manifest entries and files of the photographs to use.

    `rows` are name, file and, unless they are from a folder, split.
    """
    chosen, seen = [], {}
    for name, file, *split in rows:
        size, sha = _measure(name, file), hashlib.sha256(file.read_bytes()).hexdigest()
        if min(size) < TILE:
            print(f'Skipping {name}: {size[0]}×{size[1]} is less than a {TILE}² tile')
        elif sha in seen:
            print(f'Skipping {name}: the same as {seen[sha]}')
        else:
            seen[sha] = name
            split = split[0] if split else SPLITS[len(chosen) % EVERY == 1]
            size = [side - side % MULTIPLE for side in size]
            entry = {'name': name, 'split': split, 'size': size, 'sha256': sha}
            chosen.append((entry, file))
    if source == 'folder' and len(chosen) < 2:
        raise ValueError(
            f'--folder holds {len(chosen)} usable photographs: give folders with 2 or '
            f'more ({", ".join(SUFFIXES)}; {TILE} pixels or more in both sides)'
        )
    chosen.sort(key=lambda pair: SPLITS.index(pair[0]['split']))
    pictures = [{'number': i, **entry} for i, (entry, _) in enumerate(chosen, 1)]
    return pictures, [file for _, file in chosen]


def plan_files(picture, scales):
    """Yield scale, file and box in full resolution of all that a picture becomes."""
    number, (w, h) = f'{picture["number"]:04d}', picture['size']
    for scale in (1, *scales):
        kind = 'HR' if scale == 1 else f'LR_bicubic/X{scale}'
        if picture['split'] == 'val':
            yield scale, f'DIV2K_valid_{kind}/{number}.png', (0, 0, w, h)
            continue
        corners = [(x, y) for y in range(0, h, TILE) for x in range(0, w, TILE)]
        boxes = [(x, y, x + TILE, y + TILE) for x, y in corners]
        boxes = [box for box in boxes if box[2] <= w and box[3] <= h]
        for i, box in enumerate(boxes, 1):
            yield scale, f'DIV2K_train_{kind}_sub/{number}_s{i:03d}.png', box


def _load_picture(picture, file):
    with _opened(picture['name'], file) as image:
        image = ImageOps.exif_transpose(image).convert('RGB')
    image = image.resize(_shrink(image.size), Image.LANCZOS)  # or as it is
    image = image.crop((0, 0, *picture['size']))
    image.info.clear()  # no colour profile, place or date in the files
    return image


def write_picture(out, picture, file, scales):
    """Write the tiles of a picture at full size and reduced by each scale."""
    full = _load_picture(picture, file)
    versions = {1: full}
    for scale in scales:  # of the whole picture, so that tiles have no borders
        size = [side // scale for side in full.size]
        versions[scale] = full.resize(size, Image.BICUBIC)
    for scale, name, box in plan_files(picture, scales):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        # PNG is lossless, so no encoder changes the pixels.
        part = versions[scale].crop([side // scale for side in box])
        part.save(out / name, compress_level=3)


def _clear(out):
    for old in out.glob('DIV2K_*/**/[0-9]*.png'):
        old.unlink()
    for folder in sorted(out.glob('DIV2K_*/**/'), reverse=True):
        with contextlib.suppress(OSError):  # it holds other files
            folder.rmdir()


def _names(settings):
    """Return the names of all files that the settings ask for."""
    pictures, scales = settings['pictures'], settings['scales']
    return {TILE_LIST, *(row[1] for one in pictures for row in plan_files(one, scales))}


def _why_make(out, settings):
    """Return why `out` must be made, '' if it is up to date."""
    done, reason = read_manifest(out, 'man_mm photos')
    if reason:
        return reason
    for key, value in settings.items():
        if done.get(key) != value:
            if key == 'pictures':
                return 'the photographs differ'
            return f'{key} was {done.get(key)}, now {value}'
    paths = [*out.glob('DIV2K_*/**/[0-9]*.png'), *out.glob(TILE_LIST)]
    if {path.relative_to(out).as_posix() for path in paths} != _names(settings):
        return 'files are missing, or too many'
    return ''


def make_photos(
    out='data/photos', source='packages', scales=SCALES, root='/', folders=()
) -> Path:
    """Make the data set, unless the folder already holds it.

    Layout: training tiles in `DIV2K_train_HR_sub/0001_s001.png` and, for scale 2,
    `DIV2K_train_LR_bicubic/X2_sub/0001_s001.png`; validation pictures, whole, in
    `DIV2K_valid_HR/0027.png` and `DIV2K_valid_LR_bicubic/X2/0027.png`; the names of
    the tiles in `meta_info_DIV2K800sub_GT.txt`, which mmagic's configs name. The
    same settings and photographs give the same files; others replace them.

    Args:
        out (str | os.PathLike): Folder to write: new, empty or made by an
            earlier call. Defaults to `'data/photos'`.
        source (str): `'packages'` for the photographs in scikit-image and
            scikit-learn, `'debian'` for those in Debian's wallpaper packages,
            `'folder'` for your own. Defaults to `'packages'`.
        scales (Sequence[int]): How many times smaller the low resolution is: 2,
            3, 4 or several of them. Defaults to `(2, 3, 4)`.
        root (str | os.PathLike): Folder under which the Debian packages are
            installed or unpacked. Defaults to `'/'`.
        folders (Sequence[str | os.PathLike]): Folders with PNG, JPEG or WebP files
            at any depth. Of the files sorted by name, the 2nd, 6th, 10th and so on
            validate. Those smaller than a tile and copies are skipped.

    Returns:
        pathlib.Path: The folder `out`.

    Raises:
        ValueError: An argument is not usable, or `out` holds other files.
        OSError: A photograph is missing or unreadable, or `out` cannot be written.
    """
    out = Path(out)
    if source not in LICENSES:
        raise ValueError(f'--source is {source}: use {", ".join(LICENSES)}')
    if not scales or set(scales) - set(SCALES):
        raise ValueError(f'--scales is {list(scales)}: use some of {list(SCALES)}')
    if (source == 'folder') != bool(folders):
        raise ValueError('--source folder and --folder DIR need each other: give both')
    rows = _find_in_folders(folders, out) if folders else _find_listed(source, root)
    pictures, files = _describe(source, rows)
    settings = {'recipe': RECIPE, 'source': source, 'scales': sorted(set(scales))}
    settings['pictures'] = pictures
    try:
        out.mkdir(parents=True, exist_ok=True)
        reason = _why_make(out, settings)
        if not reason:
            print(f'{out} is up to date: nothing to do')
            return out
        begin_manifest(out, {**settings, 'license': LICENSES[source]})
    except OSError as error:
        raise OSError(
            f'--out {out} cannot be written ({error.strerror}): choose another folder'
        ) from error
    print(f'Making {out}: {reason}')
    _clear(out)
    for picture, file in track(list(zip(pictures, files, strict=True)), 'pictures'):
        write_picture(out, picture, file, settings['scales'])
    tiles = sorted(n for n in _names(settings) if n.startswith('DIV2K_train_HR_sub/'))
    lines = [f'{Path(name).name} ({TILE},{TILE},3)\n' for name in tiles]
    (out / TILE_LIST).write_text(''.join(lines), 'utf-8')
    finish_manifest(out)
    return out
