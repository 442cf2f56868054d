"""Stepping a module only if its gradients are finite, without waiting for that."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .distributed import is_sharded
from .optimizers import in_parts, optimizer_limited_to

# A call of the optimizer has its price, so small parameters are stepped together, and
# only large ones in parts. What is kept to undo a step is as large as these and their
# state.
_CHUNK_BYTES = 2**20
_SHARE = 16  # of a module, at most
_LEAST_BYTES = 2**15  # less is not worth a call
_PART_BYTES = 2**21
_SMALL = 2**14  # bytes of a tensor that is kept in one piece with others


class Chunk:
    """Parameters that wait until they are worth a call of the optimizer.

    Args:
        params: All parameters of the module.
    """

    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        share = sum(param.nbytes for param in params) // _SHARE
        self._limit = max(_LEAST_BYTES, min(_CHUNK_BYTES, share))
        self._waiting: list[nn.Parameter] = []
        self._nbytes = 0

    def add(self, param: nn.Parameter) -> list[nn.Parameter]:
        """Lets one more wait.

        Args:
            param: A parameter of the module.

        Returns:
            All that have waited, once they are worth a call; else none.
        """
        self._waiting.append(param)
        self._nbytes += param.nbytes
        return self.take() if self._nbytes >= self._limit else []

    def take(self) -> list[nn.Parameter]:
        """Those that wait; none does any more."""
        taken, self._waiting, self._nbytes = self._waiting, [], 0
        return taken


def chunks(params: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Splits parameters of a module into what is stepped at once.

    Args:
        params: The parameters.

    Yields:
        Some of them, in their order.
    """
    chunk = Chunk(params)
    for param in params:
        if some := chunk.add(param):
            yield some
    if rest := chunk.take():
        yield rest


def waits_for(flag: Tensor) -> bool:
    """Whether the host would wait to read a flag, as it does for a GPU's."""
    return flag.device.type != 'cpu'


class Stepper:
    """Steps the parameters of modules, unless their gradients are not finite.

    Whether they are is known on the device first, and reading it makes the host wait
    for a GPU. So a module is stepped there in any case, a few parameters at a time, and
    where its flag is false, parameters and state get their values back. The flags of
    all modules are read at once, by `read`.

    Args:
        optimizer: An optimizer that treats each element by itself, unless
            `step_if_finite` is not called.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._flags: dict[str, Tensor] = {}
        self._stateless: set[nn.Parameter] = set()
        # State on other devices than the flags, such as Adam's counts of steps.
        self._elsewhere: list[tuple[str, Tensor, Tensor]] = []

    def flag(self, name: str, is_finite: Tensor) -> None:
        """Notes whether gradients of a module are finite, until `read` is called.

        Args:
            name: Name of the module.
            is_finite: A truth value on its device, the same on all ranks.
        """
        others = self._flags.get(name)
        self._flags[name] = is_finite if others is None else others & is_finite

    def read(self) -> dict[str, bool]:
        """Waits for the flags of all modules, the only time in a step.

        Returns:
            Whether the gradients of a module were finite, by its name.
        """
        values = torch.stack([*self._flags.values()]).tolist() if self._flags else []
        finite = dict(zip(self._flags, values, strict=True))
        for name, tensor, before in self._elsewhere:
            if not finite[name]:
                tensor.copy_(before)
        self._flags.clear()
        self._elsewhere.clear()
        return finite

    def step(self, params: Sequence[nn.Parameter], **kwargs: Any) -> None:
        """Steps some parameters, and frees their gradients.

        Args:
            params: Parameters with gradients.
            **kwargs: Arguments of ``optimizer.step``.
        """
        with optimizer_limited_to(self._optimizer, params):
            self._optimizer.step(**kwargs)
        state = self._optimizer.state
        self._stateless.update(param for param in params if not state.get(param))
        for param in params:
            param.grad = None

    def step_module(self, name: str, params: Sequence[nn.Parameter]) -> None:
        """Steps a whole module as `step_if_finite` does, in as few calls as is wise.

        Args:
            name: Name of the module.
            params: Its parameters with gradients.
        """
        if params:
            waits = waits_for(self._flags[name])
            for some in chunks(params) if waits else [params]:
                self.step_if_finite(name, some)

    def step_if_finite(self, name: str, params: Sequence[nn.Parameter]) -> None:
        """Steps parameters of a module if its flag is true; frees their gradients.

        A step that makes the state of a parameter waits for the flag: there is nothing
        yet that could be given back.

        Args:
            name: Name of the module.
            params: Parameters with gradients, one of `chunks`: until they are
                stepped, as many bytes are held, and as many as their state has.
                Large ones are stepped in parts.
        """
        flag = self._flags[name]
        known = [p in self._stateless or self._optimizer.state.get(p) for p in params]
        if not all(known):
            if flag:
                self.step(params)
            for param in params:
                param.grad = None
            return
        together = []
        for param in params:
            if param.nbytes > _PART_BYTES and not is_sharded(param):
                for part in in_parts(self._optimizer, param, _PART_BYTES):
                    self._step_or_undo(name, [part], self._optimizer.step)
                param.grad = None
            else:
                together.append(param)
        if together:
            self._step_or_undo(name, together, partial(self.step, together))
            for param in together:
                param.grad = None

    def _step_or_undo(
        self, name: str, params: Sequence[nn.Parameter], step: Callable[[], Any]
    ) -> None:
        flag = self._flags[name]
        if not waits_for(flag):
            if flag:
                step()
            return
        tensors = self._tensors(params)
        here = [tensor for tensor in tensors if tensor.device == flag.device]
        undo = [_Kept(group) for group in _groups(here)]
        self._elsewhere += [
            (name, tensor, tensor.clone())
            for tensor in tensors
            if tensor.device != flag.device
        ]
        step()
        for kept in undo:
            kept.put_back_unless(flag)

    def _tensors(self, params: Sequence[nn.Parameter]) -> list[Tensor]:
        """Parameters and what the optimizer keeps of them."""
        states = [self._optimizer.state.get(param, {}).values() for param in params]
        tensors = [x for x in chain(params, *states) if isinstance(x, Tensor)]
        return [_local(tensor.detach()) for tensor in tensors]


class _Kept:
    """Values of one tensor, or of several of one dtype in one piece, for few calls."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self._before = _joined(tensors) if len(tensors) > 1 else tensors[0].clone()

    def put_back_unless(self, flag: Tensor) -> None:
        if len(self._tensors) == 1:
            (tensor,) = self._tensors
            torch.where(flag, tensor, self._before, out=tensor)
            return
        values = torch.where(flag, _joined(self._tensors), self._before)
        parts = values.split([tensor.numel() for tensor in self._tensors])
        torch._foreach_copy_(
            self._tensors,
            [part.view(t.shape) for part, t in zip(parts, self._tensors, strict=True)],
        )


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _groups(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Small tensors by their dtype, and each other one alone."""
    small = defaultdict(list)
    large = []
    for tensor in tensors:
        if tensor.nbytes > _SMALL:
            large.append([tensor])
        else:
            small[tensor.dtype].append(tensor)
    return [*small.values(), *large]


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if hasattr(tensor, 'to_local') else tensor
