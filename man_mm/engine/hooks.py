"""MemoryBankHook: gives the auxiliary heads a memory bank."""

from __future__ import annotations

from typing import Any

from mmengine import registry as root
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner

from man_mm.core import MemoryBank

from .checks import check_wrapper_type
from .distributed import average_tensors


@root.HOOKS.register_module()
class MemoryBankHook(Hook):
    """Adds a `MemoryBank` to the run, keeps it equal on all ranks, logs its bytes.

    Args:
        long_term: Whether the bank keeps long-term memory. Defaults to True.
        momentum: Its momentum, in [0, 1). Defaults to 0.99.

    Examples:
        >>> from mmengine.registry import HOOKS
        >>> import man_mm
        >>> default_hooks = dict(memory_bank=dict(type='MemoryBankHook', momentum=0.9))
        >>> HOOKS.build(default_hooks['memory_bank']).bank.momentum
        0.9
    """

    def __init__(self, long_term: bool = True, momentum: float = 0.99) -> None:
        self.bank = MemoryBank(long_term, momentum)

    def before_run(self, runner: Runner) -> None:
        """Hands the bank to the learner, before a checkpoint is loaded into it."""
        if not isinstance(runner.optim_wrapper, OptimWrapper):
            return  # testing or validating alone: the wrapper is not built
        check_wrapper_type(type(runner.optim_wrapper).__name__)
        learner = runner.optim_wrapper.learner
        if learner.heads:
            learner.bank = self.bank

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: dict | None = None,
    ) -> None:
        """Averages the long-term memory over ranks and logs the bank's bytes."""
        learner = runner.optim_wrapper.learner
        if learner.bank is None:  # there are no heads, or no more
            self.bank = None
            return
        average_tensors(self.bank.moments())
        runner.message_hub.update_scalar('train/bank_bytes', learner.bank_bytes)
