"""The picture of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .comparison_report import group_results, mean_of, metric_names
from .paired_differences import MARGINS, paired_differences
from .records import MIB

Groups = dict[str, list[dict]]
Colours = dict[str, tuple[float, ...]]


def draw_comparison(results: Sequence[dict], path: Path) -> None:
    """Draws the network's own loss over the training, every result, and its memory.

    With several seeds also the paired differences from the first method, and what the
    protocol takes for none.

    Args:
        results: Results of all runs.
        path: PNG file.
    """
    groups, metric = group_results(results), metric_names(results)[0]
    with_pairs = len(groups) > 1 and len({result['seed'] for result in results}) > 1
    ratios = (3, 2, 2, 2) if with_pairs else (3, 2, 2)
    figure = Figure(figsize=(2.4 * sum(ratios), 4.5), layout='constrained')
    panels = figure.subplots(1, len(ratios), width_ratios=ratios)
    palette = colormaps['tab10' if len(groups) <= 10 else 'tab20'].colors
    colours = {name: palette[i % len(palette)] for i, name in enumerate(groups)}
    _draw_curves(panels[0], groups, colours)
    _draw_results(panels[1], groups, metric, colours)
    if with_pairs:
        _draw_differences(panels[2], results, colours)
    _draw_memory(panels[-1], groups, metric, colours)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _draw_curves(axes: Axes, groups: Groups, colours: Colours) -> None:
    for name, group in groups.items():
        curves = np.array([result['curves']['loss'] for result in group])
        step, colour = group[0]['curves']['step'], colours[name]
        axes.plot(step, curves.mean(0), color=colour, label=name)
        axes.fill_between(step, curves.min(0), curves.max(0), color=colour, alpha=0.15)
    losses = [r['curves']['loss'] for group in groups.values() for r in group]
    low, high = np.percentile(losses, (0, 90))
    axes.set(
        xlabel='step',
        ylabel="the network's own loss",
        ylim=(low - 0.05 * (high - low), high),
        title='mean, least and greatest of the seeds',
    )
    axes.legend(fontsize='small', ncols=-(-len(groups) // 10))


def _draw_results(axes: Axes, groups: Groups, metric: str, colours: Colours) -> None:
    for index, (name, group) in enumerate(groups.items()):
        values = [result['metrics'][metric] for result in group]
        axes.plot(values, [index] * len(values), 'o', color=colours[name], alpha=0.6)
        mean = mean_of(group, metric)
        axes.plot(mean, index, '|', color=colours[name], markersize=24)
    axes.set(xlabel=metric, title='every seed, and the mean')
    axes.set_yticks(range(len(groups)), list(groups))
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.grid(axis='x', alpha=0.3)


def _draw_differences(axes: Axes, results: Sequence[dict], colours: Colours) -> None:
    differences = paired_differences(results)
    metric, baseline = metric_names(results)[0], results[0]['name']
    for index, (name, difference) in enumerate(differences.items()):
        if len(difference.seeds) > 1:  # one pair has no interval
            half = difference.high - difference.mean
            axes.errorbar(
                difference.mean,
                index,
                xerr=half,
                fmt='o',
                capsize=4,
                color=colours[name],
            )
    axes.axvline(0, color='black', lw=1)
    if margin := MARGINS.get(metric):
        axes.axvspan(-margin, 0, color='black', alpha=0.08)
    axes.set(xlabel=f'{metric} to {baseline}', title='paired, 95 % interval')
    axes.set_yticks(range(len(differences)), list(differences))
    axes.set_ylim(len(differences) - 0.5, -0.5)
    axes.grid(axis='x', alpha=0.3)


def _draw_memory(axes: Axes, groups: Groups, metric: str, colours: Colours) -> None:
    for name, group in groups.items():
        values = [result['metrics'][metric] for result in group]
        peak = group[0]['peak_bytes'] / MIB
        axes.plot([peak] * 2, [min(values), max(values)], color=colours[name])
        axes.plot(peak, mean_of(group, metric), 'o', color=colours[name])
    axes.set(xlabel='peak MiB', ylabel=metric, title='against memory')
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
