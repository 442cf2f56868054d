"""From the config's ``optim_wrapper`` to a partitioned model and its optimizer."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

from mmengine import registry as root
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from man_mm.aux_heads import find_sites
from man_mm.backbones import find_units, probe
from man_mm.core import CompressedActivations, LocalLearner, split
from man_mm.core.partition import Measure
from man_mm.core.random_states import random_state_kept
from man_mm.measure.model_costs import measure_units, with_boundaries

from .checks import (
    AMP_WRAPPER,
    WRAPPER,
    check_model_wrapper,
    check_wrapper_type,
    warn_of_clipping,
)
from .data_parallel import free_buckets
from .distributed import broadcast_module
from .fully_sharded_model import FullyShardedModel
from .loss_patches import loss_patches
from .memory_patches import compression_patches, fold_patches, recompute_patches
from .optim_wrapper import LocalLearningOptimWrapper
from .options import check_paramwise, complete_options, has_heads, recomputes_last
from .sliced_overlaps import slice_overlaps

LEARNER_OPTIONS = (
    'partition',
    'aux_head',
    'micro_batch_size',
    'recompute',
    'efficient_conv_bn_eval',
    'recompute_losses',
    'activation_bits',
)


@root.OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LocalLearningOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Builds a `LocalLearningOptimWrapper` and all that belongs to it.

    With ``optim_wrapper.type`` `AmpLocalLearningOptimWrapper`, or mmengine's
    ``AmpOptimWrapper``, which ``--amp`` writes there, it builds the former.

    ``optim_wrapper`` takes, beside mmengine's own keys, a dictionary
    ``local_learning``, whose keys and defaults are:

    - ``partition=dict(type='StagePartition')``: where the model is cut.
    - ``aux_head=dict(type='MANHead')``: the auxiliary head of each module.
    - ``aux_lr_mult=1.0``, ``aux_decay_mult=1.0``: learning rate and weight decay of
      the heads, as multiples of the model's (eta_a / eta_l in arXiv 2406.00446).
    - ``update='module'``, ``clip='module'``: see `LocalLearningOptimWrapper`.
    - ``end_to_end_from=None``: share of the training, from 0 to 1, after which steps
      are end to end over the same modules; None never, 0 always.
    - ``local_loss_weight=0.0``: weight of the local losses in these steps. With 0 they
      are *exact*, else *joint*; ``'balanced'`` needs no weight. See
      `man_mm.core.ExactSteps`.
    - ``recompute_last_module=None``: whether the last module runs twice in these
      steps, as the others do; None for yes, except in classifiers, where that would
      save nothing. Without, they are faster, and what the last module saves adds to
      what neck and heads need.
    - ``micro_batch_size=None``: images that run through a module at a time; see
      `man_mm.core.LocalLearner`.
    - ``recompute=()``: names of submodules, such as ``'backbone.layer4'``, or of lists
      of them, such as ``'encoder.layers'``, whose activations are computed again in
      the backward pass (activation checkpointing).
    - ``efficient_conv_bn_eval=True``: fold batch norms in evaluation mode into their
      convolutions; see `man_mm.core.conv_bn.fold_norms`.
    - ``recompute_losses=True``: compute elementwise losses, such as the focal loss,
      a few rows at a time, and again in the backward pass, and overlaps of anchors
      and objects a few at a time; see `man_mm.engine.loss_patches.loss_patches` and
      `man_mm.engine.sliced_overlaps.SlicedOverlaps`.
    - ``activation_bits=None``: 8 or 4 to save activations in so many bits a value; see
      `man_mm.core.CompressedActivations`.
    - ``base_constructor='DefaultOptimWrapperConstructor'``: the constructor that
      groups the model's parameters, such as
      ``'LearningRateDecayOptimWrapperConstructor'`` of mmpretrain for layer-wise
      decay. The heads' parameters are grouped by mmengine's.

    Args:
        optim_wrapper_cfg: The config's ``optim_wrapper``.
        paramwise_cfg: Its ``paramwise_cfg``; applies to the heads too.

    Raises:
        ValueError: If a key is unknown, another wrapper type is configured, there is
            no optimizer or several, or ``paramwise_cfg`` is for another constructor.

    Examples:
        >>> from mmengine.hub import get_model
        >>> from mmengine.optim import build_optim_wrapper
        >>> import man_mm
        >>> model = get_model('mmpretrain::resnet/resnet18_8xb16_cifar10.py')
        >>> optim_wrapper = dict(
        ...     type='LocalLearningOptimWrapper',
        ...     constructor='LocalLearningOptimWrapperConstructor',
        ...     optimizer=dict(type='SGD', lr=0.1),
        ...     local_learning=dict(
        ...         partition=dict(type='UniformPartition', num_modules=2),
        ...         aux_head=dict(type='DGLHead')))
        >>> wrapper = build_optim_wrapper(model, optim_wrapper)
        >>> [module.cut for module in wrapper.learner.modules]
        ['backbone.layer2.0', 'backbone.layer4.1']
    """

    def __init__(
        self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None
    ) -> None:
        optim_wrapper_cfg = dict(optim_wrapper_cfg)
        given = optim_wrapper_cfg.pop('local_learning', None) or {}
        self.options = complete_options(given)
        wrapper = optim_wrapper_cfg.get('type', WRAPPER)
        if not isinstance(wrapper, str):
            wrapper = wrapper.__name__
        if wrapper.rpartition('.')[2] == 'AmpOptimWrapper':
            # So do the training scripts of OpenMMLab write when called with --amp.
            wrapper = AMP_WRAPPER
        optim_wrapper_cfg['type'] = wrapper
        if 'optimizer' not in optim_wrapper_cfg:
            raise ValueError(
                'optim_wrapper has no optimizer. Local learning trains models with one '
                'optimizer; those with several, such as GANs, are not supported.'
            )
        check_wrapper_type(wrapper)
        check_paramwise(paramwise_cfg, given)
        super().__init__(optim_wrapper_cfg, paramwise_cfg)

    def __call__(self, model: nn.Module) -> LocalLearningOptimWrapper:
        """Partitions the model, builds its heads and one optimizer for both.

        Args:
            model: The model, on its device, plain or in
                ``MMDistributedDataParallel``.
        """
        check_model_wrapper(model)
        wrapped = model
        if is_model_wrapper(model):
            model = model.module
        options = {key: self.options[key] for key in LEARNER_OPTIONS}
        weight, share = (
            self.options[key] for key in ('local_loss_weight', 'end_to_end_from')
        )
        learner = build_learner(
            model,
            with_heads=has_heads(self.options),
            keeps_boundaries=share is not None,
            **options,
        )
        if share is not None and len(learner.modules) > 1:
            clips = bool(self.optim_wrapper_cfg.get('clip_grad'))
            warn_of_clipping(self.options['clip'], clips)
        sharded = wrapped if isinstance(wrapped, FullyShardedModel) else None
        if sharded is not None:
            sharded.shard(learner)
        groups = self._model_groups(model)
        for group in self._head_groups(learner.heads):
            if self.base_lr is not None:
                lr = group.get('lr', self.base_lr)
                group['lr'] = lr * self.options['aux_lr_mult']
            if self.base_wd is not None:
                decay = group.get('weight_decay', self.base_wd)
                group['weight_decay'] = decay * self.options['aux_decay_mult']
            groups.append(group)
        optimizer = root.OPTIMIZERS.build({**self.optimizer_cfg, 'params': groups})
        if isinstance(wrapped, DistributedDataParallel):
            free_buckets(wrapped)
        return root.OPTIM_WRAPPERS.build(
            self.optim_wrapper_cfg,
            default_args=dict(
                optimizer=optimizer,
                learner=learner,
                update=self.options['update'],
                clip=self.options['clip'],
                end_to_end_from=share,
                local_loss_weight=weight,
                recompute_last_module=recomputes_last(self.options, model),
                measure=_measure(model, options),
                sharded=sharded,
            ),
        )

    def _model_groups(self, model: nn.Module) -> list[dict]:
        constructor = root.OPTIM_WRAPPER_CONSTRUCTORS.build(
            dict(
                type=self.options['base_constructor'],
                optim_wrapper_cfg=dict(
                    type='OptimWrapper', optimizer=dict(self.optimizer_cfg)
                ),
                paramwise_cfg=self.paramwise_cfg or None,
            )
        )
        groups = list(constructor(model).optimizer.param_groups)
        for group in groups:
            # For the log only; torch takes it to name the parameters of all groups.
            group.pop('param_names', None)
        return groups

    def _head_groups(self, heads: nn.Module) -> list[dict]:
        groups: list[dict] = []
        if self.paramwise_cfg:
            self.add_params(groups, heads)
        elif params := list(heads.parameters()):
            groups.append(dict(params=params))
        return groups


