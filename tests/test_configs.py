"""Every config builds and trains a step, shrunken; stock configs by options alone."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from conftest import RESTORERS, batch_of, image_pairs, labelled_images, needs_mmagic
from mmengine.config import Config
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import HOOKS, MODELS, init_default_scope

from man_mm.engine.checks import check_start
from man_mm.measure.synthetic_batch import synthetic_batch

END_TO_END = sorted(Path('configs/end_to_end').glob('*.py'))
CONFIGS = sorted(set(Path('configs').glob('[!_]*/*.py')) - set(END_TO_END))
CLASSIFIERS = [path for path in END_TO_END if path.stem.startswith('resnet')]
# As those on CIFAR-10, but for the data.
OTHER_DATA = [p for p in (*CONFIGS, *CLASSIFIERS) if p.stem.endswith(('svhn', 'stl10'))]
WIDTHS = {18: 1, 34: 1, 50: 4, 101: 4, 152: 4}
SMALL = {
    'CIFARResNet': dict(base_channels=4),
    'SwinTransformer': dict(
        arch=dict(embed_dims=8, depths=[1] * 4, num_heads=[2] * 4),
        img_size=64,
        window_size=2,
    ),
    'VisionTransformer': dict(
        arch=dict(embed_dims=8, num_layers=4, num_heads=2, feedforward_channels=8),
        img_size=64,
    ),
}
OUTPUTS = {'CIFARResNet': 16, 'SwinTransformer': 64, 'VisionTransformer': 8}


def read(path):
    if path.stem.partition('_')[0] in RESTORERS:
        needs_mmagic()
    return Config.fromfile(path)


def shrink(cfg):
    if 'generator' in cfg.model:
        shrink_restorer(cfg.model.generator)
        return
    backbone = cfg.model.backbone
    if cfg.model.type != 'ImageClassifier':
        shrink_detector(cfg.model)
        return
    cfg.model.data_preprocessor = cfg.data_preprocessor
    if backbone.type in SMALL:
        backbone.update(SMALL[backbone.type])
        cfg.model.head.in_channels = OUTPUTS[backbone.type]
        return
    backbone.base_channels = 8
    backbone.init_cfg = None
    widths = [8 * WIDTHS[backbone.depth] * 2**i for i in range(4)]
    backbone.stem_channels = 8
    cfg.model.head.in_channels = widths[-1]


def shrink_detector(model):
    backbone = model.backbone
    if backbone.type == 'CSPNeXt':
        for part in (backbone, model.neck, model.bbox_head):
            part.norm_cfg.type = 'BN'
        return
    if backbone.type == 'MobileNetV2':
        backbone.update(widen_factor=0.25, init_cfg=None)
        model.neck.in_channels = [8, 8, 24, 80]
        if 'roi_head' in model:
            model.train_cfg.rcnn.sampler.num = 32
        return
    if backbone.type == 'SwinTransformer':
        backbone.update(embed_dims=8, depths=[1] * 4, num_heads=[2] * 4)
        expansion = 1
    else:
        backbone.update(base_channels=8, init_cfg=None)
        expansion = WIDTHS[backbone.depth]
    widths = [8 * expansion * 2**i for i in backbone.out_indices]
    model.neck.in_channels = widths[::-1] if model.type == 'YOLOV3' else widths
    if 'roi_head' in model:
        model.train_cfg.rcnn.sampler.num = 32
    if model.type == 'DINO':
        model.num_queries = 50
        model.encoder.num_layers = model.decoder.num_layers = 1


def shrink_restorer(generator):
    small = dict(mid_channels=8, num_blocks=8, growth_channels=4)
    if generator.type == 'SwinIRNet':
        small = dict(embed_dim=12, depths=[1] * 4, num_heads=[2] * 4)
    elif generator.type != 'RRDBNet':
        del small['growth_channels']
    generator.update(small)


def batch_for(cfg, model):
    if cfg.model.type == 'ImageClassifier':
        grey = cfg.model.backbone.get('in_channels') == 1
        small = cfg.model.backbone.type == 'CIFARResNet'
        return labelled_images(side=16 if small else 64, channels=1 if grey else 3)
    if cfg.model.type == 'BaseEditModel':
        return image_pairs(scale=cfg.scale)
    return synthetic_batch(model, (2, 3, 64, 96))


def expected_modules(path, cfg):
    if named := re.search(r'_k(\d+)_', path.stem):
        return int(named[1])
    return 3 if cfg.model.get('backbone', {}).get('frozen_stages', -1) == 1 else 4


def check_metafile(path, cfg):
    """The metafile says on what the config trains, and for how long."""
    models = yaml.safe_load((path.parent / 'metafile.yml').read_text())['Models']
    (model,) = (model for model in models if model['Config'] == str(path))
    length = 'Epochs' if cfg.train_cfg.get('max_epochs') else 'Iterations'
    key = f'max_{length.lower()}'.replace('iterations', 'iters')
    metadata = model['Metadata']
    assert metadata.keys() == {'Training Data', length}
    assert metadata[length] == cfg.train_cfg[key]
    results = model.get('Results', ())
    assert all(row['Dataset'] == metadata['Training Data'] for row in results)


@pytest.mark.parametrize(
    'path', sorted(set(CONFIGS) - set(OTHER_DATA)), ids=lambda path: path.stem
)
def test_config_trains(path):
    cfg = read(path)
    check_metafile(path, cfg)
    init_default_scope(cfg.default_scope)
    shrink(cfg)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model).train()
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    if 'memory_bank' in cfg.default_hooks:
        wrapper.learner.bank = HOOKS.build(cfg.default_hooks.memory_bank).bank
    check_start(wrapper.learner, wrapper.update)
    before = [p.clone() for p in model.parameters()]
    logs = model.train_step(batch_for(cfg, model), wrapper)
    assert torch.isfinite(logs['loss'])
    assert len(wrapper.learner.modules) == expected_modules(path, cfg)
    assert any(
        not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)
    )


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_config_adds_only_local_learning(path):
    text = path.read_text()
    keys = re.findall(r'^(\w+) = ', text, re.MULTILINE)
    # mmdet has no RetinaNet-R34 and no YOLOv3 with a ResNet to inherit from.
    if path.stem.startswith(('retinanet_r34', 'yolov3_r')):
        keys.remove('model')
    # Those of mmagic would else be written to the folders of the stock configs.
    keys = [key for key in keys if key not in ('experiment_name', 'work_dir')]
    expected = ['_base_', 'custom_imports', 'optim_wrapper', 'default_hooks']
    if path.parent.name in ('dgl', 'predsim', 'auglocal') and 'end_to_end' in text:
        expected.pop()  # without memory bank, and the base has the other hooks
    if re.match(r"_base_ = '\w+\.py'", text):  # the one beside it has added the rest
        expected = expected[:1]
    assert keys == expected
    hooks = read(path).default_hooks
    assert hooks.resume.type == 'ResumeHook'
    assert hooks.checkpoint.type == 'SafeCheckpointHook'


@pytest.mark.parametrize('path', OTHER_DATA, ids=lambda path: path.stem)
def test_other_data_sets_change_nothing_else(path):
    cfg = read(path)
    twin = Config.fromfile(re.sub('svhn|stl10', 'cifar10', str(path)))
    assert cfg.model == twin.model and cfg.data_preprocessor != twin.data_preprocessor
    local = cfg.optim_wrapper.get('local_learning')
    assert local == twin.optim_wrapper.get('local_learning')
    assert (local is None) == (path in END_TO_END)
    if path in CONFIGS:
        check_metafile(path, cfg)
    kinds = {
        loader.dataset.type for loader in (cfg.train_dataloader, cfg.test_dataloader)
    }
    assert kinds == {path.stem.rpartition('_')[2].upper()}


@pytest.mark.parametrize(
    'path', sorted(set(CLASSIFIERS) - set(OTHER_DATA)), ids=lambda path: path.stem
)
def test_the_end_to_end_twin_trains(path):
    cfg = read(path)
    init_default_scope(cfg.default_scope)
    shrink(cfg)
    model = MODELS.build(cfg.model).train()
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    assert type(wrapper) is OptimWrapper
    assert torch.isfinite(model.train_step(batch_for(cfg, model), wrapper)['loss'])


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


@pytest.mark.parametrize('path', sorted(Path('configs/end_to_end').glob('*_div2k.py')))
def test_restorers_are_tested_on_five_sets(path):
    cfg = read(path)
    sets = ['Set5', 'Set14', 'DIV2K', 'B100', 'Urban100']
    roots = [loader.dataset.data_root for loader in cfg.test_dataloader]
    assert roots == [f'data/{name}' for name in sets]
    for name, loader, evaluator in zip(
        sets, cfg.test_dataloader, cfg.test_evaluator, strict=True
    ):
        assert {metric.type for metric in evaluator.metrics} == {'PSNR', 'SSIM'}
        for metric in evaluator.metrics:
            assert (metric.prefix, metric.crop_border) == (name, cfg.scale)
            # SwinIR's stock configs compare the Y channel, the others RGB.
            assert ('convert_to' in metric) == ('swinir' in path.stem)
        assert f'{cfg.scale}' in loader.dataset.data_prefix.img
