"""From which share of the training on steps are end to end: exact, or joint."""

from __future__ import annotations

import math

from mmengine.logging import print_log
from torch import nn
from torch.optim import Optimizer

from man_mm.core import ExactSteps, LocalLearner, LocalModule

from .sharded_tensors import free_parts


class Dial:
    """Turns from local to end-to-end steps, once, for good.

    End-to-end steps are *exact*, or *joint* with a weight: see
    `man_mm.core.ExactSteps`. When the dial turns, the optimizer forgets its state of
    all modules but the last: their gradients change by an order of magnitude, and
    AdamW would stand still for a thousand steps. Exact steps need neither auxiliary
    heads nor bank, which are freed.

    Args:
        learner: The learner whose modules are trained.
        optimizer: The optimizer of network and heads.
        share: Share of the training after which it turns, from 0 to 1; None never.
        weight: Of the local losses afterwards; see `ExactSteps`.
        recompute_last: Whether the last module then runs twice, too; see there.

    Attributes:
        is_end_to_end: Whether it has turned.
        steps: The end-to-end steps.
    """

    def __init__(
        self,
        learner: LocalLearner,
        optimizer: Optimizer,
        share: float | None = None,
        weight: float | str = 0.0,
        recompute_last: bool = True,
    ) -> None:
        self.learner = learner
        self.optimizer = optimizer
        self.share = share
        self.steps = ExactSteps(learner, weight, recompute_last)
        self.is_end_to_end = False

    def turn_if_due(self, done: int, total: int) -> None:
        """Turns at the first step behind its share of the training.

        Args:
            done: Iterations done so far.
            total: Iterations in total; negative if not known.

        Raises:
            ValueError: If the share is of a training whose length is not known.
        """
        # One module is trained end to end in any case.
        if self.is_end_to_end or self.share is None or len(self.learner.modules) == 1:
            return
        if 0 < self.share and total < 0:
            raise ValueError(
                'optim_wrapper.local_learning.end_to_end_from is a share of the '
                'training, whose length is not known: call '
                'optim_wrapper.initialize_count_status(model, 0, iterations), as '
                "mmengine's Runner does."
            )
        if done < math.ceil(self.share * total):
            return
        weight, heads = self.steps.weight, len(self.learner.heads)
        kind = f'joint (local_loss_weight={weight!r})' if weight else 'exact'
        message = f'From iteration {done + 1} on, steps are {kind}.'
        if heads and not weight:
            message += f' The {heads} auxiliary heads and the memory bank are freed.'
        self.turn()
        print_log(message, 'current')

    def module_under_way(self) -> LocalModule:
        """The module that runs, or ran last."""
        modules, done = self.learner.modules, len(self.learner.losses)
        return self.steps.under_way if self.is_end_to_end else modules[done]

    def resume(self) -> None:
        """Turns for a checkpoint of a run that had turned.

        Raises:
            ValueError: If this run never turns.
        """
        if self.share is None:
            raise ValueError(
                'The checkpoint is of steps that are end to end: resume it with the '
                'optim_wrapper.local_learning.end_to_end_from that it was trained '
                'with, or use load_from.'
            )
        if not self.is_end_to_end:
            self.turn()

    def turn(self) -> None:
        """Turns now."""
        self.is_end_to_end = True
        for module in self.learner.modules[:-1]:
            for param in module.params:
                self.optimizer.state.pop(param, None)
        if not self.steps.weight:
            self._free(self.learner.heads)

    def _free(self, heads: nn.Module) -> None:
        params = set(heads.parameters())
        for param in params:
            self.optimizer.state.pop(param, None)
        # The groups stay: schedulers count them.
        for group in self.optimizer.param_groups:
            group['params'] = [p for p in group['params'] if p not in params]
        free_parts(params)
        self.learner.free_heads()
