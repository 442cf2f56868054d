"""Needs that are counted without computing, against computed steps; and the tool."""

import json
import re

import matplotlib.image
import pytest
from conftest import needs_mmagic
from mmengine.config import Config
from scripts import run_script

from man_mm.benchmark import card_needs, card_report
from man_mm.benchmark.card_needs import Counter, Need, usable
from man_mm.benchmark.card_plan import CardPlan, count_on_cpu, plan_cards
from man_mm.benchmark.card_search import search
from man_mm.benchmark.published_memory import published_memory
from man_mm.engine.config_files import load_config
from man_mm.measure import uncomputed

GIB = 2**30
DEMO, SIZE, BATCH = 'configs/man/retinanet_r18_man_demo.py', (64, 96), 2
SLOW = {
    'classifier': ('configs/man/resnet32_k4_man_fashion.py', (14, 14), 16),
    'faster_rcnn': ('configs/man/faster_rcnn_r18_man_scenes.py', (96, 128), 2),
    'transformer': ('configs/man/swin_tiny_man_imagenet.py', (224, 224), 1),
    'restorer': ('configs/man/edsr_x2_man_div2k.py', (32, 32), 4),
}


def errors(plan):
    return {
        a.name: a.peak / b.peak - 1 for a, b in zip(*count_on_cpu(plan), strict=True)
    }


@pytest.mark.slow
@pytest.mark.parametrize('name', SLOW)
def test_needs_are_those_of_computed_steps(name):
    if name == 'restorer':
        needs_mmagic()
    check_needs(*SLOW[name])


def check_needs(config, size, batch):
    plan = plan_cards(config, None, size, batch)
    assert [need.name for need in plan.needs] == [
        'end-to-end',
        'recomputed',
        'exact',
        'joint',
        'local',
    ]
    assert all(abs(error) < 0.05 for error in errors(plan).values())


def test_an_op_that_is_forgotten_is_an_error(monkeypatch):
    skipped = uncomputed._zeros_like

    def half(meta):
        return skipped(meta).half() if meta.dim() == 4 else skipped(meta)

    monkeypatch.setattr(uncomputed, '_zeros_like', half)
    with pytest.raises((AssertionError, RuntimeError)):
        check_needs(DEMO, SIZE, BATCH)


@pytest.mark.slow
def test_a_budget_changes_the_cuts_of_what_does_not_fit():
    config, batch = 'configs/man/resnet50_man_imagenet.py', 8
    stages = plan_cards(config, None, (64, 64), batch)
    given = int(stages.needs[4].peak / (1 - card_needs.GAPS)) + card_needs.CONTEXT
    for budget, changed in ((given + 2**20, False), (given - 2**20, True)):
        plan = plan_cards(config, str(budget), (64, 64), batch)
        local = plan.needs[4]
        assert (local.cuts != stages.needs[4].cuts) == changed
        assert local.fits(budget)


DINO = 'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py'


def test_layers_behind_the_backbone_are_recomputed_where_cuts_are_not_enough(
    monkeypatch,
):
    monkeypatch.setattr(card_needs, 'CONTEXT', 0)
    counter = Counter(load_config(DINO), (1, 3, 608, 800))
    assert counter.layers == ['encoder.layers', 'decoder.layers']
    counted = [
        counter.count('exact', 'exact', recompute=names)
        for names in ((), counter.layers)
    ]
    assert counted[1].peak < 0.97 * counted[0].peak
    limit = int(1.01 * counted[1].peak / (1 - card_needs.GAPS))
    found = search(counter, 'exact', counted[0], limit)
    assert found.fits(limit) and found.recompute == tuple(counter.layers)
    assert found.settings['recompute'] == counter.layers
    found = search(counter, 'exact', counted[0], 2 * counted[0].peak)
    assert found.recompute == ()
    strongest = counter.count_strongest(found.cuts, counter.layers)
    assert strongest.peak < counter.count_strongest(found.cuts, ()).peak


def need(name, peak):
    kinds = dict.fromkeys(card_needs.KINDS, 0) | dict(activations=int(peak * GIB))
    return Need(name, name, (), (), kinds, 1)


