"""Leads of classifiers."""

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import nn

from man_mm import MANClsHead
from man_mm.aux_heads.classifier import count_classes, label_scores
from man_mm.core.local_losses import total_loss

from .leads import ContrastTerm, Lead, PrototypeTerm
from .memories import ClassMeans, Queue, running


class ClsLead(Lead, MANClsHead):
    """A lead of classifiers."""

    def __init__(self, site, **options):
        super().__init__(site, use_bank=False, **options)
        self.num_classes = count_classes(site.model)
        self.width = self.classifier.in_channels  # of the features
        self.deep = site.model.head.in_channels  # of what the real head reads

    def forward(self, maps, targets, bank):
        features = self.features(maps, bank)
        labels = label_scores(targets, self.num_classes).argmax(1)
        loss = total_loss(self.classifier.loss((features,), targets))
        return self.joined(loss, features, labels, maps)

    def watch_deep(self, model, remember):
        """Calls ``remember`` with what the real head reads, and the labels."""
        read = []
        model.head.register_forward_pre_hook(lambda _, args: read.append(args[0][-1]))

        def seen(_module, args):
            if model.training:
                remember(read[-1].detach(), args[1])
            read.clear()

        model.head.loss_module.register_forward_pre_hook(seen)


def on_input(module: nn.Module, see) -> None:
    """Calls ``see`` with a module's input, a leaf by then, when a graph is recorded."""

    def enter(_module, args):
        if not torch.is_grad_enabled():
            return args
        x = args[0].detach().requires_grad_()
        see(x)
        return x, *args[1:]

    module.register_forward_pre_hook(enter)


@MODELS.register_module()
class Prototypes(PrototypeTerm, ClsLead):
    """1, 6: see `PrototypeTerm`."""


@MODELS.register_module()
class SoftLabels(ClsLead):
    """1: targets are mixed with what the real head says of the class, on average."""

    def __init__(self, site, uniform=False, **options):
        super().__init__(site, **options)
        self.uniform = uniform  # a control, which knows nothing
        self.answers = ClassMeans(self.num_classes, self.num_classes, self.momentum)

    def watch(self, model):
        def remember(_module, args):
            if model.training:
                self.answers.remember(args[0].softmax(1), args[1])

        model.head.loss_module.register_forward_pre_hook(remember)

    def term(self, features, labels, maps, loss):
        means = torch.full_like(self.answers.means, 1 / self.num_classes)
        if not self.uniform:
            means = torch.where(self.answers.seen > 0, self.answers.means, means)
        return F.cross_entropy(self.classifier((features,)), means[labels])


@MODELS.register_module()
class NextGradient(ClsLead):
    """2: the gradient of the next module's loss at its input, by class or channel."""

    def __init__(self, site, by_class=False, **options):
        super().__init__(site, **options)
        self.by_class = by_class
        self.following = site.ahead[0].name
        self.labels = None
        channels = site.own[-1].channels
        self.gradients = ClassMeans(self.num_classes, channels, self.momentum)

    def watch(self, model):
        def see(x):
            # A mean over images: the batch divides each image's gradient.
            x.register_hook(
                lambda grad: self.gradients.remember(
                    len(x) * grad.mean((2, 3)), self.labels
                )
            )

        on_input(model.get_submodule(self.following), see)

    def term(self, features, labels, maps, loss):
        self.labels = labels if self.by_class else torch.zeros_like(labels)
        means = self.gradients.means[self.labels]
        return (maps[self.own].sum((2, 3)) * means).sum(1).mean()


@MODELS.register_module()
class Contrast(ContrastTerm, ClsLead):
    """3: see `ContrastTerm`."""


@MODELS.register_module()
class RunningHead(ClsLead):
    """4: features are read by the real head's running mean, through a projection.

    Args:
        site: Where the head sits.
        learned: A control: a layer of its own that learns, in place of the mean.
        **options: Options of `Lead`.
    """

    def __init__(self, site, learned=False, **options):
        super().__init__(site, **options)
        self.learned = learned
        self.project = nn.Linear(self.width, self.deep)
        self.reader = nn.Linear(self.deep, self.num_classes)
        self.reader.requires_grad_(learned)
        self.register_buffer('seen', torch.zeros(()))

    @torch.no_grad()
    def follow(self, model):
        super().follow(model)
        if self.learned:
            return
        for mean, new in zip(
            self.reader.parameters(), model.head.fc.parameters(), strict=True
        ):
            mean.copy_(running(mean, new, self.seen, self.momentum))
        self.seen += 1

    def term(self, features, labels, maps, loss):
        return F.cross_entropy(self.reader(self.project(features)), labels)


@MODELS.register_module()
class Retrieval(ClsLead):
    """5: attention over remembered vectors adds their labels to the scores."""

    def __init__(self, site, length=512, size=32, temperature=0.1, **options):
        super().__init__(site, **options)
        self.temperature = temperature
        self.project = nn.Linear(self.width, size)
        self.queue = Queue(length, size)
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, maps, targets, bank):
        features = self.features(maps, bank)
        labels = label_scores(targets, self.num_classes).argmax(1)
        own = F.normalize(self.project(features))
        classes = self.queue.classes
        known = (classes >= 0).to(own)
        weights = (own @ self.queue.vectors.T / self.temperature).exp() * known
        weights = weights / weights.sum(1, keepdim=True).clamp(min=1e-6)
        found = weights @ F.one_hot(classes.clamp(min=0), self.num_classes).to(own)
        scores = self.classifier((features,)) + self.factor * (found + 0.01).log()
        self.queue.remember(own, labels)
        return dict(loss=F.cross_entropy(scores, labels))


@MODELS.register_module()
class Reconciled(ClsLead):
    """Beside 2: neighbouring gradients agree, without a memory (arXiv 2406.05222).

    L' is 1 minus the cosine of the gradient of this module's loss at its input and that
    of the loss before at the same map, image by image.
    """

    def __init__(self, site, **options):
        super().__init__(site, **options)
        self.needs_bank = True  # for what heads of a step share
        self.is_first = site.module.index == 0
        self.start = site.module.parts[0]
        self.reads = frozenset()
        self.input = None

    def watch(self, model):
        def see(x):
            self.input = x

        if not self.is_first:  # nothing in front could agree
            on_input(model.get_submodule(self.start), see)

    def forward(self, maps, targets, bank):
        self.shared = bank.shared
        return super().forward(maps, targets, bank)

    def term(self, features, labels, maps, loss):
        before = self.shared.get('gradient')
        (own,) = torch.autograd.grad(loss, maps[self.own], retain_graph=True)
        self.shared['gradient'] = own.flatten(1)
        if before is None:
            return torch.zeros(())
        (grad,) = torch.autograd.grad(loss, self.input, create_graph=True)
        return 1 - F.cosine_similarity(grad.flatten(1), before).mean()
