"""Where to cut, and on which card it trains: ``mim run man_mm plan_partition CONFIG``.

Without ``--num-modules`` and ``--memory-budget``, it counts all bytes of a training
step: plain end-to-end training, the strongest exact checkpointing, exact, joint and
local steps; and says the smallest card for each. With ``--budget``, it tries other
partitions where the config's needs more than that card has, and says what fits.

With ``--num-modules`` or ``--memory-budget``, it finds the cuts with which the largest
module of local steps needs the fewest bytes: those of a given number of modules, or of
the fewest modules that fit. These bytes are those of activations and gradients, above
the model, its auxiliary heads and the optimizer's state. What the optimizer needs for
a moment while it updates is not predicted; with images of a hundred pixels, it can be
more than the rest.

Steps are not computed, which takes seconds and hardly any memory, whatever the network;
``--check`` computes them and compares.
"""

import argparse
import sys
import time
from pathlib import Path

from rich.console import Console

from man_mm.benchmark import card_plan, card_report
from man_mm.benchmark.card_needs import OBJECTS
from man_mm.benchmark.partition_plan import (
    check_plan,
    partition_lines,
    plan_config,
    setting_lines,
    write_config,
)
from man_mm.benchmark.partition_report import (
    check_table,
    draw,
    make_bars,
    make_table,
    named,
)
from man_mm.benchmark.published_memory import published_memory
from man_mm.benchmark.records import MIB


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help="config, or its name in a package: 'mmdet::...'")
    wanted = parser.add_mutually_exclusive_group()
    wanted.add_argument(
        '--budget', metavar='SIZE', help='memory of a card in all, such as 24GiB'
    )
    wanted.add_argument(
        '--num-modules', type=int, metavar='K', help='number of modules'
    )
    wanted.add_argument(
        '--memory-budget',
        metavar='SIZE',
        help='memory limit of a module, such as 6GiB or 800MiB',
    )
    parser.add_argument(
        '--size',
        type=int,
        nargs=2,
        metavar=('H', 'W'),
        help=(
            'height and width of the images in pixels; default: 800 1333,'
            ' for classifiers 224 224'
        ),
    )
    parser.add_argument(
        '--batch',
        type=int,
        help=("images in a step; default: that of the config's train_dataloader"),
    )
    parser.add_argument(
        '--objects',
        type=int,
        default=OBJECTS,
        help='objects in an image of a detector, for cards (default: %(default)s)',
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        default=[],
        metavar='KEY=VALUE',
        help='override settings of the config',
    )
    parser.add_argument(
        '--out',
        type=Path,
        help='file to write a config with the recommended cuts and steps to',
    )
    parser.add_argument('--picture', type=Path, help='PNG file to draw the peaks to')
    parser.add_argument(
        '--record', type=Path, help='JSON file to write the table of cards to'
    )
    parser.add_argument(
        '--check',
        action='store_true',
        help='train a step of each, and compare its peak',
    )
    args = parser.parse_args()
    if args.out and args.cfg_options:
        parser.error(
            '--out writes a config that inherits CONFIG: put --cfg-options into one.'
        )
    if args.record and (args.num_modules or args.memory_budget):
        parser.error('--record is for cards: drop --num-modules and --memory-budget.')
    return args


def main() -> None:
    args, console = parse_args(), Console()
    try:
        if args.num_modules or args.memory_budget:
            show_partition(args, console)
        else:
            show_cards(args, console)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f'plan_partition: {error}')


def show_cards(args: argparse.Namespace, console: Console) -> None:
    start = time.perf_counter()
    plan = card_plan.plan_cards(
        args.config,
        args.budget,
        args.size,
        args.batch,
        args.cfg_options,
        args.objects,
        console,
    )
    seconds = time.perf_counter() - start
    batch, _, height, width = plan.shape
    title = f'{Path(args.config).stem}, {batch} × {height}×{width}'
    console.print(card_report.make_table(plan, f'GiB at the peak: {title}'))
    if known := published_memory(args.config):
        console.print(f"Read on GPUs, by the config's metafile: {known} GB.\n")
    if plan.budget is not None:
        console.print(card_report.verdict(plan), '\n', sep='')
    need = plan.recommended
    if need is not None:
        print(f'# {need.name} steps')
        print('\n'.join([*partition_lines(need.cuts), *setting_lines(need.settings)]))
        if args.out:
            write_config(args.out, args.config, plan.cfg, need.cuts, need.settings)
            console.print(f'Config: {args.out}')
    elif args.out:
        console.print('No config was written.')
    if args.picture:
        card_report.draw(args.picture, plan, title)
        console.print(f'Picture: {args.picture}')
    checked = None
    if args.check:
        with console.status('training a step of each ...'):
            checked = card_plan.count_on_cpu(plan)
        console.print(card_report.check_table(*checked))
    if args.record:
        card_report.write_record(args.record, plan, checked, seconds)


def show_partition(args: argparse.Namespace, console: Console) -> None:
    planned = plan_config(
        args.config,
        args.num_modules,
        args.memory_budget,
        args.size,
        args.batch,
        args.cfg_options,
        console,
    )
    plan, whole = planned.plan, planned.whole
    batch, _, height, width = planned.shape
    title = f'{Path(args.config).stem}, {batch} × {height}×{width}'
    rows = named(plan, whole)
    console.print(make_table(rows, f'Predicted peaks in MiB: {title}'))
    console.print(make_bars(rows))
    console.print(
        f'\nLargest module: {plan.peak / MIB:.0f} MiB, {plan.peak / whole.peak:.2f} of '
        'end-to-end training.\n'
    )
    if planned.needed < len(plan.modules):
        console.print(f'{planned.needed} modules would need no more.\n')
    print('\n'.join(partition_lines(plan.cuts)))
    if args.out:
        write_config(args.out, args.config, planned.cfg, plan.cuts)
        console.print(f'Config: {args.out}')
    if args.picture:
        draw(args.picture, rows, title, planned.budget)
        console.print(f'Picture: {args.picture}')
    if args.check:
        with console.status('training a step ...'):
            peaks = check_plan(planned)
        console.print(check_table(plan, peaks))


if __name__ == '__main__':
    main()
