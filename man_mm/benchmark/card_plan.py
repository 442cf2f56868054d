"""Which card a config trains on: plain, recomputed, exact, joint and local."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from rich.console import Console
from torch.optim import Optimizer

from man_mm.backbones import find_units
from man_mm.core import LocalLearner
from man_mm.core.storages import tensor_bytes
from man_mm.engine.config_files import load_config
from man_mm.engine.quiet import quiet
from man_mm.measure.memory import measure_memory
from man_mm.measure.peaks import Plan, UnitCost
from man_mm.measure.planner import parse_bytes, plan_modules
from man_mm.measure.synthetic_batch import synthetic_batch
from man_mm.measure.uncomputed import Uncomputed

from .partition_plan import build_uncomputed, images_shape, make_measure
from .schemes import (
    END_TO_END,
    EXACT,
    JOINT,
    JOINT_WEIGHT,
    LOCAL,
    parse_scheme,
    scheme_config,
)
from .training_steps import build_scheme

GIB = 2**30
CARDS = (8, 12, 16, 24, 32, 48, 80)  # GiB
# What a card needs beside tensors: CUDA's context and the workspaces of its libraries;
# and gaps between blocks of its allocator, a share of what is left.
CONTEXT, GAPS = GIB, 0.05
STRONGEST = 'recomputed'
KINDS = ('parameters', 'optimizer state', 'gradients', 'activations', 'temporaries')
_STEPS = (EXACT, JOINT, LOCAL)  # from accurate to fast
_TRIES = 4  # partitions of a scheme that are tried for a budget


@dataclass(frozen=True)
class Need:
    """What a training step needs in all.

    Attributes:
        name: ``'end-to-end'``, ``'recomputed'``, ``'exact'``, ``'joint'``, ``'local'``.
        scheme: As `benchmark` takes it.
        cuts: Names of the units after which it is cut.
        kinds: Bytes at the peak, by `KINDS`.
        flops: Floating-point operations of a step; None if it was computed.
    """

    name: str
    scheme: str
    cuts: tuple[str, ...]
    kinds: dict[str, int]
    flops: int | None

    @property
    def peak(self) -> int:
        """Bytes of all tensors at the peak."""
        return sum(self.kinds.values())

    @property
    def card(self) -> int | None:
        """The smallest of `CARDS` on which it fits, in GiB; None if there is none."""
        return next((card for card in CARDS if self.fits(card * GIB)), None)

    @property
    def settings(self) -> dict[str, object]:
        """Keys of ``local_learning`` that make these steps."""
        if self.name == LOCAL:
            return {}
        weight = JOINT_WEIGHT if self.name == JOINT else 0.0
        return dict(end_to_end_from=0, local_loss_weight=weight)

    def fits(self, card: int) -> bool:
        """Whether a card of so many bytes is enough."""
        return self.peak <= usable(card)


def usable(card: int) -> int:
    """Bytes that tensors can have of a card's.

    Examples:
        >>> from man_mm.benchmark.card_plan import usable
        >>> f'{usable(24 * 2**30) / 2**30:.2f} GiB'
        '21.85 GiB'
    """
    return max(int((card - CONTEXT) * (1 - GAPS)), 0)


class CardPlan(NamedTuple):
    """Needs of a config.

    Attributes:
        config: Its path or name.
        options: Overridden settings.
        cfg: The config.
        shape: Shape ``(N, C, H, W)`` of the images.
        needs: What each way to train needs.
        budget: Bytes of the card that was asked about, or None.
    """

    config: str
    options: list[str]
    cfg: Config
    shape: tuple[int, int, int, int]
    needs: list[Need]
    budget: int | None

    @property
    def recommended(self) -> Need | None:
        """The most accurate of the steps in modules that fit, of equal ones the first.

        Without a budget, exact steps. None if none fits, or plain training does.
        """
        if self.budget is None:
            fitting = self.needs
        else:
            fitting = [need for need in self.needs if need.fits(self.budget)]
            if self.needs[0] in fitting:
                return None
        return next((need for need in fitting if need.name in _STEPS), None)


class Counter:
    """Counts what schemes of a config need.

    Args:
        cfg: The config, with or without local learning.
        shape: Shape ``(N, C, H, W)`` of the images.
        computed: Whether to compute the steps. Defaults to False, which gives the
            same bytes in seconds.
    """

    def __init__(
        self, cfg: Config, shape: tuple[int, int, int, int], computed: bool = False
    ) -> None:
        self.cfg, self.shape, self.computed = cfg, shape, computed
        model = build_uncomputed(cfg)
        self.data, self.units = synthetic_batch(model, shape), find_units(model)

    def count(self, name: str, scheme: str) -> Need:
        """Counts the bytes of a training step whose optimizer state exists."""
        gc.collect()  # the model before
        with nullcontext() if self.computed else Uncomputed() as mode:
            built = build_scheme(self.cfg, parse_scheme(scheme), self.data, self.shape)
            optimizers = _optimizers(built.wrapper)
            if self.computed:
                built.step()
            else:
                _make_states(built.wrapper, optimizers)
                mode.flops = 0
            model = tensor_bytes([built.model, *_heads(built.learner)])
            state = tensor_bytes(optimizers)
            kinds = measure_memory(built.step, learner=built.learner).kinds
        by_kind = {
            'parameters': model,
            'optimizer state': state + kinds.pop('optimizer state'),
            'gradients': kinds.pop('gradients'),
            'temporaries': kinds.pop('temporaries'),
        }
        by_kind['activations'] = sum(kinds.values())
        kinds = {kind: by_kind[kind] for kind in KINDS}
        return Need(name, scheme, built.cuts, kinds, mode.flops if mode else None)

    def count_strongest(self, cuts: Sequence[str]) -> Need:
        """The strongest exact checkpointing over some cuts."""
        in_backward = '+in-backward'
        if self.cfg.optim_wrapper.get('clip_grad'):
            in_backward = ''  # needs all gradients at once
        scheme = f'{END_TO_END}+lean{in_backward}'
        try:
            return self.count(STRONGEST, f'{scheme}+cuts={",".join(cuts)}')
        except ValueError:  # units that take more than a map
            names = ','.join(unit.name for unit in self.units)
            return self.count(STRONGEST, f'{scheme}+recompute={names}')


def _heads(learner: LocalLearner | None) -> list:
    return [] if learner is None else [learner.heads]


def _optimizers(wrapper: OptimWrapper) -> list[Optimizer]:
    many = getattr(wrapper, 'optimizers', {0: wrapper.optimizer})
    return list(many.values())


def _make_states(wrapper: OptimWrapper, optimizers: Iterable[Optimizer]) -> None:
    """Gives optimizers the state that they have after a step."""
    if dial := getattr(wrapper, 'dial', None):
        with quiet():
            dial.turn_if_due(done=0, total=1)  # exact steps drop state and heads
    for optimizer in optimizers:
        params = [p for group in optimizer.param_groups for p in group['params']]
        for param in params:
            if param.requires_grad:
                param.grad = torch.zeros_like(param)
        optimizer.step()
        for param in params:
            param.grad = None


def plan_cards(
    config: str,
    budget: str | None = None,
    size: Sequence[int] | None = None,
    batch: int | None = None,
    options: Sequence[str] = (),
    console: Console | None = None,
) -> CardPlan:
    """Counts what each way to train needs, without training.

    Args:
        config: Path of a config with or without local learning, or its name in a
            package.
        budget: Memory of a card, such as ``'24GiB'``: where the config's partition
            needs more, others are tried. Defaults to None.
        size: Height and width of the images in pixels. Defaults to 800 and 1333, for
            classifiers 224 and 224.
        batch: Images in a step. Defaults to the train_dataloader's.
        options: Settings that override the config, each ``KEY=VALUE``.
        console: Where progress is shown.

    Raises:
        FileNotFoundError: If there is no such config.
        ValueError: If the config cannot be trained so.
    """
    console = console or Console(quiet=True)
    cfg = load_config(config, options)
    shape = images_shape(cfg, build_uncomputed(cfg), size, batch)
    counter = Counter(cfg, shape)
    limit = None if budget is None else parse_bytes(budget, '--budget')
    with console.status('counting ...') as status:
        needs = list(_needs(counter, limit, status.update))
    return CardPlan(config, list(options), cfg, shape, needs, limit)


def _needs(
    counter: Counter, limit: int | None, tell: Callable[[str], None]
) -> Iterator[Need]:
    tell('counting end-to-end training ...')
    yield counter.count(END_TO_END, END_TO_END)
    measure = _measure(counter)
    cuts, found = (), []
    for base in _STEPS:
        tell(f'counting {base} steps ...')
        scheme = _cut(base, cuts) if base == JOINT and cuts else base
        need = counter.count(base, scheme)
        if limit is not None and not need.fits(limit):
            need = _search(counter, base, need, limit, measure)
        cuts = need.cuts  # joint steps start from those of exact steps
        found.append(need)
    tell('counting end-to-end training, recomputed ...')
    yield counter.count_strongest(found[0].cuts)
    yield from found


def _cut(base: str, cuts: Sequence[str]) -> str:
    return f'{base}+cuts={",".join(cuts)}'


def _measure(counter: Counter) -> Callable[[], list[UnitCost]]:
    """Measures the units once, when they are asked for."""
    known: list[list[UnitCost]] = []

    def measure() -> list[UnitCost]:
        if not known:
            cfg = scheme_config(counter.cfg, parse_scheme(LOCAL), counter.shape)
            model = build_uncomputed(cfg)
            known.append(make_measure(cfg, model, Console(quiet=True))(counter.shape))
        return known[0]

    return measure


def _search(
    counter: Counter,
    base: str,
    first: Need,
    limit: int,
    measure: Callable[[], list[UnitCost]],
) -> Need:
    """The fewest modules that fit a card, or what needs least of those tried."""
    costs = measure() if base == LOCAL else exact_costs(measure())
    room = usable(limit) - first.kinds['parameters'] - first.kinds['optimizer state']
    plans = [plan_modules(costs, count) for count in range(2, len(costs) + 1)]
    promising = [plan for plan in plans if plan.peak <= room]
    best, tried = first, [first.cuts]
    for plan in (promising or [min(plans, key=_peak_of, default=None)])[:_TRIES]:
        if plan is None or tuple(plan.cuts) in tried:
            continue
        need = counter.count(base, _cut(base, plan.cuts))
        tried.append(need.cuts)
        best = min(best, need, key=lambda need: need.peak)
        if need.fits(limit):
            return need
    return best


def _peak_of(plan: Plan) -> int:
    return plan.peak


def exact_costs(costs: Sequence[UnitCost]) -> list[UnitCost]:
    """What units cost in exact steps: no auxiliary heads, but every boundary."""
    *inner, last = costs
    free = partial(replace, head=0, head_grads=0)
    return [*(free(cost, kept=cost.output) for cost in inner), last]


def count_computed(plan: CardPlan) -> list[Need]:
    """What the same steps need when they are computed."""
    counter = Counter(plan.cfg, plan.shape, computed=True)
    return [counter.count(need.name, need.scheme) for need in plan.needs]
