import hashlib
import json
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packages import run_python
from PIL import Image
from pycocotools.coco import COCO
from scripts import run_script
from sklearn.datasets import load_digits
from test_package import BLOCK_IMPORTS

from man_mm.datasets import make_digits as tool

SMALL = {'num_train': 12, 'num_val': 6, 'size': 96}


def digest(folder):
    """Hash the names and the bytes of all files of a folder."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob('*')):
        if path.is_file():
            total.update(str(path.relative_to(folder)).encode())
            total.update(path.read_bytes())
    return total.hexdigest()


def load(folder, split):
    return COCO(str(folder / 'annotations' / f'instances_{split}.json'))


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    return tool.make_digits(tmp_path_factory.mktemp('made') / 'digits', **SMALL)


def test_same_seed_same_bytes_other_seed_other_bytes(made, tmp_path):
    again = tool.make_digits(tmp_path / 'again', **SMALL)
    other = tool.make_digits(tmp_path / 'other', seed=1, **SMALL)
    assert digest(again) == digest(made)
    assert digest(other) != digest(made)
    one, two = (path / 'val' / '000001.png' for path in (made, other))
    assert one.read_bytes() != two.read_bytes()
    # Not only the digits: the backgrounds follow the seed too.
    photos = [
        [i['photo'] for i in load(f, 'train').dataset['images']] for f in (made, other)
    ]
    assert photos[0] != photos[1]


@pytest.mark.parametrize('split, count', [('train', 12), ('val', 6)])
def test_pycocotools_reads_the_annotations(made, split, count):
    coco = load(made, split)
    assert [image['id'] for image in coco.dataset['images']] == [*range(1, count + 1)]
    assert len(list((made / split).iterdir())) == count
    names = {c['id']: c['name'] for c in coco.dataset['categories']}
    assert names == {digit + 1: str(digit) for digit in range(10)}
    assert {note['category_id'] for note in coco.anns.values()} == set(names)
    assert sorted(coco.anns) == list(range(1, len(coco.anns) + 1))
    for image in coco.dataset['images']:
        with Image.open(made / split / image['file_name']) as pixels:
            assert pixels.size == (image['width'], image['height']) == (96, 96)
            assert pixels.mode == 'RGB'
        assert 2 <= len(coco.getAnnIds(image['id'])) <= 6


@pytest.mark.parametrize('package', ['sklearn', 'skimage'])
def test_a_package_that_is_missing_is_named(package, tmp_path):
    code = BLOCK_IMPORTS.format(blocked=(package,)) + (
        'import runpy\n'
        f'sys.argv = ["make_digits", "--out", {str(tmp_path / "digits")!r}]\n'
        'try:\n'
        '    runpy.run_path("tools/dataset_converters/make_digits.py", '
        'run_name="__main__")\n'
        'except SystemExit as error:\n    print(error)\n'
    )
    message = run_python('-c', code).splitlines()[-1]
    assert message == (
        f'make_digits: the images are made from files of {package}, which is not '
        'installed: pip install scikit-image scikit-learn'
    )


def test_labels_match_the_samples(made):
    target = load_digits().target
    for split in tool.PHOTOS:
        for note in load(made, split).anns.values():
            assert target[note['sample']] + 1 == note['category_id']


def test_splits_share_no_digit_and_no_photograph(made):
    train, val = load(made, 'train'), load(made, 'val')
    for key, table in (('sample', 'annotations'), ('photo', 'images')):
        seen = [{row[key] for row in coco.dataset[table]} for coco in (train, val)]
        assert seen[0] and seen[1] and not seen[0] & seen[1]
    # The pools behind them, whatever this small set happened to use.
    pools = tool.split_samples(load_digits().target)
    parts = [set(np.concatenate(pools[split])) for split in ('train', 'val')]
    assert not parts[0] & parts[1]
    assert len(parts[0] | parts[1]) == 1797
    assert not set(tool.PHOTOS['train'].split()) & set(tool.PHOTOS['val'].split())


PHOTOS = tool.load_photos('val')
DIGITS = load_digits()
POOLS = tool.split_samples(DIGITS.target)['val']


def compose(seed, size):
    """Return the background of a scene, the scene and its annotations."""
    background = tool.crop_photo(np.random.default_rng(seed), PHOTOS, size)[1]
    classes = iter(np.random.default_rng(seed).permutation(10))
    pixels, _, notes = tool.make_scene(
        np.random.default_rng(seed), PHOTOS, DIGITS.images, POOLS, classes, size
    )
    return np.rint(background.clip(0, 255)), pixels, notes


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.sampled_from([64, 128, 200]))
def test_boxes_fit_the_strokes(seed, size):
    background, pixels, notes = compose(seed, size)
    changed = (background != pixels).any(2)
    claimed = np.zeros_like(changed)
    for note in notes:
        x, y, w, h = note['bbox']
        assert x >= 0 and y >= 0 and x + w <= size and y + h <= size
        assert note['area'] == w * h and note['iscrowd'] == 0
        assert max(w, h) >= 0.75 / 6 * size
        assert max(w, h) <= 1.3 / 2 * size
        claimed[y : y + h, x : x + w] = True
        # A stroke touches each side; one pixel may equal what it covers.
        inside = changed[y : y + h, x : x + w]
        for line in (inside.any(0), inside.any(1)):
            assert line[:2].any() and line[-2:].any()
    assert not (changed & ~claimed).any()
    for one, two in combinations(notes, 2):
        assert iou(one['bbox'], two['bbox']) <= 0.1


def iou(one, two):
    low, high = np.maximum(one[:2], two[:2]), np.minimum(end(one), end(two))
    shared = np.prod(np.maximum(high - low, 0))
    return shared / (one[2] * one[3] + two[2] * two[3] - shared)


def end(box):
    return np.add(box[:2], box[2:])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 1796), st.floats(6, 100), st.floats(-15, 15))
def test_a_digit_is_cut_tight_and_stays_whole(sample, side, turn):
    alpha = tool.draw_digit(DIGITS.images[sample], side, turn)
    ink = alpha > 0
    assert alpha.min() >= 0 and 0.9 < alpha.max() <= 1
    assert ink[0].any() and ink[-1].any() and ink[:, 0].any() and ink[:, -1].any()
    # Smaller than the field it was drawn in: nothing was cut off by its border.
    assert max(ink.shape) < round(side * 12 / 8)


def test_a_second_call_does_nothing(made, capsys):
    before = {path: path.stat().st_mtime_ns for path in made.rglob('*')}
    assert tool.make_digits(made, **SMALL) == made
    assert 'up to date' in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in made.rglob('*')} == before


def test_other_settings_remake_and_say_why(tmp_path, capsys):
    tool.make_digits(tmp_path, 3, 2, 64)
    tool.make_digits(tmp_path, 2, 2, 64, seed=4)
    assert 'num_train was 3, now 2' in capsys.readouterr().out
    assert len(list((tmp_path / 'train').iterdir())) == 2
    assert json.loads((tmp_path / 'dataset.json').read_text())['seed'] == 4


@pytest.mark.parametrize('lost', ['val/000002.png', 'annotations/instances_val.json'])
def test_lost_files_are_made_again(tmp_path, capsys, lost):
    tool.make_digits(tmp_path, 2, 2, 64)
    before = digest(tmp_path)
    (tmp_path / lost).unlink()
    tool.make_digits(tmp_path, 2, 2, 64)
    assert 'files of val are missing' in capsys.readouterr().out
    assert digest(tmp_path) == before


@pytest.mark.parametrize('had_one_before', [False, True])
def test_an_interrupted_run_is_redone(tmp_path, monkeypatch, capsys, had_one_before):
    out, whole = tmp_path / 'out', tool.make_digits(tmp_path / 'whole', 3, 2, 64)
    if had_one_before:
        tool.make_digits(out, 3, 2, 64, seed=9)
    scene, calls = tool.make_scene, []

    def stop_at_fourth(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return scene(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tool, 'make_scene', stop_at_fourth)
        tool.make_digits(out, 3, 2, 64)
    assert not (out / 'dataset.json').exists()
    tool.make_digits(out, 3, 2, 64)
    assert 'did not finish' in capsys.readouterr().out
    assert digest(out) == digest(whole)


@pytest.mark.parametrize(
    'option, value, least',
    [('num-train', 0, 1), ('num-val', -3, 1), ('size', 63, 64), ('seed', -1, 0)],
)
def test_bad_numbers_name_the_option_and_the_fix(tmp_path, option, value, least):
    out = tmp_path / 'out'
    with pytest.raises(SystemExit) as stop:
        run_script('make_digits', '--out', str(out), f'--{option}={value}')
    assert f'--{option} is {value}: use {least} or more' in str(stop.value)
    assert not out.exists()
    with pytest.raises(ValueError, match=f'--{option}'):
        tool.make_digits(out, **{option.replace('-', '_'): value})


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / 'train').mkdir()
    (tmp_path / 'train' / '000001.png').write_text('mine')
    (tmp_path / 'dataset.json').write_text('[1, 2')
    before = digest(tmp_path)
    with pytest.raises(ValueError, match='--out .* choose an empty folder'):
        tool.make_digits(tmp_path, 2, 2, 64)
    assert digest(tmp_path) == before


def test_an_unwritable_folder_is_named(tmp_path):
    (tmp_path / 'file').write_text('')
    for out in (tmp_path / 'file', tmp_path / 'file' / 'digits'):
        with pytest.raises(OSError, match='--out .* choose another folder'):
            tool.make_digits(out, 2, 2, 64)


def test_command_line_prints_counts_and_draws_a_preview(tmp_path, capsys):
    out, preview = tmp_path / 'out', tmp_path / 'new' / 'preview.png'
    numbers = ['--num-train', '4', '--num-val', '3', '--size', '64']
    run_script('make_digits', '--out', str(out), *numbers, '--preview', str(preview))
    text = capsys.readouterr().out
    assert 'new data set' in text
    rows = [line.replace('│', ' ').split() for line in text.splitlines()]
    assert ['images', '4', '3'] in rows
    counts = [str(len(load(out, split).anns)) for split in ('train', 'val')]
    assert ['objects', *counts] in rows
    with Image.open(preview) as sheet:
        assert sheet.size == (6 * 132, 4 * 132)
        assert np.asarray(sheet)[:132].std() > 10
