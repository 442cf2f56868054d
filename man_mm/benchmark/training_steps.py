"""Builds the training steps that `benchmark` measures."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from mmengine.config import Config
from mmengine.model.efficient_conv_bn_eval import turn_on_efficient_conv_bn_eval
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import HOOKS, MODELS, OPTIMIZERS
from mmengine.runner.activation_checkpointing import turn_on_activation_checkpointing
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from man_mm.backbones import find_units
from man_mm.core import CompressedActivations, LocalLearner
from man_mm.core.checkpointing import recomputed
from man_mm.core.micro_batches import slice_batch, slices_of
from man_mm.engine.constructor import LEARNER_OPTIONS, build_learner
from man_mm.engine.loss_patches import loss_patches
from man_mm.engine.memory_patches import (
    compression_patches,
    fold_patches,
    module_patches,
    submodules_of,
)
from man_mm.engine.options import complete_options, recomputes_last
from man_mm.engine.quiet import quiet
from man_mm.engine.sliced_overlaps import slice_overlaps

from .schemes import (
    END_TO_END,
    EXACT,
    Scheme,
    autocast_dtype,
    last_module_setting,
    partition_config,
    scheme_config,
)


@dataclass
class Built:
    """A scheme that is ready to train.

    Attributes:
        model: The model, in training mode and on its device.
        learner: Its local learner, None for end-to-end training.
        cuts: Names of the units after which it is cut, in order.
        method: What is computed, as opposed to how: kind of steps, cuts and auxiliary
            heads. The same for all schemes that are end to end.
        step: Trains for one step on a fixed batch.
        wrapper: What updates its weights.
    """

    model: nn.Module
    learner: LocalLearner | None
    cuts: tuple[str, ...]
    method: tuple
    step: Callable[[], None]
    wrapper: OptimWrapper


class InBackwardOptimWrapper(OptimWrapper):
    """Updates each parameter in the backward pass and frees its gradient at once.

    As in PyTorch's tutorial "How to save memory by fusing the optimizer step into the
    backward pass": one optimizer a parameter, called when its gradient is complete.

    Args:
        optimizer: Its groups tell the settings of each parameter; else not used.
        config: Config of the optimizers.
        accumulative_counts: Backward passes before an update.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, config: dict, accumulative_counts: int
    ) -> None:
        super().__init__(optimizer, accumulative_counts)
        self.optimizers = {}
        for group in optimizer.param_groups:
            for param in filter(lambda p: p.requires_grad, group['params']):
                alone = dict(config, params=[{**group, 'params': [param]}])
                self.optimizers[param] = OPTIMIZERS.build(alone)
                param.register_post_accumulate_grad_hook(self._update)

    def step(self, **_: object) -> None:
        """Updates what the last backward pass did not reach."""
        for param in self.optimizers:
            if param.grad is not None:
                self._step(param)

    def _update(self, param: Tensor) -> None:
        if self.should_sync():
            self._step(param)

    def _step(self, param: Tensor) -> None:
        self.optimizers[param].step()
        param.grad = None


def build_model(cfg: dict, seed: int = 0) -> nn.Module:
    """Builds a model from its config, with weights that all get gradients.

    ResNets start with the last norm of each residual branch at zero, which blocks the
    gradients of the branch in the first step: there it is one half.

    Args:
        cfg: Config of the model; left as it is.
        seed: Of the weights.
    """
    with quiet():
        torch.manual_seed(seed)
        model = MODELS.build(cfg)
        model.init_weights()
    for norm in model.modules():
        if isinstance(norm, _BatchNorm) and norm.affine and not norm.weight.any():
            nn.init.constant_(norm.weight, 0.5)
    return model.train()


