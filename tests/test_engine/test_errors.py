"""Bad configurations fail at start with one message that names the key and the fix."""

import pytest
import torch
from conftest import (
    LOCAL_LEARNING,
    batch_of,
    build_classifier,
    build_detector,
    build_wrapper,
    detector_config,
)
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope


@pytest.fixture(scope='module')
def model():
    return build_detector(detector_config('retinanet', 18))


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(partition=dict(type='CutPartition', cuts=['backbone.layer9'])),
         r"partition.cuts has 'backbone.layer9'.*Did you mean 'backbone.layer"),
        (dict(partition=dict(type='CutPartition', cuts=['neck'])),
         r"partition.cuts has 'neck'"),
        (dict(partition=dict(type='CutPartition', cuts=['backbone.layer1.0.conv1'])),
         r"cannot be cut. Did you mean .*'backbone.layer1.0'"),
        (dict(partition=dict(type='CutPartition', cuts=['backbone.layer4'])),
         r"ends with 'backbone.layer4', the last unit: drop it"),
        (dict(partition=dict(
            type='CutPartition', cuts=['backbone.layer3', 'backbone.layer1'])),
         r'in the order in which they run'),
        (dict(partition=dict(
            type='CutPartition', cuts=[f'backbone.layer1.{i}' for i in range(30)])),
         r'31 modules, but the network has only 9 units'),
        (dict(partitions=dict()),
         r"unknown keys \['partitions'\]; it takes .*'partition'"),
        (dict(update='epoch'), r"local_learning.update must be one of .* got 'epoch'"),
        (dict(end_to_end_from=1.5),
         r'end_to_end_from must be None or a share of the training from 0 to 1'),
        (dict(end_to_end_from=True), r'end_to_end_from must be None or a share'),
        (dict(end_to_end_from=0, local_loss_weight=-1),
         r'local_loss_weight must be a number of at least 0'),
        (dict(end_to_end_from=0, local_loss_weight='equal'),
         r"local_loss_weight must be .*, or 'balanced', got 'equal'"),
        (dict(local_loss_weight=0.05),
         r'all steps are local: set .*end_to_end_from=0 for joint steps'),
        (dict(clip='none'), r"local_learning.clip must be one of"),
        (dict(clip='global'), r"local_learning.update='iteration'"),
        (dict(aux_head=dict(mode='heavy')),
         r"aux_head.mode must be one of .* got 'heavy'"),
        (dict(aux_head=dict(channels=0)), r'aux_head.channels must be at least 1'),
        (dict(aux_head=dict(num_convs=-1)), r'aux_head.num_convs at least 0'),
        (dict(aux_head=dict(num_blocks=-1)), r'aux_head.num_blocks must be at least 0'),
        (dict(aux_head=dict(cls_weight=0)), r'aux_head.cls_weight above 0'),
        (dict(aux_head=dict(width=3)), r"unknown options \['width'\].*'channels'"),
        (dict(aux_head=dict(type='MANClsHead')), r'use a head of mmpretrain'),
        (dict(aux_head=dict(type='MANSRHead')),
         r"not RetinaNet: set aux_head.type='MANHead'"),
        (dict(aux_head='MANHead'), r"aux_head must be a dictionary such as"),
        (dict(partition='StagePartition'), r"partition must be a dictionary such as"),
        (dict(partition=dict(type='CutPartition', cuts='backbone.layer1')),
         r'partition.cuts must be a list'),
        (dict(partition=dict(type='UniformPartition', num_modules=99)),
         r'partition.num_modules is 99, .* only 9 units'),
        (dict(partition=dict(type='BalancedPartition')),
         r'either partition.num_modules or partition.memory_budget'),
        (dict(partition=dict(type='BalancedPartition', num_modules=3)),
         r'partition.input_shape'),
        (dict(partition=dict(type='BalancedPartition', memory_budget='lots',
                             input_shape=(2, 3, 64, 64))),
         r"partition.memory_budget must be a size such as '6GiB'"),
        (dict(micro_batch_size=0), r'micro_batch_size must be None or a number'),
        (dict(micro_batch_size='2'), r"micro_batch_size must be .* got '2'"),
        (dict(recompute_last_module='no'), r'recompute_last_module must be True, Fa'),
        (dict(recompute_last_module=False, micro_batch_size=2),
         r'recompute_last_module=False .* remove one of them'),
        (dict(recompute='backbone.layer1'), r'recompute must be a list of names'),
        (dict(recompute=['backbone.layer9']), r"recompute has 'backbone.layer9'"),
        (dict(aux_lr_mult=-1), r'aux_lr_mult must be a number of at least 0'),
        (dict(aux_decay_mult='x'), r"aux_decay_mult must be .* got 'x'"),
        (dict(efficient_conv_bn_eval='backbone'), r'efficient_conv_bn_eval must be'),
    ],
)  # fmt: skip
def test_local_learning_options(model, options, message):
    with pytest.raises(ValueError, match=message):
        build_wrapper(model, **options)


@pytest.mark.parametrize(
    'name, fix',
    [
        ('ApexOptimWrapper', 'train without Apex'),
        ('DeepSpeedOptimWrapper', 'train without DeepSpeed'),
        ('OptimWrapper', "keep optim_wrapper.type='LocalLearningOptimWrapper'"),
    ],
)
def test_another_wrapper_type(model, name, fix):
    import man_mm

    cfg = dict(type=name, optimizer=dict(type='SGD', lr=0.1))
    with pytest.raises(ValueError, match=fix):
        man_mm.LocalLearningOptimWrapperConstructor(cfg)(model)


