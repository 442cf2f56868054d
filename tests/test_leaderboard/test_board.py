"""Entries of the leaderboard: made from result files, and refused with the reason."""

import json
import shutil
import statistics
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from scripts import run_script

from man_mm.benchmark.training_runs import slug
from man_mm.leaderboard import board
from man_mm.leaderboard.adding import make_entries
from man_mm.leaderboard.charts import nice_ticks
from man_mm.leaderboard.documents import update_metafile
from man_mm.leaderboard.entries import (
    DEMO_CONFIG,
    EntryError,
    compare_with_baseline,
    derive,
    read_entries,
)
from man_mm.leaderboard.entry_tables import claims_table, entry_table
from man_mm.leaderboard.site import make_rows
from man_mm.leaderboard.tables import TableError
from man_mm.leaderboard.validation import find_errors

RESULTS = Path('benchmarks/results')
STEP = 'retinanet_r50_man_coco_608x972_b1'
RUNS = 'edsr_x2_photos'


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A repository with two comparisons and what a paper reports, to be changed."""
    names = [f'detection/{STEP}-*.json', f'super-resolution/{RUNS}-*.json']
    names += ['classification/reported-infopro-*.json']
    for pattern in (*names, f'{STEP}/*.json', f'training/{RUNS}/*.json'):
        for path in RESULTS.glob(pattern):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, tmp_path / path)
    shutil.copy('benchmarks/entry.schema.json', tmp_path / 'benchmarks')
    (tmp_path / 'configs').symlink_to(Path('configs').resolve())
    monkeypatch.chdir(tmp_path)
    return Path('.')


def load(path):
    return json.loads(path.read_text())


def edit(path, **changes):
    """Changes fields of a JSON file; a dot leads into an object, None removes."""
    content = load(path)
    for place, value in changes.items():
        *outer, key = place.split('__')
        target = content
        for name in outer:
            target = target[name]
        if value is None:
            del target[key]
        else:
            target[key] = value
    path.write_text(json.dumps(content))


def test_the_entries_of_the_project_are_valid():
    assert board.validate(Path('.')) == []


LOCAL = RESULTS / f'detection/{STEP}-local.json'
MAN = RESULTS / f'super-resolution/{RUNS}-man.json'
PAPER = RESULTS / 'classification/reported-infopro-imagenet-r101-infopro.json'
BASE = f'{STEP}-end-to-end'


@pytest.mark.parametrize(
    ('path', 'changes', 'reason'),
    [
        (LOCAL, dict(model=None), "'model' is a required property"),
        (LOCAL, dict(command=None), "'command' is a required property"),
        (LOCAL, dict(colour='blue'), "'colour' was unexpected"),
        (LOCAL, dict(batch='1'), "batch: '1' is not of type 'integer'"),
        (LOCAL, dict(task='segmentation'), "task: 'segmentation' is not one of"),
        (LOCAL, dict(task='classification'), 'is not the name of the folder'),
        (LOCAL, dict(id='other'), "id: 'other' is not the name of the file"),
        (LOCAL, dict(date='2026-13-01'), "date: '2026-13-01' is not a 'date'"),
        (LOCAL, dict(memory__peak=-1), 'memory.peak: -1 is less than the minimum'),
        (LOCAL, dict(memory__split__bank=5), 'do not add up to the peak'),
        (LOCAL, dict(memory__allocated=9, memory__reserved=8), 'more is allocated'),
        (LOCAL, dict(memory__allocated=9, memory__reserved=10), 'only CUDA has'),
        (LOCAL, dict(step_seconds__median=99.0), 'not between least and greatest'),
        (LOCAL, dict(step_seconds__median=0), 'step_seconds.median: 0 is less than'),
        (LOCAL, dict(modules__cuts=['backbone.layer2']), '1 cuts do not make K=3'),
        (LOCAL, dict(flops=7), 'flops: 7, but the sources say 804905375488'),
        (LOCAL, dict(batch=2), 'batch: 2, but the sources say 1'),
        (LOCAL, dict(command='python /home/me/x.py'), '/home/me/x.py exists on one'),
        (LOCAL, dict(sources=[]), 'sources: []'),
        (LOCAL, dict(sources=['none.json']), 'none.json does not exist'),
        (LOCAL, dict(baseline='none'), "baseline: there is no entry 'none'"),
        (LOCAL, dict(baseline=f'{STEP}-local'), 'is not end-to-end training'),
        (LOCAL, dict(dataset='COCO'), "other settings, dataset 'synthetic' instead"),
        (LOCAL, dict(hardware='a laptop'), "has other settings, hardware 'AMD"),
        (LOCAL, dict(metrics=dict(mAP=dict(mean=0.5))), 'mAP: is not in the sources'),
        (MAN, dict(metrics__PSNR__mean=150), '150 is greater than the maximum of 100'),
        (MAN, dict(metrics__SSIM__mean=91.0), '91.0 is greater than the maximum of 1'),
        (MAN, dict(metrics__PSNR__std=-0.1), '-0.1 is less than the minimum of 0'),
        (MAN, dict(metrics__PSNR__seeds=[0, 0, 1]), 'a seed counts twice'),
        (MAN, dict(metrics__PSNR__seeds=[0]), '1 seeds and std'),
        (MAN, dict(metrics__BLEU=dict(mean=1)), "'BLEU' was unexpected"),
        (MAN, dict(length=99), 'length: 99, but the sources say 1200'),
        (PAPER, dict(reference=None), "'reference' is a required property"),
        (PAPER, dict(sources=['a.json']), "sources: ['a.json']"),
        (PAPER, dict(relative__memory=0), 'relative.memory: 0 is less than'),
        (PAPER, dict(modules__K=0), 'modules.K: 0 is less than the minimum of 1'),
    ],
)
def test_bad_entries_are_refused_with_the_reason(root, path, changes, reason):
    assert board.validate(root) == []
    edit(path, **changes)
    errors = board.validate(root)
    assert reason in '\n'.join(errors)
    assert all(error.startswith('benchmarks/results/') for error in errors)


def test_a_baseline_is_needed_and_is_end_to_end(root):
    edit(LOCAL, baseline='x')
    text = LOCAL.read_text().replace('"x"', 'null')
    LOCAL.write_text(text)
    assert 'baseline: missing' in board.validate(root)[0]
    LOCAL.write_text('{')
    assert 'is not valid JSON' in board.validate(root)[0]


def test_a_changed_result_file_is_noticed(root):
    step = RESULTS / STEP / 'local.json'
    known = statistics.median(json.loads(step.read_text())['seconds'])
    edit(step, seconds=[1.0, 2.0, 3.0])
    edit(RESULTS / 'training' / RUNS / 'man_seed0.json', seed=7)
    errors = '\n'.join(board.validate(root))
    assert f'step_seconds.median: {known}, but the sources say 2.0' in errors
    assert 'metrics.PSNR.seeds: [0, 1, 2], but the sources say [1, 2, 7]' in errors
    (RESULTS / STEP / 'local.json').unlink()
    assert 'local.json does not exist' in '\n'.join(board.validate(root))


def test_adding_again_changes_nothing(root, mmagic):
    before = {path: path.read_text() for path in read_entries(root)}
    assert len(board.add([], root)) == 14
    assert {path: path.read_text() for path in read_entries(root)} == before


def test_new_results_become_entries(root, capsys):
    """As of a comparison of classifiers, with another metric."""
    folder = RESULTS / 'training/fashion_k4'
    folder.mkdir()
    for name, config, options, position, accuracy, heads in (
        ('end-to-end', 'end_to_end/resnet32_fashion', [], 0, 88.0, 0),
        ('dgl K 4', 'dgl/resnet32_k4_dgl_fashion', [], 1, 87.0, 3),
        (
            'less',
            'end_to_end/resnet32_fashion',
            ['model.backbone.with_cp=True'],
            2,
            88,
            0,
        ),
    ):
        for seed in (0, 1):
            record = load(RESULTS / f'training/{RUNS}/man_seed0.json')
            losses = [f'module{i + 1}/loss' for i in range(heads)]
            command = f'python tools/compare.py "{name}=x.py" --seeds {seed}'
            record |= dict(
                name=name,
                config=f'configs/{config}.py',
                options=options,
                seed=seed,
                position=position,
                metrics={'accuracy/top1': accuracy + seed, 'other': 1.0},
                curves=dict.fromkeys(['step', 'loss', *losses], [1.0, 2.0]),
                command=f'{command} --out {folder}',
                resolution=[28, 28],
                hardware='a machine',
                commit='0123abc-dirty',
                date='2026-11-01',
            )
            path = folder / f'{slug(name)}_seed{seed}.json'
            path.write_text(json.dumps(record))
    run_script('leaderboard', 'add', folder, '--set', 'notes=a note')
    assert '3 entries' in capsys.readouterr().out
    entry = load(RESULTS / 'classification/fashion_k4-dgl-k-4.json')
    assert entry['metrics'] == {'top-1': dict(mean=87.5, std=0.5**0.5, seeds=[0, 1])}
    assert (entry['model'], entry['dataset']) == ('ResNet-32', 'Fashion-MNIST')
    assert (entry['method'], entry['modules']['K']) == ('DGL', 4)
    assert (entry['batch'], entry['resolution']) == (128, [28, 28])
    assert entry['optimizer'].startswith('SGD(lr=0.1, momentum=0.9')
    assert entry['commit'] == '0123abc-dirty' and entry['notes'] == 'a note'
    assert '--seeds 0 1 --out' in entry['command']
    assert entry['baseline'] == 'fashion_k4-end-to-end'
    less = load(RESULTS / 'classification/fashion_k4-less.json')
    assert (less['method'], less['baseline']) == ('checkpointing', entry['baseline'])

    entries = list(read_entries(root).values())
    row = '| ResNet-32 | Fashion-MNIST | DGL | top-1 | 4 | 87.50 ± 0.71 | 88.50 ± 0.71 '
    assert list(entry_table(entries, 'dgl'))[2].startswith(row + '| -1.00 |')
    assert list(entry_table(entries, 'infopro')) == [
        'No result is on the leaderboard yet.'
    ]
    text = Path('configs/dgl/metafile.yml').read_text()
    (with_results,) = (
        model
        for model in yaml.safe_load(update_metafile(text, entries))['Models']
        if model['Name'] == 'resnet32_k4_dgl_fashion'
    )
    (result,) = with_results['Results']
    assert result['Task'] == 'Image Classification'
    assert result['Metrics'] == {'Top 1 Accuracy': 87.5}
    assert update_metafile(update_metafile(text, entries), []) == update_metafile(
        text, []
    )


def test_results_on_cuda_have_bytes_of_the_allocator(root):
    for name in ('local', 'end-to-end'):
        path = RESULTS / STEP / f'{name}.json'
        cuda = dict(allocated=10, reserved=20, requested=9)
        edit(path, device='cuda:0', cuda=cuda, hardware='a GPU', cuts=['a', 'b'])
    # Those that were measured on a CPU have no baseline any more.
    with pytest.raises(EntryError, match="'end-to-end' was not measured beside it"):
        make_entries([RESULTS / STEP], {}, root)
    for path in (RESULTS / STEP).glob('*.json'):
        if path.stem not in ('local', 'end-to-end'):
            path.unlink()
    made = make_entries([RESULTS / STEP], {}, root)
    entry = made[LOCAL]
    assert (entry['device'], entry['hardware']) == ('cuda', 'a GPU')
    assert (entry['memory']['allocated'], entry['memory']['reserved']) == (10, 20)
    assert entry['modules'] == dict(K=3, cuts=['a', 'b'])
    assert find_errors(made, root) == []


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['add', 'none.json'], 'none.json does not exist'),
        (['add', 'outside'], 'put it there, to be published'),
        (['add', 'benchmarks/results/empty'], 'has no result files'),
        (
            ['add', 'benchmarks/results/other'],
            'was not written by benchmark',
        ),
        (['add', f'benchmarks/results/{STEP}', '--set', 'batch=9'], 'says itself what'),
        (['add', f'benchmarks/results/{STEP}', '--set', 'batch'], 'write KEY=VALUE'),
        (['add', f'benchmarks/results/{STEP}', '--set', 'colour=1'], 'unexpected'),
        (['add', 'benchmarks/results/digits_seed0.json'], 'has accuracy only'),
        (
            ['add', 'benchmarks/results/alone'],
            "'end-to-end' was not measured beside it",
        ),
        (['add', 'bad.json'], "'model' is a required property"),
        (['add', 'task.json'], "task: 'golf' is not one of"),
    ],
)
def test_what_cannot_be_added_is_refused(root, request, capsys, arguments, message):
    for name in ('outside', 'benchmarks/results/empty', 'benchmarks/results/other'):
        Path(name).mkdir()
    shutil.copytree(RESULTS / STEP, RESULTS / 'alone')
    (RESULTS / 'alone/end-to-end.json').unlink()
    (RESULTS / 'other/a.json').write_text('{"a": 1}')
    shutil.copy(request.config.rootpath / RESULTS / 'digits_seed0.json', RESULTS)
    Path('bad.json').write_text('{"kind": "reported", "task": "detection"}')
    Path('task.json').write_text('{"kind": "reported", "task": "golf"}')
    before = {path: path.read_text() for path in read_entries(root)}
    with pytest.raises(SystemExit) as error:
        run_script('leaderboard', *arguments)
    assert message in str(error.value) + capsys.readouterr().err
    assert {path: path.read_text() for path in read_entries(root)} == before


def test_a_reported_entry_is_put_where_it_belongs(root):
    entry = load(PAPER) | dict(id='reported-new', method='New')
    Path('new.json').write_text(json.dumps(entry))
    run_script('leaderboard', 'add', 'new.json')
    assert load(RESULTS / 'classification/reported-new.json') == entry
    run_script('leaderboard', 'validate')
    edit(RESULTS / 'classification/reported-new.json', metrics__PSNR=dict(mean=-1))
    with pytest.raises(SystemExit, match='less than the minimum'):
        run_script('leaderboard', 'validate')


def test_times_that_are_not_used_stay_unused(root, mmagic):
    board.add([RESULTS / STEP], root, with_times=False)
    assert load(LOCAL)['step_seconds'] is None
    board.add([], root)
    assert load(LOCAL)['step_seconds'] is None
    assert board.validate(root) == []


def test_adding_a_part_keeps_the_other_sources_of_an_entry(root, request, mmagic):
    demo, seeds = DEMO_CONFIG.split('/')[-1][:-3], range(3)
    digits = [RESULTS / f'digits_seed{seed}.json' for seed in seeds]
    names = [*digits, *RESULTS.glob(f'training/{RUNS}/*.json')]
    step = RESULTS / f'{demo}_96x96_b16'
    shutil.copytree(request.config.rootpath / step, step)
    for path in digits:
        shutil.copy(request.config.rootpath / path, path)
    made = board.add([step, *digits], root)
    local = RESULTS / f'detection/{step.name}-local.json'
    assert local in made and load(local)['metrics']['mAP']['seeds'] == list(seeds)

    before = {path: path.read_text() for path in read_entries(root)}
    for part in ([step], [names[-1]], [RESULTS / STEP], []):
        board.add(part, root)
        after = {path: path.read_text() for path in read_entries(root)}
        assert after == before, part

    sources = [f'{STEP}/local.json', *(path.name for path in digits)]
    edit(LOCAL, sources=sources)
    (error,) = board.validate(root)
    assert f'the tool demo trains {DEMO_CONFIG}, not' in error


def test_sources_of_different_entries_do_not_mix():
    step = load(RESULTS / STEP / 'local.json')
    runs = [load(RESULTS / f'training/{RUNS}/man_seed{seed}.json') for seed in (0, 1)]
    for records in ([step, step], [step, *runs], []):
        with pytest.raises(EntryError, match='an entry comes from one record'):
            derive(records)
    with pytest.raises(EntryError, match='differ in more than the seed'):
        derive([runs[0], runs[1] | dict(config='other.py')])
    with pytest.raises(EntryError, match='no known metric among loss'):
        derive([runs[0] | dict(metrics=dict(loss=1.0))])


def test_ratios_are_to_the_baseline(root):
    entries = {entry['id']: entry for entry in read_entries(root).values()}
    found = compare_with_baseline(entries[f'{STEP}-local'], entries[BASE])
    record = load(RESULTS / STEP / 'local.json')
    for key in ('memory', 'time', 'flops'):
        name = {'memory': 'peak'}.get(key, key)
        assert found[key] == pytest.approx(record[f'{name}_ratio'])
    paper = entries[PAPER.stem]
    found = compare_with_baseline(paper, entries[paper['baseline']])
    assert (found['memory'], found['time']) == (0.612, 1.117)
    assert found['gains'] == {'top-1 error': pytest.approx(0.18)}  # less is better
    rows = make_rows(list(entries.values()))
    assert [row['options'] for row in rows if row['baseline'] == BASE] == [
        *[['bits=8']] * 3,  # local, exact, joint
        [],
        ['lean', 'in-backward', 'stages'],
        [],
        [],
        ['efficient'],
        [],
        ['efficient'],
    ]
    shown = [row['memory'] for row in rows if not row['is_baseline']]
    assert shown == sorted(shown)


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(2, 10))
def test_ticks_are_few_and_hold_the_range(low, width, count):
    ticks = nice_ticks(low, low + width, count)
    assert ticks[0] <= low + 1e-6 * width and ticks[-1] >= low + width * (1 - 1e-6)
    assert 2 <= len(ticks) <= count + 3


def test_claims_stand_beside_their_baselines():
    entries = list(read_entries(Path()).values())
    ids = f'{STEP}-local srresnet_x2_photos-man'
    step, accuracy = list(claims_table(entries, ids))[2:]
    assert step.startswith(
        '| RetinaNet, ResNet-50, one image of 608×972 | MAN | 0.259 |'
    )
    assert step.endswith('|  |  |')
    assert accuracy.endswith('| PSNR 35.450 ± 0.012, photographs | 35.498 ± 0.028 |')
    with pytest.raises(TableError, match='there is no nothing'):
        list(claims_table(entries, 'nothing'))
