"""What saves memory inside a module, as patches that live for a training step."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from man_mm.core import Unit
from man_mm.core.checkpointing import recomputed
from man_mm.core.compressed_activations import uncompressed
from man_mm.core.conv_bn import fold_norms
from man_mm.core.max_pool import light_max_pool
from man_mm.core.micro_batches import Chain, Maps, MicroBatches, check_maps
from man_mm.core.partition import LocalModule, outlets
from man_mm.core.patches import Forward, Wrap
from man_mm.core.second_runs import trainable_parts

Patches = list[tuple[nn.Module, Wrap]]


def fold_patches(model: nn.Module, units: Sequence[Unit]) -> Patches:
    """Folds frozen batch norms into the convolutions of all units."""
    patches = []
    for unit in units:
        if len(unit.parts) == 1:
            submodule = model.get_submodule(unit.name)
            if wrap := fold_norms(submodule):
                patches.append((submodule, wrap))
    return patches


def recompute_patches(
    model: nn.Module, units: Sequence[Unit], names: Sequence[str]
) -> Patches:
    """Recomputes submodules in the backward pass of their modules.

    Args:
        model: The model.
        units: Its units.
        names: Dotted names of submodules. A name that holds units, such as
            ``'backbone.layer4'``, stands for each of these units, and the name of a
            list, such as ``'encoder.layers'``, for each of its items.

    Raises:
        ValueError: If a name is unknown.
    """
    patches = []
    for name in names:
        inside = [unit.name for unit in units if unit.name.startswith(f'{name}.')]
        for part in inside or [name]:
            try:
                submodules = submodules_of(model, part)
            except AttributeError:
                raise ValueError(
                    f'optim_wrapper.local_learning.recompute has {name!r}, which is '
                    'no submodule of the model. Units are called '
                    f'{units[0].name!r} to {units[-1].name!r}.'
                ) from None
            patches += [(submodule, recomputed(submodule)) for submodule in submodules]
    return patches


def submodules_of(model: nn.Module, name: str) -> list[nn.Module]:
    """A submodule of a model, or the items of a list, which is never called itself.

    Args:
        model: The model.
        name: Dotted name of the submodule.

    Raises:
        AttributeError: If there is none.
    """
    submodule = model.get_submodule(name)
    return [*submodule] if isinstance(submodule, nn.ModuleList) else [submodule]


def compression_patches(*modules: nn.Module) -> Patches:
    """What goes with compressed activations.

    Losses save what they are of as it is, and max poolings a byte a value instead of
    64-bit integers, which are not compressed.

    Args:
        *modules: Networks and heads.
    """
    patches = []
    for module in modules:
        for submodule in module.modules():
            if hasattr(submodule, 'loss_weight'):  # of all losses of OpenMMLab
                patches.append((submodule, _uncompressed))
            elif type(submodule) is nn.MaxPool2d:
                if wrap := light_max_pool(submodule):
                    patches.append((submodule, wrap))
    return patches


def _uncompressed(forward: Forward) -> Forward:
    def call(*args: Any, **kwargs: Any) -> Any:
        with uncompressed():
            return forward(*args, **kwargs)

    return call


def module_patches(model: nn.Module, modules: Sequence[LocalModule]) -> Patches:
    """Recomputes whole modules in the backward pass of plain end-to-end training.

    Like exact steps, this keeps what enters a module, and runs each module once more.

    Args:
        model: The model.
        modules: Its modules.

    Raises:
        ValueError: If units take or return something else than one map.
    """
    units = [unit for module in modules for unit in module.units]
    check_maps(units, 'Recomputing whole modules', 'recompute units instead')
    patches = []
    for module in modules:
        parts = trainable_parts(model, module)
        submodules = [model.get_submodule(part) for part in parts]
        checkpointed = recomputed(*submodules)

        def run(chain: Chain, x: Tensor, checkpointed: Wrap = checkpointed) -> Maps:
            return checkpointed(chain)(x)

        ends = [name for name in outlets(module) if name in parts]
        whole = MicroBatches(parts, ends, run)
        wraps = [partial(whole.wrap, part) for part in parts]
        patches += zip(submodules, wraps, strict=True)
    return patches
