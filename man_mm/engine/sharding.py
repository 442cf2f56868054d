"""Sharding: each rank keeps one part of parameters, gradients and optimizer state."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from mmengine import dist
from torch import Tensor, nn, optim

from man_mm.core import LocalLearner, LocalModule

from .distributed import all_gather, gradient_norm, reduce_scatter, waited

_NOT_GATHERED = (
    'The weights are sharded, and were not gathered for this checkpoint: only '
    'CheckpointHook and what derives from SafeCheckpointHook save them.'
)
# A message is held beside the weights or gradients that it is made of.
_MESSAGE_BYTES = 25 * 2**20
# They treat each element by itself, so a part of a parameter is a parameter to them.
_ELEMENTWISE = (
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


def check_optimizer(optimizer: optim.Optimizer) -> None:
    """Refuses optimizers that do not treat each element of a parameter by itself.

    Args:
        optimizer: The optimizer.

    Raises:
        ValueError: If it may need whole parameters, as LARS does for their norms.
    """
    if type(optimizer) not in _ELEMENTWISE:
        names = ', '.join(kind.__name__ for kind in _ELEMENTWISE)
        raise ValueError(
            f'optim_wrapper.optimizer.type={type(optimizer).__name__!r} may need whole '
            'parameters, which ShardedModel splits: use one of '
            f'{names}, or remove model_wrapper_cfg.'
        )


def total_norm(grads: Sequence[Tensor], norm_type: float = 2.0) -> Tensor:
    """Norm of gradients of which each rank has a part.

    Args:
        grads: This rank's parts.
        norm_type: Order of the norm. Default: 2.
    """
    ranks = all_gather(gradient_norm(grads, norm_type)[None])
    return torch.linalg.vector_norm(ranks, norm_type)


def clip_norm(
    params: Sequence[nn.Parameter], max_norm: float, norm_type: float | str = 2.0
) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` for gradients of which each rank has a part.

    Args:
        params: Parts of parameters, with gradients.
        max_norm: Norm that the gradients of all ranks together will have at most.
        norm_type: Order of the norm, ``'inf'`` for the maximum. Default: 2.

    Returns:
        The norm before.
    """
    grads = [param.grad for param in params]
    norm = total_norm(grads, float(norm_type))
    for grad in grads:
        grad.mul_((max_norm / (norm + 1e-6)).clamp(max=1))
    return norm


class Bundle:
    """Parameters of which each rank keeps an equal part, sent in one message.

    While they are not gathered, the parameters keep their shapes, but take no memory
    and read as NaN, so that a use out of turn cannot pass unseen.

    Args:
        params: Parameters of one device and dtype, equal on all ranks.

    Attributes:
        shards: This rank's part of each parameter, flat and padded with zeros. They
            share one piece of memory.
    """

    def __init__(self, params: Sequence[nn.Parameter]) -> None:
        self.params = list(params)
        self._world = dist.get_world_size()
        parts = [own_part(param.detach()) for param in params]
        self._sizes = [len(part) for part in parts]
        self._own = torch.cat(parts)
        self.shards = [nn.Parameter(part) for part in self._own.split(self._sizes)]
        self._is_gathered = True

    def gather(self) -> None:
        """Gives the parameters their values, on all ranks."""
        if self._is_gathered:
            return
        everything = all_gather(self._own).view(self._world, -1)
        parts = everything.split(self._sizes, dim=1)
        for param, part in zip(self.params, parts, strict=True):
            param.data = _whole(part, param)
        self._is_gathered = True

    def release(self) -> None:
        """Frees the memory of the parameters."""
        if not self._is_gathered:
            return
        for param in self.params:
            param.data = param.new_full((), torch.nan).expand(param.shape)
        self._is_gathered = False

    def reduce(self) -> Callable[[], None]:
        """Starts to average gradients, beside what runs next.

        A parameter without a gradient on some ranks counts as zero there; its part
        gets none if no rank used it.

        Returns:
            Waits for the averages, and adds this rank's part of them to the gradients
            of ``shards``.
        """
        sizes = [*self._sizes, len(self.params)]
        flat = self._own.new_zeros(self._world, sum(sizes))
        *parts, used = flat.split(sizes, dim=1)
        used[:] = used.new_tensor([param.grad is not None for param in self.params])
        for param, part in zip(self.params, parts, strict=True):
            if param.grad is not None:
                part.copy_(_parts(param.grad))
                param.grad = None  # the message is its only copy
        flat /= self._world
        own, work = reduce_scatter(flat.view(-1))

        def wait() -> None:
            waited(work)
            *grads, used = own.split(sizes)
            for shard, grad, share in zip(self.shards, grads, used.tolist()):  # noqa: B905
                if share > 0:
                    shard.grad = grad if shard.grad is None else shard.grad + grad

        return wait


