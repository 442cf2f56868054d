"""Comparisons: real trainings that are stored, gone on with and shown."""

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import needs_mmagic
from mmengine.registry import MODELS
from mmengine.runner import Runner, load_checkpoint
from rich.console import Console
from scripts import run_script

from man_mm.benchmark import comparison, training_runs
from man_mm.benchmark.comparison_report import make_table, markdown_rows
from man_mm.benchmark.restored_photos import restore
from man_mm.benchmark.training_runs import (
    ComparedConfig,
    Run,
    RunError,
    parse_entry,
    slug,
    train,
)
from man_mm.datasets.make_photos import make_photos
from man_mm.engine.config_files import load_config

CONFIG = 'configs/{}/edsr_x2_{}photos.py'


def result(name, seed, psnr, peak=2**20, seconds=0.5, position=0):
    return dict(
        name=name,
        seed=seed,
        position=position,
        metrics=dict(PSNR=psnr, SSIM=0.9),
        peak_bytes=peak,
        step_seconds=seconds,
        curves=dict(step=[1, 2, 3], loss=[3.0, 2.0, psnr / 30]),
    )


RESULTS = [
    *(result('end-to-end', seed, 30 + seed / 10) for seed in (0, 1, 2)),
    *(result('MAN', seed, 30.05 + seed / 10, 2**19, 0.55, 1) for seed in (0, 1, 2)),
]


def test_rows_have_means_spreads_and_ratios():
    first, second = markdown_rows(RESULTS)
    assert first.startswith(
        '| end-to-end | 30.100 ± 0.100 | 0.9000 ± 0.0000 | +0.000 |'
    )
    assert second.startswith('| MAN | 30.150 ± 0.100 | 0.9000 ± 0.0000 | +0.050 |')
    assert second.endswith('| 0.5 | 0.500 |')
    assert markdown_rows(RESULTS[:5])[1].startswith('| MAN (2 runs) |')
    *_, times, ratios = make_table(RESULTS).columns
    assert [*times.cells, *ratios.cells] == ['0.500', '0.550', '1.000', '1.100']


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('configs/man/x.py', 'is not an entry: write NAME=CONFIG'),
        ('MAN=', 'is not an entry'),
        (f'MAN={CONFIG.format("man", "man_")} lr', 'is not an entry'),
        ('MAN=configs/none.py', "Entry 'MAN': There is no config 'configs/none.py'"),
    ],
)
def test_wrong_entries_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_entry(text)


def test_options_of_an_entry_come_after_those_for_all():
    entry = parse_entry(f'no bank={CONFIG.format("man", "man_")} a.b=1 c=2', ('c=1',))
    assert (entry.name, entry.options) == ('no bank', ('c=1', 'a.b=1', 'c=2'))
    assert slug('no bank, K=4') == 'no-bank-k-4'


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    needs_mmagic()  # whose models are trained on them
    return make_photos(tmp_path_factory.mktemp('data') / 'photos', scales=(2,))


def options_for(photos):
    options = [
        f'{split}_dataloader.dataset.data_root={photos}' for split in ('train', 'val')
    ]
    return [
        *options,
        'train_dataloader.batch_size=2',
        'model.generator.mid_channels=8',
        'model.generator.num_blocks=4',
        'train_cfg.max_iters=6',
        'train_cfg.val_interval=6',
        'default_hooks.logger.interval=2',
        'default_hooks.checkpoint.interval=3',
    ]


def test_a_mixed_training_needs_what_the_larger_of_its_steps_does(photos):
    def peak(share):
        key = 'optim_wrapper.local_learning.end_to_end_from'
        options = [*options_for(photos), *([] if share is None else [f'{key}={share}'])]
        cfg = load_config(CONFIG.format('man', 'man_'), options)
        return training_runs._measure_step(cfg)['peak_bytes']

    local, exact, mixed = (peak(share) for share in (None, 0, 0.5))
    assert mixed == max(local, exact) > min(local, exact)


