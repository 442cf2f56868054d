"""DDP without the buckets in which it would average gradients."""

from __future__ import annotations

from typing import NoReturn

from torch.nn.parallel import DistributedDataParallel


def free_buckets(model: DistributedDataParallel) -> None:
    """Frees the buckets of DDP, which are as large as all gradients together.

    Local learning averages gradients module by module itself, in messages that live as
    long as they travel. What else DDP does stays: it has broadcast weights and buffers,
    and broadcasts buffers before each step if it was told to.

    Args:
        model: A wrapped model, trained by local learning alone from now on.
    """
    # The logger keeps the reducer alive.
    model.reducer = model.logger = _FreedReducer()


class _FreedReducer:
    """In place of what owned the buckets; refuses to average gradients."""

    def _rebuild_buckets(self) -> bool:
        # All that DDP asks for in `no_sync`, in which every step of ours runs.
        return False

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith('__'):  # asked by copy and pickle, say
            raise AttributeError(name)
        raise RuntimeError(
            f'DDP wants to average gradients ({name}), but its buckets were freed: the '
            'optimizer wrapper of local learning averages them. Train with that one, '
            'or wrap the plain model in MMDistributedDataParallel again.'
        )
