"""What an auxiliary head computes, and what later heads read of its module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .bank import MemoryBank
from .micro_batches import Maps, slice_batch
from .partition import LocalModule

ENTRY = 'entry'
Backward = Callable[[Tensor, LocalModule, bool], None]
Losses = Tensor | Mapping[str, Any]


def default_backward(loss: Tensor, module: LocalModule, complete: bool) -> None:
    """Back-propagates a local loss and updates nothing; see `LocalLearner.step`."""
    loss.backward()


def local_loss(
    head: nn.Module,
    own: Maps,
    earlier: Mapping[str, Tensor],
    targets: Any,
    bank: MemoryBank | None = None,
    images: slice | None = None,
    count: int = 0,
) -> Tensor:
    """The local loss of some images of a batch, weighted by their share of it.

    Args:
        head: The auxiliary head of a module.
        own: The module's maps of these images by unit name, with their graph.
        earlier: Maps ``(N, C, H, W)`` of earlier modules, of the whole batch.
        targets: Targets of the whole batch.
        bank: The bank, for what else it holds.
        images: Which images ``own`` has. Defaults to all.
        count: Number of images N, if ``images`` is given.
    """
    if images is None:
        return total_loss(head({**earlier, **own}, targets, bank))
    earlier = {name: map_[images] for name, map_ in earlier.items()}
    targets = slice_batch(targets, images, count)
    loss = total_loss(head({**earlier, **own}, targets, bank))
    return loss * ((images.stop - images.start) / count)


def total_loss(losses: Losses) -> Tensor:
    """Sums the terms of a dictionary of losses, as ``parse_losses`` of mmengine does.

    Args:
        losses: A scalar tensor, or a dictionary of tensors or lists of tensors;
            keys without ``loss`` are only for the log.
    """
    if isinstance(losses, Tensor):
        return losses
    terms = [value for name, value in losses.items() if 'loss' in name]
    terms = [term if isinstance(term, list | tuple) else [term] for term in terms]
    return sum(value.mean() for term in terms for value in term)


def readers(heads: Sequence[nn.Module], name: str, index: int) -> list[nn.Module]:
    """The heads behind a given one that may read a map.

    Args:
        heads: All auxiliary heads, in order.
        name: Name of the map.
        index: Position of the given head.
    """
    return [head for head in list(heads)[index + 1 :] if _reads(head, name)]


def reads_entry(heads: Sequence[nn.Module]) -> bool:
    """Whether a head reads what enters the first unit, which it has to name."""
    return any(ENTRY in (getattr(head, 'reads', None) or ()) for head in heads)


def remember(
    bank: MemoryBank, heads: Sequence[nn.Module], module: LocalModule, own: Maps
) -> None:
    """Adds those maps of a module to the bank that later heads read.

    Args:
        bank: The bank.
        heads: All auxiliary heads, in order.
        module: The module.
        own: Its maps ``(N, C, H, W)`` by unit name.
    """
    for name, map_ in own.items():
        if later := readers(heads, name, module.index):
            average = all(getattr(head, 'reads_averages', False) for head in later)
            bank.store(name, map_, average)


def _reads(head: nn.Module, name: str) -> bool:
    names = getattr(head, 'reads', None)
    return names is None or name in names