def test_runs_are_done_once_and_shown_from_their_files(
    photos, tmp_path, capsys, monkeypatch
):
    out, work_dirs = tmp_path / 'out', tmp_path / 'work_dirs'
    arguments = [f'MAN={CONFIG.format("man", "man_")}', '--seeds', '3']
    arguments += ['--out', str(out), '--work-dirs', str(work_dirs)]
    arguments += ['--cfg-options', *options_for(photos)]
    run_script('compare', *arguments)
    (path,) = out.glob('*')
    assert path.name == 'man_seed3.json'
    record = json.loads(path.read_text())
    assert record['seed'] == 3 and record['length'] == 6
    assert record['metrics'].keys() == {'PSNR', 'SSIM'}
    assert record['curves']['step'] == [2, 4, 6]
    assert {'loss', 'module1/loss', 'module3/loss'} <= record['curves'].keys()
    assert record['peak_bytes'] > 0 < record['step_seconds']
    assert record['data'] and '--seeds 3' in record['command']
    assert (record['batch'], record['resolution']) == (2, [24, 24])
    assert len(record['cuts']) == 3 and record['hardware'] and record['date']
    assert sum(record['kinds'].values()) == record['peak_bytes']

    # Nothing is trained again; files are enough for table, rows and picture.
    monkeypatch.setattr(comparison, 'train', None)
    run_script('compare', *arguments)
    monkeypatch.undo()
    capsys.readouterr()
    picture = tmp_path / 'curves.png'
    run_script('compare', '--from', out, '--markdown', '--picture', picture)
    assert f'| MAN | {record["metrics"]["PSNR"]:.3f} |' in capsys.readouterr().out
    assert picture.stat().st_size > 10_000

    # What it trained is drawn; the plain config loads the checkpoint strictly.
    (checkpoint,) = work_dirs.rglob('iter_6.pth')
    drawn = tmp_path / 'preview.png'
    config = tmp_path / 'plain.py'
    config.write_text(
        f"_base_ = '{Path(CONFIG.format('end_to_end', '')).resolve()}'\n"
        f"val_dataloader = dict(dataset=dict(data_root='{photos}'))\n"
        'model = dict(generator=dict(mid_channels=8, num_blocks=4))\n'
    )
    run_script('preview_photos', config, f'MAN={checkpoint}', '--out', drawn)
    assert drawn.stat().st_size > 10_000
    check_preview(load_config(str(config)), str(checkpoint))

    # Other settings are another run, with a folder of its own.
    entry = ComparedConfig(
        'MAN', CONFIG.format('man', 'man_'), tuple(options_for(photos))
    )
    run = Run(entry, 3, out, work_dirs)
    assert run.is_done and run.work_dir.is_dir()
    other = dataclasses.replace(run, entry=ComparedConfig('MAN', entry.config))
    assert not other.is_done and not other.work_dir.exists()
    assert not dataclasses.replace(run, seed=4).is_done


def check_preview(cfg, checkpoint):
    """What is drawn is what the network returns, its colours included."""
    (images,) = restore(cfg, {'MAN': checkpoint}, 1)
    model = MODELS.build(cfg.model).eval()
    load_checkpoint(model, checkpoint, map_location='cpu')
    sample = Runner.build_dataloader(cfg.val_dataloader).dataset[0]
    with torch.no_grad():
        output = model.generator(sample['inputs'][None] / 255)[0]
    expected = (255 * output).clamp(0, 255).round().permute(1, 2, 0).numpy()
    assert np.abs(images['MAN'] - expected).max() <= 1
    assert np.abs(images['MAN'][..., ::-1] - expected).max() > 10  # control
    truth = sample['data_samples'].gt_img.permute(1, 2, 0).numpy()
    assert (images['ground truth'] == truth).all()


def test_a_stopped_run_goes_on_where_it_was(photos, tmp_path):
    """Its result is that of a run that was never stopped."""
    # Long enough that it cannot end before it is seen to have begun.
    options = [*options_for(photos), 'train_cfg.max_iters=60']
    options += ['train_cfg.val_interval=60', 'default_hooks.checkpoint.interval=5']
    options += ['log_processor.window_size=1']  # averages start anew in a resumed run
    entry = ComparedConfig('MAN', CONFIG.format('man', 'man_'), tuple(options))
    whole, stopped = (
        Run(entry, 0, tmp_path / name, tmp_path / name) for name in ('whole', 'stopped')
    )

    def stop(_done):
        if list(stopped.work_dir.rglob('iter_*.pth')):
            raise RunError('stopped')

    with pytest.raises(RunError, match='stopped'):
        train(stopped, 1, stop)
    assert not stopped.path.exists()
    results = [train(run, 1, lambda done: None) for run in (whole, stopped)]
    assert results[0]['metrics'] == results[1]['metrics']
    assert results[0]['curves'] == results[1]['curves']


def test_ended_from_outside_no_training_stays_behind(photos, tmp_path):
    entry = f'MAN={CONFIG.format("man", "man_")}'
    command = [sys.executable, 'tools/analysis_tools/compare.py', entry, '--seeds', '0']
    command += ['--out', tmp_path, '--work-dirs', tmp_path]
    options = ['train_cfg.max_iters=5000']
    process = subprocess.Popen(
        [*command, '--cfg-options', *options_for(photos), *options],
        stderr=subprocess.PIPE,
        text=True,
    )
    while not _commands_with(tmp_path / 'man_seed0'):
        assert process.poll() is None
        time.sleep(0.2)
    process.terminate()
    assert 'goes on where they were' in process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert not _commands_with(tmp_path / 'man_seed0')


def _commands_with(path):
    found = []
    for file in Path('/proc').glob('[0-9]*/cmdline'):
        try:
            if str(path) in file.read_text():
                found.append(file)
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            continue
    return found


def test_a_failed_run_says_where_its_log_is(photos, tmp_path):
    wrong = (*options_for(photos), 'model.generator.num_blocks=none')
    entry = ComparedConfig('MAN', CONFIG.format('man', 'man_'), wrong)
    run = Run(entry, 0, tmp_path, tmp_path)
    with pytest.raises(RunError, match=r'man_seed0 failed, see .*train\.log'):
        comparison.run_all([run], 1, Console(quiet=True))
    assert not run.path.exists()