def test_several_optimizers(model):
    cfg = dict(LOCAL_LEARNING, generator=dict(optimizer=dict(type='Adam', lr=1e-3)))
    with pytest.raises(ValueError, match='has no optimizer.* GANs, are not supported'):
        build_optim_wrapper(model, cfg)


def test_options_of_a_constructor_that_is_replaced(model):
    cfg = dict(
        LOCAL_LEARNING,
        optimizer=dict(type='SGD', lr=0.1),
        paramwise_cfg=dict(layer_decay_rate=0.9),
    )
    with pytest.raises(ValueError, match=r"\['layer_decay_rate'\].*base_constructor"):
        build_optim_wrapper(model, cfg)


def test_detection_head_for_a_classifier():
    with pytest.raises(ValueError, match='MANDetHead trains detectors.*ImageClassif'):
        build_wrapper(build_classifier(18), aux_head=dict(type='MANDetHead'))
    init_default_scope('mmdet')


@pytest.mark.parametrize('momentum', [-0.1, 1.0])
def test_momentum_of_the_bank(momentum):
    import man_mm

    with pytest.raises(ValueError, match=r'momentum must be in \[0, 1\)'):
        man_mm.MemoryBankHook(momentum=momentum)


def test_no_memory_bank_hook(model):
    wrapper = build_wrapper(model, bank=False)
    with pytest.raises(ValueError, match=r"memory_bank=dict\(type='MemoryBankHook'\)"):
        wrapper.initialize_count_status(model, 0, 10)
    without = build_wrapper(model, bank=False, aux_head=dict(use_bank=False))
    without.initialize_count_status(model, 0, 10)  # control
    model.train_step(batch_of(), without)


def test_memory_bank_hook_without_local_learning(model):
    from types import SimpleNamespace

    import man_mm

    plain = build_optim_wrapper(
        model, dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1))
    )
    with pytest.raises(ValueError, match="keep optim_wrapper.type='LocalLearning"):
        man_mm.MemoryBankHook().before_run(SimpleNamespace(optim_wrapper=plain))


@pytest.mark.parametrize('kind', ['DataParallel', 'FullyShardedDataParallel'])
def test_unsupported_model_wrappers(model, kind):
    from mmengine.registry import MODEL_WRAPPERS

    from man_mm.engine.checks import check_model_wrapper

    if kind == 'DataParallel':
        wrapped = torch.nn.DataParallel(model)
    else:  # FSDP cannot be built in one process: a class that is registered alike

        @MODEL_WRAPPERS.register_module(force=True)
        class FullyShardedDataParallel(torch.nn.Module):
            pass

        wrapped = FullyShardedDataParallel()
    with pytest.raises(ValueError, match=f'{kind}.*remove model_wrapper_cfg'):
        check_model_wrapper(wrapped)
    check_model_wrapper(model)  # control


@pytest.mark.parametrize('backbone', ['HRNet', 'TridentResNet'])
def test_unsupported_backbones(backbone):
    from mmdet.models.backbones import HRNet

    stage = dict(block='BASIC', num_blocks=(1,), num_channels=(8,))
    build = dict(
        TridentResNet=lambda: MODELS.build(dict(
            type='mmdet.TridentResNet', depth=50, num_branch=3, test_branch_idx=1,
            strides=(1, 2, 2), dilations=(1, 1, 1), trident_dilations=(1, 2, 3),
            num_stages=3, out_indices=(2,))),
        HRNet=lambda: HRNet(extra=dict(
            stage1=dict(stage, num_modules=1, num_branches=1),
            stage2=dict(stage, num_modules=1, num_branches=2, num_blocks=(1, 1),
                        num_channels=(8, 16)),
            stage3=dict(stage, num_modules=1, num_branches=3, num_blocks=(1,) * 3,
                        num_channels=(8, 16, 32)),
            stage4=dict(stage, num_modules=1, num_branches=4, num_blocks=(1,) * 4,
                        num_channels=(8, 16, 32, 64)))),
    )  # fmt: skip
    model = torch.nn.Module()
    model.backbone = build[backbone]()
    with pytest.raises(ValueError, match=f'{backbone}.*Supported backbones: .*ResNet'):
        build_wrapper(model)


def test_model_without_a_head_for_it():
    from mmpretrain.models import ResNet

    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = ResNet(18, base_channels=8, stem_channels=8)

    with pytest.raises(ValueError, match='MANHead knows no auxiliary head for Plain'):
        build_wrapper(Plain())


def test_cut_inside_a_checkpointed_region(model):
    from mmengine.runner.activation_checkpointing import (
        turn_on_activation_checkpointing,
    )

    model = build_detector(detector_config('retinanet', 18))
    wrapper = build_wrapper(
        model, partition=dict(type='CutPartition', cuts=['backbone.layer2.0'])
    )
    model.train_step(batch_of(), wrapper)  # control
    turn_on_activation_checkpointing(model, ['backbone.layer2'])
    with pytest.raises(RuntimeError, match=r'backbone.layer2.0.*activation_checkpoint'):
        model.train_step(batch_of(), wrapper)


def test_resuming_a_checkpoint_without_heads(model):
    plain = build_optim_wrapper(
        model, dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1))
    )
    wrapper = build_wrapper(model)
    with pytest.raises(ValueError, match='load_from'):
        wrapper.load_state_dict(plain.state_dict())
    other = build_wrapper(model, aux_head=dict(channels=32))
    with pytest.raises(ValueError, match='do not fit this configuration'):
        other.load_state_dict(wrapper.state_dict())
    wrapper.load_state_dict(build_wrapper(model).state_dict())  # control
