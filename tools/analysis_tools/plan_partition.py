"""Find where to cut: ``mim run man_mm plan_partition CONFIG --num-modules 4``.

Measures what every unit of a config's model costs in a training step, and finds the
cuts with which the largest module needs the fewest bytes: those of a given number of
modules, or of the fewest modules that fit ``--memory-budget``. Bytes are those of
activations and gradients, above the model, its auxiliary heads and the optimizer's
state. What the optimizer needs for a moment while it updates is not predicted; with
images of a hundred pixels, it can be more than the rest.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from man_mm.benchmark.partition_plan import check_plan, plan_config, write_config
from man_mm.benchmark.partition_report import (
    check_table,
    draw,
    make_bars,
    make_table,
    named,
    partition_lines,
)
from man_mm.benchmark.records import MIB


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config trained by local learning')
    wanted = parser.add_mutually_exclusive_group(required=True)
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
        '--out', type=Path, help='file to write a config with these cuts to'
    )
    parser.add_argument(
        '--picture', type=Path, help='PNG file to draw the predicted peaks to'
    )
    parser.add_argument(
        '--check',
        action='store_true',
        help='train one step and compare its peaks with the prediction',
    )
    return parser.parse_args()


def main() -> None:
    args, console = parse_args(), Console()
    try:
        planned = plan_config(
            args.config,
            args.num_modules,
            args.memory_budget,
            args.size,
            args.batch,
            console,
        )
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f'plan_partition: {error}')
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
