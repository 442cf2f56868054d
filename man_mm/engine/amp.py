"""AmpLocalLearningOptimWrapper: local learning in mixed precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from mmengine import registry as root
from torch import Tensor, nn
from torch.optim import Optimizer

from man_mm.core import LocalLearner, LocalModule

from .optim_wrapper import LocalLearningOptimWrapper
from .optimizers import optimizer_limited_to

_DTYPES = ('float16', 'bfloat16')


@root.OPTIM_WRAPPERS.register_module()
class AmpLocalLearningOptimWrapper(LocalLearningOptimWrapper):
    """`LocalLearningOptimWrapper` in mixed precision, on GPU and CPU.

    With ``float16`` each module has a loss scale of its own: when the gradients of a
    module overflow, that module is skipped and its scale comes down; the others are
    updated, at theirs. In steps that are end to end, all have the lowest. ``bfloat16``
    has the range of ``float32`` and needs none.

    Args:
        optimizer: See `LocalLearningOptimWrapper`.
        learner: See there.
        loss_scale: ``'dynamic'``, a fixed number, or arguments of
            ``torch.amp.GradScaler``. Defaults to ``'dynamic'``.
        dtype: ``'float16'`` or ``'bfloat16'``. Defaults to None, what autocast prefers:
            ``float16`` on GPUs and ``bfloat16`` on CPUs.
        **kwargs: Of `LocalLearningOptimWrapper`.

    Raises:
        ValueError: If an option is unknown, or if ``update='parameter'``, which steps
            before a module's overflow is known, meets ``float16``.

    Examples:
        >>> from mmengine.hub import get_model
        >>> from mmengine.optim import build_optim_wrapper
        >>> import man_mm
        >>> model = get_model('mmpretrain::resnet/resnet18_8xb16_cifar10.py')
        >>> optim_wrapper = dict(
        ...     type='AmpLocalLearningOptimWrapper',
        ...     constructor='LocalLearningOptimWrapperConstructor',
        ...     optimizer=dict(type='SGD', lr=0.1),
        ...     dtype='bfloat16',
        ...     local_learning=dict(aux_head=dict(type='DGLHead')))
        >>> wrapper = build_optim_wrapper(model, optim_wrapper)
        >>> wrapper.dtype
        torch.bfloat16
    """

    def __init__(
        self,
        optimizer: Optimizer,
        learner: LocalLearner,
        loss_scale: str | float | dict[str, Any] = 'dynamic',
        dtype: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer, learner, **kwargs)
        if dtype not in (None, *_DTYPES):
            raise ValueError(
                f'optim_wrapper.dtype must be one of {_DTYPES}, got {dtype!r}.'
            )
        self.device_type = next(learner.model.parameters()).device.type
        self.dtype = torch.get_autocast_dtype(self.device_type)
        if dtype is not None:
            self.dtype = getattr(torch, dtype)
        scales = self.dtype == torch.float16
        if scales and self.update == 'parameter':
            raise ValueError(
                "optim_wrapper.local_learning.update='parameter' steps before it is "
                "known whether float16 overflowed: set it to 'module', or "
                "optim_wrapper.dtype='bfloat16'."
            )
        self._fixed_scale = loss_scale if isinstance(loss_scale, int | float) else None
        options = _scaler_options(loss_scale)
        self.scalers = [
            torch.amp.GradScaler(self.device_type, enabled=scales, **options)
            for _ in learner.modules
        ]
        if scales:
            learner.entry.rescale = self._rescale

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Arms the learner, with autocast on; see `LocalLearningOptimWrapper`.

        Args:
            model: The model, plain or in ``MMDistributedDataParallel``.
        """
        with torch.autocast(self.device_type, self.dtype), super().optim_context(model):
            yield

    def local_backward(self, loss: Tensor, module: LocalModule, complete: bool) -> None:
        """Back-propagates a local loss, without autocast, as torch asks.

        Args:
            loss: The local loss, a scalar.
            module: The module that it trains.
            complete: Whether no other loss of this iteration reaches the module.
        """
        with torch.autocast(self.device_type, enabled=False):
            super().local_backward(loss, module, complete)
        # It holds the module's weights in half precision, which have changed.
        torch.clear_autocast_cache()

    def _step_of_learner(self) -> AbstractContextManager[None]:
        step = super()._step_of_learner()
        if self.dial.is_end_to_end and self.scalers[0].is_enabled():
            self._share_scale()
        return step

    def _share_scale(self) -> None:
        """Gives the lowest scale to all modules, through which gradients now pass."""
        device = next(self.learner.model.parameters()).device
        for scaler in self.scalers:
            scaler.scale(torch.zeros((), device=device))  # it may not have begun
        lowest = torch.stack([scaler._scale for scaler in self.scalers]).amin(0)
        for scaler in self.scalers:
            scaler._scale = lowest.clone()

    def _replay(self) -> None:
        with torch.autocast(self.device_type, self.dtype):
            super()._replay()

    def state_dict(self) -> dict:
        """State of `LocalLearningOptimWrapper`, and the loss scales."""
        scales = [scaler.state_dict() for scaler in self.scalers]
        return {**super().state_dict(), 'loss_scalers': scales}

    def load_state_dict(self, state_dict: dict) -> None:
        """Restores what `state_dict` returned; single precision has no scales.

        Raises:
            ValueError: If the state is not of a run with the same modules and heads.
        """
        state = dict(state_dict)
        scales = state.pop('loss_scalers', None)
        super().load_state_dict(state)
        for scaler, scale in zip(self.scalers, scales or [], strict=False):
            if scale and scaler.is_enabled():
                scaler.load_state_dict(scale)

    def _scaled(self, loss: Tensor, module: LocalModule) -> Tensor:
        scaler = self.scalers[module.index]
        return scaler.scale(loss.float()) if scaler.is_enabled() else loss

    def _rescale(self, grad: Tensor) -> Tensor:
        """From the loss scale of the first module to that of the last."""
        first, last = self.scalers[0], self.scalers[-1]
        one = torch.ones((), device=grad.device)
        return grad * (last.scale(one) / first.scale(one))

    def _check_and_clip(self, module: LocalModule) -> None:
        scaler = self.scalers[module.index]
        params = self._with_grad(module)
        if scaler.is_enabled() and params:
            with optimizer_limited_to(self.optimizer, params):
                scaler.unscale_(self.optimizer)
            scale = scaler.scale(torch.ones((), device=params[0].device))
            self._scalars[f'{module.name}/loss_scale'] = scale
            scaler.update(self._fixed_scale)
        super()._check_and_clip(module)


def _scaler_options(loss_scale: str | float | dict[str, Any]) -> dict[str, Any]:
    if loss_scale == 'dynamic':
        return {}
    if isinstance(loss_scale, dict):
        return loss_scale
    if isinstance(loss_scale, int | float) and loss_scale > 0:
        return dict(init_scale=float(loss_scale))
    raise ValueError(
        "optim_wrapper.loss_scale must be 'dynamic', a number above 0 or a dictionary, "
        f'got {loss_scale!r}.'
    )
