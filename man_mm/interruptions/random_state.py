"""Random state: of this process, of all ranks, and of the data loader's workers."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader


def get_random_state() -> dict[str, Any]:
    """States of Python's, numpy's and torch's generators, as plain data.

    Lists of numbers are tensors: a checkpoint with thousands of them loads slowly.
    """
    version, keys, *rest = np.random.get_state()
    python_version, python_state, gauss = random.getstate()
    return dict(
        python=[python_version, torch.tensor(python_state), gauss],
        numpy=[version, torch.from_numpy(keys.astype(np.int64)), *rest],
        torch=torch.get_rng_state(),
        cuda=torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    )


def set_random_state(state: dict[str, Any]) -> None:
    """Restores what `get_random_state` returned."""
    version, python_state, gauss = state['python']
    random.setstate((version, tuple(python_state.tolist()), gauss))
    name, keys, *rest = state['numpy']
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state['torch'].cpu())
    if len(state['cuda']) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state['cuda']])


def restart_workers(loader: DataLoader, epoch: int) -> None:
    """Lets workers that outlive an epoch start it with a random state of its own.

    Their state cannot be saved, so it must follow from the epoch: a run that resumes
    here has fresh workers. Does nothing for workers that live for one epoch.

    Args:
        loader: The training data loader.
        epoch: The epoch that begins.
    """
    if epoch == 0 or not getattr(loader, 'persistent_workers', False):
        return
    init = loader.worker_init_fn
    if isinstance(init, partial) and init.func is _init_worker:
        init = init.args[0]
    loader.worker_init_fn = partial(_init_worker, init, epoch)
    loader._iterator = None


def _init_worker(init: Callable | None, epoch: int, worker_id: int) -> None:
    # Without a function of its own, torch seeds from the restored state already.
    if init is None:
        return
    init(worker_id)
    seed = (torch.initial_seed() + 1_000_003 * epoch) % 2**32
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
