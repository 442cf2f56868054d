"""Configurations that cannot work, told at start with the key and the fix."""

from __future__ import annotations

from mmengine.model import MMDistributedDataParallel, is_model_wrapper
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from man_mm.core import LocalLearner

WRAPPER = 'LocalLearningOptimWrapper'

_OTHER_WRAPPERS = {
    'AmpOptimWrapper': 'train without --amp (mixed precision is not supported)',
    'ApexOptimWrapper': 'train without Apex',
    'DeepSpeedOptimWrapper': 'train without DeepSpeed',
}


def check_wrapper_type(name: str) -> None:
    """Refuses a configuration in which another wrapper replaced ours.

    Args:
        name: ``optim_wrapper.type``, with or without a scope.

    Raises:
        ValueError: If it is not `LocalLearningOptimWrapper`; ``--amp`` overwrites the
            type and would silently turn local learning off.
    """
    plain = name.rpartition('.')[2]
    if plain != WRAPPER:
        fix = _OTHER_WRAPPERS.get(plain, 'remove the other type')
        raise ValueError(
            f'optim_wrapper.type is {name!r}, with which local learning would be off: '
            f"{fix}, and keep optim_wrapper.type='{WRAPPER}'."
        )


def check_model_wrapper(model: nn.Module) -> None:
    """Refuses model wrappers that do not allow a backward pass in the forward pass.

    Args:
        model: The model that the runner trains.

    Raises:
        ValueError: For FSDP, DeepSpeed and everything else but
            ``MMDistributedDataParallel``.
    """
    wraps = is_model_wrapper(model) or isinstance(
        model, DataParallel | DistributedDataParallel
    )
    if wraps and not isinstance(model, MMDistributedDataParallel):
        raise ValueError(
            f'The model is wrapped in {type(model).__name__}, which cannot run the '
            'backward pass of a module inside the forward pass: remove '
            'model_wrapper_cfg (and strategy) from the config, so that '
            'MMDistributedDataParallel is used.'
        )


def check_start(learner: LocalLearner) -> None:
    """Refuses to start without a memory bank that a head reads.

    Args:
        learner: The learner about to train.

    Raises:
        ValueError: With the line to add.
    """
    needs_bank = any(getattr(head, 'needs_bank', False) for head in learner.heads)
    if needs_bank and learner.bank is None:
        raise ValueError(
            'The auxiliary heads read a memory bank, but no MemoryBankHook is '
            'configured. Add to the config:\n'
            "    default_hooks = dict(memory_bank=dict(type='MemoryBankHook'))\n"
            'or set optim_wrapper.local_learning.aux_head.use_bank=False.'
        )