def build_learner(
    model: nn.Module,
    partition: dict[str, Any],
    aux_head: dict[str, Any],
    recompute: Sequence[str] = (),
    efficient_conv_bn_eval: bool = True,
    micro_batch_size: int | None = None,
    recompute_losses: bool = True,
    activation_bits: int | None = None,
    with_heads: bool = True,
    keeps_boundaries: bool = False,
) -> LocalLearner:
    """Partitions a model and builds its auxiliary heads, of its device and dtype.

    The heads are initialised from a random state of their own, so that a model's
    initial weights do not depend on whether it is trained by local learning.

    Args:
        model: The plain model.
        partition: Config of a partition.
        aux_head: Config of an auxiliary head; built once for each module but the
            last, with ``site`` added.
        recompute: See `LocalLearningOptimWrapperConstructor`.
        efficient_conv_bn_eval: See there.
        micro_batch_size: See there.
        recompute_losses: See there.
        activation_bits: See there.
        with_heads: Whether there are auxiliary heads. Exact steps need none, and
            neither ``aux_head`` then. Defaults to True.
        keeps_boundaries: Whether steps are exact or joint, at least in the end: then
            partitions that measure count all boundaries. Defaults to False.

    Returns:
        A learner without a bank; `MemoryBankHook` adds one.

    Raises:
        ValueError: If the model cannot be cut so, or has no such head.

    Examples:
        >>> from mmengine.hub import get_model
        >>> from man_mm import MemoryBank, build_learner
        >>> model = get_model('mmpretrain::resnet/resnet18_8xb16_cifar10.py')
        >>> partition, aux_head = dict(type='StagePartition'), dict(type='MANHead')
        >>> learner = build_learner(model, partition, aux_head)
        >>> learner.bank = MemoryBank()
        >>> [module.cut for module in learner.modules[:-1]]
        ['backbone.layer1.1', 'backbone.layer2.1', 'backbone.layer3.1']
    """
    units = find_units(model)
    measure = _measure(
        model,
        dict(
            aux_head=aux_head,
            recompute=recompute,
            efficient_conv_bn_eval=efficient_conv_bn_eval,
            micro_batch_size=micro_batch_size,
            recompute_losses=recompute_losses,
            activation_bits=activation_bits,
        ),
    )
    if keeps_boundaries:
        measure = with_boundaries(measure, with_heads)
    cuts = root.TASK_UTILS.build(dict(partition)).cuts(units, measure)
    modules = split(model, units, cuts)
    ends = ', '.join(module.cut for module in modules[:-1]) or 'nothing'
    print_log(f'Local learning: K = {len(modules)}, cut after {ends}.', 'current')
    heads = []
    if with_heads and len(modules) > 1:
        entry, taps = probe(model, units)
        like = next(model.parameters())
        with random_state_kept(like):
            for site in find_sites(model, modules, entry, taps):
                config = dict(copy.deepcopy(aux_head), site=site)
                heads.append(root.MODELS.build(config).to(like))
    patches = []
    if recompute_losses:
        patches += loss_patches(model, *heads)
        slice_overlaps(model, *heads)
    if efficient_conv_bn_eval:
        patches += fold_patches(model, units)
    patches += recompute_patches(model, units, recompute)
    compressed = None
    if activation_bits is not None:
        compressed = CompressedActivations(activation_bits)
        patches += compression_patches(model, *heads)
    learner = LocalLearner(
        model,
        modules,
        heads,
        patches=patches,
        micro_batch_size=micro_batch_size,
        compressed=compressed,
    )
    broadcast_module(learner.heads)
    return learner


def _measure(model: nn.Module, options: dict[str, Any]) -> Measure:
    options = {key: value for key, value in options.items() if key != 'partition'}
    return partial(measure_units, model, partial(build_learner, **options))
