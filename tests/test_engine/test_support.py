"""What of mmengine works with local learning: each cell of docs/support.md is a test.

``python tests/test_engine/test_support.py`` writes the table into the document.
"""

import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from mmengine import runner as mmengine_runner
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import DATASETS, HOOKS
from mmengine.runner import FlexibleRunner, Runner

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / 'helpers'))
from conftest import LOCAL_LEARNING, build_classifier, labelled_images
from documents import read_marked, write_marked

DOCUMENT = Path(__file__).parents[2] / 'docs/support.md'
# On a CPU, where mmengine would select a GPU.
DDP = dict(type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False)
COLUMNS = {
    'one process': {},
    'two processes': {'launcher': 'pytorch', 'model_wrapper_cfg': DDP},
    'mixed precision': {
        'optim_wrapper.type': 'AmpLocalLearningOptimWrapper',
        'optim_wrapper.dtype': 'bfloat16',
    },
}
SGD = 'optim_wrapper.optimizer'
LOCAL = 'optim_wrapper.local_learning'
ROWS = {}
COMPILE = '`compile` of mmengine (the graph breaks at each cut)'


def row(title, **refused):
    """Adds a row; ``refused`` gives, for a column, the error that it must raise."""

    def add(check):
        errors = {name.replace('_', ' '): text for name, text in refused.items()}
        ROWS[title] = check, errors

    return add


@DATASETS.register_module()
class LabelledImages(torch.utils.data.Dataset):
    """Eight images of noise."""

    def __init__(self):
        torch.manual_seed(3)
        batch = labelled_images(8, 32)
        self.items = [dict(zip(batch, item)) for item in zip(*batch.values())]  # noqa: B905

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


@HOOKS.register_module()
class KeepWeights(Hook):
    """Keeps the weights after each iteration."""

    priority = 'LOWEST'

    def before_train(self, runner):
        self.history = [snapshot(runner)]

    def after_train_iter(self, runner, *args, **kwargs):
        self.history.append(snapshot(runner))


def snapshot(runner):
    return {
        module.name: [
            p.detach().clone() for p in runner.optim_wrapper.learner.params(module)
        ]
        for module in runner.optim_wrapper.learner.modules
    }


def same(a, b):
    return all(
        torch.equal(x, y) for name in a for x, y in zip(a[name], b[name], strict=True)
    )


class Runs:
    """Trains a small classifier for four iterations in one column of the table."""

    def __init__(self, folder, column):
        self.folder, self.column, self.count = folder, column, 0

    def __call__(
        self, options=None, runner=Runner, iters=4, keep=None, depth=18, **keys
    ):
        self.count += 1
        cfg = Config(
            dict(
                work_dir=str(keep or self.folder / str(self.count)),
                experiment_name=f'{self.folder.name}-{self.column}-{self.count}',
                default_scope='mmpretrain',
                train_dataloader=dict(
                    batch_size=2,
                    dataset=dict(type='LabelledImages'),
                    sampler=dict(type='DefaultSampler', shuffle=False),
                ),
                train_cfg=dict(by_epoch=False, max_iters=iters, val_interval=100),
                optim_wrapper=dict(LOCAL_LEARNING, optimizer=dict(type='SGD', lr=0.1)),
                default_hooks=dict(
                    memory_bank=dict(type='MemoryBankHook'),
                    checkpoint=dict(type='CheckpointHook', interval=2, by_epoch=False),
                ),
                custom_hooks=[dict(type='KeepWeights')],
                randomness=dict(seed=0),
                log_level='ERROR',
                **keys,
            )
        )
        cfg.merge_from_dict({**COLUMNS[self.column], **(options or {})})
        model = build_classifier(depth)
        if runner is Runner:
            made = Runner(model=model, cfg=cfg, **_arguments(cfg))
        else:
            made = FlexibleRunner(model=model, **_arguments(cfg))
        made.train()
        made.history = next(h for h in made.hooks if isinstance(h, KeepWeights)).history
        return made

    @property
    def is_single(self):
        return self.column == 'one process'


def _arguments(cfg):
    names = (
        'work_dir experiment_name default_scope train_dataloader train_cfg '
        'optim_wrapper default_hooks custom_hooks randomness log_level launcher '
        'param_scheduler auto_scale_lr resume strategy'
    ).split()
    given = {name: cfg[name] for name in names if name in cfg}
    return given


