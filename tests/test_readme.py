"""Numbers and names in the documents are those of the files that they come from."""

import json
import re
from pathlib import Path
from statistics import mean, stdev

import pytest
import yaml

RESULTS = Path('benchmarks/results')
CARD, MEMORY = Path('configs/man/README.md'), Path('docs/memory.md')
README, RESTORATION = Path('README.md'), Path('docs/super_resolution.md')
CARDS = sorted(Path('configs').glob('*/README.md'))
FOLDERS = [path.parent.name for path in CARDS]
PROCESSES = (Path('docs/pipeline.md'), Path('docs/distributed.md'))
DOCUMENTS = (README, CARD, MEMORY, RESTORATION, *PROCESSES)
MIB = 2**20


@pytest.fixture
def step_rows(monkeypatch):
    """Table rows of a folder of results of one of the tools."""
    monkeypatch.syspath_prepend('tools')
    import _comparison
    import compare
    import measure_sharding
    import pipeline
    from _records import markdown_rows, read_records

    def rows(folder):
        assert folder.is_dir(), folder
        if folder.parent.name == 'training':
            return _comparison.markdown_rows(compare.read_folder(folder))
        if folder.name == 'sharding':
            return measure_sharding.markdown_rows(measure_sharding.read_records(folder))
        if folder.name == 'pipeline':
            return pipeline.markdown_rows(pipeline.read_records(folder))
        return markdown_rows(read_records(folder))

    return rows


def kind_rows(folder):
    """Table rows of what peaks consist of, in MiB."""
    for path in sorted(folder.glob('*.json')):
        record = json.loads(path.read_text())
        if 'kinds' not in record:
            continue
        sizes = [f'{size / MIB:.1f}' for size in record['kinds'].values()]
        total = f'{record["peak"] / MIB:.1f} | {record["peak_ratio"]:.3f}'
        yield f'| {record["scheme"]} | {total} | {" | ".join(sizes)} |'


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


def numeric_rows(text):
    """Rows with measured numbers; rows that name a setting are none."""
    found = re.findall(r'^\|.*\d\.\d+.*\|$', text, re.MULTILINE)
    return [row for row in found if '`' not in row]


@pytest.mark.parametrize('document', DOCUMENTS, ids=str)
def test_every_row_of_the_tables_comes_from_a_result(document, step_rows):
    text = document.read_text()
    rows = list(accuracy_rows()) if document == CARD else []
    for folder in {path.parent for path in RESULTS.rglob('*.json')} - {RESULTS}:
        if folder.name in text:
            rows += [*step_rows(folder), *kind_rows(folder)]
    assert rows and missing(step_rows_of(text, step_rows), text) == []
    assert [row for row in numeric_rows(text) if row not in rows] == []
    changed = re.sub(r'(\d)\.(\d)', r'\1.9\2', text)  # control
    assert [row for row in numeric_rows(changed) if row not in rows]


def step_rows_of(text, step_rows):
    """The rows of every folder of results that a document links to."""
    names = re.findall(r'benchmarks/results/([\w./-]+)\)', text)
    folders = [RESULTS / name for name in dict.fromkeys(names)]
    # Results of several batches or models are drawn, not listed.
    return [row for f in folders if any(f.glob('*.json')) for row in step_rows(f)]


@pytest.mark.parametrize('folder', FOLDERS)
def test_the_metafile_lists_every_config(folder):
    text = Path('configs', folder, 'metafile.yml').read_text()
    models = yaml.safe_load(text)['Models']
    listed = {model['Config']: model['Name'] for model in models}
    configs = {str(path): path.stem for path in Path('configs', folder).glob('*.py')}
    assert listed == configs
    card = Path('configs', folder, 'README.md').read_text()
    assert all(name in card for name in configs.values())
    index = yaml.safe_load(Path('model-index.yml').read_text())['Import']
    assert f'configs/{folder}/metafile.yml' in index


def test_links_of_the_documents_exist():
    for document in {*DOCUMENTS, *CARDS}:
        for link in re.findall(r'\]\(([^)#]+)', document.read_text()):
            if not link.startswith('http'):
                assert (document.parent / link).exists(), link
