"""Tells of modules that are skipped, and ends a run in which one is again and again."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence

from mmengine.logging import print_log

from man_mm.core import LocalModule

# More than a dynamic loss scale of 2**16 needs to come down to 1.
_MOST_SKIPS = 25


class Skips:
    """Counts the consecutive iterations in which a module was not updated.

    Args:
        modules: All modules.
    """

    def __init__(self, modules: Sequence[LocalModule]) -> None:
        self._cuts = {module.name: module.cut for module in modules}
        self._counts: Counter[str] = Counter()

    def report(self, finite: Mapping[str, bool]) -> None:
        """Warns of modules that were skipped.

        Args:
            finite: Whether the gradients of a module were finite, by its name.

        Raises:
            FloatingPointError: If a module was skipped too often.
        """
        for name, is_finite in finite.items():
            if is_finite:
                self._counts[name] = 0
            else:
                self._skip(name)

    def _skip(self, name: str) -> None:
        self._counts[name] += 1
        if self._counts[name] > _MOST_SKIPS:
            raise FloatingPointError(
                f'The gradients of {name} (up to {self._cuts[name]!r}) were not finite '
                f'in {_MOST_SKIPS} consecutive iterations. '
                'It has not been updated since, so the '
                'latest checkpoint is sound: resume it with a lower '
                'optim_wrapper.optimizer.lr, a longer warm-up or '
                'optim_wrapper.clip_grad.'
            )
        print_log(
            f'{name} (up to {self._cuts[name]!r}) has gradients that are not finite: '
            'they are dropped in this iteration.',
            'current',
            logging.WARNING,
        )
