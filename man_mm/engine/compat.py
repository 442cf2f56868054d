"""What mmengine 0.10 needs with recent torch."""

from __future__ import annotations

from functools import wraps
from typing import Any

import numpy as np
import torch
from mmengine.device import get_device
from mmengine.dist import utils as dist_utils
from mmengine.logging import HistoryBuffer
from mmengine.model import MMDistributedDataParallel
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler
from mmengine.utils import digit_version

_OWNERS = (HistoryBuffer, OneCycleParamScheduler)


def allow_safe_loading() -> None:
    """Lets ``torch.load`` read mmengine's checkpoints with safe loading on.

    mmengine stores log buffers (numpy arrays) and schedulers in checkpoints, and
    calls ``torch.load`` without ``weights_only``, which torch 2.6 turned on. The types
    in them are allowed one by one.
    """
    if digit_version(torch.__version__) < digit_version('2.6'):
        return
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


def allow_cpu_ranks() -> None:
    """Lets ``--launcher pytorch`` start on machines without an accelerator, over gloo.

    mmengine selects a GPU for each rank without asking whether there is one.
    """
    if get_device() != 'cpu' or hasattr(dist_utils._init_dist_pytorch, '__wrapped__'):
        return

    @wraps(dist_utils._init_dist_pytorch)
    def init_dist(_backend: str, init_backend: str = 'torch', **kwargs: Any) -> None:
        torch.distributed.init_process_group('gloo', **kwargs)

    wrap = MMDistributedDataParallel.__init__

    @wraps(wrap)
    def init_wrapper(self, *args: Any, **kwargs: Any) -> None:
        wrap(self, *args, **{**kwargs, 'device_ids': None})

    dist_utils._init_dist_pytorch = init_dist
    MMDistributedDataParallel.__init__ = init_wrapper


def _method(owner: type, name: str) -> Any:
    # Both classes pickle references to their methods, as getattr(owner, name).
    if owner not in _OWNERS or name.startswith('__') or name not in vars(owner):
        raise ValueError(f'The checkpoint asks for {owner}.{name}, which is refused.')
    return getattr(owner, name)
