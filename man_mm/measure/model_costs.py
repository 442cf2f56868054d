"""Measures what the units of a model cost in a training step."""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from mmengine import dist
from torch import nn

from man_mm.backbones import find_units
from man_mm.core import LocalLearner, MemoryBank
from man_mm.core.local_losses import Backward
from man_mm.core.partition import Measure
from man_mm.core.random_states import random_state_kept

from .peaks import UnitCost, exact_costs
from .synthetic_batch import synthetic_batch
from .unit_costs import measure_costs


def measure_units(
    model: nn.Module,
    build: Callable[[nn.Module, dict[str, Any]], LocalLearner],
    shape: Sequence[int],
    plain: bool = False,
) -> list[UnitCost]:
    """Runs a training step of a copy of a model, cut after every unit.

    The copy gets weights of a fixed seed, so that the costs depend on nothing but the
    configuration: every run, every rank and every resumed run plans alike.

    Args:
        model: The model on its device; unchanged, like the random states.
        build: Builds a learner from a model and the config of a partition.
        shape: Shape ``(N, C, H, W)`` of the batch.
        plain: Whether to run the unchanged network, without folding, recomputing and
            micro-batches, as end-to-end training does. Defaults to False.

    Returns:
        One cost for each unit that can be a module.
    """
    with _undisturbed(next(model.parameters())):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        twin = copy.deepcopy(model).train()
        for module in twin.modules():
            if hasattr(module, 'reset_parameters'):
                module.reset_parameters()
        cuts = [unit.name for unit in find_units(twin)[:-1]]
        learner = build(twin, dict(type='CutPartition', cuts=cuts))
        if plain:
            learner.patches, learner.micro_batch_size = (), None
            learner.compressed = None
        if any(getattr(head, 'needs_bank', False) for head in learner.heads):
            learner.bank = MemoryBank()
        batch = synthetic_batch(twin, shape)

        def step(backward: Backward) -> None:
            with learner.step(backward=backward):
                data = twin.data_preprocessor(batch, training=True)
                learner.targets = data['data_samples']
                losses = twin(**data, mode='loss')
            loss, _ = twin.parse_losses(losses)
            backward(loss, learner.modules[-1], True)

        costs = [measure_costs(learner, step, next(twin.parameters()).device)]
    dist.broadcast_object_list(costs)
    return costs[0]


def with_boundaries(measure: Measure, with_heads: bool) -> Measure:
    """Measures what units cost in exact or joint steps.

    Args:
        measure: Measures what they cost in local steps.
        with_heads: Whether there are auxiliary heads.
    """

    def measure_exact(shape: Sequence[int], plain: bool = False) -> list[UnitCost]:
        costs = measure(shape, plain=plain)
        return costs if plain else exact_costs(costs, with_heads)

    return measure_exact


@contextmanager
def _undisturbed(like: torch.Tensor) -> Iterator[None]:
    """Restores random states, and keeps mmengine from logging each initial weight."""
    disabled = logging.root.manager.disable
    python, numpy = random.getstate(), np.random.get_state()
    logging.disable(logging.INFO)
    try:
        with random_state_kept(like):
            yield
    finally:
        logging.disable(disabled)
        random.setstate(python)
        np.random.set_state(numpy)
