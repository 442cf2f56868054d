"""Measure training schemes side by side: ``mim run man_mm benchmark CONFIG``.

Every scheme trains the same model from the same weights on the same images, in one
process. For each of them:

- memory: the peak of live tensor bytes above the start of a training step whose
  optimizer state exists already, and what it consists of;
- time: the median of steps that are taken in turn with those of the other schemes;
- floating-point operations of a step;
- exactness: how far the model's weights after the first step are from those of the
  reference, as a share of the length of the reference's first update. 0 is bit for
  bit, 1e-7 to 1e-4 is rounding (Adam magnifies it: it divides small gradients by
  themselves), and more is another method. The reference is the first scheme with the
  same cuts and auxiliary heads, or for schemes without cuts the first of those.

Ratios are those to end-to-end training, or to the first scheme.
"""

import argparse
import sys
import warnings
from pathlib import Path

from rich.console import Console

from man_mm.benchmark.records import make_tables, markdown_rows, read_records
from man_mm.benchmark.scheme_costs import measure_configs
from man_mm.benchmark.scheme_pictures import draw_pictures
from man_mm.benchmark.schemes import SchemeError, describe_options


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f'options of schemes:\n{describe_options()}',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('configs', nargs='*', metavar='CONFIG')
    parser.add_argument(
        '--schemes',
        nargs='+',
        help=('training schemes to compare, such as end-to-end or local+K=4+micro=1'),
    )
    parser.add_argument(
        '--size',
        type=int,
        nargs=2,
        default=(800, 1333),
        help='height and width of the images in pixels',
    )
    parser.add_argument(
        '--batch',
        type=int,
        nargs='+',
        default=[1],
        help='images in a step; several values give growth curves',
    )
    parser.add_argument(
        '--repeats',
        type=int,
        default=5,
        help='number of timed steps for each scheme; 0 for none, on a busy machine',
    )
    parser.add_argument('--device', default='cpu')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        default=[],
        metavar='KEY=VALUE',
        help='override settings of the config',
    )
    parser.add_argument('--out', type=Path, help='folder to write JSON files to')
    parser.add_argument(
        '--picture', type=Path, help='PNG file to draw the comparison to'
    )
    parser.add_argument(
        '--from',
        dest='source',
        type=Path,
        help='show the JSON files of this folder instead of measuring',
    )
    parser.add_argument(
        '--markdown', action='store_true', help='print table rows in Markdown'
    )
    args = parser.parse_args()
    if not (args.configs or args.source):
        parser.error('give a CONFIG, or --from DIR')
    if args.repeats < 0:
        parser.error('--repeats must be at least 0')
    return args


def main() -> None:
    args = parse_args()
    for message in ('.*use_reentrant', 'pkg_resources'):
        warnings.filterwarnings('ignore', message=message)
    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        if args.source:
            records = read_records(args.source, args.configs)
        else:
            records = measure_configs(
                args.configs,
                args.size,
                args.batch,
                args.repeats,
                args.schemes,
                args.device,
                args.cfg_options,
                args.out,
                console,
            )
    except (SchemeError, FileNotFoundError) as error:
        sys.exit(f'benchmark: {error}')
    if args.markdown:
        print('\n'.join(markdown_rows(records)))
    else:
        for table in make_tables(records):
            console.print(table)
    if args.picture:
        for path in draw_pictures(records, args.picture):
            console.print(path)


if __name__ == '__main__':
    main()
