"""Every config builds and trains a step, shrunken; stock configs by options alone."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import batch_of, labelled_images
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import HOOKS, MODELS, init_default_scope

from man_mm.aux_heads.man_det import num_classes

CONFIGS = sorted(Path('configs/man').glob('*.py'))
WIDTHS = {18: 1, 34: 1, 50: 4, 101: 4, 152: 4}


def shrink(cfg):
    backbone = cfg.model.backbone
    backbone.base_channels = 8
    backbone.init_cfg = None
    widths = [8 * WIDTHS[backbone.depth] * 2**i for i in range(4)]
    if cfg.model.type == 'ImageClassifier':
        backbone.stem_channels = 8
        cfg.model.head.in_channels = widths[-1]
    else:
        cfg.model.neck.in_channels = widths


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_config_trains(path):
    cfg = Config.fromfile(path)
    init_default_scope(cfg.default_scope)
    shrink(cfg)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model).train()
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    wrapper.learner.bank = HOOKS.build(cfg.default_hooks.memory_bank).bank
    before = [p.clone() for p in model.parameters()]
    is_classifier = cfg.model.type == 'ImageClassifier'
    batch = labelled_images() if is_classifier else batch_of(classes=num_classes(model))
    logs = model.train_step(batch, wrapper)
    assert torch.isfinite(logs['loss'])
    frozen = cfg.model.backbone.get('frozen_stages', -1)
    assert len(wrapper.learner.modules) == (3 if frozen == 1 else 4)
    assert any(
        not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)
    )


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_config_adds_only_local_learning(path):
    keys = re.findall(r'^(\w+) = ', path.read_text(), re.MULTILINE)
    if '_r34_' in path.stem:  # mmdet has no RetinaNet-R34 to inherit from
        keys.remove('model')
    assert keys == ['_base_', 'custom_imports', 'optim_wrapper', 'default_hooks']


def test_options_on_a_stock_config():
    """The lines of the README, on the stock RetinaNet, with scoped types."""
    stock = Path(find_spec('mmdet').origin).parent / '.mim/configs/retinanet'
    cfg = Config.fromfile(stock / 'retinanet_r50_fpn_1x_coco.py')
    cfg.merge_from_dict(
        {
            'optim_wrapper.type': 'man_mm.LocalLearningOptimWrapper',
            'optim_wrapper.constructor': 'man_mm.LocalLearningOptimWrapperConstructor',
            'default_hooks.memory_bank.type': 'man_mm.MemoryBankHook',
        }
    )
    init_default_scope('mmdet')
    shrink(cfg)
    model = MODELS.build(cfg.model).train()
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    wrapper.learner.bank = HOOKS.build(cfg.default_hooks.memory_bank).bank
    assert torch.isfinite(model.train_step(batch_of(), wrapper)['loss'])
    assert len(wrapper.learner.losses) == 2