@row('`accumulative_counts`')
def accumulation(run):
    history = run({'optim_wrapper.accumulative_counts': 2}).history
    assert same(history[0], history[1]) and same(history[2], history[3])
    assert not same(history[1], history[2]) and not same(history[3], history[4])


@row('`clip_grad`, a module at a time')
def clipping(run):
    options = {'optim_wrapper.clip_grad': dict(max_norm=1e-2), f'{SGD}.lr': 1.0}
    for bound, history in (
        (True, run(options).history),
        (False, run({f'{SGD}.lr': 1.0}).history),
    ):
        for name in history[0]:
            moves = [
                b - a for a, b in zip(history[0][name], history[1][name], strict=True)
            ]
            assert (torch.stack([m.norm() for m in moves]).norm() < 1.01e-2) == bound


@row("`clip_grad`, one norm for all (`clip='global'`)")
def clipping_all(run):
    options = {'optim_wrapper.clip_grad': dict(max_norm=1e-2), f'{SGD}.lr': 1.0}
    options |= {f'{LOCAL}.clip': 'global', f'{LOCAL}.update': 'iteration'}
    history = run(options).history
    moves = [
        (b - a).norm()
        for name in history[0]
        for a, b in zip(history[0][name], history[1][name], strict=True)
    ]
    assert torch.stack(moves).norm() == pytest.approx(1e-2, rel=0.01)


@row("`update='iteration'`: all modules at the end")
def update_at_the_end(run):
    assert same(run().history[-1], run({f'{LOCAL}.update': 'iteration'}).history[-1])


@row("`update='parameter'`", two_processes="set it to 'module'")
def update_each_parameter(run):
    assert same(run().history[-1], run({f'{LOCAL}.update': 'parameter'}).history[-1])


@row('`micro_batch_size`')
def micro_batches(run):
    batch = {'train_dataloader.batch_size': 4, f'{LOCAL}.micro_batch_size': 2}
    runner = run(batch, iters=2)
    assert not same(runner.history[0], runner.history[-1])
    assert runner.optim_wrapper.learner.micro_batch_size == 2


@row('`recompute`, activation checkpointing of this package')
def recompute(run):
    options = {f'{LOCAL}.recompute': ['backbone.layer1', 'backbone.layer3']}
    assert same(run().history[-1], run(options).history[-1])


@row('`activation_checkpointing` of mmengine')
def activation_checkpointing(run):
    cut = run(dict(activation_checkpointing=['backbone.layer2.1']))
    assert same(run().history[-1], cut.history[-1])


@row('`efficient_conv_bn_eval` of mmengine', one_process='remove the key',
     two_processes='remove the key', mixed_precision='remove the key')  # fmt: skip
def efficient_conv_bn_eval(run):
    run(dict(efficient_conv_bn_eval=['backbone']))


@row('`param_scheduler`')
def schedulers(run):
    runner = run(
        param_scheduler=[
            dict(type='LinearLR', start_factor=0.5, end=2, by_epoch=False),
            dict(type='MultiStepLR', milestones=[3], by_epoch=False),
        ],
        options={f'{LOCAL}.aux_lr_mult': 2.0},
    )
    rates = {group['lr'] for group in runner.optim_wrapper.param_groups}
    assert sorted(rates) == pytest.approx([0.01, 0.02])


@row('`auto_scale_lr`')
def scaled_rate(run):
    runner = run(auto_scale_lr=dict(enable=True, base_batch_size=8))
    images = 4 if run.column == 'two processes' else 2
    rates = [group['lr'] for group in runner.optim_wrapper.optimizer.param_groups]
    assert rates == pytest.approx(2 * [0.1 * images / 8])


@row('layer-wise decay (`base_constructor`)')
def layer_decay(run):
    runner = run(
        {
            f'{LOCAL}.base_constructor': 'LearningRateDecayOptimWrapperConstructor',
            'optim_wrapper.paramwise_cfg': dict(layer_decay_rate=0.5),
            f'{SGD}.weight_decay': 0.1,
        },
        depth=50,  # the only one for which mmpretrain knows the depths of layers
        iters=1,
    )
    groups = {
        group['param_name']: group['lr']
        for group in runner.optim_wrapper.param_groups
        if 'param_name' in group
    }
    first, last = groups['backbone.conv1.weight'], groups['head.fc.weight']
    assert first < 0.01 * last == pytest.approx(0.001)
    assert not same(runner.history[0], runner.history[-1])


