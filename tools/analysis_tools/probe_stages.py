r"""Measure how well each stage of trained networks tells classes apart: linear probes.

    mim run man_mm probe_stages configs/end_to_end/retinanet_r18_scenes.py \
        end-to-end=work_dirs/.../iter_900.pth MAN=work_dirs/.../iter_900.pth

A probe is a linear classifier on what a stage of the frozen backbone returns: on the
average of its map over an image of a classifier, over the box of each object of a
detector. It learns from one half of the config's validation images, and its accuracy is
that on the other half. Where local learning loses, this tells in which stage.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from man_mm.benchmark.stage_probes import make_table, probe_checkpoints, write_records


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config of the plain model')
    parser.add_argument('checkpoints', nargs='+', metavar='NAME=CHECKPOINT')
    parser.add_argument(
        '--images', type=int, help='number of validation images; default: all'
    )
    parser.add_argument('--out', type=Path, help='folder to write JSON files to')
    parser.add_argument('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE')
    args = parser.parse_args()
    for text in args.checkpoints:
        if not Path(text.partition('=')[2]).is_file():
            parser.error(f'write NAME=CHECKPOINT, with a file that exists: {text!r}')
    return args


def main() -> None:
    args = parse_args()
    checkpoints = dict(text.split('=', 1) for text in args.checkpoints)
    try:
        records = probe_checkpoints(
            args.config, checkpoints, args.images, args.cfg_options
        )
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f'probe_stages: {error}')
    Console().print(make_table(records))
    if args.out:
        write_records(records, args.out)


if __name__ == '__main__':
    main()
