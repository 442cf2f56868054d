"""Small real models, and the batches that they train on."""

import copy
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from packages import BUILT_FROM, ROOT, build_wheel, run_python

import man_mm

pytest_plugins = ['built_site']
MMDET = Path(find_spec('mmdet').origin).parent
STOCK = {
    'retinanet': 'retinanet/retinanet_r50_fpn_1x_coco.py',
    'atss': 'atss/atss_r50_fpn_1x_coco.py',
    'gfl': 'gfl/gfl_r50_fpn_1x_coco.py',
    'faster_rcnn': 'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
}
LOCAL_LEARNING = dict(
    type='LocalLearningOptimWrapper',
    constructor='LocalLearningOptimWrapperConstructor',
)


def detector_config(name: str, depth: int, frozen: int = -1) -> Config:
    """A stock config, with a narrow backbone without pretrained weights."""
    cfg = Config.fromfile(MMDET / '.mim/configs' / STOCK[name])
    widths = [16 * 2**i * (4 if depth >= 50 else 1) for i in range(4)]
    cfg.model.backbone.update(
        depth=depth, base_channels=16, frozen_stages=frozen, init_cfg=None
    )
    cfg.model.neck.in_channels = widths
    if name == 'faster_rcnn':
        cfg.model.roi_head.bbox_head.fc_out_channels = 64
        cfg.model.test_cfg.rcnn.score_thr = 0  # an untrained model predicts something
    else:
        cfg.model.test_cfg.score_thr = 0
    return cfg


def build_detector(cfg: Config, seed: int = 0) -> torch.nn.Module:
    init_default_scope('mmdet')
    torch.manual_seed(seed)
    model = MODELS.build(cfg.model)
    model.init_weights()
    return model.train()


def build_wrapper(
    model, bank=True, optimizer=None, clip_grad=None, amp=None, **local_learning
):
    """The wrapper as the runner builds it; with a bank unless told otherwise.

    ``amp`` holds the options of mixed precision.
    """
    if amp is not None:
        amp = dict(amp, type='AmpLocalLearningOptimWrapper')
    cfg = dict(
        LOCAL_LEARNING | (amp or {}),
        optimizer=optimizer or dict(type='SGD', lr=0.01, momentum=0.9),
        clip_grad=clip_grad,
        local_learning=local_learning,
    )
    wrapper = build_optim_wrapper(model, copy.deepcopy(cfg))
    if bank:
        wrapper.learner.bank = man_mm.MemoryBank()
    return wrapper


def batch_of(size: int = 2, height: int = 64, width: int = 96, classes: int = 80):
    from mmdet.testing import demo_mm_inputs

    shape, boxes = (3, height, width), [3] * size
    return demo_mm_inputs(size, shape, num_items=boxes, num_classes=classes)


def detection_targets(masks: bool = False):
    from mmdet.testing import demo_mm_inputs

    batch = demo_mm_inputs(
        2, (3, 64, 64), num_items=[3, 3], num_classes=80, with_mask=masks
    )
    for sample in batch['data_samples']:
        sample.set_metainfo(dict(pad_shape=(64, 64)))
    return batch['data_samples']


def watch_gradients(wrapper, named_parameters):
    """A list that notes at each update which parameters have a gradient, by name."""
    named, seen = list(named_parameters), []

    def note(*_):
        seen.extend((name, param.grad is not None) for name, param in named)

    wrapper.optimizer.register_step_pre_hook(note)
    return seen


def check_local_losses_fall(model, batch, steps, **local_learning):
    wrapper = build_wrapper(
        model, optimizer=dict(type='AdamW', lr=1e-3), **local_learning
    )
    first = None
    for _ in range(steps):
        model.train_step(batch, wrapper)
        first = first or dict(wrapper.learner.losses)
    for name, loss in wrapper.learner.losses.items():
        assert loss < 0.9 * first[name]


@pytest.fixture(params=['retinanet', 'faster_rcnn'])
def kind(request):
    return request.param


@pytest.fixture(params=[18, 50])
def depth(request):
    return request.param


def build_classifier(depth: int, head: dict | None = None, **kwargs):
    """mmpretrain's ResNet classifier, narrow; ``head`` updates its linear head."""
    init_default_scope('mmpretrain')
    torch.manual_seed(0)
    width = 16 * 2**3 * (4 if depth >= 50 else 1)
    linear = dict(type='LinearClsHead', num_classes=10, in_channels=width)
    model = MODELS.build(
        dict(
            type='ImageClassifier',
            backbone=dict(
                type='ResNet', depth=depth, stem_channels=16, base_channels=16
            ),
            neck=dict(type='GlobalAveragePooling'),
            head={**linear, **(head or {})},
            data_preprocessor=dict(num_classes=10, mean=[127.5] * 3, std=[64.0] * 3),
            **kwargs,
        )
    )
    model.init_weights()
    return model.train()


