"""Stock detectors of mmdet: each row of docs/detectors.md is a test.

A stock config is attached as a user would, takes two steps, and its losses are checked
to reach exactly what they train. ``python tests/test_engine/test_detectors.py`` runs
all of them and writes the table into the document.
"""

import copy
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from torch.nn.modules.batchnorm import _BatchNorm

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / 'helpers'))
from conftest import MMDET
from documents import read_marked, write_marked

import man_mm
from man_mm.engine.checks import check_start
from man_mm.measure.synthetic_batch import synthetic_batch

DOCUMENT = Path(__file__).parents[2] / 'docs/detectors.md'
START, END = '<!-- table -->', '<!-- end of table -->'
ARCHITECTURES = {
    'RetinaNet': [
        'retinanet/retinanet_r18_fpn_1x_coco',
        'retinanet/retinanet_r50_fpn_1x_coco',
        'swin/retinanet_swin-t-p4-w7_fpn_1x_coco',
        'regnet/retinanet_regnetx-800MF_fpn_1x_coco',
        'pvt/retinanet_pvt-t_fpn_1x_coco',
        'pvt/retinanet_pvtv2-b0_fpn_1x_coco',
    ],
    'FCOS': ['fcos/fcos_r50-caffe_fpn_gn-head_1x_coco'],
    'ATSS': ['atss/atss_r50_fpn_1x_coco'],
    'GFL': ['gfl/gfl_r50_fpn_1x_coco'],
    'TOOD': ['tood/tood_r50_fpn_1x_coco'],
    'VarifocalNet': ['vfnet/vfnet_r50_fpn_1x_coco'],
    'FoveaBox': ['foveabox/fovea_r50_fpn_4xb4-1x_coco'],
    'YOLOF': ['yolof/yolof_r50-c5_8xb8-1x_coco'],
    'CenterNet': ['centernet/centernet_r18_8xb16-crop512-140e_coco'],
    'YOLOv3': [
        'yolo/yolov3_d53_8xb8-320-273e_coco',
        'yolo/yolov3_mobilenetv2_8xb24-320-300e_coco',
    ],
    'YOLOX': ['yolox/yolox_tiny_8xb8-300e_coco'],
    'RTMDet': [
        'rtmdet/rtmdet_tiny_8xb32-300e_coco',
        'rtmdet/rtmdet-ins_tiny_8xb32-300e_coco',
    ],
    'SSD': ['ssd/ssd300_coco'],
    'RPN': ['rpn/rpn_r50_fpn_1x_coco'],
    'Faster R-CNN': [
        'faster_rcnn/faster-rcnn_r50_fpn_1x_coco',
        'pafpn/faster-rcnn_r50_pafpn_1x_coco',
        'hrnet/faster-rcnn_hrnetv2p-w18-1x_coco',
    ],
    'Dynamic R-CNN': ['dynamic_rcnn/dynamic-rcnn_r50_fpn_1x_coco'],
    'Cascade R-CNN': [
        'cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco',
        'detectors/cascade-rcnn_r50-rfp_1x_coco',
    ],
    'Mask R-CNN': [
        'mask_rcnn/mask-rcnn_r50_fpn_1x_coco',
        'swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco',
        'convnext/mask-rcnn_convnext-t-p4-w7_fpn_amp-ms-crop-3x_coco',
    ],
    'Sparse R-CNN': ['sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco'],
    'TridentNet': ['tridentnet/tridentnet_r50-caffe_1x_coco'],
    'DETR': ['detr/detr_r18_8xb2-500e_coco'],
    'Deformable DETR': ['deformable_detr/deformable-detr_r50_16xb2-50e_coco'],
    'DINO': ['dino/dino-4scale_r50_8xb2-12e_coco'],
    'SOLOv2': ['solov2/solov2_r50_fpn_1x_coco'],
    'CondInst': ['condinst/condinst_r50_fpn_ms-poly-90k_coco_instance'],
}
PATHS = {path: name for name, paths in ARCHITECTURES.items() for path in paths}
# The others take minutes.
QUICK = [
    'retinanet/retinanet_r18_fpn_1x_coco',
    'centernet/centernet_r18_8xb16-crop512-140e_coco',
    'yolox/yolox_tiny_8xb8-300e_coco',
    'rtmdet/rtmdet_tiny_8xb32-300e_coco',
    'rtmdet/rtmdet-ins_tiny_8xb32-300e_coco',
    'hrnet/faster-rcnn_hrnetv2p-w18-1x_coco',
    'detr/detr_r18_8xb2-500e_coco',
]
SIDES = {  # of images, in pixels; otherwise 64
    'ssd/ssd300_coco': 300,  # its neck has no padding
    'dino/dino-4scale_r50_8xb2-12e_coco': 96,
}
FEWER = {
    # As many queries are chosen as there are locations in an image of this size.
    'dino/dino-4scale_r50_8xb2-12e_coco': {'model.num_queries': 100},
    # The maps of its head have the size of these grids, not of the image.
    'solov2/solov2_r50_fpn_1x_coco': {'model.mask_head.num_grids': [8, 7, 6, 4, 3]},
}


