"""Which optimizers may step a part of their parameters, and how they do."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

from mmengine.logging import print_log
from torch import Tensor, nn, optim

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
    with _with_groups_of(
        optimizer,
        [[p for p in g['params'] if p in chosen] for g in optimizer.param_groups],
    ):
        yield


@contextmanager
def _with_groups_of(
    optimizer: optim.Optimizer, params: Sequence[list[nn.Parameter]]
) -> Iterator[None]:
    """Gives each group of an optimizer other parameters, and hides empty groups."""
    groups = optimizer.param_groups
    everything = [group['params'] for group in groups]
    try:
        for group, some in zip(groups, params, strict=True):
            group['params'] = some
        optimizer.param_groups = [group for group in groups if group['params']]
        yield
    finally:
        optimizer.param_groups = groups
        for group, all_params in zip(groups, everything, strict=True):
            group['params'] = all_params


def in_parts(
    optimizer: optim.Optimizer, param: nn.Parameter, nbytes: int
) -> Iterator[nn.Parameter]:
    """Lets an elementwise optimizer take a large parameter for several smaller ones.

    What it makes for a moment while it steps is then as large as one of them.

    Args:
        optimizer: The optimizer, with the state of the parameter.
        param: A parameter with a gradient.
        nbytes: Size of a part, if the parameter can be split so: along its first
            dimension.

    Yields:
        One part after the other, which share memory with parameter, gradient and
        state. Until the next one is asked for, the optimizer has only that.
    """
    state, whole = optimizer.state, optimizer.state.get(param, {})
    alike = {key for key, value in whole.items() if _is_split_like(value, param)}
    common = {key: value for key, value in whole.items() if key not in alike}
    count = max(nbytes * len(param) // param.nbytes, 1)
    holders = [param in set(group['params']) for group in optimizer.param_groups]
    after = common
    for start in range(0, len(param), count):
        rows = slice(start, start + count)
        part = nn.Parameter(param.detach()[rows])
        part.grad = param.grad[rows]
        if whole:
            # Each part counts its step by itself.
            state[part] = copy.deepcopy(common)
            state[part].update({key: whole[key][rows] for key in alike})
        with _with_groups_of(optimizer, [[part] if held else [] for held in holders]):
            yield part
        after = state.pop(part, common)
    whole.update({key: after[key] for key in common})


def _is_split_like(value: object, param: nn.Parameter) -> bool:
    return isinstance(value, Tensor) and value.shape == param.shape
