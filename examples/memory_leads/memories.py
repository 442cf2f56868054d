"""Memories of fixed size."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def running(old: Tensor, new: Tensor, seen: Tensor, momentum: float) -> Tensor:
    """A running mean after one more update, which follows ``seen`` others."""
    return torch.lerp(new, old, (seen / (seen + 1)).clamp(max=momentum))


class ClassMeans(nn.Module):
    """The running mean of something, class by class.

    Args:
        num_classes: Number of classes.
        size: Width of the values.
        momentum: Share of the old value in each update. The first updates of a class
            are plain averages.
    """

    def __init__(self, num_classes: int, size: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer('means', torch.zeros(num_classes, size))
        self.register_buffer('seen', torch.zeros(num_classes, 1))

    @torch.no_grad()
    def remember(self, values: Tensor, labels: Tensor) -> None:
        """Adds the values ``(N, size)`` of a batch to the means of their classes."""
        members = F.one_hot(labels, len(self.means)).T.to(values)
        counts = members.sum(1, keepdim=True)
        new = members @ values / counts.clamp(min=1)
        new = running(self.means, new, self.seen, self.momentum)
        self.means = torch.where(counts > 0, new, self.means)
        self.seen = self.seen + (counts > 0)


class Queue(nn.Module):
    """The latest vectors, with their labels; -1 where there is none yet."""

    def __init__(self, length: int, size: int) -> None:
        super().__init__()
        self.register_buffer('vectors', torch.zeros(length, size))
        self.register_buffer('classes', torch.full((length,), -1))

    @torch.no_grad()
    def remember(self, vectors: Tensor, labels: Tensor) -> None:
        """Puts vectors ``(N, size)`` in the place of the N oldest."""
        kept = len(self.vectors) - len(vectors)
        self.vectors = torch.cat([vectors.detach(), self.vectors[:kept]])
        self.classes = torch.cat([labels, self.classes[:kept]])