def stock(path):
    """A stock config without downloads, on one process, with fewer regions."""
    cfg = Config.fromfile(MMDET / f'.mim/configs/{path}.py')
    cfg.merge_from_dict(FEWER.get(path, {}))
    make_offline(cfg.model)
    stages = (cfg.model.get('train_cfg') or {}).get('rcnn') or []
    for stage in stages if isinstance(stages, list) else [stages]:
        if stage.sampler.type == 'RandomSampler':
            stage.sampler.num = 32  # regions of an image, of 512
    return cfg


def make_offline(cfg):
    if isinstance(cfg, list | tuple):
        for item in cfg:
            make_offline(item)
    if not isinstance(cfg, dict):
        return
    for key, value in cfg.items():
        if key == 'pretrained' or (key == 'init_cfg' and 'checkpoint' in str(value)):
            cfg[key] = None
        elif key == 'type' and value in ('SyncBN', 'MMSyncBN'):
            cfg[key] = 'BN'
        else:
            make_offline(value)


def build(cfg):
    init_default_scope('mmdet')
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    for module in model.modules():
        # Residual branches begin at zero, which pretrained ones do not.
        if isinstance(module, _BatchNorm) and not module.weight.any():
            torch.nn.init.constant_(module.weight, 0.2)
    return model.train()


def attach(cfg, model, **aux_head):
    """As the options of the README do; returns the optimizer's wrapper."""
    given = cfg.optim_wrapper.to_dict()
    local = dict(aux_head=dict(type='MANHead', **aux_head))
    if 'constructor' in given:
        local['base_constructor'] = given['constructor']
    if given['type'] == 'AmpOptimWrapper':
        given = {k: v for k, v in given.items() if k not in ('dtype', 'loss_scale')}
    given.update(
        type='LocalLearningOptimWrapper',
        constructor='LocalLearningOptimWrapperConstructor',
        local_learning=local,
    )
    wrapper = build_optim_wrapper(model, given)
    wrapper.learner.bank = man_mm.MemoryBank()
    check_start(wrapper.learner, wrapper.update)
    return wrapper


def batch_for(path, model):
    side = SIDES.get(path, 64)
    for name in ('iter', 'epoch'):  # read by YOLOX and by TOOD
        MessageHub.get_current_instance().update_info(name, 0)
    return synthetic_batch(model, (2, 3, side, side))


def take_steps(model, wrapper, batch, steps=2):
    for _ in range(steps):
        logs = model.train_step(copy.deepcopy(batch), wrapper)
        losses = [*logs.values(), *wrapper.learner.losses.values()]
        assert all(torch.isfinite(loss).all() for loss in losses)
    assert len(wrapper.learner.losses) == len(wrapper.learner.modules) - 1


def names_of(model, wrapper):
    heads = wrapper.learner.heads.named_parameters(prefix='heads')
    return {param: name for name, param in (*model.named_parameters(), *heads)}


def reached(model, wrapper, batch, local=True):
    """Names of the parameters that get a gradient, by the loss that it is of.

    Of one step without update; by the model's own loss alone if not ``local``. Also
    returns that loss.
    """
    learner, names, got = wrapper.learner, names_of(model, wrapper), {}

    def collect(module):
        got[module.name] = {
            name: bool(param.grad.any())
            for param, name in names.items()
            if param.grad is not None
        }
        for param in names:
            param.grad = None

    def backward(loss, module, _complete):
        loss.backward()
        collect(module)

    torch.manual_seed(0)
    data = model.data_preprocessor(copy.deepcopy(batch), training=True)
    if local:
        with learner.step(data['data_samples'], backward):
            losses = model(**data, mode='loss')
    else:
        losses = model(**data, mode='loss')
    loss, _ = model.parse_losses(losses)
    loss.backward()
    collect(learner.modules[-1])
    return got, loss.detach()


