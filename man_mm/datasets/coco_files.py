"""What the tools that make COCO-format detection data sets share.

Layout: ``train/000001.png``, ``val/000001.png``, and COCO annotations in
``annotations/instances_train.json`` and ``annotations/instances_val.json``.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table

from .manifest import begin_manifest, finish_manifest, read_manifest

SPLITS = ('train', 'val')
AREAS = (32**2, 96**2)  # pixels, by which COCO tells small, medium and large


def make_once(out: Path, settings: Mapping, write: Callable[[str, int], None]) -> Path:
    """Makes a data set, unless its folder already holds it.

    Args:
        out: The folder: new, empty or made by an earlier call.
        settings: What was asked for, with ``recipe``, which begins with two words that
            name the kind of data set, ``num_train`` and ``num_val``.
        write: Writes a split of so many images.

    Returns:
        The folder.

    Raises:
        ValueError: If the folder holds other files.
        OSError: If it cannot be written.
    """
    kind = ' '.join(settings['recipe'].split()[:2])
    try:
        out.mkdir(parents=True, exist_ok=True)
        reason = _why_make(out, kind, settings)
        if not reason:
            print(f'{out} is up to date: nothing to do')
            return out
        begin_manifest(out, settings)
    except OSError as error:
        raise OSError(
            f'--out {out} cannot be written ({error.strerror}): choose another folder'
        ) from error
    print(f'Making {out}: {reason}')
    for split in SPLITS:
        write(split, settings[f'num_{split}'])
    finish_manifest(out)
    return out


def package_folder(package: str) -> Path:
    """Finds the folder of an installed package, of whose files a data set is made.

    Args:
        package: What it is imported as.

    Raises:
        FileNotFoundError: If it is not installed; the message says what to install.
    """
    try:
        return Path(str(resources.files(package)))
    except ModuleNotFoundError as error:
        raise FileNotFoundError(
            f'the images are made from files of {error.name}, which is not installed: '
            'pip install scikit-image scikit-learn'
        ) from error


def check_least(settings: Mapping[str, int], least: Mapping[str, int]) -> None:
    """Refuses settings below what they must be at least.

    Raises:
        ValueError: If one is; it names the option of the command line.
    """
    for key, value in least.items():
        if settings[key] < value:
            option = '--' + key.replace('_', '-')
            raise ValueError(f'{option} is {settings[key]}: use {value} or more')


def annotations_file(out: Path, split: str) -> Path:
    """The file of the annotations of a split."""
    return Path(out) / 'annotations' / f'instances_{split}.json'


def read_annotations(out: Path, split: str) -> dict:
    """The annotations of a split, in COCO's format."""
    return json.loads(annotations_file(out, split).read_text('utf-8'))


def _why_make(out: Path, kind: str, settings: Mapping) -> str:
    """Tells why a data set must be made.

    Args:
        out: Its folder.
        kind: How the recipes of the tool's data sets begin.
        settings: What was asked for, with ``num_train`` and ``num_val``.

    Returns:
        The reason; '' if the folder holds what was asked for.
    """
    done, reason = read_manifest(out, kind)
    if reason:
        return reason
    for key, value in settings.items():
        if done.get(key) != value:
            return f'{key} was {done.get(key)}, now {value}'
    for split in SPLITS:
        found = len(list((out / split).glob('[0-9]*.png')))
        files_missing = not annotations_file(out, split).exists()
        if found != settings[f'num_{split}'] or files_missing:
            return f'files of {split} are missing'
    return ''


def write_split(
    out: Path,
    split: str,
    scenes: Iterable[tuple[np.ndarray, dict, list[dict]]],
    header: Mapping,
) -> None:
    """Writes the images and the annotations of a split, in place of old ones.

    Args:
        out: Folder of the data set.
        split: ``'train'`` or ``'val'``.
        scenes: Of each image the pixels ``(H, W, 3)``, what to note of the image, and
            its annotations without numbers.
        header: ``info``, ``licenses`` and ``categories``.
    """
    for folder in (out / split, out / 'annotations'):
        folder.mkdir(exist_ok=True)
    for old in (out / split).glob('[0-9]*.png'):
        old.unlink()
    coco = {**header, 'images': [], 'annotations': []}
    for number, (pixels, about, notes) in enumerate(scenes, 1):
        name = f'{number:06d}.png'  # lossless, so no encoder changes the pixels
        Image.fromarray(pixels).save(out / split / name, compress_level=3)
        height, width = pixels.shape[:2]
        image = {'id': number, 'file_name': name, 'height': height, 'width': width}
        coco['images'].append({**image, **about})
        for note in notes:
            ids = {'id': len(coco['annotations']) + 1, 'image_id': number}
            coco['annotations'].append({**ids, **note})
    annotations_file(out, split).write_text(json.dumps(coco), 'utf-8')


def draw_preview(out: Path, file: Path) -> None:
    """Draws the first 24 validation images, twice as large, with their boxes."""
    coco = read_annotations(out, 'val')
    names = {kind['id']: kind['name'] for kind in coco['categories']}
    cell = 2 * coco['images'][0]['width'] + 4
    sheet = Image.new('RGB', (6 * cell, 4 * cell))
    for i, image in enumerate(coco['images'][:24]):
        tile = Image.open(Path(out) / 'val' / image['file_name']).resize([cell - 4] * 2)
        pen = ImageDraw.Draw(tile)
        for note in coco['annotations']:
            if note['image_id'] == image['id']:
                x, y, w, h = (2 * value for value in note['bbox'])
                pen.rectangle((x - 1, y - 1, x + w, y + h), outline='white')
                pen.text((x, max(y - 13, 0)), names[note['category_id']], 'white')
        sheet.paste(tile, (i % 6 * cell, i // 6 * cell))
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(file)


def print_counts(out: Path) -> None:
    """Prints how many images and objects there are, by class and by size."""
    columns = []
    for split in SPLITS:
        coco = read_annotations(out, split)
        kinds, notes = coco['categories'], coco['annotations']
        counts = np.bincount(
            [note['category_id'] for note in notes], minlength=len(kinds) + 1
        )
        sizes = np.digitize([note['area'] for note in notes], AREAS)
        shares = np.bincount(sizes, minlength=3) / max(len(notes), 1)
        column = [len(coco['images']), len(notes), *counts[1:]]
        columns.append([*map(str, column), *(f'{share:.0%}' for share in shares)])
    names = ['images', 'objects', *(kind['name'] for kind in kinds)]
    names += ['small (< 32² px)', 'medium', 'large (≥ 96² px)']
    table = Table('', *SPLITS)
    for name, *cells in zip(names, *columns, strict=True):
        table.add_row(name, *cells)
    Console().print(table)
