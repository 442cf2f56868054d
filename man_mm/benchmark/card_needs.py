"""What a training step needs of a card: plain, recomputed, exact, joint and local."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from rich.console import Console
from torch import nn
from torch.optim import Optimizer

from man_mm.backbones import find_backbone, find_units
from man_mm.core import LocalLearner
from man_mm.core.storages import tensor_bytes
from man_mm.engine.quiet import quiet
from man_mm.measure.memory import measure_memory
from man_mm.measure.peaks import UnitCost
from man_mm.measure.synthetic_batch import synthetic_batch
from man_mm.measure.uncomputed import Uncomputed

from .partition_plan import build_uncomputed, make_measure
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
OBJECTS = 100  # more than in any image of COCO but a few
STRONGEST = 'recomputed'
KINDS = ('parameters', 'optimizer state', 'gradients', 'activations', 'temporaries')
STEPS = (EXACT, JOINT, LOCAL)  # from accurate to fast


@dataclass(frozen=True)
class Need:
    """What a training step needs in all.

    Attributes:
        name: ``'end-to-end'``, ``'recomputed'``, ``'exact'``, ``'joint'``, ``'local'``.
        scheme: As `benchmark` takes it.
        cuts: Names of the units after which it is cut.
        recompute: Names of submodules that are recomputed besides.
        kinds: Bytes at the peak, by `KINDS`.
        flops: Floating-point operations of a step; None if it was computed.
    """

    name: str
    scheme: str
    cuts: tuple[str, ...]
    recompute: tuple[str, ...]
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
        settings = dict(recompute=[*self.recompute]) if self.recompute else {}
        if self.name != LOCAL:
            weight = JOINT_WEIGHT if self.name == JOINT else 0.0
            settings |= dict(end_to_end_from=0, local_loss_weight=weight)
        return settings

    def fits(self, card: int) -> bool:
        """Whether a card of so many bytes is enough."""
        return self.peak <= usable(card)


def usable(card: int) -> int:
    """Bytes that tensors can have of a card's.

    Examples:
        >>> from man_mm.benchmark.card_needs import usable
        >>> f'{usable(24 * 2**30) / 2**30:.2f} GiB'
        '21.85 GiB'
    """
    return max(int((card - CONTEXT) * (1 - GAPS)), 0)


class Counter:
    """Counts what schemes of a config need.

    Args:
        cfg: The config, with or without local learning.
        shape: Shape ``(N, C, H, W)`` of the images.
        objects: Objects in an image of a detector. Defaults to 100.
        device: Device whose operators count. Defaults to ``'cuda'``.
        computed: Whether to compute the steps, on the CPU. Defaults to False, which
            gives the same bytes as the CPU's operators in seconds.
    """

    def __init__(
        self,
        cfg: Config,
        shape: tuple[int, int, int, int],
        objects: int = OBJECTS,
        device: str = 'cuda',
        computed: bool = False,
    ) -> None:
        self.cfg, self.shape, self.device, self.computed = cfg, shape, device, computed
        model = build_uncomputed(cfg)
        self.data = synthetic_batch(model, shape, objects)
        self.units, self.layers = find_units(model), attention_layers(model)

    @cached_property
    def costs(self) -> list[UnitCost]:
        """What the units cost as modules of local steps."""
        cfg = scheme_config(self.cfg, parse_scheme(LOCAL), self.shape)
        model, console = build_uncomputed(cfg), Console(quiet=True)
        return make_measure(cfg, model, console, self.device)(self.shape)

    def count(
        self,
        name: str,
        scheme: str,
        cuts: Sequence[str] = (),
        recompute: Sequence[str] = (),
    ) -> Need:
        """Counts the bytes of a training step whose optimizer state exists.

        Args:
            name: See `Need`.
            scheme: As `benchmark` takes it.
            cuts: Names of the units after which it is cut. Defaults to the scheme's.
            recompute: Names of submodules that are recomputed. Defaults to none.
        """
        for option, names in (('cuts', cuts), ('recompute', recompute)):
            scheme += f'+{option}={",".join(names)}' if names else ''
        gc.collect()  # the model before
        with nullcontext() if self.computed else Uncomputed(self.device) as mode:
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
        flops = mode.flops if mode else None
        return Need(name, scheme, built.cuts, tuple(recompute), kinds, flops)

    def count_strongest(self, cuts: Sequence[str], recompute: Sequence[str]) -> Need:
        """The strongest exact checkpointing over some cuts, and of some submodules."""
        in_backward = '+in-backward'
        if self.cfg.optim_wrapper.get('clip_grad'):
            in_backward = ''  # needs all gradients at once
        scheme = f'{END_TO_END}+lean{in_backward}'
        try:
            return self.count(STRONGEST, scheme, cuts, recompute)
        except ValueError:  # units that take more than a map
            units = [unit.name for unit in self.units]
            return self.count(STRONGEST, scheme, (), [*units, *recompute])


def attention_layers(model: nn.Module) -> list[str]:
    """Names of lists of layers with attention behind the backbone of a model.

    Args:
        model: A model such as DINO, whose encoder has a list of layers.
    """
    backbone, _ = find_backbone(model)
    return [
        name
        for name, part in model.named_modules()
        if isinstance(part, nn.ModuleList)
        and not f'{name}.'.startswith(f'{backbone}.')
        and len(part) > 1
        and all(_has_attention(item) for item in part)
    ]


def _has_attention(module: nn.Module) -> bool:
    inside = [*module.modules()][1:]
    return any('attention' in type(part).__name__.lower() for part in inside)


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
