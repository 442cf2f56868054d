"""Numbers and names in the documents are those of the files that they come from."""

import json
import re
from pathlib import Path
from statistics import mean, median, stdev

import yaml

RESULTS = Path('benchmarks/results')
CARD = Path('configs/man/README.md')
MIB = 2**20


def step_rows(name):
    """Table rows of a result of tools/benchmark.py."""
    results = json.loads((RESULTS / f'{name}.json').read_text())['results']
    base = results['end-to-end']
    for scheme, row in results.items():
        seconds = median(row['seconds'])
        yield (
            f'| {scheme} | {row["peak"] / MIB:.0f} MiB '
            f'| {row["peak"] / base["peak"]:.2f} | {seconds:.2f} s '
            f'| {seconds / median(base["seconds"]):.2f} |'
        )


def accuracy_rows():
    """Table rows of the results of tools/demo.py, and their mean and spread."""
    records = [
        json.loads(path.read_text()) for path in sorted(RESULTS.glob('digits_*.json'))
    ]
    for record in records:
        for scheme, row in record['results'].items():
            cells = f'{row["mAP"]:.3f} | {row["AP50"]:.3f}'
            yield f'| {record["seed"]} | {scheme} | {cells} |'
    for scheme in records[0]['results']:
        rows = [record['results'][scheme] for record in records]
        cells = [
            f'{mean(values):.3f} ± {stdev(values):.3f}'
            for values in ([r['mAP'] for r in rows], [r['AP50'] for r in rows])
        ]
        yield f'| mean | {scheme} | {cells[0]} | {cells[1]} |'


def missing(rows, text):
    return [row for row in rows if row not in text]


def test_every_row_of_the_tables_comes_from_a_result():
    readme, card = Path('README.md').read_text(), CARD.read_text()
    tables = [
        (readme, list(step_rows('retinanet_r50_man_coco_608x972'))),
        (card, [*accuracy_rows(), *step_rows('retinanet_r18_man_demo_96x96')]),
    ]
    for text, rows in tables:
        assert missing(rows, text) == []
        numeric = re.findall(r'^\|.*\d\.\d+.*\|$', text, re.MULTILINE)
        known = [row for row in numeric if row in rows or '`' in row or '_mult' in row]
        assert sorted(known) == sorted(numeric)
        changed = text.replace('.', '.9', 1000)  # control
        assert missing(rows, changed) == rows


def test_the_metafile_lists_every_config():
    models = yaml.safe_load(Path('configs/man/metafile.yml').read_text())['Models']
    listed = {model['Config']: model['Name'] for model in models}
    configs = {str(path): path.stem for path in Path('configs/man').glob('*.py')}
    assert listed == configs
    assert all(name in CARD.read_text() for name in configs.values())


def test_links_of_the_documents_exist():
    for document in (Path('README.md'), CARD):
        for link in re.findall(r'\]\(([^)#]+)', document.read_text()):
            if not link.startswith('http'):
                assert (document.parent / link).exists(), link