def build_scheme(
    cfg: Config,
    scheme: Scheme,
    data: dict,
    shape: tuple[int, int, int, int],
    device: str = 'cpu',
) -> Built:
    """Builds a config's model and what trains it by a scheme.

    Args:
        cfg: Config of a model, with or without local learning; left as it is.
        scheme: The scheme.
        data: A batch as the data loader gives it, of lists or tensors.
        shape: Its shape ``(N, C, H, W)``.
        device: Where to train.

    Raises:
        ValueError: If config, batch or device do not allow the scheme.
    """
    given = cfg.optim_wrapper.get('local_learning')
    cfg = scheme_config(cfg, scheme, shape, device)
    if 'efficient' in scheme.options and 'backbone' not in cfg.model:
        raise ValueError('efficient needs a backbone with batch norms.')
    if 'efficient' in scheme.options:
        cfg.model.backbone.pop('with_cp', None)  # such blocks cannot be traced
    try:
        model = build_model(cfg.model).to(device)
    except TypeError as error:
        if 'with_cp' not in str(error):
            raise
        raise ValueError(f'the backbone has no with_cp. {error}') from error
    if scheme.base == END_TO_END:
        cuts = _save_memory(model, given, scheme, shape)
    if 'efficient' in scheme.options:
        _fold(model, scheme)
    elif 'checkpointing' in scheme.options and 'backbone' not in cfg.model:
        names = [unit.name for unit in find_units(model)]
        turn_on_activation_checkpointing(model, names)
    head = str(cfg.optim_wrapper.get('local_learning', {}).get('aux_head'))
    amp = autocast_dtype(scheme)
    if amp is None or 'Amp' in cfg.optim_wrapper.type:
        autocast = nullcontext
    else:
        kind, dtype = torch.device(device).type, getattr(torch, amp)
        autocast = partial(torch.autocast, kind, dtype)
    wrapper = build_wrapper(model, cfg, 'in-backward' in scheme.options)
    learner = getattr(wrapper, 'learner', None)
    if learner is not None:
        cuts = cut_names(learner)
    size = shape[0] // scheme.parts(shape[0])
    compressed = nullcontext
    if scheme.base == END_TO_END and 'bits' in scheme.options:
        compressed = CompressedActivations(scheme.options['bits']).saving
    batches = [
        slice_batch(data, images, shape[0]) for images in slices_of(shape[0], size)
    ]

    def step() -> None:
        with autocast(), compressed():
            for batch in batches:
                model.train_step(batch, wrapper)

    is_end_to_end = not cuts or scheme.base in (END_TO_END, EXACT)
    method = () if is_end_to_end else (scheme.base, cuts, head)
    return Built(model, learner, cuts, method, step, wrapper)


def build_wrapper(
    model: nn.Module, cfg: Config, in_backward: bool = False
) -> OptimWrapper:
    """Builds what trains a model by a config, with the bank that its hook would add.

    Args:
        model: The model.
        cfg: The config.
        in_backward: Whether each weight is updated in the backward pass.
    """
    optimizer = dict(cfg.optim_wrapper.optimizer)
    with quiet():
        wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    if in_backward:
        counts = cfg.optim_wrapper.get('accumulative_counts', 1)
        return InBackwardOptimWrapper(wrapper.optimizer, optimizer, counts)
    if 'memory_bank' in cfg.default_hooks and wrapper.learner.heads:
        wrapper.learner.bank = HOOKS.build(cfg.default_hooks.memory_bank).bank
    return wrapper


def cut_names(learner: LocalLearner) -> tuple[str, ...]:
    """The cuts of a learner in their order."""
    return tuple(module.cut for module in learner.modules[:-1])


def _save_memory(
    model: nn.Module, given: dict | None, scheme: Scheme, shape: tuple[int, ...]
) -> tuple[str, ...]:
    """Gives end-to-end training what local learning has beside its local losses.

    Submodules are recomputed as a whole: stages, for instance, keep their input only.

    Returns:
        Names of the units after which it is cut into modules that are recomputed.
    """
    patches, cuts = [], ()
    if 'lean' in scheme.options:
        patches += fold_patches(model, find_units(model))
    if 'lean' in scheme.options or 'recompute-losses' in scheme.options:
        patches += loss_patches(model)
        slice_overlaps(model)
    if partition := partition_config(scheme.options, shape):
        options = {**complete_options(given), 'partition': partition}
        options.update(last_module_setting(scheme.options))
        count = None if recomputes_last(options, model) else -1
        options = {key: options[key] for key in LEARNER_OPTIONS}
        with quiet():
            learner = build_learner(
                model, with_heads=False, keeps_boundaries=True, **options
            )
        cuts = cut_names(learner)
        patches += module_patches(model, learner.modules[:count])
    for name in scheme.options.get('recompute', ()):
        patches += [(part, recomputed(part)) for part in submodules_of(model, name)]
    if 'bits' in scheme.options:
        patches += compression_patches(model)
    for submodule, wrap in patches:
        submodule.forward = wrap(submodule.forward)
    return cuts


def _fold(model: nn.Module, scheme: Scheme) -> None:
    """Turns on mmengine's efficient_conv_bn_eval, in checkpointed blocks if asked.

    Stock blocks do one or the other. Here, a block that would checkpoint itself is
    folded and then checkpointed as a whole; what is outside of blocks stays as it is.
    """
    modules = dict(model.backbone.named_modules(prefix='backbone'))
    norms = [m for m in modules.values() if isinstance(m, _BatchNorm)]
    if all(norm.training for norm in norms):
        raise ValueError(
            'no batch norm of the backbone is in evaluation mode (norm_eval).'
        )
    if 'checkpointing' not in scheme.options:
        turn_on_efficient_conv_bn_eval(model, 'backbone')
        return
    blocks = {
        name: module
        for name, module in modules.items()
        if hasattr(module, 'with_cp')
        and not any(hasattr(m, 'with_cp') for m in [*module.modules()][1:])
    }
    turn_on_efficient_conv_bn_eval(model, list(blocks))
    for block in blocks.values():
        block.forward = partial(_checkpointed, block.forward)


def _checkpointed(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    if not x.requires_grad:
        return forward(x)
    return checkpoint(forward, x, use_reentrant=False)
