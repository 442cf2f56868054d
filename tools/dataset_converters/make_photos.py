"""Make a super-resolution data set of photographs.

man_mm/datasets/make_photos.py describes sources, their licences and the layout.
"""

import argparse
import sys

from man_mm.datasets.make_photos import LICENSES, SCALES, make_photos
from man_mm.datasets.photo_files import draw_preview, print_counts


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description='Make a super-resolution data set of photographs.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add('--out', default='data/photos', help='folder to write')
    add('--source', default='packages', choices=LICENSES, help='of the photographs')
    text = 'photographs of --source folder, at any depth'
    add('--folder', dest='folders', metavar='DIR', nargs='+', default=(), help=text)
    text = 'where the packages of --source debian are unpacked'
    add('--root', default='/', metavar='DIR', help=text)
    add('--scales', type=int, nargs='+', default=SCALES, help='of the low resolution')
    add('--preview', metavar='FILE', help='also draw all photographs to FILE')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    try:
        out = make_photos(args.out, args.source, args.scales, args.root, args.folders)
        if args.preview:
            draw_preview(out, args.preview)
    except (ValueError, OSError) as error:
        sys.exit(f'make_photos: {error}')
    print_counts(out)


if __name__ == '__main__':
    main()
