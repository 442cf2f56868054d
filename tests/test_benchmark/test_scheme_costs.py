import json
import shlex
from types import SimpleNamespace

import pytest
import torch
from conftest import batch_of
from mmengine.config import Config, ConfigDict
from mmengine.registry import init_default_scope
from scripts import run_script

from man_mm.benchmark import scheme_costs, schemes, training_steps
from man_mm.benchmark.scheme_pictures import draw_pictures

CONFIG = 'configs/man/retinanet_r18_man_demo.py'
SHAPE = (2, 3, 64, 64)
NARROW = ['model.backbone.base_channels=8', 'model.neck.in_channels=[8,16,32,64]']
RATIOS = ('peak_ratio', 'time_ratio', 'flops_ratio')
CLIP = dict(clip_grad=dict(max_norm=1))
VGG = ConfigDict(type='SSDVGG', depth=16)
# Every option but fp16.
TRAINABLE = [
    'end-to-end',
    'end-to-end+checkpointing',
    'end-to-end+accumulate=2',
    'end-to-end+bf16',
    'end-to-end+efficient',
    'end-to-end+lean+bits=4+recompute=backbone.layer2,backbone.layer3',
    'end-to-end+recompute-losses+stages',
    'end-to-end+in-backward',
    'end-to-end+in-backward+bf16+accumulate=batch+checkpointing+efficient',
    'local',
    'local+K=2',
    'local+cuts=backbone.layer2,backbone.layer3.0',
    'local+cuts=',
    'local+stages',
    'local+faithful',
    'local+no-bank',
    'local+micro=1',
    'local+recompute=backbone.layer1.0,backbone.layer4',
    'local+unfolded+losses-kept+bits=8',
    'local+bf16',
    'local+update=parameter',
    'local+update=iteration',
    'local+checkpointing',
    'local+accumulate=2+K=3+micro=1+recompute=backbone.layer4+update=parameter',
    'exact',
    'exact+K=3+micro=1',
    'exact+last=once',
    'joint',
]


@pytest.fixture
def tools():
    return SimpleNamespace(schemes=schemes, building=training_steps, bench=scheme_costs)


@pytest.fixture
def cfg():
    """The demo with frozen norms and without clipping, so that it allows everything."""
    cfg = Config.fromfile(CONFIG)
    cfg.model.backbone.norm_eval = True
    cfg.optim_wrapper.optimizer = dict(type='SGD', lr=0.01, momentum=0.9)
    cfg.optim_wrapper.clip_grad = None
    return cfg


def run_main(capsys, *arguments):
    run_script('benchmark', *arguments)
    return capsys.readouterr().out


def test_every_option_is_trained_here(tools):
    parsed = map(tools.schemes.parse_scheme, TRAINABLE)
    used = {option for scheme in parsed for option in scheme.options}
    assert used == set(tools.schemes.OPTIONS) - {'fp16'}


def test_schemes_do_not_touch_each_other(tools, cfg):
    before, built = str(cfg), {}
    for scheme in map(tools.schemes.parse_scheme, TRAINABLE):
        built[scheme.name] = tools.schemes.scheme_config(cfg, scheme, SHAPE)
    assert str(cfg) == before
    for name, config in built.items():
        wrapper, in_modules = config.optim_wrapper, not name.startswith('end-to-end')
        assert ('constructor' in wrapper) == in_modules
        assert wrapper.optimizer == cfg.optim_wrapper.optimizer
        assert ('with_cp' in config.model.backbone) == ('checkpointing' in name)
        assert ('accumulative_counts' in wrapper) == ('accumulate' in name)


def test_stock_configs_can_be_trained_locally(tools, cfg):
    """A config without local learning gets what the README tells to add."""
    stock = Config.fromfile('configs/end_to_end/retinanet_r18_demo.py')
    local = tools.schemes.parse_scheme('local')
    built = tools.schemes.scheme_config(stock, local, SHAPE)
    assert built.optim_wrapper.constructor.endswith(cfg.optim_wrapper.constructor)
    assert built.default_hooks.memory_bank.type.endswith('MemoryBankHook')


