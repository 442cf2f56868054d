"""make_scenes writes COCO files of items that fit what the pixels show."""

import copy
import hashlib
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.registry import init_default_scope
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scripts import run_script
from sklearn.datasets import load_digits

from man_mm.datasets import make_scenes as tool

NUMBERS = {'train': 700, 'val': 500}
SMALL = {'num_train': 40, 'num_val': 20}


def write_items(folder, side=28, numbers=NUMBERS):
    """Files as those of Fashion-MNIST, of handwritten digits that are enlarged."""
    folder.mkdir(parents=True, exist_ok=True)
    digits, first = load_digits(), 0
    for split, count in numbers.items():
        chosen = slice(first, first + count)
        images = [
            np.asarray(Image.fromarray(np.uint8(15.9 * x)).resize((side, side)))
            for x in digits.images[chosen]
        ]
        labels = digits.target[chosen].astype(np.uint8)
        for kind, values in (('images-idx3', images), ('labels-idx1', labels)):
            values = np.array(values)
            head = struct.pack(f'>HBB{values.ndim}I', 0, 8, values.ndim, *values.shape)
            path = folder / f'{tool.FILES[split]}-{kind}-ubyte'
            path.write_bytes(head + values.tobytes())
        first += count
    return folder


def digest(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob('*')
        if path.is_file()
    }


def load(folder, split):
    return COCO(str(folder / 'annotations' / f'instances_{split}.json'))


@pytest.fixture(scope='module')
def items(tmp_path_factory):
    return write_items(tmp_path_factory.mktemp('items'))


@pytest.fixture(scope='module')
def made(items, tmp_path_factory):
    out = tmp_path_factory.mktemp('made') / 'scenes'
    return tool.make_scenes(out, items, **SMALL)


def test_same_seed_same_bytes_other_seed_other_bytes(items, made, tmp_path):
    again = tool.make_scenes(tmp_path / 'again', items, **SMALL)
    assert digest(again) == digest(made)
    other = tool.make_scenes(tmp_path / 'other', items, 3, 3, seed=1)
    name = 'val/000001.png'
    assert (other / name).read_bytes() != (made / name).read_bytes()


def test_splits_share_no_item_and_no_photograph(items, made):
    sets = []
    for split in ('train', 'val'):
        coco, (images, labels) = load(made, split), tool.load_items(items, split)
        notes = coco.anns.values()
        assert all(labels[x['item']] + 1 == x['category_id'] for x in notes)
        used = [x['item'] for x in notes]
        assert len(set(used)) == len(used)  # none twice before all have been seen
        photos = {x['photo'] for x in coco.dataset['images']}
        assert len(photos) > 2
        sets.append(({images[x].tobytes() for x in used}, photos))
    for train, val in zip(*sets, strict=True):
        assert train and val and not train & val
    (images, _), known = tool.load_items(items, 'train'), sets[0][0]
    assert known & {x.tobytes() for x in images}  # control: bytes do tell


def test_mmdet_reads_boxes_and_masks(made):
    from mmdet.datasets import CocoDataset

    init_default_scope('mmdet')
    dataset = CocoDataset(
        data_root=str(made),
        ann_file='annotations/instances_train.json',
        data_prefix=dict(img='train/'),
        metainfo=dict(classes=tool.CLASSES),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
        ],
    )
    assert len(dataset) == SMALL['num_train']
    coco = load(made, 'train')
    for index in range(5):
        sample = dataset[index]
        notes = coco.loadAnns(coco.getAnnIds(sample['img_id']))
        assert sample['img'].shape == (160, 160, 3)
        assert sample['gt_masks'].areas.tolist() == [x['area'] for x in notes]
        boxes = [[x, y, x + w, y + h] for x, y, w, h in (n['bbox'] for n in notes)]
        assert np.array_equal(boxes, sample['gt_bboxes'].tensor)


def test_every_range_of_areas_is_populated(made):
    coco = load(made, 'train')
    # Every object is found, with a score of 1.
    found = coco.loadRes(
        [{**copy.deepcopy(x), 'score': 1.0} for x in coco.anns.values()]
    )
    ranges = COCOeval(coco, found, 'bbox')
    ranges.evaluate()
    ranges.accumulate()
    ranges.summarize()
    assert np.allclose(ranges.stats[[0, 3, 4, 5]], 1)
    sizes = np.digitize([x['area'] for x in coco.anns.values()], (32**2, 96**2))
    assert (np.bincount(sizes) > 0.03 * len(sizes)).all()
    for note in coco.anns.values():  # control: without large objects there is no AP
        note['area'] = min(note['area'], 9000)
    ranges = COCOeval(coco, found, 'bbox')
    ranges.evaluate()
    ranges.accumulate()
    ranges.summarize()
    assert ranges.stats[5] == -1


