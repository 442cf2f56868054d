"""Configurations that cannot work, reported at start-up with the key and the fix."""

from __future__ import annotations

import torch
from mmengine import dist
from mmengine.logging import MMLogger
from mmengine.model import MMDistributedDataParallel, is_model_wrapper
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DataParallel, DistributedDataParallel

from man_mm.core import LocalLearner

from .fully_sharded_model import FullyShardedModel

WRAPPER = 'LocalLearningOptimWrapper'
AMP_WRAPPER = 'AmpLocalLearningOptimWrapper'

_OTHER_WRAPPERS = {
    'ApexOptimWrapper': 'train without Apex',
    'DeepSpeedOptimWrapper': (
        "train without DeepSpeed (model_wrapper_cfg=dict(type='FullyShardedModel') "
        'splits weights and optimizer state too)'
    ),
}


def check_wrapper_type(name: str) -> None:
    """Refuses a configuration in which another wrapper replaced ours.

    Args:
        name: ``optim_wrapper.type``, with or without a scope.

    Raises:
        ValueError: If it is neither `LocalLearningOptimWrapper` nor
            `AmpLocalLearningOptimWrapper`; local learning would silently be off.
    """
    plain = name.rpartition('.')[2]
    if plain not in (WRAPPER, AMP_WRAPPER):
        fix = _OTHER_WRAPPERS.get(plain, 'remove the other type')
        raise ValueError(
            f'optim_wrapper.type is {name!r}, with which local learning would be off: '
            f"{fix}, and keep optim_wrapper.type='{WRAPPER}' or '{AMP_WRAPPER}'."
        )


def check_model_wrapper(model: nn.Module) -> None:
    """Refuses model wrappers that do not allow a backward pass in the forward pass.

    Args:
        model: The model that the runner trains.

    Raises:
        ValueError: For FSDP, DeepSpeed and everything else but
            ``MMDistributedDataParallel`` and `FullyShardedModel`, and if the former is
            to ``detect_anomalous_params``.
    """
    wraps = is_model_wrapper(model) or isinstance(
        model, DataParallel | DistributedDataParallel
    )
    if wraps and not isinstance(model, MMDistributedDataParallel | FullyShardedModel):
        raise ValueError(
            f'The model is wrapped in {type(model).__name__}, which cannot run the '
            'backward pass of a module inside the forward pass: remove '
            'model_wrapper_cfg (and strategy) from the config, so that '
            'MMDistributedDataParallel is used. To split weights and optimizer state '
            "over processes, set model_wrapper_cfg=dict(type='FullyShardedModel')."
        )
    if getattr(model, 'detect_anomalous_params', False):
        raise ValueError(
            'model_wrapper_cfg.detect_anomalous_params looks for parameters that the '
            "model's own loss does not reach, which are all but the last module's in "
            'local learning: remove it.'
        )


def check_saving(model: nn.Module) -> None:
    """Refuses to train, in a runner, what could not be saved.

    Args:
        model: The model, wrapped or not.

    Raises:
        ValueError: If it is a `FullyShardedModel` that no `ShardingHook` gathers.
    """
    if isinstance(model, FullyShardedModel) and not model.can_save:
        raise ValueError(
            'Checkpoints of a FullyShardedModel are gathered by ShardingHook, which is '
            'not configured. Add to the config:\n'
            "    default_hooks = dict(sharding=dict(type='ShardingHook'))"
        )


def check_updates(update: str, clip: str, clips: bool) -> None:
    """Refuses options of the update that are unknown or do not go together.

    Args:
        update: ``optim_wrapper.local_learning.update``.
        clip: ``optim_wrapper.local_learning.clip``.
        clips: Whether there is an ``optim_wrapper.clip_grad``.

    Raises:
        ValueError: If so; names the key and the fix.
    """
    for key, value, known in (
        ('update', update, ('module', 'iteration', 'parameter')),
        ('clip', clip, ('module', 'global')),
    ):
        if value not in known:
            raise ValueError(
                f'optim_wrapper.local_learning.{key} must be one of {known}, got '
                f'{value!r}.'
            )
    if update == 'parameter' and clips:
        raise ValueError(
            "optim_wrapper.local_learning.update='parameter' frees gradients one by "
            'one, but clip_grad needs those of a module at once: set '
            "optim_wrapper.local_learning.update='module', or remove "
            'optim_wrapper.clip_grad.'
        )
    if clip == 'global' and update != 'iteration':
        raise ValueError(
            "optim_wrapper.local_learning.clip='global' needs the gradients of all "
            "modules at once: set optim_wrapper.local_learning.update='iteration'."
        )


def warn_of_clipping(clip: str, clips: bool) -> None:
    """Warns that steps that are end to end clip otherwise than plain training does.

    Args:
        clip: ``optim_wrapper.local_learning.clip``.
        clips: Whether there is an ``optim_wrapper.clip_grad``.
    """
    if clips and clip == 'module':
        MMLogger.get_current_instance().warning(
            'optim_wrapper.clip_grad clips the gradients of each module by themselves. '
            'To clip all together, as end-to-end training does, set '
            "optim_wrapper.local_learning.clip='global' and "
            "optim_wrapper.local_learning.update='iteration'."
        )


def check_start(learner: LocalLearner, update: str) -> None:
    """Refuses to start what could not train, and warns of what trains differently.

    Args:
        learner: The learner about to train.
        update: When the wrapper updates.

    Raises:
        ValueError: If a head reads a memory bank that is not there, if another tool
            has replaced the forward function that would run the units, or if
            ``update='parameter'`` meets several processes.
    """
    needs_bank = any(getattr(head, 'needs_bank', False) for head in learner.heads)
    if needs_bank and learner.bank is None:
        raise ValueError(
            'The auxiliary heads read a memory bank, but no MemoryBankHook is '
            'configured. Add to the config:\n'
            "    default_hooks = dict(memory_bank=dict(type='MemoryBankHook'))\n"
            'or, for the heads of MAN, set '
            'optim_wrapper.local_learning.aux_head.use_bank=False.'
        )
    if update == 'parameter' and dist.get_world_size() > 1:
        raise ValueError(
            "optim_wrapper.local_learning.update='parameter' steps before gradients "
            "are averaged over processes: set it to 'module'."
        )
    if len(learner.modules) > 1:
        _check_forward(learner)
        if learner.micro_batch_size is not None:
            _warn_of_batch_norm(learner)


def _check_forward(learner: LocalLearner) -> None:
    *holders, _ = learner.modules[0].cut.split('.')
    for depth in range(1, len(holders) + 1):
        name = '.'.join(holders[:depth])
        forward = learner.model.get_submodule(name).forward
        if isinstance(getattr(forward, '__self__', None), torch.fx.GraphModule):
            raise ValueError(
                f'efficient_conv_bn_eval has traced {name!r} as a whole, so its units '
                'never run and cannot be cut: remove the key efficient_conv_bn_eval '
                'from the config. Local learning does the same by itself '
                '(optim_wrapper.local_learning.efficient_conv_bn_eval).'
            )


def _warn_of_batch_norm(learner: LocalLearner) -> None:
    parts = [part for module in learner.modules for part in module.parts]
    norms = [
        norm
        for part in parts
        for norm in learner.model.get_submodule(part).modules()
        if isinstance(norm, _BatchNorm) and norm.training
    ]
    if norms:
        MMLogger.get_current_instance().warning(
            f'micro_batch_size={learner.micro_batch_size}: {len(norms)} batch norms '
            'are in training mode, and will normalise each micro-batch by itself.'
        )
