import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scripts import run_script

from man_mm.datasets import make_photos as tool

HR, LR = 'DIV2K_train_HR_sub', 'DIV2K_train_LR_bicubic'
VALID_HR, VALID_LR = 'DIV2K_valid_HR', 'DIV2K_valid_LR_bicubic'
VALIDATE = {
    'packages': {'chelsea', 'china', 'coffee'},
    'debian': {
        'Kleiber_by_Lukas_Baubkus',
        'aitzgorri_by_Aitzol_Berasategi',
        'life_by_Aitzol_Berasategi',
        *('ColdRipple', 'EveningGlow', 'OneStandsOut', 'FreshFlower', 'RainDrops'),
    },
}


def digest(folder):
    """Hash the names and the bytes of all files of a folder."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob('*')):
        if path.is_file():
            total.update(str(path.relative_to(folder)).encode())
            total.update(path.read_bytes())
    return total.hexdigest()


def load(path):
    with Image.open(path) as image:
        assert image.mode == 'RGB'
        return np.asarray(image)


def draw(path, width, height, seed=0, **settings):
    """Write a picture of noise, the hardest for a resampling to get right."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **settings)
    return pixels


def manifest(out):
    return json.loads((out / 'dataset.json').read_text('utf-8'))


def entries(out, split):
    return [p for p in manifest(out)['pictures'] if p['split'] == split]


@pytest.fixture(scope='module')
def packages(tmp_path_factory):
    return tool.make_photos(tmp_path_factory.mktemp('made') / 'photos')


@pytest.fixture
def own(tmp_path):
    """Return a folder of two pictures: a.png trains, b.png validates."""
    draw(tmp_path / 'own' / 'a.png', 400, 350, 1)
    draw(tmp_path / 'own' / 'b.png', 205, 181, 2)
    return tmp_path / 'own'


def make(out, own, **settings):
    return tool.make_photos(out, 'folder', folders=[own], **settings)


