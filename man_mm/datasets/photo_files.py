"""What a data set of `make_photos` holds: a picture of it, and its counts."""

import json
from pathlib import Path

from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table

from .make_photos import SPLITS, plan_files


def _read_splits(out):
    """Return, for each split, the pictures and the plans of their full resolution."""
    pictures = json.loads((out / 'dataset.json').read_text('utf-8'))['pictures']
    rows = [(picture, list(plan_files(picture, ()))) for picture in pictures]
    return {s: [row for row in rows if row[0]['split'] == s] for s in SPLITS}


def draw_preview(out, file, columns=6, width=240, height=216):
    """Draw all pictures, put together again from their tiles, in a block a split."""
    splits, head = _read_splits(out), 36
    lines = sum(-(-len(rows) // columns) for rows in splits.values())
    size = (columns * width, lines * height + len(splits) * head)
    sheet = Image.new('RGB', size, 'white')
    pen, top = ImageDraw.Draw(sheet), 0
    for split, rows in splits.items():
        pen.text((8, top + 8), f'{split}: {len(rows)}', 'black', font_size=20)
        top += head
        for i, (picture, plans) in enumerate(rows):
            ends = zip(*(box[2:] for _, _, box in plans), strict=True)
            whole = Image.new('RGB', tuple(map(max, ends)))
            for _, name, box in plans:
                with Image.open(out / name) as image:
                    whole.paste(image, box[:2])
            whole.thumbnail((width - 8, height - 26))
            x, y = i % columns * width + 4, top + i // columns * height
            sheet.paste(whole, (x, y))
            # The file or, where all files have one name, the folder that tells them.
            path = Path(picture['name'].replace('/contents/images/2560x1600', ''))
            text = f'{picture["number"]:04d} {path.stem[:26]}'
            pen.text((x, y + whole.height + 2), text, 'black', font_size=14)
        top += -(-len(rows) // columns) * height
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(file)


def print_counts(out):
    """Prints how many pictures, tiles and pixels there are, by split."""
    columns = [('pictures', 'tiles', 'pixels')]
    for split, rows in _read_splits(out).items():
        boxes = [box for _, plans in rows for _, _, box in plans]
        pixels = sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in boxes)
        tiles = len(boxes) if split == 'train' else 'whole'
        columns.append((str(len(rows)), str(tiles), f'{pixels:,}'))
    table = Table('', *SPLITS)
    for row in zip(*columns, strict=True):
        table.add_row(*row)
    Console().print(table)
