"""Tables in documents that are no entries of the leaderboard."""

import json

from man_mm.leaderboard.tables import KINDS


def test_differences_are_paired_by_seed_and_have_verdicts(tmp_path):
    scores = {'end-to-end': (0.20, 0.22), 'MAN': (0.21, 0.231)}
    for position, (name, values) in enumerate(scores.items()):
        for seed, value in enumerate(values):
            record = dict(name=name, position=position, seed=seed)
            record['metrics'] = {'coco/bbox_mAP': value}
            (tmp_path / f'{name}_seed{seed}.json').write_text(json.dumps(record))
    head, line, row = KINDS['differences'](tmp_path)
    assert head.startswith('| coco/bbox_mAP to end-to-end | seeds | mean |')
    assert head.count('|') == line.count('|') == row.count('|')
    assert row.startswith('| MAN | 2 | +0.0105 | +0.004') and row.endswith('| better |')
