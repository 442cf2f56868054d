"""Which optimizers may step a part of their parameters, and how they do."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from mmengine.logging import print_log
from torch import nn, optim

# They treat each element by itself, and keep no state but that of a parameter.
ELEMENTWISE = (
    optim.SGD,
    optim.Adam,
    optim.AdamW,
    optim.Adamax,
    optim.NAdam,
    optim.RAdam,
    optim.Adagrad,
    optim.Adadelta,
    optim.RMSprop,
    optim.ASGD,
    optim.Rprop,
)


def is_elementwise(optimizer: optim.Optimizer) -> bool:
    """Whether an optimizer treats each element of each parameter by itself.

    Then it may step some parameters before others, and parts of them. Other optimizers
    may count the steps of a group, or use the norm of all gradients, as LAMB does. Only
    those of `ELEMENTWISE` are known not to; a subclass may do anything.

    Args:
        optimizer: The optimizer.
    """
    return type(optimizer) in ELEMENTWISE


def choose_update(optimizer: optim.Optimizer, update: str) -> str:
    """When modules may be updated by an optimizer.

    Args:
        optimizer: The optimizer.
        update: When they are to be; see `LocalLearningOptimWrapper`.

    Returns:
        ``update``, or ``'iteration'`` if the optimizer needs all gradients at once.

    Raises:
        ValueError: If it does, and ``update`` is ``'parameter'``.
    """
    if update == 'iteration' or is_elementwise(optimizer):
        return update
    name = type(optimizer).__name__
    if update == 'parameter':
        raise ValueError(
            f'optim_wrapper.optimizer.type={name!r} may need the gradients of all '
            "parameters at once: set optim_wrapper.local_learning.update='iteration', "
            f'or use one of {", ".join(kind.__name__ for kind in ELEMENTWISE)}.'
        )
    print_log(
        f'{name} may need the gradients of all parameters at once, so all modules are '
        "updated together (optim_wrapper.local_learning.update='iteration').",
        'current',
    )
    return 'iteration'


@contextmanager
def optimizer_limited_to(
    optimizer: optim.Optimizer, params: Collection[nn.Parameter]
) -> Iterator[None]:
    """Limits an optimizer to some parameters: others may hold unfinished gradients.

    Args:
        optimizer: The optimizer.
        params: The parameters.
    """
    chosen = set(params)
    groups = optimizer.param_groups
    everything = [group['params'] for group in groups]
    try:
        for group in groups:
            group['params'] = [p for p in group['params'] if p in chosen]
        optimizer.param_groups = [group for group in groups if group['params']]
        yield
    finally:
        optimizer.param_groups = groups
        for group, all_params in zip(groups, everything, strict=True):
            group['params'] = all_params