PHOTOS = tool.load_photos('val')
DIGITS = load_digits()
ITEMS = (
    [
        np.asarray(Image.fromarray(np.uint8(15.9 * x)).resize((28, 28)))
        for x in DIGITS.images[:200]
    ],
    DIGITS.target[:200],
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.sampled_from([64, 128, 200]))
def test_boxes_areas_and_shares_fit_the_masks(seed, size):
    background = tool.crop_photo(np.random.default_rng(seed), PHOTOS, size)[1]
    pixels, name, notes = tool.make_scene(
        np.random.default_rng(seed), PHOTOS, ITEMS, iter(range(200)), size
    )
    assert pixels.shape == (size, size, 3) and name in PHOTOS
    assert 2 <= len(notes) <= sum(max(counts) for counts, _ in tool.SIZES)
    top = np.zeros((size, size), int)
    masks = [coco_mask.decode(x['segmentation']).astype(bool) for x in notes]
    for number, (note, mask) in enumerate(zip(notes, masks, strict=True), 1):
        rows, cols = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
        box = [cols[0], rows[0], np.ptp(cols) + 1, np.ptp(rows) + 1]
        assert box == note['bbox'] and note['area'] == mask.sum()
        assert max(box[2:]) >= tool.LEAST * 0.6
        top[mask] = number
    for number, (note, mask) in enumerate(zip(notes, masks, strict=True), 1):
        share = (top == number).sum() / mask.sum()
        assert note['visible'] == pytest.approx(
            share, abs=1e-3
        )  # rounded to three digits
        assert share >= tool.MIN_VISIBLE
    changed = (np.rint(background.clip(0, 255)) != pixels).any(2)
    assert changed[top > 0].mean() > 0.9
    assert changed[top == 0].mean() < 0.2  # soft edges alone


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 199), st.floats(8, 128), st.floats(-30, 30))
def test_an_item_has_the_area_that_was_asked_for(sample, root, turn):
    grey, alpha = tool.draw_item(ITEMS[0][sample], root, turn, 160)
    ink = alpha > 0.5
    assert grey.shape == alpha.shape and max(ink.shape) <= 160
    for line in (ink[0], ink[-1], ink[:, 0], ink[:, -1]):
        assert line.any()
    longest = max(ink.shape)
    if tool.LEAST * 1.5 < longest < 130:
        assert 0.7 * root < np.sqrt(ink.sum()) < 1.4 * root


def test_an_item_of_thin_lines_does_not_vanish():
    image = np.zeros((28, 28), np.uint8)
    image[14, 4:24] = 200
    for root, size in ((3.2, 64), (8, 160)):
        ink = tool.draw_item(image, root, 20, size)[1] > 0.5
        assert tool.LEAST <= ink.sum() < 100


def test_a_second_call_does_nothing_and_other_items_make_it_anew(
    items, tmp_path, capsys
):
    make = lambda folder: tool.make_scenes(tmp_path / 'out', folder, 2, 2, 64)  # noqa: E731
    before = digest(make(items))
    make(items)
    assert 'nothing to do' in capsys.readouterr().out
    assert digest(tmp_path / 'out') == before
    other = write_items(tmp_path / 'items', numbers={'train': 300, 'val': 300})
    assert digest(make(other)) != before
    assert 'items was' in capsys.readouterr().out


def test_missing_reduced_or_damaged_items(tmp_path):
    out = tmp_path / 'out'
    with pytest.raises(SystemExit, match='make_scenes: .*is missing: run make_fashion'):
        run_script('make_scenes', '--out', str(out), '--items', str(tmp_path))
    few = {'train': 3, 'val': 3}
    with pytest.raises(ValueError, match='of 14 pixels.*without --side'):
        tool.make_scenes(out, write_items(tmp_path / 'small', 14, few))
    path = write_items(tmp_path / 'cut', numbers=few) / 'train-images-idx3-ubyte'
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match='is damaged: run make_fashion'):
        tool.make_scenes(out, path.parent)
    assert not out.exists()


def test_the_command_line_prints_shares_and_draws(items, tmp_path, capsys):
    out, preview = tmp_path / 'out', tmp_path / 'new' / 'preview.png'
    numbers = ['--num-train', '4', '--num-val', '3', '--size', '96']
    files = ['--items', str(items), '--preview', str(preview)]
    run_script('make_scenes', '--out', str(out), *numbers, *files)
    rows = capsys.readouterr().out.replace('│', ' ').splitlines()
    rows = [line.split() for line in rows]
    assert ['images', '4', '3'] in rows
    assert [row[0] for row in rows if row and row[-1].endswith('%')] == [
        'small',
        'medium',
        'large',
    ]
    with Image.open(preview) as sheet:
        assert sheet.size == (6 * 196, 4 * 196)
    with pytest.raises(SystemExit, match='--size is 63: use 64 or more'):
        run_script('make_scenes', '--size', '63')
