"""Make a small detection data set of handwritten digits on photographs.

What it holds is described in man_mm/datasets/make_digits.py.
"""

import argparse
import sys

from man_mm.datasets.coco_files import draw_preview, print_counts
from man_mm.datasets.make_digits import make_digits


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description='Make the demo data set of digits on photographs.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument('--out', default='data/digits', help='folder to write')
    parser.add_argument('--num-train', type=int, default=2000, help='training images')
    parser.add_argument('--num-val', type=int, default=250, help='validation images')
    parser.add_argument('--size', type=int, default=96, help='image side in pixels')
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
        out = make_digits(args.out, args.num_train, args.num_val, args.size, args.seed)
        if args.preview:
            draw_preview(out, args.preview)
    except (ValueError, OSError) as error:
        sys.exit(f'make_digits: {error}')
    print_counts(out)


if __name__ == '__main__':
    main()
