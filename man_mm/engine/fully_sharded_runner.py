"""FullyShardedRunner: starts a `FullyShardedModel` without a whole copy in memory."""

from __future__ import annotations

import zipfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from mmengine import dist
from mmengine import registry as root
from mmengine.device import get_device
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .disk_tensors import parameters_on_disk
from .distributed import broadcast_module, share_random_state
from .fully_sharded_model import FullyShardedModel

# By which PyTorch's layers draw their first weights; the others of `nn.init` call them.
_DRAWING = (
    Tensor.uniform_,
    Tensor.normal_,
    nn.init.uniform_,
    nn.init.normal_,
    nn.init.kaiming_uniform_,
)


@root.RUNNERS.register_module()
class FullyShardedRunner(Runner):
    """mmengine's ``Runner``, lean where it starts a `FullyShardedModel`.

    The first process builds and initialises the model, with weights that lie in files
    in ``work_dir``. The others only allocate its weights, which takes no memory until
    they are written, and get their parts from the first one, group by group. No
    process moves the whole model to its device, or reads more of a checkpoint than its
    part. Weights and random numbers are those of ``Runner``. A line of a config chooses
    it::

        runner_type = 'FullyShardedRunner'

    Raises:
        ValueError: If another ``model_wrapper_cfg`` is configured, or ``sync_bn``.

    Examples:
        >>> from mmengine.registry import RUNNERS
        >>> import man_mm
        >>> RUNNERS.get('FullyShardedRunner').__name__
        'FullyShardedRunner'
    """

    def build_model(self, model: nn.Module | dict) -> nn.Module:
        """Builds the model, without values on other processes than the first."""
        if isinstance(model, nn.Module):
            return super().build_model(model)
        if dist.is_main_process():
            with parameters_on_disk(self.work_dir):
                return super().build_model(model)
        with _Unwritten():
            model = super().build_model(model)
        model.is_init = True  # by the first process
        return model

    def wrap_model(
        self, model_wrapper_cfg: dict | None, model: nn.Module
    ) -> FullyShardedModel:
        """Wraps the model where it was built, in the memory of the CPU."""
        cfg = dict(model_wrapper_cfg or {})
        kind = root.MODEL_WRAPPERS.get(cfg.pop('type', None) or 'FullyShardedModel')
        if kind is not FullyShardedModel:
            raise ValueError(
                f"runner_type='FullyShardedRunner' starts no {kind.__name__}: set "
                "model_wrapper_cfg=dict(type='FullyShardedModel'), or remove "
                'runner_type.'
            )
        if self.cfg.get('sync_bn') is not None:
            raise ValueError(
                "runner_type='FullyShardedRunner' does not convert batch norms: remove "
                'sync_bn, or runner_type.'
            )
        return FullyShardedModel(model, **cfg)

    def build_optim_wrapper(self, optim_wrapper: dict | OptimWrapper) -> OptimWrapper:
        """Builds the optimizer wrapper, which splits the model."""
        wrapper = super().build_optim_wrapper(optim_wrapper)
        share_random_state()
        return wrapper

    def load_checkpoint(
        self, filename: str, map_location: Any = 'cpu', *args: Any, **kwargs: Any
    ) -> dict:
        """Loads a checkpoint of which each process reads its part."""
        with _mapped(filename):
            return super().load_checkpoint(filename, 'cpu', *args, **kwargs)

    def val(self) -> dict:
        """Validates alone, with the whole model: see ``Runner.val``."""
        self._complete()
        return super().val()

    def test(self) -> dict:
        """Tests alone, with the whole model: see ``Runner.test``."""
        self._complete()
        return super().test()

    def _complete(self) -> None:
        if not self.model.is_sharded:
            broadcast_module(self.model.module)
            self.model.to(get_device())


class _Unwritten(TorchFunctionMode):
    """Lets layers allocate their weights, but draw no values for them."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _DRAWING:
            return args[0] if args else kwargs['tensor']
        return func(*args, **kwargs)


def _mapped(filename: str) -> Any:
    """Lets ``torch.load`` map a local file, rather than read all of it."""
    from torch.utils.serialization import config

    path = Path(filename)
    if not (path.is_file() and zipfile.is_zipfile(path)):
        return nullcontext()
    return config.patch('load.mmap', True)
