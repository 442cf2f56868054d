"""The picture of recorded training steps: bytes over time, module by module."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .records import MIB

TITLES = {
    'end-to-end': (
        'End-to-end',
        'Activations of all modules wait for the one backward pass at the end.',
    ),
    'exact': (
        'Exact steps',
        'Modules run without activations; from the last to the first, each runs again '
        'and is back-propagated.',
    ),
    'joint': (
        'Joint steps',
        'Exact steps, to which each module adds its own loss with a small weight.',
    ),
    'local': (
        'Local learning',
        'Each module is back-propagated by its own loss before the next one starts.',
    ),
}
HATCH = '////'
COLOURS = ('#1b6ca8', '#2a9d8f', '#e9a23b', '#c8553d', '#7b4b94', '#5a7d2b')
LOSS_COLOUR = '0.25'


def draw(records: dict, path: Path) -> None:
    """Draws the recorded steps, one above the other, on the same axes."""
    steps = records['steps']
    figure = Figure(figsize=(8, 2.6 + 1.9 * len(steps)), layout='constrained')
    panels = figure.subplots(len(steps), 1, sharex=True, sharey=True, squeeze=False)
    panels = panels.ravel()
    top = max(m[1] for moments in steps.values() for m in moments) / MIB
    for panel, (scheme, moments) in zip(panels, steps.items(), strict=True):
        _draw_step(panel, moments)
        peak = max(moments, key=lambda moment: moment[1])
        panel.axhline(peak[1] / MIB, color='0.35', lw=0.9, ls=':')
        title, text = TITLES[scheme]
        panel.set_title(
            f'{title}: peak {peak[1] / MIB:.0f} MiB\n',
            loc='left',
            fontsize=12,
            weight='bold',
        )
        panel.text(0, 1.03, text, transform=panel.transAxes, fontsize=9.5)
        panel.set(ylabel='MiB alive', ylim=(0, 1.06 * top))
        panel.spines[['top', 'right']].set_visible(False)
    panels[-1].set(xlabel='time, share of the training step in %', xlim=(0, 100))
    count = 1 + max(m[2] for moments in steps.values() for m in moments)
    handles = [
        Patch(facecolor=COLOURS[index], label=f'module {index + 1}')
        for index in range(count)
    ]
    handles += [
        Patch(facecolor='0.6', label='forward'),
        Patch(facecolor=LOSS_COLOUR, label='head and loss'),
        Patch(facecolor='0.85', edgecolor='0.4', hatch=HATCH, label='backward, update'),
    ]
    figure.legend(
        handles=handles,
        ncols=len(handles),
        loc='outside lower center',
        fontsize=9,
        frameon=False,
        columnspacing=1.1,
        handlelength=1.4,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _draw_step(panel: Axes, moments: list) -> None:
    end = moments[-1][0]
    start = 0
    for stop in range(1, len(moments)):
        if stop < len(moments) - 1 and moments[stop][2:] == moments[start][2:]:
            continue
        part = moments[start : stop + 1]
        _, _, index, phase = moments[start]
        colour = LOSS_COLOUR if phase == 'loss' else COLOURS[index]
        panel.fill_between(
            [100 * m[0] / end for m in part],
            [m[1] / MIB for m in part],
            step='post',
            facecolor=colour,
            alpha=0.45 if phase == 'backward' else 1.0,
            hatch=HATCH if phase == 'backward' else None,
            edgecolor='white' if phase == 'backward' else colour,
            lw=0,
        )
        start = stop
