"""The pages of options and of partitions: all options, and the ladders' numbers."""

import inspect
import json
import re
from pathlib import Path

import pytest
from mmengine import registry as root

from man_mm.engine.options import DEFAULTS

RESULTS, MIB = Path('benchmarks/results'), 2**20
OPTIONS, PARTITIONS = Path('docs/options.md'), Path('docs/partitions.md')
# What others than a config give to a component.
GIVEN = {'site', 'optimizer', 'learner', 'measure', 'sharded', 'module'}
GIVEN |= {'optim_wrapper_cfg', 'paramwise_cfg'}
REGISTRIES = ('MODELS', 'HOOKS', 'OPTIM_WRAPPERS', 'OPTIM_WRAPPER_CONSTRUCTORS')
REGISTRIES += ('TASK_UTILS', 'MODEL_WRAPPERS', 'DATASETS', 'RUNNERS')


def components():
    """Components that configs name, with the options that a config may give."""
    for registry in REGISTRIES:
        for name, component in getattr(root, registry).module_dict.items():
            if component.__module__.startswith('man_mm.'):
                yield name, own_options(component)


def own_options(component):
    function = component.__init__ if inspect.isclass(component) else component
    if not getattr(function, '__module__', '').startswith('man_mm.'):
        return {}  # inherited from OpenMMLab, or none
    return {
        name: None if parameter.default is parameter.empty else repr(parameter.default)
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        and name not in {'self', *GIVEN, *DEFAULTS}
    }


def documented_options(text):
    """By heading of the page: options with their defaults, None if required."""
    parts = re.split(r'^### `?(\w+)`?.*$', text, flags=re.MULTILINE)
    sections = {}
    for name, section in zip(parts[1::2], parts[2::2], strict=True):
        section = re.split(r'^## ', section, flags=re.MULTILINE)[0]
        rows = re.findall(r'^\| `(\w+)` \| (?:`([^`]+)`|required) \|', section, re.M)
        sections[name] = {
            option: repr(eval(default)) if default else None for option, default in rows
        }
    return sections


def wrong_options(text):
    """What the page lacks, has too much, or tells wrong."""
    expected = {'local_learning': {k: repr(v) for k, v in DEFAULTS.items()}}
    expected.update(components())
    found = documented_options(text)
    for name in sorted({*expected, *found}):
        if name not in found or name not in expected:
            yield name
        else:
            options = {*expected[name], *found[name]}
            for option in sorted(options):
                default = expected[name].get(option, 'no such option')
                if option not in found[name] or found[name][option] != default:
                    yield f'{name}.{option}'


def test_every_option_stands_in_the_page_with_its_default():
    assert list(wrong_options(OPTIONS.read_text())) == []


def test_options_that_are_missing_or_wrong():
    text = OPTIONS.read_text()
    lacks = re.sub(r'^\| `clip` .*\n', '', text, flags=re.MULTILINE)
    assert list(wrong_options(lacks)) == ['local_learning.clip']
    wrong = text.replace("| `fusion` | `'concatenate'`", "| `fusion` | `'add'`")
    assert list(wrong_options(wrong)) == ['MANClsHead.fusion']
    extra = text.replace('| `fusion` |', '| `fission` | `1` |\n| `fusion` |')
    assert list(wrong_options(extra)) == ['MANClsHead.fission']
    gone = text.replace('### `InfoProHead`', '### Other')
    assert 'InfoProHead' in list(wrong_options(gone))
    assert (
        DEFAULTS['update']
        == inspect.signature(root.OPTIM_WRAPPERS.get('LocalLearningOptimWrapper'))
        .parameters['update']
        .default
    )


# The ladder


def ladder_tables(text):
    """Tables under each link to results of a ladder: rows of cells by column."""
    parts = re.split(r'\(\.\./benchmarks/results/(ladder/\w+)\)', text)
    for folder, part in zip(parts[1::2], parts[2::2], strict=True):
        for table in re.findall(r'(?:^\|.*\n)+', part, re.MULTILINE):
            header, _, *rows = [
                [cell.strip() for cell in line.strip('|\n').split('|')]
                for line in table.splitlines()
            ]
            if 'scheme' in header:
                yield folder, [dict(zip(header, row, strict=True)) for row in rows]


def wrong_rows(text):
    """Rows of ladders that differ from the result file of their scheme."""
    for folder, rows in ladder_tables(text):
        records = [json.loads(p.read_text()) for p in (RESULTS / folder).glob('*.json')]
        by_scheme = {record['scheme']: record for record in records}
        above = None
        for row in rows:
            record = by_scheme[row['scheme'].strip('`')]
            peak = record['peak'] / MIB
            expected = {
                'peak, MiB': f'{peak:.1f}',
                'change': ''
                if above is None
                else f'{round(peak - above, 1) + 0.0:+.1f}',
                'ratio': f'{record["peak_ratio"]:.3f}',
                'FLOPs': f'{record["flops_ratio"]:.3f}',
            }
            above = peak
            if any(row.get(key, value) != value for key, value in expected.items()):
                yield row


@pytest.mark.parametrize('page', [OPTIONS, PARTITIONS], ids=str)
def test_ladders_are_the_result_files(page):
    text = page.read_text()
    count = sum(len(rows) for _, rows in ladder_tables(text))
    assert count >= 5
    assert list(wrong_rows(text)) == []
    for column in (r'\d+\.\d', r'\d\.\d{3}'):  # peaks; ratios and FLOPs
        changed = re.sub(rf'\| ({column}) \|', r'| 7\1 |', text)
        assert len(list(wrong_rows(changed))) == count
