"""What starting a split model takes: a table of docs/distributed.md.

``python tests/test_engine/test_fully_sharded_start.py`` writes it into the document.
"""

import ctypes
import os
import re
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / 'helpers'))
from conftest import LOCAL_LEARNING, labelled_images
from documents import write_marked
from mmengine import runner as mmengine_runner
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS, RUNNERS, init_default_scope
from short_runs import different, last_checkpoint
from test_distributed import in_processes

from man_mm import SafeCheckpointHook
from man_mm.engine import fully_sharded_runner

DOCUMENT = Path(__file__).parents[2] / 'docs/distributed.md'
START, END = '<!-- start -->', '<!-- end of start -->'
SMALL, LARGE = (768, 6), (1024, 8)  # width and layers
KINDS = ('Runner', 'FullyShardedRunner')
DDP = 'MMDistributedDataParallel'
WEIGHTS = 'weights.pth'


@DATASETS.register_module()
class FourImages(torch.utils.data.Dataset):
    """Images of noise."""

    def __init__(self):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            batch = labelled_images(4, 32)
        self.items = [dict(zip(batch, item)) for item in zip(*batch.values())]  # noqa: B905

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def config(folder, kind, width, layers, **changes):
    """A run of a Vision Transformer, of which each layer is a module."""
    backbone = dict(
        type='VisionTransformer',
        img_size=32,
        patch_size=16,
        drop_path_rate=0.5,
        arch=dict(
            embed_dims=width,
            num_layers=layers,
            num_heads=4,
            feedforward_channels=4 * width,
        ),
    )
    head = dict(type='VisionTransformerClsHead', num_classes=10, in_channels=width)
    loader = dict(
        batch_size=1,
        dataset=dict(type='FourImages'),
        sampler=dict(type='DefaultSampler', shuffle=False),
    )
    local_learning = dict(
        aux_head=dict(type='MANHead', use_bank=False),
        partition=dict(type='UniformPartition', num_modules=layers),
    )
    cfg = Config(
        dict(
            default_scope='mmpretrain',
            runner_type=kind,
            work_dir=str(folder),
            model=dict(
                type='ImageClassifier',
                backbone=backbone,
                head=head,
                data_preprocessor=dict(num_classes=10),
            ),
            train_dataloader=loader,
            train_cfg=dict(by_epoch=False, max_iters=1, val_interval=1),
            val_dataloader=loader,
            val_cfg=dict(),
            val_evaluator=dict(type='Accuracy'),
            test_dataloader=loader,
            test_cfg=dict(),
            test_evaluator=dict(type='Accuracy'),
            optim_wrapper=dict(
                LOCAL_LEARNING,
                optimizer=dict(type='SGD', lr=0.1, momentum=0.9),
                local_learning=local_learning,
            ),
            default_hooks=dict(
                sharding=dict(type='ShardingHook'),
                checkpoint=dict(type='SafeCheckpointHook', by_epoch=False, interval=1),
            ),
            model_wrapper_cfg=dict(type='FullyShardedModel'),
            launcher='pytorch',
            randomness=dict(seed=0),
            log_level='ERROR',
            experiment_name=f'{folder}-{time.time()}',
        )
    )
    cfg.merge_from_dict(changes)
    return cfg


@pytest.fixture(scope='module', autouse=True)
def imported():
    """Imports what each forked process would import by itself."""
    import torch.distributed.checkpoint.state_dict
    import torch.distributed.fsdp  # noqa: F401

    build_model(64, 1)


def build_model(width, layers):
    init_default_scope('mmpretrain')
    return MODELS.build(config('', 'Runner', width, layers).model)


def trim():
    """Gives the system what is freed."""
    ctypes.CDLL('libc.so.6').malloc_trim(0)


def resident():
    """Bytes of the memory of this process, mapped files aside."""
    status = Path('/proc/self/status').read_text()
    return 1024 * int(re.search(r'RssAnon:\s+(\d+)', status)[1])


@contextmanager
def watched(report, name):
    """Notes the most that was resident, and what is at the end, beyond the start."""
    trim()
    start, seen, ends = resident(), [0], False

    def watch():
        while not ends:
            seen.append(resident())
            time.sleep(0.002)

    thread = Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        ends = True
        thread.join()
        trim()
        report[name] = (max(seen) - start) / 1e6
        report[f'{name}, after'] = (resident() - start) / 1e6


