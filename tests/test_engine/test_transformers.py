"""Swin-T and ViT-S as stock configs have them, for a short run on real images."""

import statistics

import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmpretrain.structures import DataSample
from sklearn.datasets import load_digits

from man_mm import MemoryBank

SIDE, BATCH = 64, 16


def digits(steps):
    """Batches of handwritten digits, enlarged."""
    images, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(images).float().view(-1, 1, 8, 8) * (255 / 16)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    for rows in order[: steps * BATCH].split(BATCH):
        large = F.interpolate(images[rows], (SIDE, SIDE), mode='bilinear')
        yield dict(
            inputs=list(large.expand(-1, 3, -1, -1)),
            data_samples=[DataSample().set_gt_label(int(labels[i])) for i in rows],
        )


def losses(config, learning_rate, steps):
    """The loss of every module, at each step of a run."""
    cfg = Config.fromfile(f'configs/man/{config}_man_imagenet.py')
    init_default_scope('mmpretrain')
    torch.manual_seed(0)
    cfg.model.head.num_classes = 10
    cfg.model.train_cfg = None  # labels of single classes
    cfg.model.backbone.img_size = SIDE
    if cfg.model.backbone.type == 'SwinTransformer':
        cfg.model.backbone.pad_small_map = True  # windows of 7 do not fit the last maps
    model = MODELS.build(
        {**cfg.model, 'data_preprocessor': dict(mean=[127.5] * 3, std=[64.0] * 3)}
    )
    model.init_weights()
    cfg.optim_wrapper.optimizer.lr = learning_rate
    wrapper = build_optim_wrapper(model.train(), cfg.optim_wrapper)
    wrapper.learner.bank = MemoryBank()
    rows = []
    for batch in digits(steps):
        log = model.train_step(batch, wrapper)
        own = wrapper.learner.losses.values()
        rows.append([value.item() for value in (*own, log['loss'].detach())])
    return list(zip(*rows, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ('config', 'learning_rate', 'steps'),
    [('swin_tiny', 1e-3, 40), ('vit_small', 3e-4, 100)],
)
def test_the_loss_of_every_module_falls(config, learning_rate, steps):
    learned = losses(config, learning_rate, steps)
    untrained = losses(config, 0.0, steps)  # control: the same batches
    assert len(learned) == 4
    for ours, theirs in zip(learned, untrained, strict=True):
        assert statistics.mean(ours[-8:]) < 0.96 * statistics.mean(theirs[-8:])
