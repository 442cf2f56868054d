"""Make Fashion-MNIST ready for mmpretrain.

Its source and its licence are described in man_mm/datasets/make_fashion.py.
"""

import argparse
import sys

from man_mm.datasets.make_fashion import PACKAGE, SIDE, make_fashion


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description='Unpack Fashion-MNIST for mmpretrain.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add('--out', default='data/fashion', help='folder to write')
    add('--folder', metavar='DIR', help='with the four files, instead of a package')
    add('--root', default='/', metavar='DIR', help=f'where {PACKAGE} is unpacked')
    add('--side', type=int, default=SIDE, help='reduce the images to these pixels')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    try:
        out = make_fashion(args.out, args.folder, args.root, args.side)
    except (ValueError, OSError) as error:
        sys.exit(f'make_fashion: {error}')
    print(f'Fashion-MNIST is in {out}: 60,000 and 10,000 images.')


if __name__ == '__main__':
    main()
