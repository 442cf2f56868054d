"""What a peak of memory consists of: its bytes by kind and by module."""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from man_mm.core import LocalLearner, LocalModule
from man_mm.core.checkpointing import in_checkpoint, top_saved_tensors_hooks
from man_mm.core.compressed_activations import check_unchanged
from man_mm.core.storages import find_storages

from .memory_regions import OTHER, Groups, Regions

KINDS = (
    'optimizer state',
    'boundaries',
    'bank',
    'auxiliaries',
    'gradients',
    'saved activations',
    'temporaries',
)
AUXILIARIES, BANK, REST = 'auxiliaries', 'bank', 'neck and heads'

_BYTES, _SAVED, _INPUT, _BANKED, _HANDED_ON = range(5)
# The input of the running module is a boundary, and the bank's only after it.
_BY_PLACE = ((_INPUT, 'boundaries'), (_BANKED, 'bank'), (_HANDED_ON, 'boundaries'))


@dataclass(eq=False)
class _Birth:
    """A new storage, with the labels that it has for life."""

    region: str
    is_state: bool = False
    is_gradient: bool = False
    is_read: bool = False
    is_handed_on: bool = False


class MemorySplit:
    """Labels the storages of a measured call, and sums them up at its peak.

    A context manager around the call. A tracker of storages, which have any numbers
    as keys, tells it when an op starts, and what is born, resized, freed. Of the
    kinds, the first that applies at the moment of the peak counts:

    - ``optimizer state``: in the ``state`` of a torch optimizer that made a step.
    - ``boundaries``: the running module's input, from when the last cut handed it on.
    - ``bank``: maps in the memory bank; whatever the bank made, such as moments.
    - ``boundaries``, too: other outputs of cuts and ends of stages, from when the cut
      handed them on; before that, if none of what follows applies.
    - ``auxiliaries``: made by the forward or the backward pass of an auxiliary head,
      gradients of its parameters included: all that is of the group of this name.
    - ``gradients``: what autograd accumulates in a leaf's ``grad``, from its birth.
    - ``saved activations``: what autograd holds for the backward pass, while it does.
      Made under other hooks on saved tensors, such as those of non-reentrant
      checkpointing: what an op of a backward pass reads later, from its birth.
    - ``temporaries``: the rest, such as gradients of activations.

    `Regions` tells which group of modules a storage belongs to: that of the op it
    was born in, but for gradients and optimizer state the one with the parameter.

    Args:
        groups: Modules, or lists of them, by the name of their group; of nested ones,
            the innermost counts. Defaults to the learner's modules by their names and
            ``'neck and heads'`` for the rest of its model, if there is a learner.
        learner: Learner whose boundaries, bank and heads count as such. Its heads are
            the group ``'auxiliaries'``, its bank is one as well. Defaults to None.

    Attributes:
        accumulates: Whether the running op may make the gradient of a leaf.
    """

    def __init__(
        self, groups: Groups | None = None, learner: LocalLearner | None = None
    ) -> None:
        groups = dict(groups or {})
        if learner is not None:
            groups = {**(groups or learner_groups(learner)), AUXILIARIES: learner.heads}
        self._regions = Regions(groups)
        self._learner = learner
        has_bank = learner is not None and learner.bank is not None
        self._names = [*groups, *([BANK] if has_bank else []), OTHER]
        self._births: dict[int, _Birth] = {}
        self._events: list[tuple[_Birth, int, int]] = []
        self._peak_at = 0
        self._under_other_hooks: dict[int, _Birth] = {}
        self._input: _Birth | None = None
        self._banked: set[_Birth | None] = set()
        self._leaf: weakref.ref[Tensor] | None = None
        self._accumulated: list[_Birth] = []
        self._region = OTHER
        self.accumulates = False
        self._hooks = saved_tensors_hooks(self._pack, _unpack)
        self._stack = ExitStack()

    def __enter__(self) -> MemorySplit:
        with ExitStack() as stack:
            stack.enter_context(self._hooks)
            stack.enter_context(self._regions.watched())
            for handle in (
                register_optimizer_step_pre_hook(self._before_update),
                register_optimizer_step_post_hook(self._after_update),
            ):
                stack.callback(handle.remove)
            if self._learner is not None:
                self._observe(self._learner, stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def start_op(self) -> None:
        """An op is about to run: what is born next belongs where it runs."""
        self._region = self._regions.advance()
        self._find_gradient(self._regions.leaf)
        self.accumulates = self._regions.leaf is not None

    def reads(self, keys: Iterable[int]) -> None:
        """The running op reads storages."""
        if self._under_other_hooks and self._regions.in_backward:
            if not in_checkpoint():  # which makes again what is read next
                for key in self._under_other_hooks.keys() & keys:
                    self._under_other_hooks[key].is_read = True

    def may_be_gradient(self, key: int) -> None:
        """An op that `accumulates` returns a storage."""
        if birth := self._births.get(key):
            self._accumulated.append(birth)

    def born(self, key: int) -> None:
        """A storage is new."""
        self._births[key] = birth = _Birth(self._region)
        if self._has_other_hooks():
            self._under_other_hooks[key] = birth

    def resized(self, key: int, change: int) -> None:
        """A storage counts so many bytes more."""
        self._events.append((self._births[key], _BYTES, change))

    def died(self, key: int) -> None:
        """A storage is freed; its bytes were taken off before."""
        del self._births[key]
        self._under_other_hooks.pop(key, None)

    def mark_peak(self) -> None:
        """Nothing before was larger than what is alive now."""
        self._peak_at = len(self._events)

    def passed_on(self, module: LocalModule, maps: Mapping[str, Tensor]) -> None:
        """See `man_mm.core.observer.Observer`."""
        if module.cut in maps:
            self._label({self._input}, _INPUT, -1)
            self._input = self._find(maps[module.cut])
            self._label({self._input}, _INPUT, 1)
        handed_on = {self._find(map_) for map_ in maps.values()}
        self._label(handed_on, _HANDED_ON, 1)
        for birth in handed_on - {None}:
            birth.is_handed_on = True

    @contextmanager
    def bank_changes(self, maps: Mapping[str, Tensor]) -> Iterator[None]:
        """See `man_mm.core.observer.Observer`."""
        with self._regions.inside(BANK):
            yield
        held = {self._find(map_) for map_ in maps.values()}
        self._label(self._banked - held, _BANKED, -1)
        self._label(held - self._banked, _BANKED, 1)
        self._banked = held

    def result(self) -> tuple[dict[str, int], dict[str, int]]:
        """Bytes at the marked peak by kind and by group of modules."""
        self._find_gradient(None)
        held: dict[_Birth, Counter] = defaultdict(Counter)
        for index, (birth, label, change) in enumerate(self._events):
            # Autograd saves an op's result just after the op, thus after the peak.
            if index >= self._peak_at and (label == _BYTES or change < 0):
                break
            held[birth][label] += change
        kinds, modules = dict.fromkeys(KINDS, 0), dict.fromkeys(self._names, 0)
        for birth, labels in held.items():
            kinds[_kind(birth, labels)] += labels[_BYTES]
            modules[birth.region] += labels[_BYTES]
        return kinds, modules

    def _observe(self, learner: LocalLearner, stack: ExitStack) -> None:
        watched = [learner] if learner.bank is None else [learner, learner.bank]
        for each in watched:
            each.observer = self
            stack.callback(setattr, each, 'observer', None)

    def _find_gradient(self, leaf: weakref.ref[Tensor] | None) -> None:
        """Labels the gradient of the latest op's leaf; ``leaf`` is the next op's."""
        if self._leaf is not None:
            tensor = self._leaf()
            if tensor is not None and tensor.grad is not None:
                found = [self._find(tensor.grad)]
            elif leaf is not None and leaf() is tensor:
                found = []  # a hook of the user ran, and autograd's op comes next
            else:
                found = self._accumulated  # it was freed at once
            for birth in filter(None, found):
                birth.is_gradient = True
                birth.region = self._regions.owners.get(tensor, birth.region)
            self._accumulated.clear()
        self._leaf = leaf

    def _find(self, tensor: Tensor) -> _Birth | None:
        return self._births.get(tensor.untyped_storage()._cdata)

    def _pack(self, tensor: Tensor) -> _Packed:
        # An output that held its own graph would never be freed. No mode is to see
        # the op, but subclasses have to.
        plain = type(tensor) in (Tensor, nn.Parameter)
        with torch._C._DisableTorchDispatch() if plain else nullcontext():
            detached = tensor.detach()
        return _Packed(detached, self._find(tensor), self._events)

    def _has_other_hooks(self) -> bool:
        top = top_saved_tensors_hooks()
        return top is not None and top[0] != self._hooks.pack_hook

    def _label(self, births: set[_Birth | None], label: int, change: int) -> None:
        # Storages from before the call have no births.
        self._events += [(birth, label, change) for birth in births - {None}]

    def _before_update(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self._regions.enter(OTHER, optimizer)

    def _after_update(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self._regions.leave(optimizer)
        for param, state in optimizer.state.items():
            for storage in find_storages(state):
                if birth := self._births.get(storage._cdata):
                    birth.is_state = True
                    birth.region = self._regions.owners.get(param, OTHER)


class _Packed:
    """What autograd holds instead of a tensor; it tells when autograd lets go."""

    __slots__ = ('tensor', 'version', 'birth', 'events')

    def __init__(self, tensor: Tensor, birth: _Birth | None, events: list) -> None:
        self.tensor = tensor
        self.version = tensor._version
        self.birth = birth
        self.events = events
        if birth is not None:
            events.append((birth, _SAVED, 1))

    def __del__(self) -> None:
        if self.birth is not None:
            self.events.append((self.birth, _SAVED, -1))


def _unpack(packed: _Packed) -> Tensor:
    check_unchanged(packed.tensor, packed.version)
    return packed.tensor


def learner_groups(learner: LocalLearner) -> dict[str, list[nn.Module]]:
    """Groups a learner's modules by their names, and the rest of its model.

    Args:
        learner: The learner; its last module's group has its units only.
    """
    groups = {
        module.name: [learner.model.get_submodule(part) for part in module.parts]
        for module in learner.modules
    }
    return {**groups, REST: [learner.model]}


def _kind(birth: _Birth, labels: Mapping[int, int]) -> str:
    if birth.is_state:
        return 'optimizer state'
    for label, kind in _BY_PLACE:
        if labels[label] > 0:
            return kind
    if birth.region in (BANK, AUXILIARIES):
        return birth.region
    if birth.is_gradient:
        return 'gradients'
    if birth.is_read or labels[_SAVED] > 0:
        return 'saved activations'
    # Micro-batches fill it slice by slice before they hand it on.
    return 'boundaries' if birth.is_handed_on else 'temporaries'