@row('`EMAHook`')
def averaged_weights(run):
    runner = run({'custom_hooks': [dict(type='KeepWeights'), dict(type='EMAHook')]})
    (ema,) = (hook for hook in runner.hooks if type(hook).__name__ == 'EMAHook')
    plain = runner.model.module if hasattr(runner.model, 'module') else runner.model
    averaged = ema.ema_model.module
    averaged = averaged.module if hasattr(averaged, 'module') else averaged
    assert averaged.state_dict().keys() == plain.state_dict().keys()
    pairs = zip(averaged.parameters(), plain.parameters(), strict=True)
    assert not all(torch.equal(a, b) for a, b in pairs)


@row('`SyncBuffersHook`')
def synchronised_buffers(run):
    run({'custom_hooks': [dict(type='KeepWeights'), dict(type='SyncBuffersHook')]})


@row('`CheckInvalidLossHook`')
def invalid_loss(run):
    import mmdet.engine  # noqa: F401

    hook = dict(type='mmdet.CheckInvalidLossHook', interval=1)
    run({'custom_hooks': [dict(type='KeepWeights'), hook]})


@row('resuming')
def resuming(run):
    whole = run()
    folder = run.folder / 'stopped'
    run(iters=2, keep=folder)
    resumed = run(keep=folder, resume=True)
    assert same(whole.history[-1], resumed.history[-1])


@row(COMPILE)
def compiled(run):
    plain = run(iters=2).history[-1]
    fast = run(dict(compile=dict(backend='eager')), iters=2).history[-1]
    for name in plain:
        for a, b in zip(plain[name], fast[name], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


@row("`model_wrapper_cfg` with `detect_anomalous_params`",
     two_processes='detect_anomalous_params')  # fmt: skip
def anomalous(run):
    run(dict(model_wrapper_cfg=dict(DDP, detect_anomalous_params=True)))


@row('`FlexibleRunner` with `SingleDeviceStrategy` or `DDPStrategy`')
def flexible_runner(run):
    strategy = dict(type='SingleDeviceStrategy')
    if run.column == 'two processes':
        strategy = dict(type='DDPStrategy', model_wrapper=DDP)
    flexible = run(runner=FlexibleRunner, strategy=strategy)
    assert same(run().history[-1], flexible.history[-1])


def refusing(kind, **options):
    message = 'local learning would be off'
    texts = {name.replace(' ', '_'): message for name in COLUMNS}

    @row(kind, **texts)
    def refuse(run):
        run({'optim_wrapper.type': options['type']})


refusing('Apex', type='ApexOptimWrapper')
refusing('DeepSpeed', type='DeepSpeedOptimWrapper')


def cells():
    return [
        pytest.param(
            title,
            column,
            id=f'{title}-{column}',
            marks=[pytest.mark.slow] if title == COMPILE else [],
        )
        for title in ROWS
        for column in COLUMNS
    ]


def check(title, column, folder):
    function, errors = ROWS[title]
    expected = (
        pytest.raises(ValueError, match=errors[column])
        if column in errors
        else nullcontext()
    )
    with expected:
        function(Runs(folder, column))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Collecting versions takes longer than the training does."""
    monkeypatch.setattr(mmengine_runner.runner, 'collect_env', dict)
    torch._dynamo.reset()


@pytest.mark.parametrize('title, column', cells())
def test_cell(title, column, tmp_path):
    if column != 'two processes':
        check(title, column, tmp_path)
        return
    from test_distributed import free_port, start

    def work(rank, port):
        start(rank, 2, port)
        check(title, column, tmp_path)

    mp.start_processes(work, (free_port(),), nprocs=2, start_method='fork')


def table():
    lines = ['| | ' + ' | '.join(COLUMNS) + ' |', '|---' * (len(COLUMNS) + 1) + '|']
    for title, (_, errors) in ROWS.items():
        marks = ['refused' if column in errors else 'works' for column in COLUMNS]
        lines.append(f'| {title} | ' + ' | '.join(marks) + ' |')
    return '\n'.join(lines)


START, END = '<!-- table -->', '<!-- end of table -->'


def test_the_document_has_this_table():
    assert read_marked(DOCUMENT, START, END) == table()


if __name__ == '__main__':
    write_marked(DOCUMENT, START, END, table())
