"""Tables and the picture of a planned partition."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from man_mm.measure.peaks import KINDS, Plan, PlannedModule

from .records import MIB

BAR = 40  # characters
# Of matplotlib and of rich.
COLOURS = {
    'held': ('tab:gray', 'white'),
    'saved': ('tab:blue', 'blue'),
    'head': ('tab:orange', 'yellow'),
    'gradients': ('tab:green', 'green'),
    'temporaries': ('tab:red', 'red'),
}
MEANING = (
    'held: images, boundary, skip connections and memory bank; '
    'saved: activations for the backward pass; '
    'head: the auxiliary head, or neck, heads and loss of the model; '
    'temporaries: of the unit that is running.'
)


def named(plan: Plan, whole: PlannedModule) -> dict[str, PlannedModule]:
    """All bars of a picture, with short names."""
    names = [f'module {index + 1}' for index in range(len(plan.modules))]
    return dict(zip([*names, 'end to end'], [*plan.modules, whole], strict=True))


def make_table(rows: dict[str, PlannedModule], title: str) -> Table:
    """A table of predicted peaks in MiB."""
    table = Table(title=title, caption=MEANING, caption_justify='left')
    table.box, table.pad_edge, table.collapse_padding = SIMPLE, False, True
    table.add_column('', no_wrap=True)
    table.add_column('up to', no_wrap=True)
    table.add_column('units', justify='right')
    table.add_column('peak', justify='right')
    for kind in KINDS:
        table.add_column(Text(kind, COLOURS[kind][1]), justify='right')
    for name, module in rows.items():
        table.add_row(
            name,
            last_unit(module),
            str(len(module.units)),
            f'{module.peak / MIB:.0f}',
            *(f'{module.kinds[kind] / MIB:.0f}' for kind in KINDS),
        )
    return table


def make_bars(rows: dict[str, PlannedModule]) -> Table:
    """Bars of predicted peaks, in the colours of the table's columns."""
    grid = Table.grid(padding=(0, 1))
    largest = max(module.peak for module in rows.values())
    for name, module in rows.items():
        bar, done = Text(), 0
        for kind in KINDS:
            start = round(done / largest * BAR)
            done += module.kinds[kind]
            length = round(done / largest * BAR) - start
            bar.append('█' * length, COLOURS[kind][1])
        grid.add_row(name, bar.append(f' {module.peak / MIB:.0f}'))
    return grid


def last_unit(module: PlannedModule) -> str:
    """Where a module ends, in short."""
    return module.units[-1].removeprefix('backbone.')


def draw(
    path: Path, rows: dict[str, PlannedModule], title: str, budget: int | None
) -> None:
    """Draws the predicted peaks as bars.

    Args:
        path: PNG file.
        rows: The modules by name.
        title: Title of the picture.
        budget: Bytes to mark by a line, or None.
    """
    modules = list(rows.values())
    names = [f'{name}\nto {last_unit(module)}' for name, module in rows.items()]
    names[-1] = 'end to end'
    figure = Figure(figsize=(2 + 1.2 * len(names), 4.5))
    axes = figure.subplots()
    bottom = [0.0] * len(modules)
    for kind in KINDS:
        sizes = [module.kinds[kind] / MIB for module in modules]
        axes.bar(names, sizes, 0.7, bottom, label=kind, color=COLOURS[kind][0])
        bottom = [a + b for a, b in zip(bottom, sizes, strict=True)]
    if budget is not None:
        axes.axhline(budget / MIB, color='black', ls='--', label='budget')
    box = dict(facecolor='white', edgecolor='none', pad=1)
    for index, peak in enumerate(bottom):
        place = dict(xytext=(0, 4), textcoords='offset points', ha='center')
        axes.annotate(f'{peak:.0f}', (index, peak), bbox=box, **place)
    axes.set(ylim=(0, 1.1 * max(bottom)), ylabel='predicted peak, MiB', title=title)
    axes.spines[['top', 'right']].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    place = dict(loc='upper left', bbox_to_anchor=(1, 1), frameon=False)
    axes.legend(handles[::-1], labels[::-1], **place)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, bbox_inches='tight')


def check_table(plan: Plan, peaks: list[int]) -> Table:
    """A table of predicted and measured peaks."""
    table = Table(title='predicted and measured peak, MiB')
    for column in ('module', 'predicted', 'measured', 'error'):
        table.add_column(column, justify='left' if column == 'module' else 'right')
    rows = [
        (f'module{index + 1}', module.peak, peak)
        for index, (module, peak) in enumerate(zip(plan.modules, peaks, strict=True))
    ]
    for name, predicted, peak in [*rows, ('largest', plan.peak, max(peaks))]:
        if name == 'largest':
            table.add_section()
        error = predicted / peak - 1
        table.add_row(
            name, f'{predicted / MIB:.1f}', f'{peak / MIB:.1f}', f'{error:+.1%}'
        )
    return table
