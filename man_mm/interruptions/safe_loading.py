"""What mmengine 0.10 needs with recent torch, the one global change of this package."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler

_OWNERS = (HistoryBuffer, OneCycleParamScheduler)


def allow_safe_loading() -> None:
    """Lets ``torch.load`` read mmengine's checkpoints with safe loading on.

    mmengine stores log buffers (numpy arrays) and schedulers in checkpoints, and
    calls ``torch.load`` without ``weights_only``, which torch turned on. The types in
    them are allowed one by one. To be called before a checkpoint is loaded:
    onedl-mmengine, which allows them while it loads one, takes the permission away
    afterwards.
    """
    # numpy's own rebuilders: their module moved between versions.
    rebuilders = [value.__reduce__()[0] for value in (np.zeros(1), np.int64())]
    torch.serialization.add_safe_globals(
        [
            *_OWNERS,
            np.ndarray,
            np.dtype,
            *rebuilders,
            *(type(np.dtype(kind)) for kind in ('f8', 'f4', 'i8', 'i4', '?')),
            (_method, 'builtins.getattr'),
        ]
    )


def _method(owner: type, name: str) -> Any:
    # Both classes pickle references to their methods, as getattr(owner, name).
    if owner not in _OWNERS or name.startswith('__') or name not in vars(owner):
        raise ValueError(f'The checkpoint asks for {owner}.{name}, which is refused.')
    return getattr(owner, name)
