"""Draw the memory of one training step over time: ``mim run man_mm draw_step``.

Trains a config's model for a step of each scheme, end to end and by local learning
unless told otherwise, records the bytes of all live tensors after each operation, and
draws the steps, one above the other: which module is running, its forward pass, its
loss, its backward pass and update.
Bytes are counted above the start of the step, as by `benchmark`, and repeat
exactly. Time is the share of the step that has passed, on the machine that measured it,
while bytes are counted; steps are compared in time by `benchmark`.
"""

import argparse
import json
from pathlib import Path

from man_mm.benchmark.step_picture import TITLES, draw
from man_mm.benchmark.step_recording import SCHEMES, record_steps


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        'config', nargs='?', default='configs/man/resnet50_man_imagenet.py'
    )
    parser.add_argument(
        '--size',
        type=int,
        nargs=2,
        default=(224, 224),
        help='height and width of the images in pixels',
    )
    parser.add_argument('--batch', type=int, default=8, help='images in the step')
    parser.add_argument(
        '--num-modules',
        type=int,
        metavar='K',
        help=('number of modules of balanced memory; default: the cuts of the config'),
    )
    parser.add_argument(
        '--schemes',
        nargs='+',
        choices=list(TITLES),
        default=SCHEMES,
        help='kinds of steps to draw, from top to bottom',
    )
    parser.add_argument('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE')
    parser.add_argument(
        '--out', type=Path, help='JSON file to write the measurements to'
    )
    parser.add_argument(
        '--from',
        dest='source',
        type=Path,
        help='draw this JSON file instead of measuring',
    )
    parser.add_argument('--picture', type=Path, required=True, help='PNG file to write')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.source:
        records = json.loads(args.source.read_text())
    else:
        records = record_steps(
            args.config,
            args.size,
            args.batch,
            args.num_modules,
            args.cfg_options,
            args.schemes,
        )
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(records) + '\n')
    draw(records, args.picture)
    print(args.picture)


if __name__ == '__main__':
    main()
