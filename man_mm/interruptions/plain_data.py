"""Checkpoints that hold nothing but data, so that torch loads them safely."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer


def to_plain_data(checkpoint: dict[str, Any]) -> None:
    """Replaces, in place, what torch does not load safely.

    Log buffers become dictionaries of tensors, numpy's numbers Python's. Functions
    that schedulers keep are left out: loading a state leaves their own in place.
    """
    hub = checkpoint['message_hub']
    buffers = {
        name: dict(
            log_history=torch.as_tensor(buffer._log_history),
            count_history=torch.as_tensor(buffer._count_history),
            max_length=buffer.max_length,
        )
        for name, buffer in hub['log_scalars'].items()
    }
    info = {
        name: value.item() if isinstance(value, np.generic) else value
        for name, value in hub['runtime_info'].items()
    }
    checkpoint['message_hub'] = {**hub, 'log_scalars': buffers, 'runtime_info': info}
    schedulers = checkpoint.get('param_schedulers')
    if isinstance(schedulers, list):
        checkpoint['param_schedulers'] = [
            {key: value for key, value in state.items() if not callable(value)}
            for state in schedulers
        ]


def from_plain_data(checkpoint: dict[str, Any]) -> None:
    """Restores, in place, the log buffers that `to_plain_data` replaced."""
    scalars = checkpoint.get('message_hub', {}).get('log_scalars', {})
    for name, buffer in scalars.items():
        if isinstance(buffer, dict):
            arrays = {
                key: buffer[f'{key}_history'].cpu().numpy() for key in ('log', 'count')
            }
            scalars[name] = HistoryBuffer(
                arrays['log'], arrays['count'], buffer['max_length']
            )
