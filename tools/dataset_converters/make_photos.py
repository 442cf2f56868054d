"""Make a super-resolution data set of photographs without downloading anything.

The photographs come from Python packages, from Debian packages or from folders
of your own. The files are laid out as mmagic's DIV2K configs read them. Training
and validation share no photograph. Licences of the photographs:

- packages, scikit-image: CC0, public domain or, in its words, 'no known copyright
  restrictions'. It states no licence for motorcycle_left.png, which is from the
  Middlebury stereo benchmark of 2014.
- packages, scikit-learn: CC BY 2.0. The authors are in its README.txt.
- debian, lomiri-wallpapers-16.04: CC BY 4.0, CC BY-SA 4.0 or, for seeding, CC0.
- debian, lomiri-wallpapers-20.04: CC BY-SA 3.0.
- debian, mate-backgrounds: GPL-2+.
- debian, plasma-workspace-wallpapers: GPL-2+ in its copyright file, LGPLv3 in the
  metadata of each photograph.

Who shares what is made of them must credit the authors that the copyright files
name.
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
