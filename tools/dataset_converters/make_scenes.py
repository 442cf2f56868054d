"""Make a detection data set of Fashion-MNIST items on photographs.

What it holds is described in man_mm/datasets/make_scenes.py.
"""

import argparse
import sys

from man_mm.datasets.coco_files import draw_preview, print_counts
from man_mm.datasets.make_scenes import make_scenes


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description='Make a detection data set of Fashion-MNIST on photographs.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument('--out', default='data/scenes', help='folder to write')
    parser.add_argument(
        '--items',
        metavar='DIR',
        default='data/fashion',
        help='folder written by make_fashion',
    )
    parser.add_argument('--num-train', type=int, default=4000, help='training images')
    parser.add_argument('--num-val', type=int, default=1000, help='validation images')
    parser.add_argument('--size', type=int, default=160, help='image side in pixels')
    parser.add_argument(
        '--seed', type=int, default=0, help='seed of all random choices'
    )
    parser.add_argument(
        '--preview', metavar='FILE', help='also draw validation images to FILE'
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    try:
        out = make_scenes(
            args.out, args.items, args.num_train, args.num_val, args.size, args.seed
        )
        if args.preview:
            draw_preview(out, args.preview)
    except (ValueError, OSError) as error:
        sys.exit(f'make_scenes: {error}')
    print_counts(out)


if __name__ == '__main__':
    main()
