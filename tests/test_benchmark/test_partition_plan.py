"""The planner's command line, and the config that it writes."""

import re
import subprocess
import sys

import matplotlib.image
import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import HOOKS, MODELS
from scripts import run_script

from man_mm.benchmark.partition_plan import write_config
from man_mm.benchmark.partition_report import BAR, make_bars
from man_mm.engine.config_files import load_config
from man_mm.measure.peaks import PlannedModule
from man_mm.measure.synthetic_batch import synthetic_batch

DEMO = 'configs/man/retinanet_r18_man_demo.py'
GREY = 'configs/man/resnet32_k4_man_fashion.py'  # images of one channel
# So large that the temporaries of AdamW, which nobody predicts, set no peak.
SIZE = ['--size', '96', '128', '--batch', '16']


def test_the_planner_writes_a_config_that_trains(tmp_path):
    out, picture = tmp_path / 'configs/planned.py', tmp_path / 'plan.png'
    options = ['--num-modules', 3, *SIZE, '--out', out, '--picture', picture]
    command = [
        sys.executable,
        'tools/analysis_tools/plan_partition.py',
        DEMO,
        *map(str, options),
    ]
    done = subprocess.run([*command, '--check'], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]

    cfg = load_config(str(out))
    partition = cfg.optim_wrapper.local_learning.partition
    assert set(partition) == {'type', 'cuts'}
    assert len(partition.cuts) == 2
    for cut in partition.cuts:
        assert f"        '{cut}',\n" in done.stdout
    base = load_config(DEMO)
    base.optim_wrapper.local_learning = dict(partition=partition)
    assert cfg.to_dict() == base.to_dict()

    torch.manual_seed(0)
    model = MODELS.build(cfg.model).train()
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    wrapper.learner.bank = HOOKS.build(cfg.default_hooks.memory_bank).bank
    logs = model.train_step(synthetic_batch(model, (2, 3, 64, 64)), wrapper)
    assert torch.isfinite(logs['loss'])
    assert [m.cut for m in wrapper.learner.modules[:-1]] == partition.cuts

    (largest,) = re.findall(r'largest.*?([\d.]+)%', done.stdout)
    assert float(largest) < 10
    assert 'of end-to-end training' in done.stdout
    assert matplotlib.image.imread(picture).std() > 0.1  # not blank


def test_images_have_the_channels_that_the_network_takes(capsys):
    options = ['--num-modules=2', '--size', '14', '14', '--batch=2']
    run_script('plan_partition', GREY, *options)
    assert 'of end-to-end training' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('config', 'option', 'message'),
    [
        (
            DEMO,
            '--memory-budget=1MiB',
            r'partition.memory_budget is 1048576 bytes, but no partition needs less '
            r'than \d+ \([\d.]+ MiB\): \d+ bytes \([\d.]+ MiB\) too many\.',
        ),
        (
            'configs/end_to_end/retinanet_r18_demo.py',
            '--num-modules=2',
            "optim_wrapper.type is 'OptimWrapper', with which local learning would be",
        ),
    ],
)
def test_what_cannot_be_planned_is_one_line(config, option, message):
    with pytest.raises(SystemExit, match=rf'^plan_partition: {message}.*$'):
        run_script('plan_partition', config, option, *SIZE)


@pytest.mark.parametrize('local', [{}, dict(partition=dict(type='StagePartition'))])
@pytest.mark.parametrize('cuts', [[], ['backbone.layer2.0', 'backbone.layer3.0']])
def test_configs_inherit_and_replace_the_partition(tmp_path, local, cuts):
    base = tmp_path / 'a/base.py'
    base.parent.mkdir()
    wrapper = dict(type='LocalLearningOptimWrapper', local_learning=local)
    base.write_text(f'optim_wrapper = {wrapper!r}\n')
    out = tmp_path / 'b/c/new.py'
    write_config(out, str(base), Config.fromfile(base), cuts)
    written = Config.fromfile(out).optim_wrapper
    assert written == dict(
        type='LocalLearningOptimWrapper',
        local_learning=dict(partition=dict(type='CutPartition', cuts=cuts)),
    )
    assert '../../a/base.py' in out.read_text()


def test_configs_inherit_those_of_packages(tmp_path):
    base = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'
    out = tmp_path / 'new.py'
    cfg = Config(dict(optim_wrapper=dict()))
    write_config(out, base, cfg, ['backbone.layer2'])
    assert Config.fromfile(out).model.type == 'RetinaNet'


def test_bars_are_as_long_as_their_bytes():
    kinds = dict(held=0, saved=30, head=10, gradients=0, temporaries=0)
    rows = {'a': PlannedModule(('x',), kinds), 'b': PlannedModule(('x',), {})}
    rows['b'].kinds.update(dict(kinds, saved=10, head=0))
    long, short = make_bars(rows).columns[1].cells
    assert long.plain.count('█') == BAR
    assert short.plain.count('█') == BAR / 4
