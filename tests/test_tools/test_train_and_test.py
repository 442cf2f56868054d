"""Runs ``tools/train.py`` and ``tools/test.py`` on a toy config."""

import itertools
import pickle

import pytest
import torch
from scripts import run_script
from tiny_data import tiny_fashion

RUN_NUMBER = itertools.count()
TOY_CONFIG = """
custom_imports = dict(imports=['toy_parts'])
default_scope = 'mmengine'
model = dict(type='ToyModel')
train_dataloader = val_dataloader = test_dataloader = dict(
    batch_size=4,
    collate_fn=dict(type='default_collate'),
    dataset=dict(type='ToyData'),
    sampler=dict(type='DefaultSampler', shuffle=False),
)
val_evaluator = test_evaluator = dict(type='ToyMetric')
val_cfg = test_cfg = dict()
train_cfg = dict(by_epoch=True, max_epochs=1)
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.1, momentum=0.9))
"""
TOY_PARTS = """
import torch
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, METRICS, MODELS

@MODELS.register_module(force=True)
class ToyModel(BaseModel):
    def __init__(self, data_preprocessor=None):
        super().__init__(data_preprocessor)
        self.linear = torch.nn.Linear(1, 1)

    def forward(self, x, mode='loss'):
        y = self.linear(x)
        return dict(loss=y.square().mean()) if mode == 'loss' else [y]

@DATASETS.register_module(force=True)
class ToyData(torch.utils.data.Dataset):
    metainfo = {}

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return dict(x=torch.full((1,), float(index)))

@METRICS.register_module(force=True)
class ToyMetric(BaseMetric):
    def process(self, batch, outputs):
        self.results.append(outputs[0].abs().mean().item())

    def compute_metrics(self, results):
        return dict(size=sum(results))
"""


@pytest.fixture
def run_tool(tmp_path, monkeypatch):
    """Run a script of ``tools/`` in this process, beside a toy config."""
    (tmp_path / 'toy_parts.py').write_text(TOY_PARTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv('LOCAL_RANK', '0')

    def run(name, *args):
        # Runners of one name share their logger and log buffers in a process.
        config = f"{TOY_CONFIG}experiment_name = 'run{next(RUN_NUMBER)}'\n"
        (tmp_path / 'toy.py').write_text(config)
        run_script(name, *args)

    return run


def load(path):
    return torch.load(path, weights_only=False)


@pytest.mark.parametrize('resume', [[], ['work_dirs/toy/epoch_1.pth']])
def test_resumed_training_equals_uninterrupted_training(run_tool, resume):
    two_epochs = ['--cfg-options', 'train_cfg.max_epochs=2', 'randomness.seed=1']
    run_tool('train', 'toy.py', '--work-dir', 'whole', *two_epochs)
    run_tool('train', 'toy.py', '--cfg-options', 'randomness.seed=1')
    run_tool('train', 'toy.py', '--resume', *resume, *two_epochs)
    whole, resumed = load('whole/epoch_2.pth'), load('work_dirs/toy/epoch_2.pth')
    assert resumed['meta']['iter'] == whole['meta']['iter'] == 4
    torch.testing.assert_close(
        resumed['state_dict'], whole['state_dict'], rtol=0, atol=0
    )
    first = load('work_dirs/toy/epoch_1.pth')['state_dict']
    assert not torch.equal(
        first['linear.weight'], resumed['state_dict']['linear.weight']
    )


def test_test_loads_the_checkpoint(run_tool, capfd):
    run_tool('train', 'toy.py', '--work-dir', 'out')
    checkpoint = load('out/epoch_1.pth')
    checkpoint['state_dict']['linear.weight'].fill_(0)
    checkpoint['state_dict']['linear.bias'].fill_(4)
    torch.save(checkpoint, 'changed.pth')
    capfd.readouterr()
    run_tool('test', 'toy.py', 'changed.pth', '--work-dir', 'out')
    output = capfd.readouterr()
    assert 'size: 8.0000' in output.out + output.err


def rates(path):
    return [group['lr'] for group in load(path)['optimizer']['param_groups']]


def test_the_learning_rate_follows_the_batch_size(run_tool):
    base = ['--cfg-options', 'auto_scale_lr.base_batch_size=8']
    run_tool('train', 'toy.py', '--work-dir', 'plain', *base)
    run_tool('train', 'toy.py', '--work-dir', 'scaled', '--auto-scale-lr', *base)
    assert rates('plain/epoch_1.pth') == [0.1]
    assert rates('scaled/epoch_1.pth') == [0.1 * 4 / 8]


def test_predictions_are_stored(run_tool):
    run_tool('train', 'toy.py', '--work-dir', 'out')
    run_tool('test', 'toy.py', 'out/epoch_1.pth', '--out', 'found.pkl')
    with open('found.pkl', 'rb') as file:
        assert len(pickle.load(file)) == 2  # a batch each


def test_mixed_precision_of_local_learning(tmp_path):
    data = tiny_fashion(tmp_path / 'original')
    options = [
        f'train_dataloader.dataset.data_root={data}',
        'train_dataloader.dataset.indices=8',
        f'val_dataloader.dataset.data_root={data}',
        'train_dataloader.batch_size=4',
        'train_cfg.max_epochs=1',
        'model.backbone.depth=14',
    ]
    config = 'configs/man/resnet32_k4_man_fashion.py'
    args = ['--work-dir', tmp_path / 'out', '--amp', '--cfg-options', *options]
    run_script('train', config, *args)
    saved = load(tmp_path / 'out/epoch_1.pth')
    assert len(saved['optimizer']['loss_scalers']) == 4


@pytest.mark.parametrize(
    ('name', 'args', 'message'),
    [
        ('train', ['none.py'], "There is no config 'none.py'"),
        ('train', ['toy.py', '--auto-scale-lr'], 'set auto_scale_lr.base_batch_size'),
        ('test', ['toy.py', 'x.pth', '--show'], 'default_hooks.visualization'),
        ('test', ['toy.py', 'x.pth', '--tta'], 'no tta_model'),
        ('test', ['toy.py', 'x.pth', '--out', 'x.json'], 'name a .pkl file'),
    ],
)
def test_what_a_config_does_not_allow_is_told(run_tool, capsys, name, args, message):
    with pytest.raises(SystemExit):
        run_tool(name, *args)
    assert message in capsys.readouterr().err