def test_layout_and_sizes(packages):
    pictures = manifest(packages)['pictures']
    assert [picture['number'] for picture in pictures] == [*range(1, 11)]
    assert [p['split'] for p in pictures] == ['train'] * 7 + ['val'] * 3
    wanted, listed = set(), []
    for picture in pictures:
        number, (w, h) = f'{picture["number"]:04d}', picture['size']
        assert max(w, h) <= 1200 and w % 12 == h % 12 == 0
        if picture['split'] == 'val':
            wanted |= {f'{VALID_LR}/X{s}/{number}.png' for s in (2, 3, 4)}
            wanted.add(f'{VALID_HR}/{number}.png')
            continue
        tiles = (w // 168) * (h // 168)
        assert tiles > 0
        names = [f'{number}_s{i:03d}.png' for i in range(1, tiles + 1)]
        listed += [f'{name} (168,168,3)' for name in names]
        wanted |= {f'{LR}/X{s}_sub/{name}' for s in (2, 3, 4) for name in names}
        wanted |= {f'{HR}/{name}' for name in names}
    found = {p.relative_to(packages).as_posix() for p in packages.rglob('*.png')}
    assert found == wanted
    text = (packages / 'meta_info_DIV2K800sub_GT.txt').read_text()
    assert text.splitlines() == listed
    for scale in (2, 3, 4):
        for path in (packages / LR / f'X{scale}_sub').iterdir():
            with Image.open(path) as image:
                assert image.size == (168 // scale, 168 // scale)
        for picture in entries(packages, 'val'):
            name = f'{picture["number"]:04d}.png'
            with Image.open(packages / VALID_LR / f'X{scale}' / name) as image:
                assert image.size == tuple(side // scale for side in picture['size'])


def test_mmagic_reads_the_layout(packages):
    datasets = pytest.importorskip('mmagic.datasets')
    prefix = {'img': f'{LR}/X4_sub', 'gt': HR}
    for ann_file in ('meta_info_DIV2K800sub_GT.txt', ''):
        data = datasets.BasicImageDataset(ann_file, None, str(packages), prefix)
        assert len(data) == len(list((packages / HR).iterdir()))
        row = data.get_data_info(5)
        assert Path(row['img_path']).is_file() and Path(row['gt_path']).is_file()
        assert Path(row['img_path']).name == Path(row['gt_path']).name


def test_low_resolution_tiles_are_cut_from_the_whole_low_resolution(tmp_path, own):
    out = make(tmp_path / 'out', own)
    full = load(own / 'a.png')[:348, :396]  # multiples of 12
    starts = [(y, x) for y in (0, 168) for x in (0, 168)]
    for i, (y, x) in enumerate(starts, 1):
        tile = load(out / HR / f'0001_s00{i}.png')
        np.testing.assert_array_equal(tile, full[y : y + 168, x : x + 168])
        for scale in (2, 3, 4):
            low = Image.fromarray(full).resize((396 // scale, 348 // scale), 3)
            area = np.s_[y // scale :, x // scale :]
            cut = np.asarray(low)[area][: 168 // scale, : 168 // scale]
            found = load(out / LR / f'X{scale}_sub' / f'0001_s00{i}.png')
            np.testing.assert_array_equal(found, cut)
            # A tile shrunk by itself differs where its neighbours were missing.
            alone = Image.fromarray(tile).resize((168 // scale, 168 // scale), 3)
            assert (np.asarray(alone) != found).any()
    whole = load(out / VALID_HR / '0002.png')
    np.testing.assert_array_equal(whole, load(own / 'b.png')[:180, :204])
    low = Image.fromarray(whole).resize((51, 45), Image.BICUBIC)
    np.testing.assert_array_equal(load(out / VALID_LR / 'X4' / '0002.png'), low)


def test_large_photographs_are_shrunk_small_ones_are_not(tmp_path, own):
    draw(own / 'c.png', 1500, 800)
    large = Image.open(own / 'c.png').resize((1200, 640), Image.LANCZOS)
    out = make(tmp_path / 'out', own, scales=[2])
    sizes = [p['size'] for p in manifest(out)['pictures']]
    assert sizes == [[396, 348], [1200, 636], [204, 180]]
    tile = load(out / HR / '0002_s001.png')
    np.testing.assert_array_equal(tile, np.asarray(large)[:168, :168])


def test_train_and_validation_share_no_photograph(packages):
    seen = [{p['sha256'] for p in entries(packages, s)} for s in ('train', 'val')]
    assert len(seen[0]) == 7 and len(seen[1]) == 3 and not seen[0] & seen[1]
    assert not any('motorcycle_right' in str(p) for p in manifest(packages).values())
    for source, count in (('packages', 10), ('debian', 34)):
        parts = [set(), set()]
        for _, *lists in tool.LISTED[source].values():
            for part, names in zip(parts, lists, strict=True):
                part |= {Path(name).stem for name in names.split()}
        assert parts[1] == VALIDATE[source] and not parts[0] & parts[1]
        assert len(parts[0] | parts[1]) == count


def test_same_photographs_same_bytes(packages, tmp_path, own):
    assert digest(tool.make_photos(tmp_path / 'again')) == digest(packages)
    one, two = (make(tmp_path / name, own) for name in ('one', 'two'))
    assert digest(one) == digest(two)
    draw(own / 'a.png', 400, 350, 3)
    assert digest(make(tmp_path / 'three', own)) != digest(one)


def test_a_second_call_does_nothing(packages, capsys):
    before = {path: path.stat().st_mtime_ns for path in packages.rglob('*')}
    assert tool.make_photos(packages, scales=[4, 3, 2]) == packages
    assert 'up to date: nothing to do' in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in packages.rglob('*')} == before


def test_other_settings_remake_and_say_why(tmp_path, own, capsys):
    out = make(tmp_path / 'out', own)
    make(out, own, scales=(2, 4))
    assert 'scales was [2, 3, 4], now [2, 4]' in capsys.readouterr().out
    assert not (out / LR / 'X3_sub').exists() and (out / LR / 'X4_sub').exists()
    draw(own / 'a.png', 400, 350, 3)
    make(out, own, scales=(2, 4))
    assert 'the photographs differ' in capsys.readouterr().out
    fresh = make(tmp_path / 'fresh', own, scales=(2, 4))
    assert digest(out) == digest(fresh)


@pytest.mark.parametrize('lost', [f'{LR}/X3_sub/0001_s002.png', tool.TILE_LIST])
def test_lost_files_are_made_again(tmp_path, own, capsys, lost):
    out = make(tmp_path / 'out', own)
    before = digest(out)
    (out / lost).unlink()
    make(out, own)
    assert 'files are missing' in capsys.readouterr().out
    assert digest(out) == before


@pytest.mark.parametrize('had_one_before', [False, True])
def test_an_interrupted_run_is_redone(
    tmp_path, own, monkeypatch, capsys, had_one_before
):
    out, whole = tmp_path / 'out', make(tmp_path / 'whole', own)
    if had_one_before:
        make(out, own, scales=[3])
    write = tool.write_picture

    def stop_at_second(folder, picture, *args):
        if picture['number'] == 2:
            raise KeyboardInterrupt
        write(folder, picture, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tool, 'write_picture', stop_at_second)
        make(out, own)
    assert (out / HR / '0001_s001.png').exists()
    assert not (out / 'dataset.json').exists()
    make(out, own)
    assert 'did not finish' in capsys.readouterr().out
    assert digest(out) == digest(whole)


@pytest.mark.parametrize('name', ['dataset.json', 'dataset.json.part'])
def test_a_folder_with_other_files_is_left_alone(tmp_path, own, name):
    out = tmp_path / 'out'
    draw(out / HR / '0001_s001.png', 168, 168)
    (out / name).write_text('{"recipe": "man_mm digits 3"}')
    before = digest(out)
    with pytest.raises(ValueError, match='--out .* choose an empty folder'):
        make(out, own)
    assert digest(out) == before


def test_an_unwritable_folder_is_named(tmp_path, own):
    for out in (own / 'a.png', own / 'a.png' / 'photos'):
        with pytest.raises(OSError, match='--out .* choose another folder'):
            make(out, own)


def test_debian_photographs_are_found_or_their_packages_named(tmp_path):
    root, out = tmp_path / 'root', tmp_path / 'out'
    for number, (pattern, *lists) in enumerate(tool.LISTED['debian'].values()):
        for i, name in enumerate(' '.join(lists).split()):
            draw(root / pattern.format(name), 180, 170, (number, i))
    tool.make_photos(out, 'debian', [2], root)
    assert len(list((out / HR).iterdir())) == 26
    names = sorted(path.name for path in (out / VALID_HR).iterdir())
    assert names == [f'{number:04d}.png' for number in range(27, 35)]
    assert str(tmp_path) not in (out / 'dataset.json').read_text('utf-8')
    assert 'GPL-2+' in manifest(out)['license']
    for name in ('Kite', 'Path'):
        (root / 'usr/share/wallpapers' / name).rename(root / name)
    with pytest.raises(FileNotFoundError) as error:
        tool.make_photos(tmp_path / 'new', 'debian', [2], root)
    text = str(error.value)
    assert 'apt-get install plasma-workspace-wallpapers (' in text
    assert text.startswith('2 photographs are missing')
    assert not (tmp_path / 'new').exists()
    with pytest.raises(SystemExit) as stop:
        arguments = ['--source', 'debian', '--root', str(tmp_path / 'empty')]
        run_script('make_photos', *arguments, '--out', str(tmp_path / 'new'))
    assert f'apt-get install {" ".join(tool.LISTED["debian"])} ' in str(stop.value)


def test_a_folder_is_split_by_name_and_skips_copies_and_small_ones(tmp_path, capsys):
    own = tmp_path / 'own'
    for i, name in enumerate('1.PNG 2.jpg sub/3.webp 4.jpeg 5.png 6.png 8.png'.split()):
        draw(own / name, 180, 170, i)
    draw(own / '7.png', 900, 167)
    (own / '9.png').write_bytes((own / '5.png').read_bytes())
    (own / 'notes.txt').write_text('no picture')
    # Written inside the folder that it reads: it must not read its own files.
    out = tool.make_photos(own / 'out', 'folder', [2], folders=[own, own / 'sub'])
    text = capsys.readouterr().out
    assert 'Skipping 7.png: 900×167' in text
    assert 'Skipping 9.png: the same as 5.png' in text
    assert [p['name'] for p in entries(out, 'val')] == ['2.jpg', '8.png']
    names = [p['name'] for p in entries(out, 'train')]
    assert names == ['1.PNG', '4.jpeg', '5.png', '6.png', 'sub/3.webp']
    tool.make_photos(out, 'folder', [2], folders=[own, own / 'sub'])
    assert 'up to date' in capsys.readouterr().out


def test_photographs_are_turned_and_lose_what_a_camera_noted(tmp_path, own):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, 'maker'  # a quarter turn
    pixels = draw(own / 'a.png', 300, 180, exif=exif, icc_profile=b'profile')
    out = make(tmp_path / 'out', own, scales=[2])
    assert entries(out, 'train')[0]['size'] == [180, 300]
    with Image.open(out / HR / '0001_s001.png') as image:
        assert not image.info and not image.getexif()
        upright = np.rot90(pixels, -1)[:168, :168]
        np.testing.assert_array_equal(np.asarray(image), upright)


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--scales', '5'], r'--scales is \[5\]: use some of \[2, 3, 4\]'),
        (['--source', 'folder'], 'need each other'),
        (['--folder', '.'], 'need each other'),
        (['--source', 'folder', '--folder', 'none'], '--folder none is not a folder'),
        (['--source', 'folder', '--folder', 'one'], 'holds 1 usable photographs'),
        (['--source', 'folder', '--folder', 'bad'], 'b.png cannot be read'),
    ],
)
def test_errors_name_the_option_and_the_fix(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    draw(tmp_path / 'one' / 'a.png', 200, 200)
    draw(tmp_path / 'bad' / 'a.png', 200, 200)
    (tmp_path / 'bad' / 'b.png').write_text('no picture')
    with pytest.raises(SystemExit, match=message):
        run_script('make_photos', '--out', 'out', *arguments)
    assert not (tmp_path / 'out').exists()


def test_command_line_prints_counts_and_draws_a_preview(tmp_path, own, capsys):
    out, preview = tmp_path / 'out', tmp_path / 'new' / 'preview.png'
    arguments = ['--source', 'folder', '--folder', str(own), '--scales', '2', '3']
    run_script('make_photos', *arguments, '--out', str(out), '--preview', str(preview))
    text = capsys.readouterr().out
    assert 'new data set' in text
    rows = [line.replace('│', ' ').split() for line in text.splitlines()]
    assert ['pictures', '1', '1'] in rows
    assert ['tiles', '4', 'whole'] in rows
    assert ['pixels', f'{4 * 168**2:,}', f'{204 * 180:,}'] in rows
    with Image.open(preview) as sheet:
        assert sheet.size == (6 * 240, 2 * (216 + 36))
        pixels = np.asarray(sheet)
    # A picture in each block, and nothing beside the only one.
    for top in (36, 36 + 216 + 36):
        assert pixels[top : top + 180, 8:180].std() > 10
        assert pixels[top : top + 216, 240:].min() == 255