class Sharding:
    """The parameters of a learner and its optimizer's state, a part on each rank.

    Every module, with its auxiliary head, is gathered when the one before it has been
    back-propagated, and released after its own backward pass. So the weights of one
    module are there at a time, beside those that belong to no unit, such as neck and
    heads: the network may read them at any time, and they stay for the whole step.
    Each weight is gathered once and each gradient reduced once an iteration, which is
    the traffic of ``DistributedDataParallel``.

    From then on the optimizer holds parts of parameters, with their part of its state.

    Args:
        learner: A learner whose parameters are equal on all ranks.
        optimizer: Its optimizer, with a state or without.

    Raises:
        ValueError: If the optimizer may need whole parameters.
    """

    def __init__(self, learner: LocalLearner, optimizer: optim.Optimizer) -> None:
        check_optimizer(optimizer)
        last = learner.modules[-1]
        inside = {
            param
            for part in last.parts
            for param in learner.model.get_submodule(part).parameters()
        }
        self._bundles = [_bundle(learner.params(m)) for m in learner.modules[:-1]]
        self._bundles.append(_bundle(p for p in last.params if p in inside))
        self._rest = _bundle(p for p in last.params if p not in inside)
        self._optimizer = optimizer
        self._wholes: dict[nn.Parameter, nn.Parameter] = {
            shard: param
            for bundle in self._all()
            for shard, param in zip(bundle.shards, bundle.params, strict=True)
        }
        self._saved: dict[int, dict[str, Any]] | None = None
        self._shard_optimizer()
        self._release(self._all())

    def shards(self, module: LocalModule) -> list[nn.Parameter]:
        """This rank's parts of the parameters of a module and its head."""
        return [shard for bundle in self._of(module) for shard in bundle.shards]

    def start(self) -> None:
        """Begins an iteration: the first module has its weights."""
        self._saved = None
        self._release(self._all())
        self._gather([*self._rest, *self._bundles[0]])

    def release(self, module: LocalModule) -> None:
        """Frees the weights of a module, after its backward pass."""
        self._release(self._of(module))

    def finish(self, module: LocalModule) -> Callable[[], None]:
        """Gives the next module its weights, and starts to average gradients.

        Args:
            module: The module, which has been released.

        Returns:
            Waits for the averages of its gradients; see `Bundle.reduce`.
        """
        if not module.is_last:
            self._gather(self._bundles[module.index + 1])
        waits = [bundle.reduce() for bundle in self._of(module)]
        return lambda: [wait() for wait in waits]

    def gather(self) -> None:
        """Gives all parameters their values until the next iteration, on all ranks."""
        self._gather(self._all())

    def gather_optimizer(self) -> None:
        """Collects the optimizer's state, on all ranks, for `optimizer_state`.

        Rank 0 keeps it, in the memory of the CPU, until the next iteration.
        """
        params = chain(*(group['params'] for group in self._optimizer.param_groups))
        saved = {
            index: {
                key: self._gathered(param, value)
                for key, value in self._optimizer.state[param].items()
            }
            for index, param in enumerate(params)
            if param in self._optimizer.state
        }
        self._saved = saved if dist.is_main_process() else {}

    def optimizer_state(self) -> dict[int, dict[str, Any]]:
        """The whole state of the optimizer, as ``state`` in its ``state_dict``.

        Raises:
            RuntimeError: If it was not collected on all ranks.
        """
        if self._saved is None:
            raise RuntimeError(_NOT_GATHERED)
        return self._saved

    def _all(self) -> list[Bundle]:
        return [*chain(*self._bundles), *self._rest]

    def _of(self, module: LocalModule) -> list[Bundle]:
        rest = self._rest if module.is_last else []
        return [*self._bundles[module.index], *rest]

    @staticmethod
    def _gather(bundles: Iterable[Bundle]) -> None:
        for bundle in bundles:
            bundle.gather()

    @staticmethod
    def _release(bundles: Iterable[Bundle]) -> None:
        for bundle in bundles:
            bundle.release()

    def _shard_optimizer(self) -> None:
        old, shards = self._optimizer.state, {p: s for s, p in self._wholes.items()}
        for group in self._optimizer.param_groups:
            group['params'] = [shards.get(p, p) for p in group['params']]
        # A parameter without dimensions cannot tell a moment from a count of steps.
        keys = {
            key
            for param, state in old.items()
            for key, value in state.items()
            if param.dim() and getattr(value, 'shape', None) == param.shape
        }
        for param in [param for param in old if param in shards]:
            self._optimizer.state[shards[param]] = {
                key: own_part(value) if key in keys and value is not None else value
                for key, value in old.pop(param).items()
            }

    def _gathered(self, shard: nn.Parameter, value: Any) -> Any:
        if shard not in self._wholes or getattr(value, 'shape', None) != shard.shape:
            return value
        parts = all_gather(value)
        return _whole(parts, self._wholes[shard]).cpu() if not dist.get_rank() else None


def own_part(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, flat, padded and copied."""
    return _parts(tensor)[dist.get_rank()].clone()


def _parts(tensor: Tensor) -> Tensor:
    world = dist.get_world_size()
    return F.pad(tensor.flatten(), (0, -tensor.numel() % world)).view(world, -1)


def _whole(parts: Tensor, like: Tensor) -> Tensor:
    whole = parts.flatten()[: like.numel()].view(like.shape)
    # A view of more would take that memory too, and its place in checkpoints.
    is_view = whole.untyped_storage().nbytes() > whole.nbytes
    return whole.clone() if is_view else whole


def _bundle(params: Iterable[nn.Parameter]) -> list[Bundle]:
    groups: dict[tuple, list[list[nn.Parameter]]] = defaultdict(lambda: [[]])
    for param in params:
        messages = groups[param.device, param.dtype]
        if sum(p.nbytes for p in messages[-1]) + param.nbytes > _MESSAGE_BYTES:
            messages.append([])
        messages[-1].append(param)
    return [Bundle(some) for some in chain(*groups.values()) if some]
