"""What saves memory inside a module, as patches that live for a training step."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from man_mm.core import Unit
from man_mm.core.checkpointing import recomputed
from man_mm.core.conv_bn import fold_norms
from man_mm.core.patches import Wrap

Patches = list[tuple[nn.Module, Wrap]]

# Written in PyTorch, they save many maps of the size of the logits. None has a state.
_ELEMENTWISE_LOSSES = (
    'DistributionFocalLoss',
    'FocalLoss',
    'GaussianFocalLoss',
    'QualityFocalLoss',
    'VarifocalLoss',
)


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
            ``'backbone.layer4'``, stands for each of these units.

    Raises:
        ValueError: If a name is unknown.
    """
    patches = []
    for name in names:
        inside = [unit.name for unit in units if unit.name.startswith(f'{name}.')]
        for part in inside or [name]:
            try:
                submodule = model.get_submodule(part)
            except AttributeError:
                raise ValueError(
                    f'optim_wrapper.local_learning.recompute has {name!r}, which is '
                    'no submodule of the model. Units are called '
                    f'{units[0].name!r} to {units[-1].name!r}.'
                ) from None
            patches.append((submodule, recomputed(submodule)))
    return patches


def loss_patches(*modules: nn.Module) -> Patches:
    """Recomputes losses that are elementwise: bit-equal, and cheap."""
    return [
        (loss, recomputed(loss))
        for module in modules
        for loss in module.modules()
        if type(loss).__name__ in _ELEMENTWISE_LOSSES
    ]
