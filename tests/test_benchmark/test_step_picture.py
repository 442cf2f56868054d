"""A recorded step, and its drawing: of a real training step."""

from itertools import groupby

import pytest

from man_mm.benchmark.scheme_costs import measure_schemes
from man_mm.benchmark.step_picture import draw
from man_mm.benchmark.step_recording import record_step, record_steps, thinned
from man_mm.engine.config_files import load_config

CONFIG = 'configs/man/resnet18_man_imagenet.py'
SIZE, BATCH = (32, 32), 2


@pytest.fixture(scope='module')
def steps():
    cfg, shape = load_config(CONFIG), (BATCH, 3, *SIZE)
    local, modules = record_step(cfg, 'local', shape)
    plain, _ = record_step(cfg, 'end-to-end', shape, modules)
    return {'end-to-end': plain, 'local': local}


def phases(moments):
    return [key for key, _ in groupby(moment[2:] for moment in moments)]


def test_phases_follow_each_other(steps):
    forward = [(i, 'forward') for i in range(4)]
    backward = [(i, 'backward') for i in range(4)]
    plain = [step for step in phases(steps['end-to-end']) if step[1] != 'loss']
    assert plain == [*forward, *backward[::-1]]
    local = [step for step in phases(steps['local']) if step[1] != 'loss']
    assert local == [
        step for both in zip(forward, backward, strict=True) for step in both
    ]
    assert (0, 'loss') in phases(steps['local'])  # of an auxiliary head


def test_peaks_are_those_of_the_benchmark(steps):
    measured = measure_schemes(load_config(CONFIG), SIZE, BATCH, 1, list(steps))
    for scheme, moments in steps.items():
        assert max(moment[1] for moment in moments) == measured[scheme]['peak']


def test_thinning_keeps_peak_changes_of_phase_and_the_end():
    a, b = (0, 'forward'), (0, 'backward')
    moments = [(0.0, 9999, *a), (0.1, 10000, *a), (0.2, 9999, *a), (0.3, 9999, *b)]
    kept = thinned([*moments, (0.4, 9999, *b)], 10000)
    assert kept == [*moments[:2], moments[3], (0.4, 9999, *b)]


def test_exact_steps_run_forward_first_then_each_module_again(tmp_path):
    records = record_steps(CONFIG, SIZE, BATCH, schemes=('local', 'exact'))
    assert list(records['steps']) == ['local', 'exact']
    steps = [step for step in phases(records['steps']['exact']) if step[1] != 'loss']
    again = [(i, phase) for i in (2, 1, 0) for phase in ('forward', 'backward')]
    forward = [(i, 'forward') for i in range(4)]
    assert steps[:4] == forward
    assert steps[-6:] == again
    draw(records, tmp_path / 'steps.png')
    assert (tmp_path / 'steps.png').is_file()


def test_picture(steps, tmp_path):
    path = tmp_path / 'new' / 'step.png'
    draw(dict(steps=steps), path)
    assert path.read_bytes().startswith(b'\x89PNG')
