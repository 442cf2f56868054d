r"""Train configs with several seeds and compare them: accuracy, memory and time.

    mim run man_mm compare end-to-end=configs/end_to_end/edsr_x2_photos.py \
        MAN=configs/man/edsr_x2_man_photos.py \
        "no bank=configs/man/edsr_x2_man_photos.py \
            optim_wrapper.local_learning.aux_head.use_bank=False" \\
        --seeds 0 1 2 --out benchmarks/results/edsr_x2_photos

For classification, detection and super-resolution alike. Every run writes one JSON
file; what is there already is not trained again, and a run that was stopped goes on
from its last checkpoint. Ratios are those to the first entry; differences from it are
paired by seed, with 95 % intervals. Arguments can also come from a file, one a line,
such as those in ``benchmarks/comparisons``:

    mim run man_mm compare @benchmarks/comparisons/fashion.txt --jobs 2
"""

import argparse
import signal
import sys
from pathlib import Path

from rich.console import Console

from man_mm.benchmark.comparison import read_folder, read_results, run_all
from man_mm.benchmark.comparison_picture import draw_comparison
from man_mm.benchmark.comparison_report import make_table, markdown_rows
from man_mm.benchmark.paired_differences import make_difference_table
from man_mm.benchmark.training_runs import Run, RunError, parse_entry


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        fromfile_prefix_chars='@',
    )
    parser.add_argument('entries', nargs='*', metavar='"NAME=CONFIG [KEY=VALUE ...]"')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument(
        '--out',
        type=Path,
        default=Path('work_dirs/compare/results'),
        help='folder to write JSON files to',
    )
    parser.add_argument(
        '--work-dirs',
        type=Path,
        default=Path('work_dirs/compare'),
        help='folder for checkpoints and logs',
    )
    parser.add_argument(
        '--jobs', type=int, default=1, help='number of training runs at a time'
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        default=[],
        metavar='KEY=VALUE',
        help='override settings of all configs',
    )
    parser.add_argument(
        '--picture', type=Path, help='PNG file to draw the learning curves to'
    )
    parser.add_argument(
        '--from',
        dest='source',
        type=Path,
        help='show the JSON files of this folder instead of training',
    )
    parser.add_argument(
        '--markdown', action='store_true', help='print table rows in Markdown'
    )
    parser.add_argument(
        '--margin',
        type=float,
        help=(
            'largest loss that counts as none, in units of the first metric; '
            'default: that of docs/protocol.md'
        ),
    )
    args = parser.parse_args()
    if not (args.entries or args.source):
        parser.error('give an entry NAME=CONFIG, or --from DIR')
    if args.margin is not None and args.margin < 0:
        parser.error('--margin must be at least 0')
    try:
        options = tuple(args.cfg_options)
        args.entries = [parse_entry(text, options) for text in args.entries]
    except ValueError as error:
        parser.error(str(error))
    return args


def main() -> None:
    args = parse_args()
    signal.signal(signal.SIGTERM, end)
    console = Console(width=None if sys.stdout.isatty() else 160)
    if args.source:
        results = read_folder(args.source)
    else:
        runs = [
            Run(entry, seed, args.out, args.work_dirs, position)
            for seed in args.seeds
            for position, entry in enumerate(args.entries)
        ]
        try:
            run_all(runs, args.jobs, console)
        except RunError as error:
            sys.exit(str(error))
        results = read_results(run.path for run in runs)
    if args.markdown:
        print('\n'.join(markdown_rows(results)))
    else:
        console.print(make_table(results))
        if len({result['name'] for result in results}) > 1:
            console.print(make_difference_table(results, args.margin))
    if args.picture:
        draw_comparison(results, args.picture)
        console.print(args.picture, highlight=False, markup=False)


def end(*_: object) -> None:
    sys.exit('Ended, the trainings too. The same command goes on where they were.')


if __name__ == '__main__':
    main()