def build_cifar_classifier(depth: int = 14, data_preprocessor=None, **kwargs):
    """A narrow CIFAR ResNet; 14 layers are 7 units, the stem and 2 blocks a stage."""
    init_default_scope('mmpretrain')
    torch.manual_seed(0)
    model = MODELS.build(
        dict(
            type='ImageClassifier',
            backbone=dict(type='CIFARResNet', depth=depth, base_channels=8),
            neck=dict(type='GlobalAveragePooling'),
            head=dict(type='LinearClsHead', num_classes=10, in_channels=32),
            data_preprocessor=data_preprocessor
            or dict(num_classes=10, mean=[127.5] * 3, std=[64.0] * 3),
            **kwargs,
        )
    )
    model.init_weights()
    return model.train()


def labelled_images(
    size: int = 4, side: int = 64, classes: int = 10, channels: int = 3
):
    from mmpretrain.structures import DataSample

    images = torch.randint(256, (size, channels, side, side), dtype=torch.uint8)
    samples = [DataSample().set_gt_label(i % classes) for i in range(size)]
    return dict(inputs=list(images), data_samples=samples)


RESTORERS = {
    'edsr': dict(type='EDSRNet', mid_channels=8, num_blocks=8),
    'srresnet': dict(type='MSRResNet', mid_channels=8, num_blocks=8),
    'rrdb': dict(type='RRDBNet', mid_channels=8, num_blocks=4, growth_channels=4),
    'rdn': dict(
        type='RDNNet', mid_channels=8, num_blocks=8, num_layers=2, channel_growth=4
    ),
    'swinir': dict(
        type='SwinIRNet',
        img_size=16,
        window_size=4,
        embed_dim=12,
        depths=[1, 2, 1, 1],
        num_heads=[2] * 4,
        mlp_ratio=2,
        upsampler='pixelshuffle',
    ),
}


def needs_mmagic():
    """Skips a test where mmagic is not installed: it has no version for the forks."""
    pytest.importorskip('mmagic')


@pytest.fixture
def mmagic():
    needs_mmagic()


def build_restorer(name: str, scale: int = 2, **kwargs):
    """mmagic's super-resolution model, narrow; ``kwargs`` update its network."""
    needs_mmagic()
    init_default_scope('mmagic')
    torch.manual_seed(0)
    sizes = dict(in_channels=3, out_channels=3, upscale_factor=scale)
    if name == 'swinir':
        sizes = dict(in_chans=3, upscale=scale)
    model = MODELS.build(
        dict(
            type='BaseEditModel',
            generator={**RESTORERS[name], **sizes, **kwargs},
            pixel_loss=dict(type='L1Loss'),
            data_preprocessor=dict(
                type='DataPreprocessor', mean=[0.0] * 3, std=[255.0] * 3
            ),
        )
    )
    model.init_weights()
    return model.train()


def image_pairs(size: int = 2, side: int = 16, scale: int = 2, seed: int = 0):
    """Smooth images, which can be learned, and the same ones ``scale`` times larger."""
    needs_mmagic()
    from mmagic.structures import DataSample

    rng = torch.Generator().manual_seed(seed)
    coarse = 255 * torch.rand(size, 3, 4, 4, generator=rng)
    large, small = (
        F.interpolate(coarse, size=x, mode='bilinear').byte()
        for x in (scale * side, side)
    )
    samples = [DataSample(gt_img=image) for image in large]
    return dict(inputs=list(small), data_samples=samples)


def train_restorer(model, wrapper, steps=2, start=0):
    for step in range(start, start + steps):
        torch.manual_seed(step)  # of the paths that SwinIR drops
        logs = model.train_step(image_pairs(seed=step), wrapper)
    return logs


@pytest.fixture(scope='session')
def source_copy(tmp_path_factory):
    """Copy what a package is built from, since a build writes into its source."""
    copy = tmp_path_factory.mktemp('source')
    for name in BUILT_FROM:
        source = ROOT / name
        if source.is_dir():
            ignore = shutil.ignore_patterns('__pycache__', 'setup.lock')
            shutil.copytree(source, copy / name, ignore=ignore)
        else:
            shutil.copy2(source, copy / name)
    return copy


@pytest.fixture(scope='session')
def wheel(source_copy, tmp_path_factory):
    # What an earlier build left behind must not get into the wheel.
    leftover = source_copy / 'build/lib/man_mm/deleted_module.py'
    leftover.parent.mkdir(parents=True)
    leftover.touch()
    return build_wheel(source_copy, tmp_path_factory.mktemp('wheel'))


@pytest.fixture(scope='session')
def installed(wheel, tmp_path_factory):
    """A folder with the package installed in it, as pip does it anywhere."""
    folder = tmp_path_factory.mktemp('installed')
    options = ['--no-deps', '--no-index', '--target', folder]
    run_python('-m', 'pip', 'install', *options, wheel, cwd=folder)
    return folder