def start(rank, world, folder, kind, size):
    """MB to start on each process, to load weights, and to save a checkpoint."""
    os.environ['LOCAL_RANK'] = str(rank)
    report, save = {}, SafeCheckpointHook._save_checkpoint_with_step

    def watched_save(*args, **kwargs):
        with watched(report, 'save'):
            save(*args, **kwargs)

    SafeCheckpointHook._save_checkpoint_with_step = watched_save
    with watched(report, 'start'):
        runner = RUNNERS.build(config(folder, kind, *size))
        runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    with watched(report, 'load'):
        runner.load_checkpoint(str(Path(folder, WEIGHTS)))
    runner.train()
    return report


def save_weights(rank, world, folder, size):
    model = build_model(*size)
    torch.save(dict(state_dict=model.state_dict(), meta={}), Path(folder, WEIGHTS))
    return sum(param.nbytes for param in model.parameters()) / 1e6


def measure(folder, world, size):
    """MB of the weights, and by kind of runner what each process reports.

    All models are built in other processes: they inherit what this one keeps.
    """
    (weights,) = in_processes(save_weights, folder, 1, folder, size)
    return weights, {
        kind: in_processes(start, folder, world, folder, kind, size) for kind in KINDS
    }


# The system's figures need a quiet machine.
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_no_process_has_the_whole_model_in_its_memory(tmp_path):
    weights, reports = measure(tmp_path, 2, SMALL)
    plain, lean = reports.values()
    for report in (*plain, *lean):
        assert report['start, after'] < 0.75 * weights
    for report in plain:  # control
        assert report['start'] > weights and report['load'] > 0.95 * weights
    assert max(report['start'] for report in lean) < 0.9 * weights
    assert max(report['load'] for report in lean) < 0.75 * weights
    # Weights and momentum are saved, twice the weights.
    assert plain[0]['save'] < 1.5 * weights and lean[0]['save'] < 1.5 * weights


def train(rank, world, folder):
    """Runs of a copied model and of one that starts split, resumed and tested."""
    os.environ['LOCAL_RANK'] = str(rank)
    ddp = {'model_wrapper_cfg': dict(type=DDP, device_ids=None)}

    def build(name, **changes):
        kind, changes = (
            ('Runner', changes | ddp) if name == DDP else (KINDS[1], changes)
        )
        return RUNNERS.build(config(folder / name, kind, 16, 3, **changes))

    build(DDP).train()
    build('split').train()
    share_random_state = fully_sharded_runner.share_random_state
    fully_sharded_runner.share_random_state = lambda: None
    build('other').train()
    fully_sharded_runner.share_random_state = share_random_state
    more, scores = {'train_cfg.max_iters': 2, 'resume': True}, []
    for name in (DDP, 'split'):
        build(name, **more).train()
        last = str(folder / name / 'iter_2.pth')
        scores.append(build(name, load_from=last).test())
    assert scores[0] == scores[1]
    with pytest.raises(ValueError, match='remove sync_bn'):
        build('split', sync_bn='torch')
    with pytest.raises(ValueError, match="model_wrapper_cfg=dict.type='FullySharded"):
        build('split', **ddp)


def test_trains_as_from_whole_copies(tmp_path, monkeypatch):
    # Collecting versions takes longer than the training does.
    monkeypatch.setattr(mmengine_runner.runner, 'collect_env', dict)
    in_processes(train, tmp_path, 2, tmp_path)
    copied, split = (last_checkpoint(tmp_path / name) for name in (DDP, 'split'))
    for key in ('state_dict', 'optimizer'):
        assert not different(copied[key], split[key], key)
    early, other = (
        torch.load(tmp_path / name / 'iter_1.pth')['state_dict']
        for name in ('split', 'other')
    )
    # Controls: training goes on, and other random numbers drop other paths.
    assert different(early, split['state_dict'])
    assert different(early, other)


def table(folder):
    lines = [
        '| processes | `runner_type` | to start, first process | others | after that '
        '| to load weights | to save, first process | others |',
        '|---' * 8 + '|',
    ]
    for world in (2, 4):
        weights, reports = measure(folder, world, LARGE)
        for kind, (first, *others) in reports.items():
            cells = [
                first['start'],
                max(report['start'] for report in others),
                max(report['start, after'] for report in (first, *others)),
                max(report['load'] for report in (first, *others)),
                first['save'],
                max(report['save'] for report in others),
            ]
            row = [f'{cell / weights:.2f}' for cell in cells]
            lines.append(f'| {world} | `{kind}` | ' + ' | '.join(row) + ' |')
    return weights, '\n'.join(lines)


if __name__ == '__main__':
    imported.__wrapped__()
    with TemporaryDirectory() as folder:
        weights, rows = table(folder)
    text = (
        'Most bytes of CPU memory by process, as multiples of the weights '
        f'({weights:.0f} MB):\n\n{rows}'
    )
    write_marked(DOCUMENT, START, END, text)