def plan_of(budget, **peaks):
    needs = [need(name.replace('_', '-'), peak) for name, peak in peaks.items()]
    return CardPlan('x.py', [], Config(), (1, 3, 8, 8), needs, budget and budget * GIB)


PEAKS = dict(end_to_end=23, recomputed=13, exact=13, joint=14, local=10)


@pytest.mark.parametrize(
    ('budget', 'sentence', 'recommended'),
    [
        (32, 'End-to-end training fits a card of 32 GiB as it is.', None),
        (24, 'Only recomputed, exact, joint and local steps fit a card of 24', 'exact'),
        (12, 'Only local steps fit a card of 12 GiB; end-to-end', 'local'),
        (8, 'Nothing fits a card of 8 GiB, of which .*: local steps need least', None),
        (None, None, 'exact'),
    ],
)
def test_what_fits_is_a_sentence(budget, sentence, recommended):
    plan = plan_of(budget, **PEAKS)
    assert getattr(plan.recommended, 'name', None) == recommended
    if sentence:
        assert re.match(sentence, card_report.verdict(plan))


def test_the_smallest_card_leaves_room_for_what_is_no_tensor():
    assert need('exact', 6.6).card == 8
    assert need('exact', 6.7).card == 12
    assert need('exact', 76).card is None
    assert usable(2**29) == 0


def test_the_tool_writes_config_picture_and_record(tmp_path, capsys):
    out, picture, record = (tmp_path / x for x in ('new.py', 'a.png', 'b.json'))
    arguments = [DEMO, '--size', *SIZE, '--batch', BATCH, '--out', out]
    arguments += ['--picture', picture, '--record', record, '--check']
    run_script('plan_partition', *arguments)
    shown = capsys.readouterr().out
    assert 'exact' in shown
    assert 'end_to_end_from=0' in shown
    local = load_config(out).optim_wrapper.local_learning
    assert local.partition.type == 'CutPartition'
    assert local.end_to_end_from == 0
    assert matplotlib.image.imread(picture).std() > 0.1  # not blank
    stored = json.loads(record.read_text())
    assert {need['name'] for need in stored['needs']} >= {'end-to-end', 'exact'}
    for row in stored['needs']:
        assert row['peak'] == row['cpu_peak']  # the same operators on a GPU
        assert abs(row['cpu_peak'] / row['computed_peak'] - 1) < 0.05
        assert sum(row['kinds'].values()) == row['peak']


def test_stock_configs_get_local_learning(tmp_path, capsys):
    out = tmp_path / 'new.py'
    name = 'mmpretrain::resnet/resnet18_8xb16_cifar10.py'
    run_script('plan_partition', name, '--size', 32, 32, '--batch', 4, '--out', out)
    capsys.readouterr()
    cfg = load_config(out)
    assert cfg.optim_wrapper.type == 'LocalLearningOptimWrapper'
    assert len(cfg.optim_wrapper.local_learning.partition.cuts) == 3
    assert cfg.default_hooks.memory_bank.type == 'MemoryBankHook'


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (
            ['--budget', 'much'],
            "--budget must be a size such as '6GiB'",
        ),
        (['--out', 'x.py', '--cfg-options', 'a=1'], '2'),
        (['--num-modules', 2, '--record', 'x.json'], '2'),
    ],
)
def test_what_cannot_be_asked_is_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit, match=message):
        run_script('plan_partition', DEMO, '--size', 32, 32, *arguments)
    capsys.readouterr()


def test_what_is_known_of_gpus_is_told():
    known = published_memory('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py')
    assert known == 3.8  # GB, two images of 800 x 1333
    assert published_memory('mmdet::retinanet/no_such_config.py') is None
    assert published_memory('mmpretrain::resnet/resnet18_8xb16_cifar10.py') is None
    assert published_memory(DEMO) is None


def test_crowded_images_need_more():
    cfg = load_config('mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py')
    counters = [Counter(cfg, (1, 3, 160, 240), objects) for objects in (1, 1000)]
    few, many = (c.count('end-to-end', 'end-to-end').peak for c in counters)
    assert many > 1.2 * few