def build(tools, cfg, name, device='cpu'):
    init_default_scope('mmdet')
    data = batch_of(SHAPE[0], *SHAPE[2:], classes=10)
    scheme = tools.schemes.parse_scheme(name)
    return tools.building.build_scheme(cfg, scheme, data, SHAPE, device)


def train(built):
    """Trains a step and returns for each parameter whether it moved."""
    before = [p.detach().clone() for p in built.model.parameters()]
    built.step()
    after = list(built.model.parameters())
    assert all(p.isfinite().all() and p.grad is None for p in after)
    return [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]


def test_mixed_precision_by_local_learning_is_our_wrapper(tools, cfg):
    types = []
    for name in ('local+bf16', 'local'):
        scheme = tools.schemes.parse_scheme(name)
        wrapper = tools.schemes.scheme_config(cfg, scheme, SHAPE).optim_wrapper
        types.append((wrapper.type, wrapper.get('dtype')))
    assert types[0] == ('man_mm.AmpLocalLearningOptimWrapper', 'bfloat16')
    assert 'Amp' not in types[1][0] and types[1][1] is None


@pytest.mark.parametrize('name', TRAINABLE)
def test_scheme_trains(tools, cfg, name):
    built = build(tools, cfg, name)
    assert (built.learner is None) == name.startswith('end-to-end')
    moved = train(built)
    assert sum(moved) > 0.9 * len(moved)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
@pytest.mark.parametrize(
    'name',
    [
        'end-to-end+fp16',
        'end-to-end+bf16',
        'end-to-end+bf16+in-backward',
        'local+fp16',
        'local+bf16',
    ],
)
def test_mixed_precision_trains_on_cuda(tools, cfg, name):
    moved = train(build(tools, cfg, name, 'cuda'))
    assert sum(moved) > 0.9 * len(moved)


@pytest.mark.parametrize(
    ('change', 'scheme', 'word'),
    [
        (lambda cfg: None, 'fp16', '--device cuda'),
        (lambda cfg: None, 'accumulate=3', '3 equal parts'),
        (lambda cfg: cfg.model.backbone.update(norm_eval=False), 'efficient', 'mode'),
        (lambda cfg: cfg.optim_wrapper.update(CLIP), 'in-backward', 'clip_grad'),
        (lambda cfg: setattr(cfg.model, 'backbone', VGG), 'checkpointing', 'with_cp'),
    ],
    ids=lambda value: value if isinstance(value, str) else '',
)
def test_schemes_that_a_config_does_not_allow(tools, cfg, change, scheme, word):
    change(cfg)
    with pytest.raises(ValueError, match=word):
        build(tools, cfg, f'end-to-end+{scheme}')


def compare(tools, cfg, names):
    """Exactness and reference of each scheme."""
    references, found = None, {}
    for name in names:
        built = build(tools, cfg, name)
        references = references or tools.bench.References(built)
        built.step()
        found[name] = references.compare(name, built)
    return found


def test_exactness(tools, cfg):
    same = ['end-to-end', 'end-to-end+in-backward', 'local+cuts=', 'exact+unfolded']
    same += ['end-to-end+recompute-losses', 'end-to-end+stages+in-backward']
    rounded = ['end-to-end+checkpointing', 'end-to-end+efficient', 'exact']
    rounded.append('end-to-end+lean+recompute=backbone.layer2,backbone.layer3')
    other = ['end-to-end+bf16', 'end-to-end+accumulate=2']  # normalised by objects
    local = [
        'local',
        'local+losses-kept',
        'local+update=parameter',
        'local+recompute=backbone.layer4',
    ]
    names = [*same, *rounded, *other, *local, 'local+unfolded', 'local+no-bank']
    found = compare(tools, cfg, names)
    references = {name: reference for name, (_, reference) in found.items()}
    assert references == {
        **dict.fromkeys(same + rounded + other, 'end-to-end'),
        **dict.fromkeys([*local, 'local+unfolded'], 'local'),
        'local+no-bank': 'local+no-bank',
    }
    assert all(found[name][0] == 0 for name in same + local)
    assert all(0 < found[name][0] < 1e-4 for name in [*rounded, 'local+unfolded'])
    assert all(found[name][0] > 1e-3 for name in other)


