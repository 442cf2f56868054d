"""Pictures of `benchmark`: memory against time, and growth."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from matplotlib.transforms import Bbox

from .records import MIB, group_records, has_times, setting

COLOURS = {
    'end-to-end': 'tab:blue',
    'local': 'tab:orange',
    'exact': 'tab:green',
    'joint': 'tab:purple',
}
_PALETTES = {
    'end-to-end': 'winter',
    'local': 'autumn',
    'exact': 'summer',
    'joint': 'cool',
}
_DPI = 130
_STEP = 9  # points between the places that a label may take
_RINGS = 14


def draw_pictures(records: Sequence[dict], path: Path) -> list[Path]:
    """Draws the comparison, and growth if several batches or configs were measured.

    Args:
        records: Records of all schemes.
        path: PNG file of the comparison, which needs times; growth is drawn beside it.

    Returns:
        The files.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    groups, drawn = group_records(records), []
    if has_times(records):
        _draw_fronts(groups, path)
        drawn.append(path)
    if len({(name, batch) for name, _, batch, _ in groups}) > 1:
        growth = path.with_name(f'{path.stem}_growth{path.suffix}')
        _draw_growth(records, growth)
        drawn.append(growth)
    return drawn


def _draw_fronts(groups: dict[tuple, list[dict]], path: Path) -> None:
    """Memory against time, one panel for each config and batch."""
    columns = min(len(groups), 2)
    rows = -(-len(groups) // columns)
    size = (7.5 * columns, 5.5 * rows)
    figure = Figure(figsize=size, layout='constrained', dpi=_DPI)
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for panel in axes.flat[len(groups) :]:
        panel.set_axis_off()
    for panel, ((name, size, batch, device), group) in zip(
        axes.flat, groups.items(), strict=False
    ):
        x, y = ([row[key] for row in group] for key in ('peak_ratio', 'time_ratio'))
        front = _front(x, y)
        panel.step(*front, where='post', color='0.6', ls='--', lw=1)
        colours = [_colour(row['scheme']) for row in group]
        panel.scatter(x, y, s=30, c=colours, zorder=3)
        if max(y) > 4 * min(y):
            panel.set_yscale('log')
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter('{x:g}')
            panel.yaxis.set_minor_formatter(NullFormatter())
        panel.margins(0.25, 0.2)
        base = group[0]['base']
        panel.set(
            xlabel=f'peak memory, {base} = 1',
            ylabel=f'time of a step, {base} = 1',
            title=f'{name}, {batch} × {size[0]}×{size[1]}, {device}',
        )
        panel.grid(alpha=0.3)
    canvas.draw()  # the layout is final now, so labels can be placed
    figure.set_layout_engine('none')
    for panel, group in zip(axes.flat, groups.values(), strict=False):
        _place_labels(panel, group)
    figure.savefig(path)


def _front(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """The points that no other one beats in both coordinates, from left to right."""
    front_x, front_y = [], []
    for memory, seconds in sorted(zip(x, y, strict=True)):
        if not front_y or seconds < front_y[-1]:
            front_x.append(memory)
            front_y.append(seconds)
    return front_x, front_y


def _colour(scheme: str) -> str:
    return COLOURS[scheme.partition('+')[0]]


def _place_labels(panel: Axes, group: Sequence[dict]) -> None:
    """Writes the name beside each point, where it covers no point and no other name.

    Each name takes the free place nearest to its point, on rings around it; if it can,
    one that no line crosses.
    """
    renderer, scale = panel.figure.canvas.get_renderer(), panel.figure.dpi / 72
    places = [(row['peak_ratio'], row['time_ratio']) for row in group]
    points = panel.transData.transform(places)
    dots = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in points]
    labels: list[Bbox] = []
    front = list(zip(*_front(*points.T), strict=True))
    lines = []
    for (x, y), (next_x, next_y) in zip(front, front[1:], strict=False):
        lines.append(Bbox.from_extents(x, y, next_x, y))
        lines.append(Bbox.from_extents(next_x, y, next_x, next_y))
    frame = panel.get_window_extent(renderer)
    # Points in crowds choose last: they have to go far anyway.
    crowds = [sum(np.hypot(*(p - q)) < 40 for q in points) for p in points]
    for index in np.argsort(crowds, kind='stable'):
        name, point = group[index]['scheme'], points[index]
        text = panel.annotate(
            name,
            places[index],
            textcoords='offset points',
            xytext=(0, 0),
            fontsize=8,
            color=_colour(name),
            arrowprops=dict(arrowstyle='-', color='0.7', lw=0.6, shrinkA=0, shrinkB=2),
        )
        size = text.get_window_extent(renderer)
        boxes = [
            box
            for box in _boxes_around(point, size.width, size.height, scale)
            if frame.containsx(box.x0)
            and frame.containsx(box.x1)
            and frame.containsy(box.y0)
            and frame.containsy(box.y1)
            and not box.count_overlaps(dots + labels)
        ]
        clear = (
            box
            for box in boxes
            if not box.count_overlaps(lines) and not _crosses(point, box, labels)
        )
        box = next(clear, boxes[0] if boxes else size)
        text.set_position(((box.x0 - point[0]) / scale, (box.y0 - point[1]) / scale))
        labels.append(box)


def _crosses(point: np.ndarray, box: Bbox, labels: Sequence[Bbox]) -> bool:
    """Whether the line from a point to its label runs through another label."""
    centre = (box.min + box.max) / 2
    line = point + np.linspace(0, 1, 40)[:, None] * (centre - point)
    return any(label.contains(x, y) for label in labels for x, y in line)


def _boxes_around(
    point: Sequence[float], width: float, height: float, scale: float
) -> Iterator[Bbox]:
    """Places for a label, near ones first, beside before above."""
    for ring in range(1, _RINGS):
        up, aside = scale * _STEP * ring, scale * _STEP * min(ring, 4)
        for left in (aside, -aside - width):
            for middle in (0, up, -up):
                yield Bbox.from_bounds(
                    point[0] + left, point[1] + middle - height / 2, width, height
                )
        for middle in (up, -up):
            yield Bbox.from_bounds(
                point[0] - width / 2, point[1] + middle - height / 2, width, height
            )


def _draw_growth(records: Sequence[dict], path: Path) -> None:
    """Peak and step time over the batch, a row for each setting, or over settings."""
    batches = sorted({row['batch'] for row in records})
    settings = list(dict.fromkeys(setting(row) for row in records))
    over_batch = len(batches) > 1
    rows = settings if over_batch else [None]
    timed = has_times(records)
    size = (13 if timed else 8, 5.2 * len(rows))
    figure = Figure(figsize=size, layout='constrained', dpi=_DPI)
    axes = figure.subplots(len(rows), 1 + timed, squeeze=False)
    for pair, shown in zip(axes, rows, strict=True):
        chosen = [row for row in records if shown in (None, setting(row))]
        lines = _lines(chosen)
        styles = _styles(list(lines))
        for name, line in lines.items():
            x = [
                row['batch'] if over_batch else settings.index(setting(row))
                for row in line
            ]
            peaks = [row['peak'] / MIB for row in line]
            label = name
            if over_batch and len(line) > 1:
                label += f'  ({np.polyfit(x, peaks, 1)[0]:.1f} MiB/image)'
            pair[0].plot(x, peaks, label=label, **styles[name])
            if timed:
                seconds = [statistics.median(row['seconds']) for row in line]
                pair[1].plot(x, seconds, **styles[name])
        for panel, label in zip(pair, ('peak, MiB', 'time of a step, s'), strict=False):
            panel.set(ylabel=label, ylim=(0, None))
            panel.grid(alpha=0.3)
            if over_batch:
                panel.set(xlabel='images in a step', xticks=batches)
                panel.set_title(shown)
            else:
                common, ticks = _common(settings)
                panel.set_title(common)
                panel.set_xticks(range(len(ticks)), ticks, rotation=15, ha='right')
        pair[-1].legend(
            *pair[0].get_legend_handles_labels(),
            loc='center left',
            bbox_to_anchor=(1.01, 0.5),
            fontsize=8,
        )
    figure.savefig(path)


def _common(settings: Sequence[str]) -> tuple[str, list[str]]:
    """What all settings begin with, and the rest of each."""
    parts = [name.split(', ') for name in settings]
    same = takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False))
    common = [column[0] for column in same]
    rest = [', '.join(part[len(common) :]) for part in parts]
    return ', '.join(common), rest


def _lines(records: Sequence[dict]) -> dict[str, list[dict]]:
    """Records by scheme; one line for a scheme whose K grows with the network."""
    lines: dict[str, list[dict]] = {}
    for row in records:
        lines.setdefault(re.sub(r'\+K=\d+', '+K', row['scheme']), []).append(row)
    return {
        name.replace('+K', f'+K={",".join(dict.fromkeys(_modules(line)))}'): line
        for name, line in lines.items()
    }


def _modules(records: Sequence[dict]) -> list[str]:
    """The values of K in the names of schemes, in order."""
    return [k for row in records for k in re.findall(r'\+K=(\d+)', row['scheme'])]


def _styles(names: Sequence[str]) -> dict[str, dict]:
    """A palette for each kind of steps."""
    styles, markers = {}, 'osD^v<>PX*hd'
    for base, palette in _PALETTES.items():
        family = [name for name in names if name.partition('+')[0] == base]
        shades = colormaps[palette](np.linspace(0, 0.8, max(len(family), 1)))
        for index, name in enumerate(family):
            styles[name] = dict(
                color=shades[index], marker=markers[index % len(markers)], ms=5, lw=1.3
            )
    return styles
