"""ModulePipeline: each process trains its own modules, ahead of the next process."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from man_mm.core.learner import LocalLearner
from man_mm.core.local_losses import ENTRY, Backward, default_backward
from man_mm.core.micro_batches import Chain, Maps, MicroBatches, check_maps
from man_mm.core.partition import LocalModule, ends_of_stages, outlets
from man_mm.core.patches import patched

from .channel import Channel
from .missing_output import missing_output


class ModulePipeline:
    """Trains the modules of one network in several processes, without staleness.

    A module needs nothing of later modules, not even their gradients: its weights
    after a batch follow from its weights before and from what earlier modules hand on.
    So rank 0 goes on with the next batch while rank 1 trains on what it sent. Every
    module sees the same tensors in the same order as in one process, and the weights,
    the heads and the memory bank are the same bit by bit, as long as network, heads
    and data draw no random numbers of their own (dropout).

    Every rank builds the same model, loads the same weights and the same learner, and
    reads the same batches in the same order: later ranks need their targets, and ignore
    the images. After that, a rank keeps the parameters of its own modules, and those
    that are frozen and outside of all units; the others become empty.

    During a step a rank is a world of its own: what network and heads reduce over all
    ranks, such as the normalisers of mmdet's losses, must not wait for other modules.

    Args:
        learner: The learner, with its bank, if any.
        sizes: How many consecutive modules each rank trains. Defaults to an even
            split, in which the first ranks get one more where it does not divide.
        reads: Names of the units whose output the network itself reads, beside the
            next unit: those of necks and skip connections. They travel to the last
            rank. Defaults to the ends of all stages, and whatever units say.
        in_flight: Batches that a rank may be ahead of the next one, beside those that
            the two work on. Each holds a packet in memory. Defaults to 2.
        group: Process group, whose timeout is how long a rank waits for another one.
            If not all ranks build a pipeline, create all groups before: torch counts
            groups, and a pipeline creates one. Defaults to the default group.

    Attributes:
        modules: The modules of this rank.
        learner: The learner; its ``losses`` and ``bank_bytes`` are those of this rank.
        is_last: Whether this rank computes the network's own loss.

    Raises:
        ValueError: If there are more ranks than modules, ``sizes``, ``reads`` or
            ``in_flight`` make no sense, units work on tokens, or a head follows weights
            of later modules.

    Examples:
        >>> import torch
        >>> from torch import distributed, nn
        >>> from torch.nn.functional import cross_entropy
        >>> from man_mm.core import LocalLearner, Unit, split
        >>> from man_mm.parallel import ModulePipeline
        >>> distributed.init_process_group(
        ...     'gloo', store=distributed.HashStore(), rank=0, world_size=1)
        >>> model = nn.Sequential(nn.Linear(4, 2))  # one module, so one process
        >>> learner = LocalLearner(model, split(model, [Unit('0')], cuts=[]), heads=[])
        >>> pipeline = ModulePipeline(learner)
        >>> inputs, targets = torch.rand(3, 4), torch.tensor([0, 1, 1])
        >>> loss = pipeline.step(lambda: cross_entropy(model(inputs), targets), targets)
        >>> len(pipeline.params()), model[0].weight.grad is None
        (2, False)
        >>> distributed.destroy_process_group()
    """

    def __init__(
        self,
        learner: LocalLearner,
        sizes: Sequence[int] | None = None,
        reads: Collection[str] | None = None,
        in_flight: int = 2,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        group = group or dist.group.WORLD
        self._rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        sizes = _check_sizes(sizes, len(learner.modules), ranks)
        if ranks > 1:
            units = [unit for module in learner.modules for unit in module.units]
            check_maps(units, 'A pipeline', 'train in one process')
        if any(hasattr(head, 'follow') for head in learner.heads):
            raise ValueError(
                'A pipeline has no later modules on a rank, and such heads as '
                'MomentumHead average their weights: use other heads.'
            )
        bounds = list(pairwise(accumulate(sizes, initial=0)))
        self._ranges = [learner.modules[start:stop] for start, stop in bounds]
        self.learner = learner
        self.modules = learner.active = self._ranges[self._rank]
        self.is_last = self._rank == ranks - 1
        self._reads = _check_reads(reads, learner.modules)
        self._earlier = learner.modules[: self.modules[0].index]
        self._group = group
        self._alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
        device = next(learner.model.parameters()).device
        self._channel = Channel(device, group, in_flight)
        self._later: list[nn.Parameter] = []
        self._release()

    @property
    def sent_bytes(self) -> int:
        """Bytes that this rank sent in the latest step."""
        return self._channel.sent_bytes

    def params(self) -> list[nn.Parameter]:
        """Trainable parameters of this rank, heads included, for its optimizer."""
        return [p for module in self.modules for p in self.learner.params(module)]

    def step(
        self,
        run: Callable[[], Tensor],
        targets: Any = None,
        backward: Backward | None = None,
    ) -> Tensor | None:
        """Trains the modules of this rank on one batch.

        Args:
            run: Calls the network on the batch and returns the network's own loss, as
                on one process. It is left at the last cut of this rank.
            targets: Passed to the auxiliary heads.
            backward: As in `LocalLearner.step`; also called with the network's own
                loss, on the last rank. Defaults to ``loss.backward()``.

        Returns:
            The network's own loss, detached; None on other ranks than the last.

        Raises:
            RuntimeError: If the network has a global skip, reads a map that was not
                sent, never runs a cut, or if a neighbour is gone.
        """
        backward = backward or default_backward
        with _as_world(self._alone), ExitStack() as stack:
            if self._rank == 0:
                start = self.learner.model.get_submodule(self.modules[0].parts[0])
                hook = start.register_forward_pre_hook(self._check_entry)
                stack.callback(hook.remove)
            stack.enter_context(self.learner.step(targets, backward))
            received: Maps = {}
            if self._earlier:
                self._replace_earlier(received, stack)
            if not self.is_last:
                self._send_at_cut(received, stack)
            loss = None
            with suppress(_CutReached):
                loss = run()
        self._empty(self._later)
        if loss is None:
            return None
        with _as_world(self._alone):
            backward(loss, self.modules[-1], True)
        return loss.detach()

    def flush(self) -> None:
        """Waits until the next rank has taken all batches; call it before the end."""
        self._channel.flush()

    def gather(self) -> dict[str, Any] | None:
        """The state of the whole network, for a checkpoint; all ranks must call it.

        Returns:
            On rank 0, tensors on the CPU: ``model``, a state dict of the plain model,
            ``heads``, that of ``learner.heads``, and ``bank``, that of the bank or
            None. A pipeline goes on from them if they are loaded before it is built;
            the state of each rank's optimizer is that rank's to store. None elsewhere.
        """
        self.flush()
        learner, bank = self.learner, self.learner.bank
        own_bank = {} if bank is None else bank.state_dict()
        own = dict(
            model=_to_cpu(learner.model.state_dict(), self._owns_key),
            heads=_to_cpu(learner.heads.state_dict(), self._owns_head),
            bank={k: _to_cpu(v, self._owns_map) for k, v in own_bank.items()},
        )
        parts: list = [None] * len(self._ranges)
        dist.gather_object(
            own, parts if self._rank == 0 else None, group=self._group, group_dst=0
        )
        if self._rank > 0:
            return None
        whole = dict(
            model=learner.model.state_dict(),
            heads=learner.heads.state_dict(),
            bank=None if bank is None else bank.state_dict(),
        )
        for part in parts:
            whole['model'].update(part['model'])
            whole['heads'].update(part['heads'])
            for kind, state in part['bank'].items():
                whole['bank'][kind].update(state)
        return whole

    def _replace_earlier(self, received: Maps, stack: ExitStack) -> None:
        """Lets parts of earlier ranks return what came of them."""
        parts = [part for module in self._earlier for part in module.parts]

        def run(_chain: Chain, x: Tensor) -> Maps:
            self._check_entry(None, (x,))
            packet = self._channel.receive()
            received.update(packet['outputs'])
            for name, map_ in packet['bank'].items():
                moments = packet['moments'].get(name)
                self.learner.bank.receive(name, map_, moments)
            return {part: received.get(part, missing_output()) for part in parts}

        replaced = MicroBatches(parts, (), run)
        for part in parts:
            submodule = self.learner.model.get_submodule(part)
            stack.enter_context(patched(submodule, partial(replaced.wrap, part)))

    def _send_at_cut(self, received: Maps, stack: ExitStack) -> None:
        """Sends when the last module of this rank is trained, and ends the forward."""
        outputs: Maps = {}
        *inner, cut = [name for module in self.modules for name in outlets(module)]

        def keep(name: str, _submodule: nn.Module, _args: tuple, map_: Tensor) -> None:
            outputs[name] = map_

        def send(_submodule: nn.Module, _args: tuple, boundary: Tensor) -> None:
            read = {k: v for k, v in received.items() if k in self._reads}
            self._channel.send(
                dict(outputs={**read, **outputs, cut: boundary}, **self._bank_maps())
            )
            raise _CutReached

        # These hooks run after the learner's: they see what other modules shall see.
        hooks = {name: partial(keep, name) for name in inner if name in self._reads}
        for name, hook in {**hooks, cut: send}.items():
            submodule = self.learner.model.get_submodule(name)
            stack.callback(submodule.register_forward_hook(hook).remove)

    def _bank_maps(self) -> dict[str, Maps]:
        """What heads of later ranks may read, and the statistics that belong to it."""
        bank = self.learner.bank
        maps = {} if bank is None else dict(bank)
        moments = {name: bank.pending(name) for name in maps}
        return dict(
            bank=maps,
            moments={name: m for name, m in moments.items() if m is not None},
        )

    def _check_entry(self, _submodule: nn.Module | None, args: tuple) -> None:
        if len(self._ranges) > 1 and args[0].requires_grad:
            raise RuntimeError(
                'What enters the first unit requires grad: layers in front of it '
                'learn, or the images do. They may get gradients from several modules '
                '(a global skip, as in super-resolution networks), but a pipeline '
                'sends none back: train in one process, or freeze these layers.'
            )

    def _release(self) -> None:
        """Empties the parameters that this rank does not need."""
        model, own = self.learner.model, set(self.params())
        inside: set[nn.Parameter] = set()
        for module in self.learner.modules:
            params = _unit_params(model, module)
            inside |= params
            if module in self.modules:
                own |= params
        outside = set(model.parameters()) - inside
        heads = {
            param
            for module in self.learner.modules
            if not module.is_last
            for param in self.learner.heads[module.index].parameters()
            if module not in self.modules
        }
        self._empty((inside | heads) - own - outside)
        # In front of the first unit they run once, to tell that they learn.
        self._later = [p for p in outside - own if p.requires_grad]

    @staticmethod
    def _empty(params: Collection[nn.Parameter]) -> None:
        for param in params:
            param.data = param.data.new_empty(0)

    def _owns_key(self, key: str) -> bool:
        def covers(module: LocalModule) -> bool:
            return any(key.startswith(f'{part}.') for part in module.parts)

        if any(map(covers, self.modules)):
            return True
        return self.is_last and not any(map(covers, self._earlier))

    def _owns_head(self, key: str) -> bool:
        return int(key.partition('.')[0]) in [module.index for module in self.modules]

    def _owns_map(self, name: str) -> bool:
        if name == ENTRY:
            return self._rank == 0
        return any(name in outlets(module) for module in self.modules)


class _CutReached(BaseException):
    """Ends the forward pass of a rank; no error, so networks must not catch it."""


@contextmanager
def _as_world(group: dist.ProcessGroup) -> Iterator[None]:
    """Makes a group the default group."""
    world = dist.group.WORLD
    dist.group.WORLD = group
    try:
        yield
    finally:
        dist.group.WORLD = world


def _check_sizes(sizes: Sequence[int] | None, count: int, ranks: int) -> list[int]:
    if ranks > count:
        raise ValueError(
            f'{ranks} processes cannot share {count} modules: start at most {count} '
            'processes, or cut the network into more modules.'
        )
    if sizes is None:
        return [(count + ranks - 1 - rank) // ranks for rank in range(ranks)]
    if len(sizes) != ranks or sum(sizes) != count or min(sizes) < 1:
        raise ValueError(
            f'sizes must be {ranks} numbers of modules, one for each process and at '
            f'least 1, that sum to {count}; got {list(sizes)}.'
        )
    return list(sizes)


def _check_reads(
    reads: Collection[str] | None, modules: Sequence[LocalModule]
) -> frozenset[str]:
    units = [unit for module in modules for unit in module.units]
    if reads is None:
        ends = {unit.name for unit, _ in ends_of_stages(units)}
        return frozenset(ends | {unit.name for unit in units if unit.read_elsewhere})
    if unknown := set(reads) - {name for m in modules for name in outlets(m)}:
        raise ValueError(
            f'reads has {sorted(unknown)}, which are no ends of stages or modules: '
            f'these are {[name for m in modules for name in outlets(m)]}.'
        )
    return frozenset(reads)


def _unit_params(model: nn.Module, module: LocalModule) -> set[nn.Parameter]:
    parts = (model.get_submodule(part) for part in module.parts)
    return {param for part in parts for param in part.parameters()}


def _to_cpu(state: dict[str, Any], wanted: Callable[[str], bool]) -> dict[str, Any]:
    return {
        key: value.detach().cpu() if isinstance(value, Tensor) else value
        for key, value in state.items()
        if wanted(key)
    }
