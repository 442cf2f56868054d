"""What cards a config trains on: table, picture, sentence and record."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.table import Table

from .card_needs import CARDS, CONTEXT, GAPS, GIB, KINDS, OBJECTS, Need, usable
from .card_plan import CardPlan
from .published_memory import published_memory
from .records import provenance, versions
from .schemes import END_TO_END

COLOURS = dict(
    zip(
        KINDS,
        ('tab:gray', 'tab:purple', 'tab:green', 'tab:blue', 'tab:red'),
        strict=True,
    )
)
_SHORT = dict(
    zip(
        KINDS,
        ('weights', 'state', 'grads', 'activations', 'other'),
        strict=True,
    )
)
MEANING = (
    'K modules; weights with auxiliary heads and buffers; other: temporaries; card: '
    f'the smallest that fits. All but {CONTEXT / GIB:.0f} GiB of it, for the context '
    f'and the workspaces of CUDA, and {GAPS:.0%} of the rest, for gaps between blocks, '
    'have to be enough. FLOPs as a share of those of end-to-end training.'
)


def make_table(plan: CardPlan, title: str) -> Table:
    """A table of what each way to train needs, in GiB."""
    table = Table(title=title, caption=MEANING, caption_justify='left')
    table.box, table.pad_edge, table.collapse_padding = SIMPLE, False, True
    table.add_column('', no_wrap=True)
    for name in ('K', *_SHORT.values(), 'peak', 'FLOPs', 'card'):
        table.add_column(name, justify='right')
    for need in plan.needs:
        table.add_row(
            need.name,
            str(len(need.cuts) + 1),
            *(f'{need.kinds[kind] / GIB:.2f}' for kind in KINDS),
            f'{need.peak / GIB:.2f}',
            f'{need.flops / plan.needs[0].flops:.2f}',
            card_name(need.card),
        )
    return table


def card_name(card: int | None) -> str:
    """The smallest card, in words."""
    return f'{card} GB' if card else f'> {CARDS[-1]} GB'


def verdict(plan: CardPlan) -> str:
    """What fits the card that was asked about, in a sentence."""
    if plan.budget is None:
        raise ValueError('No card was asked about: give --budget.')
    card = f'a card of {plan.budget / GIB:.3g} GiB'
    fitting = [need.name for need in plan.needs if need.fits(plan.budget)]
    if END_TO_END in fitting:
        return f'End-to-end training fits {card} as it is.'
    if fitting:
        return f'Only {listed(fitting)} steps fit {card}; end-to-end training does not.'
    least = min(plan.needs, key=lambda need: need.peak)
    return (
        f'Nothing fits {card}, of which tensors can have '
        f'{usable(plan.budget) / GIB:.2f} GiB: {least.name} steps need least, '
        f'{least.peak / GIB:.2f} GiB. Train on fewer or smaller images, or set '
        'local_learning.micro_batch_size.'
    )


def listed(words: Sequence[str]) -> str:
    """Words with commas and an 'and'.

    Examples:
        >>> from man_mm.benchmark.card_report import listed
        >>> listed(['exact', 'joint', 'local'])
        'exact, joint and local'
    """
    *first, last = words
    return f'{", ".join(first)} and {last}' if first else last


def draw(path: Path, plan: CardPlan, title: str) -> None:
    """Draws the needs as bars, and the cards as lines.

    Args:
        path: PNG file.
        plan: The needs.
        title: Title of the picture.
    """
    figure = Figure(figsize=(8.5, 4.5))
    axes = figure.subplots()
    names = [f'{n.name}\n{card_name(n.card)}' for n in plan.needs]
    bottom = [0.0] * len(names)
    for kind in KINDS:
        sizes = [need.kinds[kind] / GIB for need in plan.needs]
        axes.bar(names, sizes, 0.7, bottom, label=kind, color=COLOURS[kind])
        bottom = [a + b for a, b in zip(bottom, sizes, strict=True)]
    top = 1.12 * max(bottom)
    for card in CARDS:
        if (limit := usable(card * GIB) / GIB) < top:
            axes.axhline(limit, color='black', lw=0.7, ls=':')
            place = dict(xycoords=('axes fraction', 'data'), fontsize=8)
            axes.annotate(f'{card} GB', (1, limit), ha='right', va='bottom', **place)
    if plan.budget is not None:
        label = f'usable of {plan.budget / GIB:g} GiB'
        axes.axhline(usable(plan.budget) / GIB, color='black', ls='--', label=label)
    box = dict(facecolor='white', edgecolor='none', pad=1)
    for index, peak in enumerate(bottom):
        place = dict(xytext=(0, 4), textcoords='offset points', ha='center')
        axes.annotate(f'{peak:.2f}', (index, peak), bbox=box, **place)
    axes.set(ylim=(0, top), ylabel='all tensors at the peak, GiB', title=title)
    axes.spines[['top', 'right']].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    place = dict(loc='upper left', bbox_to_anchor=(1, 1), frameon=False)
    axes.legend(handles[::-1], labels[::-1], **place)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, bbox_inches='tight')


def check_table(without: Sequence[Need], computed: Sequence[Need]) -> Table:
    """A table of counted peaks, without and with computing."""
    table = Table(title="peak by the CPU's operators, without and with computing, GiB")
    for column in ('', 'without', 'with', 'error'):
        table.add_column(column, justify='right' if column else 'left')
    for need, real in zip(without, computed, strict=True):
        sizes = f'{need.peak / GIB:.3f}', f'{real.peak / GIB:.3f}'
        table.add_row(need.name, *sizes, f'{need.peak / real.peak - 1:+.2%}')
    return table


def write_record(
    path: Path,
    plan: CardPlan,
    checked: tuple[Sequence[Need], Sequence[Need]] | None,
    seconds: float,
) -> None:
    """Writes needs as JSON.

    Args:
        path: The file.
        plan: The needs.
        checked: What `count_on_cpu` returned, if it was called.
        seconds: How long counting took.
    """
    batch, _, *size = plan.shape
    words = ['mim', 'run', 'man_mm', 'plan_partition', plan.config]
    words += ['--size', *map(str, size), '--batch', str(batch)]
    if plan.budget is not None:
        words += ['--budget', str(plan.budget)]
    if plan.objects != OBJECTS:
        words += ['--objects', str(plan.objects)]
    if plan.options:
        words += ['--cfg-options', *plan.options]
    words += ['--check'] * bool(checked)
    needs = [
        dict(
            name=need.name,
            scheme=need.scheme,
            cuts=list(need.cuts),
            recompute=list(need.recompute),
            kinds=need.kinds,
            peak=need.peak,
            flops=need.flops,
            card=need.card,
        )
        for need in plan.needs
    ]
    if checked:
        for need, without, computed in zip(needs, *checked, strict=True):
            need.update(cpu_peak=without.peak, computed_peak=computed.peak)
    record = dict(
        config=plan.config,
        options=plan.options,
        size=size,
        batch=batch,
        budget=plan.budget,
        objects=plan.objects,
        published_gb=published_memory(plan.config),
        needs=needs,
        seconds=seconds,
        versions=versions(),
        **provenance(),
        command=shlex.join(words),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + '\n')


def card_rows(named: Iterable[tuple[str, dict]]) -> Iterable[str]:
    """Rows of a table in the documents: peaks, and cards.

    Args:
        named: Records with their names.
    """
    for name, record in named:
        size = '×'.join(map(str, record['size']))
        cells = [
            f'{need["peak"] / GIB:.1f}, {card_name(need["card"])}'
            for need in record['needs']
        ]
        yield f'| {name}, {record["batch"]} × {size} | {" | ".join(cells)} |'


def error_rows(named: Iterable[tuple[str, dict]]) -> Iterable[str]:
    """Rows of a table in the documents: errors against steps that were computed."""
    for name, record in named:
        size = '×'.join(map(str, record['size']))
        cells = [
            f'{need["cpu_peak"] / need["computed_peak"] - 1:+.2%}'
            for need in record['needs']
        ]
        seconds = f'{record["seconds"]:.0f} s'
        cells = ' | '.join([*cells, seconds])
        yield f'| {name}, {record["batch"]} × {size} | {cells} |'


def published_rows(named: Iterable[tuple[str, dict]]) -> Iterable[str]:
    """Rows of a table in the documents: counted peaks, and readings on GPUs."""
    for _, record in named:
        name = Path(record['config'].partition('::')[2]).stem
        counted = record['needs'][0]['peak'] / GIB
        error = counted / record['published_gb'] - 1
        yield f'| {name} | {counted:.1f} | {record["published_gb"]} | {error:+.0%} |'