def check(model, wrapper, batch):
    """Two steps move every module, and each loss trains its own module alone."""
    learner, names = wrapper.learner, names_of(model, wrapper)
    before = {name: param.detach().clone() for param, name in names.items()}
    take_steps(model, wrapper, batch)
    still = {name for param, name in names.items() if torch.equal(param, before[name])}
    got, loss = reached(model, wrapper, batch)
    plain, plain_loss = reached(model, wrapper, batch, local=False)
    (plain,) = plain.values()
    torch.testing.assert_close(loss, plain_loss, rtol=1e-2, atol=1e-3)
    for module in learner.modules:
        own = {names[param] for param in learner.params(module)}
        moving = {name for name, nonzero in got[module.name].items() if nonzero}
        if module.is_last:
            own &= set(plain)  # some weights are not used in each step
        else:
            moving |= {name for name in own if not name.startswith('heads')}
        assert set(got[module.name]) == own, module.name
        assert moving and not moving & still, (module.name, sorted(moving & still)[:5])


def row(path):
    """Runs a config; returns its line of the table."""
    cfg = stock(path)
    model = build(cfg)
    modules, results = '–', {}
    # Some heads keep tensors of a step, which cannot be copied: copy before it.
    for mode in ('faithful', 'light'):
        try:
            wrapper = attach(cfg, model, mode=mode)
        except ValueError as error:
            results[mode] = f'refused: {str(error).partition(". ")[0].rstrip(".")}'
            continue
        batch = batch_for(path, model)
        if mode == 'light':
            modules = str(len(wrapper.learner.modules))
            check(model, wrapper, batch)
        else:
            take_steps(model, wrapper, batch, steps=1)
        results[mode] = 'works'
    if results['light'] == results['faithful'] != 'works':
        results['faithful'] = 'refused'  # for the same reason
    cells = [*description(path, cfg), modules, results['light'], results['faithful']]
    return f'| {" | ".join(cells)} |'


def description(path, cfg):
    backbone, necks = cfg.model.backbone, cfg.model.get('neck') or []
    kind = backbone.type.rpartition('.')[2]
    depth = f'-{backbone.depth}' if 'depth' in backbone else ''
    necks = necks if isinstance(necks, list) else [necks]
    neck = ', '.join(neck.type for neck in necks) or 'none'
    return f'`{path}`', PATHS[path], f'{kind}{depth}', neck


HEADER = (
    '| config of mmdet | architecture | backbone | neck | K '
    "| `mode='light'` | `mode='faithful'` |\n|---|---|---|---|---|---|---|"
)


def rows_of_document():
    """The rows of the table by config."""
    table = read_marked(DOCUMENT, START, END)
    return {
        line.split('`')[1]: line
        for line in table.splitlines()
        if line.startswith('| `')
    }


def write(rows):
    """Writes the table, the rows in the order of this file."""
    table = '\n'.join([HEADER, *(rows[path] for path in PATHS if path in rows)])
    write_marked(DOCUMENT, START, END, table)


def rows():
    return [
        pytest.param(path, marks=[] if path in QUICK else [pytest.mark.slow])
        for path in PATHS
    ]


@pytest.mark.parametrize('path', rows())
def test_row(path):
    assert row(path) == rows_of_document()[path]


def test_the_table_has_every_config():
    table = rows_of_document()
    assert list(table) == list(PATHS)
    works = [path for path, line in table.items() if '| works |' in line]
    assert len(works) >= 25 and len({PATHS[path] for path in works}) >= 12


@pytest.fixture
def rtmdet():
    path = 'rtmdet/rtmdet_tiny_8xb32-300e_coco'
    cfg = stock(path)
    model = build(cfg)
    return model, attach(cfg, model), batch_for(path, model)


def test_control_a_head_that_reads_the_graph_of_another_module(rtmdet):
    model, wrapper, _ = rtmdet
    head = wrapper.learner.heads[1]
    forward, images = head.forward, torch.zeros(2, 3, 32, 32)
    head.forward = lambda *args: {
        **forward(*args),
        'loss_leak': 0 * model.backbone.stem(images).sum(),
    }
    with pytest.raises(AssertionError, match='module2'):
        check(*rtmdet)


def test_control_a_module_that_is_not_updated(rtmdet):
    _, wrapper, _ = rtmdet
    finish = wrapper._finish

    def skip_second(module, update):
        if module.index != 1:
            finish(module, update)
            return
        for param in wrapper.learner.params(module):
            param.grad = None

    wrapper._finish = skip_second
    with pytest.raises(AssertionError, match='module2'):
        check(*rtmdet)


def test_control_heads_that_change_the_targets(rtmdet):
    model, wrapper, _ = rtmdet
    head = wrapper.learner.heads[0]
    forward = head.forward

    def change(maps, targets, bank):
        losses = forward(maps, targets, bank)
        for sample in targets:
            sample.gt_instances = sample.gt_instances[:1]
        return losses

    head.forward = change
    with pytest.raises(AssertionError, match='not close'):
        check(*rtmdet)


if __name__ == '__main__':
    for path in sys.argv[1:] or PATHS:
        write({**rows_of_document(), path: row(path)})