def test_exactness_finds_a_wrong_scheme(tools, cfg, monkeypatch):
    def updates_twice(self, param):
        self.optimizers[param].step()
        step(self, param)

    wrapper = tools.building.InBackwardOptimWrapper
    step = wrapper._step
    monkeypatch.setattr(wrapper, '_step', updates_twice)
    found = compare(tools, cfg, ['end-to-end', 'end-to-end+in-backward'])
    assert 0.5 < found['end-to-end+in-backward'][0] < 2  # SGD with momentum: 1.9


def test_last_stage(tools):
    from man_mm.core import Unit

    stages = [Unit('net.a.0', 0), Unit('net.b.0', 1), Unit('net.b.1', 1)]
    flat = [Unit('net.0', 0), Unit('net.1', 1), Unit('net.2', 1)]
    assert tools.schemes.last_stage(stages) == ['net.b']
    assert tools.schemes.last_stage(flat) == ['net.1', 'net.2']
    assert 'local+recompute=net.b' in tools.schemes.default_schemes(stages, 1)
    assert not any('batch' in s for s in tools.schemes.default_schemes(stages, 1))


def test_benchmark_compares_the_schemes(tmp_path, capsys):
    out = tmp_path / 'out'
    arguments = ['--size', 64, 64, '--repeats', 1, '--batch', 2, '--out', out]
    arguments += ['--cfg-options', *NARROW]
    shown = run_main(capsys, CONFIG, *arguments)
    for left_out in ('efficient', 'checkpointing+efficient', 'in-backward'):
        assert f"left out: Scheme 'end-to-end+{left_out}': " in shown
    folder = out / 'retinanet_r18_man_demo_64x64_b2'
    records = {path.stem: json.loads(path.read_text()) for path in folder.iterdir()}
    assert len(records) == len(list(out.rglob('*.json'))) == 8
    for record in records.values():
        assert (record['config'], record['batch']) == (CONFIG, 2)
        assert record['size'] == [64, 64]
        assert (record['device'], record['threads']) == ('cpu', torch.get_num_threads())
        assert sum(record['kinds'].values()) == record['peak'] > 0
        assert sum(record['modules'].values()) == record['peak']
        assert set(record['versions']) == {'man_mm', 'torch', 'mmengine', 'python'}
        assert record['options'] == list(NARROW)
        assert len(record['cuts']) == (3 if record['scheme'].startswith('local') else 0)
        assert record['hardware'] and record['date']
        for key in ('flops', *RATIOS, 'images_per_second'):
            assert record[key] > 0
    peaks = {name: record['peak'] for name, record in records.items()}
    assert peaks['local'] < peaks['end-to-end']
    assert [records['end-to-end'][key] for key in RATIOS] == [1, 1, 1]
    micro = records['local_micro-1']
    assert micro['peak_ratio'] == peaks['local_micro-1'] / peaks['end-to-end']
    assert micro['command'].endswith(shlex.join(NARROW))

    arguments = ['--from', out, '--picture', tmp_path / 'front.png']
    again = run_main(capsys, *arguments)
    tables = again[: again.index(str(tmp_path))]
    assert tables.count('local+micro=1') == 2
    assert tables in shown
    assert [path.name for path in tmp_path.glob('*.png')] == ['front.png']

    command = shlex.split(micro['command'])
    assert command[1:5] == ['mim', 'run', 'man_mm', 'benchmark']
    arguments = [*command[5:], '--out', tmp_path / 'repeated']
    run_main(capsys, *arguments)
    repeated = tmp_path / 'repeated' / folder.name / 'local_micro-1.json'
    repeated = json.loads(repeated.read_text())
    for key in ('peak', 'kinds', 'modules', 'flops', 'exactness', 'command'):
        assert repeated[key] == micro[key]


def peaks(cfg, *names):
    init_default_scope('mmdet')
    results = scheme_costs.measure_schemes(cfg, (96, 96), 8, 0, names)
    return {name: row['peak'] for name, row in results.items()}


