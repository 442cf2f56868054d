"""The demo: what it compares, and what it says about it."""

from pathlib import Path

import pytest

from man_mm.benchmark import demo
from man_mm.benchmark.demo_pictures import draw_detections
from man_mm.benchmark.records import make_records
from man_mm.benchmark.scheme_costs import measure_schemes
from man_mm.engine.config_files import load_config

NARROW = ['model.backbone.base_channels=8', 'model.neck.in_channels=[8,16,32,64]']
SIZE, BATCH = (64, 64), 2
POINTS = {'end-to-end': 0.5, 'joint': 0.6, 'local': 0.4, 'local, then joint': 0.55}


@pytest.fixture(scope='module')
def records():
    """Costs of the demo's schemes, on a narrow network."""
    schemes = dict.fromkeys(scheme for row in demo.rows() for scheme in row.schemes)
    cfg = load_config(demo.CONFIG, NARROW)
    results = measure_schemes(cfg, SIZE, BATCH, 1, list(schemes))
    return make_records(results, demo.CONFIG, SIZE, BATCH)


@pytest.fixture
def results():
    return [
        dict(name=entry.name, metrics={demo._MAP: POINTS[entry.name], demo._AP50: 0.8})
        for entry in demo.trainings()
    ]


def test_checkpointing_trains_the_weights_of_end_to_end_training(records):
    """So that one training shows the accuracy of both."""
    plain, checkpointed, joint, *_ = records
    assert checkpointed['reference'] == plain['scheme'] == 'end-to-end'
    assert checkpointed['exactness'] == 0
    assert joint['reference'] != plain['scheme']  # control: it is another method
    configured = load_config(demo.CONFIG).optim_wrapper.local_learning.partition
    assert checkpointed['cuts'] == joint['cuts'] == configured['cuts']


def test_trainings_are_of_the_steps_that_are_measured():
    assert {row.trained for row in demo.rows()} == {x.name for x in demo.trainings()}
    dials = {}
    for entry in demo.trainings():
        local = entry.cfg.optim_wrapper.get('local_learning', {})
        dials[entry.name] = local.get('end_to_end_from'), local.get('local_loss_weight')
    assert dials == {
        'end-to-end': (None, None),
        'joint': (0.0, 0.05),
        'local': (None, None),
        'local, then joint': (0.5, 0.05),
    }


def test_a_mixed_training_costs_the_mean_time_and_the_larger_peak(records, results):
    plain, _, joint, local, mixed = demo.summarise(demo.rows(), records, results)
    assert [row['mAP'] for row in (plain, joint, local, mixed)] == [*POINTS.values()]
    assert mixed['peak'] == max(joint['peak'], local['peak'])
    for key in ('seconds', 'time_ratio', 'flops_ratio'):
        assert mixed[key] == pytest.approx((joint[key] + local[key]) / 2)
    assert plain['peak_ratio'] == plain['time_ratio'] == 1


def test_table_and_sentences_say_the_numbers(records, results):
    costs = demo.summarise(demo.rows(), records, results)
    table = demo.make_table(costs, 'title')
    assert table.row_count == 5
    text = ' '.join(demo.conclusions(costs))
    for words in ('0.500 mAP', 'Joint: +0.100 mAP', 'Local: -0.100 mAP', 'of the time'):
        assert words in text
    untimed = [record | dict(seconds=[], time_ratio=None) for record in records]
    costs = demo.summarise(demo.rows(), untimed, results)
    assert 'of the time' not in ' '.join(demo.conclusions(costs))
    assert list(demo.make_table(costs, 'title').columns[5].cells) == ['–'] * 5


def test_detections_are_drawn_by_the_stock_config(tmp_path, monkeypatch):
    import torch
    from mmengine.registry import MODELS

    from man_mm.datasets.make_digits import make_digits

    monkeypatch.chdir(tmp_path)
    make_digits('data/digits', 2, 8, 64)
    model = MODELS.build(load_config(demo.PLAIN).model)
    torch.save(dict(state_dict=model.state_dict()), 'weights.pth')
    config = demo.find_config(demo.PLAIN)
    draw_detections(config, Path('weights.pth'), 'a name', Path('drawn.png'))
    assert Path('drawn.png').read_bytes().startswith(b'\x89PNG')
