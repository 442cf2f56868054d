r"""Draw what super-resolution models return, side by side with their PSNR.

    mim run man_mm preview_photos configs/end_to_end/edsr_x2_photos.py \
        end-to-end=work_dirs/.../iter_500.pth MAN=work_dirs/.../iter_500.pth

One row a picture of the config's validation set: the input (bicubic), every model and
the ground truth, each a crop of the part with the most detail; the PSNR is that of the
whole picture. Checkpoints are loaded strictly into the plain model of the config.
"""

import argparse
import sys
from pathlib import Path

from man_mm.benchmark.restored_photos import draw, restore
from man_mm.engine.config_files import load_config


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config of the plain model')
    parser.add_argument('checkpoints', nargs='+', metavar='NAME=CHECKPOINT')
    parser.add_argument('--count', type=int, default=4, help='number of pictures')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/preview.png'))
    args = parser.parse_args()
    for text in args.checkpoints:
        if not Path(text.partition('=')[2]).is_file():
            parser.error(f'write NAME=CHECKPOINT, with a file that exists: {text!r}')
    return args


def main() -> None:
    args = parse_args()
    checkpoints = dict(text.split('=', 1) for text in args.checkpoints)
    try:
        cfg = load_config(args.config)
    except FileNotFoundError as error:
        sys.exit(f'preview_photos: {error}')
    draw(restore(cfg, checkpoints, args.count), cfg.scale, args.out)
    print(args.out)


if __name__ == '__main__':
    main()
