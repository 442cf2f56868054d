"""Tables in documents that are no entries of the leaderboard."""

import json
import shutil
from pathlib import Path

import pytest

from man_mm.leaderboard.dial_table import dial_rows, scheme_shares
from man_mm.leaderboard.documents import update_documents
from man_mm.leaderboard.tables import KINDS, TableError

KEY = 'optim_wrapper.local_learning.'


def trainings(scores, **more):
    """Results of trainings with a seed for each score, by name."""
    return [
        dict(
            name=name,
            position=position,
            seed=seed,
            metrics={'coco/bbox_mAP': value},
            **more.get(name.replace(' ', '_'), {}),
        )
        for position, (name, values) in enumerate(scores.items())
        for seed, value in enumerate(values)
    ]


def test_differences_are_paired_by_seed_and_have_verdicts(tmp_path):
    scores = {'end-to-end': (0.20, 0.22), 'MAN': (0.21, 0.231)}
    for record in trainings(scores):
        path = tmp_path / f'{record["name"]}_seed{record["seed"]}.json'
        path.write_text(json.dumps(record))
    head, line, row = KINDS['differences'](tmp_path)
    assert head.startswith('| coco/bbox_mAP to end-to-end | seeds | mean |')
    assert head.count('|') == line.count('|') == row.count('|')
    assert row.startswith('| MAN | 2 | +0.0105 | +0.004') and row.endswith('| better |')


@pytest.mark.parametrize(
    'options, shares',
    [
        ([], {'local': 1}),
        (['end_to_end_from=0.0'], {'exact': 1}),
        (['end_to_end_from=0.0', 'local_loss_weight=balanced'], {'joint': 1}),
        (
            ['end_to_end_from=0.25', 'local_loss_weight=0.1'],
            {'local': 0.25, 'joint': 0.75},
        ),
        (['end_to_end_from=0.5', 'local_loss_weight=0'], {'local': 0.5, 'exact': 0.5}),
    ],
)
def test_shares_of_a_training(options, shares):
    result = dict(cuts=['layer1'], options=[f'{KEY}{option}' for option in options])
    assert scheme_shares(result) == shares


def test_dial_shows_costs_of_mixtures_beside_accuracy():
    mixture = dict(cuts=['layer1'], options=[f'{KEY}end_to_end_from=0.25'])
    results = trainings(
        {'plain': (0.20, 0.22), 'MAN': (0.19, 0.20), 'dial': (0.21, 0.23)},
        plain=dict(cuts=[]),
        MAN=dict(cuts=['layer1'], options=[]),
        dial=mixture,
    )
    costs = {
        'end-to-end': (1, 1, 1),
        'end-to-end+stages': (0.5, 1.2, 1.3),
        'exact': (0.5, 1.3, 1.3),
        'joint': (0.5, 1.4, 1.4),
        'local': (0.4, 1.1, 1.1),
    }
    records = [
        dict(scheme=scheme, peak_ratio=peak, time_ratio=time, flops_ratio=flops)
        for scheme, (peak, time, flops) in costs.items()
    ]
    head, rows = dial_rows(results, records)
    assert {len(row) for row in rows} == {len(head)}
    first, strongest, exact, joint, dial, local = rows
    assert first[:5] == ['plain', '1.000', '1.000', '1.000', '0.2100 ± 0.0141']
    assert strongest[0] == 'end-to-end+stages' and strongest[4] == 'its gradients'
    assert exact[:5] == ['exact', '0.500', '1.300', '1.300', 'its gradients']
    assert joint[0] == 'joint' and joint[4] == ''  # nobody trained it
    assert dial[:4] == ['dial', '0.500', '1.250', '1.250']  # 1.1 / 4 + 1.3 * 3 / 4
    assert dial[5:7] == ['2', '+0.0100']
    assert local[:4] == ['MAN', '0.400', '1.100', '1.100']


def test_the_dial_asks_for_times(tmp_path):
    shutil.copytree('benchmarks/results/dial', tmp_path / 'dial')
    for path in (tmp_path / 'dial').rglob('*.json'):
        path.write_text(json.dumps(json.loads(path.read_text()) | dict(seconds=[])))
    trained = Path('benchmarks/results/training/srresnet_x2_dial')
    steps = 'dial/srresnet_x2_man_photos_24x24_b4'
    assert KINDS['dial'](trained, 'benchmarks/results' / Path(steps))  # control
    with pytest.raises(TableError, match=f'{steps} has no times'):
        KINDS['dial'](trained, tmp_path / steps)


def test_the_number_of_folders_is_checked(tmp_path):
    text = '<!-- results: dial training/one -->\n<!-- end of results -->\n'
    (tmp_path / 'README.md').write_text(text)
    with pytest.raises(TableError, match='dial takes 2 folders'):
        update_documents(tmp_path, [])