def test_losses_are_recomputed_where_asked_for(cfg):
    cfg.model.bbox_head.num_classes = 400  # whose loss sets the peak
    end_to_end = ('end-to-end', 'end-to-end+recompute-losses')
    local = ('local+losses-kept', 'local')
    found = peaks(cfg, *end_to_end, *local)
    for kept, recomputed in (end_to_end, local):
        assert found[recomputed] < 0.9 * found[kept]


def test_whole_modules_are_recomputed_in_the_memory_of_exact_steps(cfg):
    whole = 'end-to-end+lean+in-backward+stages'
    found = peaks(cfg, 'end-to-end+lean', whole, 'exact+update=parameter')
    assert found[whole] < found['end-to-end+lean']
    assert found['exact+update=parameter'] <= 1.02 * found[whole]


def test_recomputed_modules_of_a_backbone_without_adapter(cfg):
    """Its units are found by running it, which its recomputed blocks would hide."""
    cfg.model.backbone = ConfigDict(
        type='MobileNetV2', widen_factor=0.25, out_indices=(1, 2, 4, 6)
    )
    cfg.model.neck.in_channels = [8, 8, 24, 80]
    found = peaks(cfg, 'end-to-end+lean', 'end-to-end+lean+stages')
    assert found['end-to-end+lean+stages'] < found['end-to-end+lean']


def test_frozen_stages_are_not_recomputed(cfg):
    cfg.model.backbone.frozen_stages = 1
    init_default_scope('mmdet')
    names = ('end-to-end+lean+stages', 'exact')
    results = scheme_costs.measure_schemes(cfg, (64, 64), 1, 0, names)
    assert results[names[0]]['flops'] == results['exact']['flops']
    assert results[names[0]]['cuts'] == results['exact']['cuts']


@pytest.mark.parametrize('base', ['end-to-end+lean+stages', 'exact'])
def test_the_last_module_runs_once_or_twice(cfg, base):
    init_default_scope('mmdet')
    names = [f'{base}+last={count}' for count in ('once', 'twice')]
    results = scheme_costs.measure_schemes(cfg, (64, 64), 2, 0, [*names, base])
    once, twice = (results[name] for name in names)
    assert once['flops'] < twice['flops'] == results[base]['flops']


def test_timed_steps_start_from_the_same_weights(cfg, monkeypatch):
    seen = []
    build = scheme_costs.build_scheme

    def watched(*args):
        built = build(*args)
        step = built.step

        def watch():
            seen.append([p.detach().clone() for p in built.model.parameters()])
            step()

        built.step = watch
        return built

    monkeypatch.setattr(scheme_costs, 'build_scheme', watched)
    init_default_scope('mmdet')
    scheme_costs.measure_schemes(cfg, (64, 64), 2, 2, ['end-to-end', 'local'])
    first = seen[0]
    assert len(seen) == 8
    for weights in seen[1:]:
        assert all(map(torch.equal, weights, first))


def test_costs_without_times(tmp_path, capsys):
    arguments = ['--size', 64, 64, '--repeats', 0, '--out', tmp_path]
    arguments += ['--schemes', 'end-to-end', 'local', '--cfg-options', *NARROW]
    shown = run_main(capsys, CONFIG, *arguments)
    assert 'FLOPs' in shown and 'images/s' not in shown
    records = [json.loads(path.read_text()) for path in tmp_path.rglob('*.json')]
    assert [record['seconds'] for record in records] == [[], []]
    assert {record['time_ratio'] for record in records} == {None}
    shown = run_main(capsys, '--from', tmp_path, '--markdown')
    assert all(row.count('|') == 5 for row in shown.strip().splitlines())
    assert draw_pictures(records, tmp_path / 'front.png') == []


def test_errors_are_told_on_the_command_line(capsys):
    for scheme, word in (('loca', 'not known'), ('local+cuts=neck', 'partition.cuts')):
        with pytest.raises(SystemExit, match=word):
            arguments = ['--size', 64, 64, '--schemes', scheme]
            run_main(capsys, CONFIG, *arguments)
