"""What heads of several tasks share."""

from collections import deque

import torch
import torch.nn.functional as F
from torch import nn

from .memories import ClassMeans, Queue


class Lead:
    """The loss is (L + w L') / (1 + w), with the head's loss L, and L' from `term`.

    Divided by the sum of the weights, L' does not also raise the rate of the module.

    Args:
        site: Where the head sits.
        weight: The weight w.
        momentum: Of running means; see `ClassMeans`.
        **options: Options of the MAN head.
    """

    def __init__(self, site, weight=0.2, momentum=0.99, **options):
        super().__init__(site, **options)
        self.weight = weight
        self.momentum = momentum
        self.is_followed = False

    def joined(self, loss, features, labels, maps):
        """The sum, from L, features ``(N, C)``, labels ``(N,)`` and maps."""
        if not len(labels):
            return dict(loss=loss)
        term = self.term(features, labels, maps, loss)
        return dict(loss=(loss + self.weight * term) / (1 + self.weight))

    def follow(self, model: nn.Module) -> None:
        """Called before each step, with the model as it was updated."""
        if not self.is_followed:
            self.is_followed = True
            self.watch(model)

    def watch(self, model: nn.Module) -> None:
        """Registers hooks on the model."""


def samples_of(model: nn.Module) -> deque:
    """Holds the data samples of a step from its start until somebody takes them."""
    samples = deque(maxlen=1)
    model.register_forward_pre_hook(
        lambda _, args, kwargs: samples.append(kwargs.get('data_samples')),
        with_kwargs=True,
    )
    return samples


class PrototypeTerm:
    """1: features are drawn to the deep prototype of their class.

    Args:
        site: Where the head sits.
        temperature: Of the softmax over cosines.
        load_from: Checkpoint of another training by `Prototypes`, whose prototypes are
            read and never updated (6: transfer).
        shifted: A control of transfer: each class reads the prototype of the next.
        trained: A control: prototypes are weights that learn, as in any classifier.
        **options: Options of `Lead`.
    """

    def __init__(
        self,
        site,
        temperature=0.3,
        load_from=None,
        shifted=False,
        trained=False,
        **options,
    ):
        super().__init__(site, **options)
        self.temperature = temperature
        self.prototypes = ClassMeans(self.num_classes, self.deep, self.momentum)
        self.is_kept = load_from is None and not trained
        if trained:
            first = torch.randn(self.num_classes, self.deep)
            self.prototypes.means = nn.Parameter(first)
        elif load_from is not None:
            state = torch.load(load_from, map_location='cpu', weights_only=False)
            heads = state['optimizer']['local_learning']['heads']
            self.prototypes.means = heads['0.prototypes.means'].roll(-shifted, 0)
        self.project = nn.Linear(self.width, self.prototypes.means.shape[1])

    def watch(self, model):
        if self.is_kept:
            self.watch_deep(model, self.prototypes.remember)

    def term(self, features, labels, maps, loss):
        means = self.prototypes.means
        means = means - means.mean(0)
        cosines = F.normalize(self.project(features)) @ F.normalize(means).T
        return F.cross_entropy(cosines / self.temperature, labels)


class ContrastTerm:
    """3: supervised contrastive loss with the batch and a queue behind it.

    Without ``use_queue``, a control, the batch alone.
    """

    def __init__(
        self, site, length=512, size=32, temperature=0.1, use_queue=True, **options
    ):
        super().__init__(site, **options)
        self.temperature = temperature
        self.project = nn.Linear(self.width, size)
        self.queue = Queue(length, size) if use_queue else None

    def term(self, features, labels, maps, loss):
        own = F.normalize(self.project(features))
        others, classes = own, labels
        if self.queue is not None:
            others = torch.cat([own, self.queue.vectors])
            classes = torch.cat([labels, self.queue.classes])
        scores = own @ others.T / self.temperature
        itself = torch.eye(*scores.shape, dtype=torch.bool, device=scores.device)
        scores = scores.masked_fill(itself | (classes < 0), -torch.inf)
        alike = (labels[:, None] == classes) & ~itself
        logs = scores.log_softmax(1).masked_fill(~alike, 0)
        if self.queue is not None:
            self.queue.remember(own, labels)
        return -(logs.sum(1) / alike.sum(1).clamp(min=1)).mean()
