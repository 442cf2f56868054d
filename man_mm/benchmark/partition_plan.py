"""Find where to cut: ``mim run man_mm plan_partition CONFIG --num-modules 4``.

Measures what every unit of a config's model costs in a training step, and finds the
cuts with which the largest module needs the fewest bytes: those of a given number of
modules, or of the fewest modules that fit ``--memory-budget``. Bytes are those of
activations and gradients, above the model, its auxiliary heads and the optimizer's
state. What the optimizer needs for a moment while it updates is not predicted; with
images of a hundred pixels, it can be more than the rest.
"""

from __future__ import annotations

import argparse
import copy
import sys
from functools import cache, partial
from os.path import relpath
from pathlib import Path

import matplotlib
from mmengine.config import Config
from mmengine.registry import MODELS
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from man_mm.aux_heads.classifier import is_classifier
from man_mm.backbones import find_backbone, image_channels
from man_mm.core.partition import Measure
from man_mm.engine import LocalLearningOptimWrapperConstructor, build_learner
from man_mm.engine.constructor import LEARNER_OPTIONS
from man_mm.measure import BalancedPartition
from man_mm.measure.model_costs import measure_units
from man_mm.measure.peaks import KINDS, Plan, PlannedModule, predict
from man_mm.measure.planner import plan_modules
from man_mm.measure.synthetic_batch import synthetic_batch
from man_mm.measure.unit_costs import measure_modules

from .scheme_costs import load_config
from .training_steps import build_wrapper

matplotlib.use('Agg')
import matplotlib.pyplot as plt

MIB = 2**20
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


def make_measure(cfg: Config, model: nn.Module, console: Console) -> Measure:
    """What measures the units of a model with the config's local learning, once.

    Raises:
        ValueError: If the config is not trained by local learning.
    """
    options = LocalLearningOptimWrapperConstructor(cfg.optim_wrapper).options
    build = partial(
        build_learner,
        **{key: options[key] for key in LEARNER_OPTIONS if key != 'partition'},
    )

    @cache
    def measure(shape: tuple[int, ...], plain: bool = False):
        kind = 'as in end-to-end training' if plain else 'one by one'
        with console.status(f'measuring the units {kind} ...'):
            return measure_units(model, build, shape, plain)

    return measure


def end_to_end(measure: Measure, shape: tuple[int, ...]) -> PlannedModule:
    """The whole network, as one module."""
    costs = measure(shape, plain=True)
    return predict(costs, [len(costs)]).modules[0]


def planned_config(cfg: Config, cuts: list[str]) -> Config:
    """A copy of a config that cuts there."""
    cfg = copy.deepcopy(cfg)  # Config.copy is shallow
    local = cfg.optim_wrapper.setdefault('local_learning', {})
    local.partition = dict(type='CutPartition', cuts=cuts)
    return cfg


def write_config(out: Path, base: str, cfg: Config, cuts: list[str]) -> None:
    """Writes a config that inherits another one, and cuts there.

    Args:
        out: The new file.
        base: Path of the config to inherit, or its name in a package
            (``'mmdet::...'``).
        cfg: That config.
        cuts: Names of the units after which to cut.
    """
    if '::' not in base:
        base = Path(relpath(base, out.parent)).as_posix()
    # A key that has nothing to delete would stay in the config.
    replaces = 'partition' in cfg.optim_wrapper.get('local_learning', {})
    lines = ['_delete_=True,'] * replaces
    lines += [
        "type='CutPartition',",
        'cuts=[',
        *(f'    {cut!r},' for cut in cuts),
        '],',
    ]
    partition = '\n'.join(f'            {line}' for line in lines)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(
        f'_base_ = {base!r}\n'
        'optim_wrapper = dict(\n'
        '    local_learning=dict(\n'
        f'        partition=dict(\n{partition}\n        ),\n'
        '    ),\n'
        ')\n'
    )


def measure_peaks(cfg: Config, model: nn.Module, shape: tuple[int, ...]) -> list[int]:
    """Peak bytes of every module in a real training step of a config."""
    model = copy.deepcopy(model).train()
    wrapper = build_wrapper(model, cfg)
    batch = synthetic_batch(model, shape)
    model.train_step(batch, wrapper)  # makes the optimizer's state
    return measure_modules(wrapper.learner, lambda: model.train_step(batch, wrapper))


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
    figure, axes = plt.subplots(figsize=(2 + 1.2 * len(names), 4.5))
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
    plt.close(figure)


def report(args: argparse.Namespace, console: Console) -> None:
    """Does what the command line asks for.

    Raises:
        ValueError: If the config cannot be planned so.
    """
    cfg = load_config(args.config)
    model = MODELS.build(cfg.model)
    size = args.size or ((224, 224) if is_classifier(model) else (800, 1333))
    batch = args.batch or cfg.get('train_dataloader', {}).get('batch_size', 1)
    shape = (batch, image_channels(find_backbone(model)[1]), *size)
    partition = BalancedPartition(args.num_modules, args.memory_budget, shape)
    measure = make_measure(cfg, model, console)
    plan = partition.plan(measure)
    whole = end_to_end(measure, shape)
    title = f'{Path(args.config).stem}, {batch} × {size[0]}×{size[1]}'
    rows = named(plan, whole)
    console.print(make_table(rows, f'Predicted peaks in MiB: {title}'))
    console.print(make_bars(rows))
    console.print(
        f'\nLargest module: {plan.peak / MIB:.0f} MiB, {plan.peak / whole.peak:.2f} of '
        'end-to-end training.\n'
    )
    for fewer in range(2, len(plan.modules)):
        if plan_modules(measure(shape), fewer).peak == plan.peak:
            console.print(f'{fewer} modules would need no more.\n')
            break
    print('partition=dict(')
    print("    type='CutPartition',")
    print('    cuts=[')
    for cut in plan.cuts:
        print(f'        {cut!r},')
    print('    ],\n)')
    if args.out:
        write_config(args.out, args.config, cfg, plan.cuts)
        console.print(f'Config: {args.out}')
    if args.picture:
        draw(args.picture, rows, title, partition.budget)
        console.print(f'Picture: {args.picture}')
    if args.check:
        with console.status('training a step ...'):
            peaks = measure_peaks(planned_config(cfg, plan.cuts), model, shape)
        console.print(check_table(plan, peaks))


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


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config trained by local learning')
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument('--num-modules', type=int, metavar='K', help='modules')
    wanted.add_argument(
        '--memory-budget', metavar='SIZE', help='most bytes of a module: 6GiB, 800MiB'
    )
    parser.add_argument(
        '--size',
        type=int,
        nargs=2,
        metavar=('H', 'W'),
        help='of the images, in pixels; default 800 1333, for classifiers 224 224',
    )
    parser.add_argument(
        '--batch', type=int, help="images in a step; default: the train_dataloader's"
    )
    parser.add_argument('--out', type=Path, help='new config with these cuts')
    parser.add_argument('--picture', type=Path, help='PNG file of the peaks')
    parser.add_argument(
        '--check', action='store_true', help='train a step and compare its peaks'
    )
    args = parser.parse_args()
    try:
        report(args, Console())
    except ValueError as error:
        sys.exit(f'plan_partition.py: {error}')
