"""The picture of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from .comparison_report import group_results, mean_of, metric_names
from .records import MIB


def draw_comparison(results: Sequence[dict], path: Path) -> None:
    """Draws the network's own loss over the training, every result, and its memory.

    Args:
        results: Results of all runs.
        path: PNG file.
    """
    groups, metric = group_results(results), metric_names(results)[0]
    figure = Figure(figsize=(16, 4.5), layout='constrained')
    left, middle, right = figure.subplots(1, 3, width_ratios=(3, 2, 2))
    colours = colormaps['tab10' if len(groups) <= 10 else 'tab20'].colors
    for index, (name, group) in enumerate(groups.items()):
        colour = colours[index % len(colours)]
        curves = np.array([result['curves']['loss'] for result in group])
        step = group[0]['curves']['step']
        left.plot(step, curves.mean(0), color=colour, label=name)
        left.fill_between(step, curves.min(0), curves.max(0), color=colour, alpha=0.15)
        values = [result['metrics'][metric] for result in group]
        mean, peak = mean_of(group, metric), group[0]['peak_bytes'] / MIB
        middle.plot(values, [index] * len(values), 'o', color=colour, alpha=0.6)
        middle.plot(mean, index, '|', color=colour, markersize=24)
        right.plot([peak] * 2, [min(values), max(values)], color=colour)
        right.plot(peak, mean, 'o', color=colour)
    low, high = np.percentile([r['curves']['loss'] for r in results], (0, 90))
    left.set(
        xlabel='step',
        ylabel="the network's own loss",
        ylim=(low - 0.05 * (high - low), high),
        title='mean, least and greatest of the seeds',
    )
    left.legend(fontsize='small', ncols=-(-len(groups) // 10))
    middle.set(xlabel=metric, title='every seed, and the mean')
    middle.set_yticks(range(len(groups)), list(groups))
    middle.invert_yaxis()
    middle.grid(axis='x', alpha=0.3)
    right.set(xlabel='peak MiB', ylabel=metric, title='against memory')
    right.set_xlim(left=0)
    right.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
