"""Drawings of the leaderboard's pages: numbers made into places in an SVG."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

WIDTH, HEIGHT = 680, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 10, 34
_SHOWN = 90  # percent of the values of curves; first steps would flatten the rest


def draw_split(rows: Sequence[tuple[dict, dict]]) -> dict | None:
    """What peaks consist of, one bar each on the same scale.

    Args:
        rows: Rows of entries, each with bytes by kind.

    Returns:
        ``kinds`` that occur; ``bars`` with a label and parts, in percent of the largest
        peak; None if there is nothing to draw.
    """
    kinds = list(
        dict.fromkeys(k for _, split in rows for k, size in split.items() if size)
    )
    if not kinds:
        return None
    largest = max(sum(split.values()) for _, split in rows)
    bars = [
        dict(
            row=row,
            parts=[
                dict(
                    index=kinds.index(kind),
                    kind=kind,
                    size=size,
                    percent=round(100 * size / largest, 3),
                )
                for kind, size in split.items()
                if size
            ],
        )
        for row, split in rows
    ]
    return dict(kinds=kinds, bars=bars)


def draw_steps(rows: Sequence[tuple[dict, list[float]]]) -> dict | None:
    """Every timed step as a dot, and the median.

    Args:
        rows: Rows of entries, each with seconds.
    """
    if not rows:
        return None
    largest = max(max(seconds) for _, seconds in rows)
    ticks = nice_ticks(0, largest)
    scale = 100 / max(ticks[-1], largest)
    return dict(
        ticks=[dict(place=tick * scale, text=f'{tick:g}') for tick in ticks],
        lines=[
            dict(
                row=row,
                dots=[dict(place=s * scale, text=f'{s:.3g} s') for s in seconds],
                median=statistics.median(seconds) * scale,
            )
            for row, seconds in rows
        ],
    )


def draw_curves(rows: Sequence[tuple[dict, list[dict]]]) -> dict | None:
    """The network's own loss over the training: mean of the seeds, least and greatest.

    Args:
        rows: Rows of entries, each with its runs.
    """
    if not rows:
        return None
    values = [y for _, runs in rows for run in runs for y in run['curves']['loss']]
    steps = [x for _, runs in rows for run in runs for x in run['curves']['step']]
    high = statistics.quantiles(values, n=100)[_SHOWN - 1]
    low_tick, *_, high_tick = y_ticks = nice_ticks(min(values), high)
    x_ticks = [tick for tick in nice_ticks(0, max(steps)) if tick <= max(steps)]

    def x(step: float) -> float:
        return round(_LEFT + step / max(steps) * (WIDTH - _LEFT - _RIGHT), 1)

    def y(value: float) -> float:
        share = (min(value, high_tick) - low_tick) / (high_tick - low_tick)
        return round(HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM), 1)

    series = []
    for row, runs in rows:
        by_step = list(zip(*(run['curves']['loss'] for run in runs), strict=False))
        places = [x(step) for step in runs[0]['curves']['step']][: len(by_step)]
        low, high = [y(min(v)) for v in by_step], [y(max(v)) for v in by_step]
        outline = [*zip(places, high, strict=True)]
        outline += reversed([*zip(places, low, strict=True)])
        mean = [y(statistics.mean(v)) for v in by_step]
        series.append(
            dict(
                row=row, band=_path(outline), line=_path(zip(places, mean, strict=True))
            )
        )
    return dict(
        width=WIDTH,
        height=HEIGHT,
        left=_LEFT,
        right=WIDTH - _RIGHT,
        bottom=HEIGHT - _BOTTOM,
        x_ticks=[dict(place=x(tick), text=f'{tick:g}') for tick in x_ticks],
        y_ticks=[dict(place=y(tick), text=f'{tick:g}') for tick in y_ticks],
        series=series[::-1],  # the entry itself is drawn last
    )


def _path(points) -> str:
    return 'M' + 'L'.join(f'{x},{y}' for x, y in points)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from at most ``low`` to at least ``high``, about ``count``."""
    width = (high - low) / count or 1.0
    power = 10 ** math.floor(math.log10(width))
    step = next(power * f for f in (1, 2, 2.5, 5, 10) if power * f >= width)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(n * step, 10) for n in range(first, max(last, first + 1) + 1)]
