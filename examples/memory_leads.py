"""What a memory could carry: the leads of docs/memory_bank.md, as auxiliary heads.

Each head is a MAN head without a bank whose loss has a second term, which reads a
memory that outlives the batch. Memories are buffers, so they are fixed in size, saved
and resumed with the head. To compare all of them, from the folder of the clone:

    PYTHONPATH=examples mim run man_mm compare @benchmarks/comparisons/memory_leads.txt
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn

from man_mm import MANClsHead
from man_mm.aux_heads.classifier import count_classes, label_scores
from man_mm.core.local_losses import total_loss


class LeadHead(MANClsHead):
    """A MAN head whose loss is (L + w L') / (1 + w), with L' from `term`.

    Divided by the sum of the weights, L' does not also raise the rate of the module.

    Args:
        site: Where the head sits.
        weight: The weight w.
        momentum: Share of the old value in each update of a running mean. The first
            updates are plain averages.
        **options: Options of `MANClsHead`.
    """

    def __init__(self, site, weight=0.2, momentum=0.99, **options):
        super().__init__(site, use_bank=False, **options)
        self.weight = weight
        self.momentum = momentum
        self.num_classes = count_classes(site.model)
        self.width = self.classifier.in_channels  # of the features
        self.deep = site.model.head.in_channels  # of what the real head reads
        self.is_followed = False

    def forward(self, maps, targets, bank):
        features = self.features(maps, bank)
        labels = label_scores(targets, self.num_classes).argmax(1)
        loss = total_loss(self.classifier.loss((features,), targets))
        term = self.term(features, labels, maps, loss)
        return dict(loss=(loss + self.weight * term) / (1 + self.weight))

    def term(self, features: Tensor, labels: Tensor, maps: Mapping, loss: Tensor):
        """L', from features ``(N, C)``, labels ``(N,)``, maps and the loss L."""
        raise NotImplementedError

    def follow(self, model: nn.Module) -> None:
        """Called before each step, with the model as it was updated."""
        if not self.is_followed:
            self.is_followed = True
            self.watch(model)

    def watch(self, model: nn.Module) -> None:
        """Registers hooks on the model."""

    def running(self, old: Tensor, new: Tensor, seen: Tensor) -> Tensor:
        """Moves a mean after ``seen`` updates, in place of which it is returned."""
        return torch.lerp(new, old, (seen / (seen + 1)).clamp(max=self.momentum))


class ClassMeans(LeadHead):
    """Remembers the mean of something, class by class."""

    def __init__(self, site, size, **options):
        super().__init__(site, **options)
        self.register_buffer('means', torch.zeros(self.num_classes, size))
        self.register_buffer('seen', torch.zeros(self.num_classes, 1))

    @torch.no_grad()
    def remember(self, values: Tensor, labels: Tensor) -> None:
        """Adds the values ``(N, size)`` of a batch to the means of their classes."""
        members = F.one_hot(labels, self.num_classes).T.to(values)
        counts = members.sum(1, keepdim=True)
        new = members @ values / counts.clamp(min=1)
        new = self.running(self.means, new, self.seen)
        self.means = torch.where(counts > 0, new, self.means)
        self.seen = self.seen + (counts > 0)


@MODELS.register_module()
class Prototypes(ClassMeans):
    """1: features are drawn to the deep prototype of their class.

    Args:
        site: Where the head sits.
        temperature: Of the softmax over cosines.
        load_from: Checkpoint of another training with this head, whose prototypes are
            read and never updated (6: transfer).
        **options: Options of `LeadHead`.
    """

    def __init__(self, site, temperature=0.3, load_from=None, **options):
        super().__init__(site, site.model.head.in_channels, **options)
        self.temperature = temperature
        self.frozen = load_from is not None
        self.project = nn.Linear(self.width, self.deep)
        if self.frozen:
            state = torch.load(load_from, map_location='cpu', weights_only=False)
            self.means = state['optimizer']['local_learning']['heads']['0.means']

    def watch(self, model):
        seen = []
        model.head.register_forward_pre_hook(lambda _, args: seen.append(args[0][-1]))

        def remember(_module, args):
            if not self.frozen and model.training:
                self.remember(seen[-1].detach(), args[1])
            seen.clear()

        model.head.loss_module.register_forward_pre_hook(remember)

    def term(self, features, labels, maps, loss):
        means = self.means - self.means.mean(0)
        cosines = F.normalize(self.project(features)) @ F.normalize(means).T
        return F.cross_entropy(cosines / self.temperature, labels)


@MODELS.register_module()
class SoftLabels(ClassMeans):
    """1: targets are mixed with what the real head says of the class, on average."""

    def __init__(self, site, uniform=False, **options):
        super().__init__(site, count_classes(site.model), **options)
        self.uniform = uniform  # a control, which knows nothing

    def watch(self, model):
        def remember(_module, args):
            if model.training:
                self.remember(args[0].softmax(1), args[1])

        model.head.loss_module.register_forward_pre_hook(remember)

    def term(self, features, labels, maps, loss):
        means = torch.full_like(self.means, 1 / self.num_classes)
        if not self.uniform:
            means = torch.where(self.seen > 0, self.means, means)
        return F.cross_entropy(self.classifier((features,)), means[labels])


@MODELS.register_module()
class NextGradient(ClassMeans):
    """2: the gradient of the next module's loss at its input, by class or channel."""

    def __init__(self, site, by_class=False, **options):
        super().__init__(site, site.own[-1].channels, **options)
        self.by_class = by_class
        self.following = site.ahead[0].name
        self.labels = None

    def watch(self, model):
        def enter(_module, args):
            if not torch.is_grad_enabled():
                return args
            x = args[0].detach().requires_grad_()
            # A mean over images: the batch divides each image's gradient.
            x.register_hook(
                lambda grad: self.remember(len(x) * grad.mean((2, 3)), self.labels)
            )
            return x, *args[1:]

        model.get_submodule(self.following).register_forward_pre_hook(enter)

    def term(self, features, labels, maps, loss):
        self.labels = labels if self.by_class else torch.zeros_like(labels)
        return (maps[self.own].sum((2, 3)) * self.means[self.labels]).sum(1).mean()


class QueueHead(LeadHead):
    """Remembers vectors of earlier batches, with their labels."""

    def __init__(self, site, length=512, size=32, **options):
        super().__init__(site, **options)
        self.project = nn.Linear(self.width, size)
        self.register_buffer('remembered', torch.zeros(length, size))
        self.register_buffer('classes', torch.full((length,), -1))

    @torch.no_grad()
    def remember(self, vectors: Tensor, labels: Tensor) -> None:
        kept = len(self.remembered) - len(vectors)
        self.remembered = torch.cat([vectors.detach(), self.remembered[:kept]])
        self.classes = torch.cat([labels, self.classes[:kept]])


@MODELS.register_module()
class Contrast(QueueHead):
    """3: supervised contrastive loss with the batch and a queue behind it."""

    def __init__(self, site, temperature=0.1, use_queue=True, **options):
        super().__init__(site, **options)
        self.temperature = temperature
        self.use_queue = use_queue

    def term(self, features, labels, maps, loss):
        own = F.normalize(self.project(features))
        others, classes = own, labels
        if self.use_queue:
            others = torch.cat([own, self.remembered])
            classes = torch.cat([labels, self.classes])
        scores = own @ others.T / self.temperature
        itself = torch.eye(*scores.shape, dtype=torch.bool, device=scores.device)
        scores = scores.masked_fill(itself | (classes < 0), -torch.inf)
        alike = (labels[:, None] == classes) & ~itself
        logs = scores.log_softmax(1).masked_fill(~alike, 0)
        if self.use_queue:
            self.remember(own, labels)
        return -(logs.sum(1) / alike.sum(1).clamp(min=1)).mean()


@MODELS.register_module()
class RunningHead(LeadHead):
    """4: features are read by the real head's running mean, through a projection.

    Args:
        site: Where the head sits.
        learned: A control: a layer of its own that learns, in place of the mean.
        **options: Options of `LeadHead`.
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
            mean.copy_(self.running(mean, new, self.seen))
        self.seen += 1

    def term(self, features, labels, maps, loss):
        return F.cross_entropy(self.reader(self.project(features)), labels)


@MODELS.register_module()
class Retrieval(QueueHead):
    """5: attention over remembered vectors adds their labels to the scores."""

    def __init__(self, site, temperature=0.1, **options):
        super().__init__(site, **options)
        self.temperature = temperature
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, maps, targets, bank):
        features = self.features(maps, bank)
        labels = label_scores(targets, self.num_classes).argmax(1)
        own = F.normalize(self.project(features))
        known = (self.classes >= 0).to(own)
        weights = (own @ self.remembered.T / self.temperature).exp() * known
        weights = weights / weights.sum(1, keepdim=True).clamp(min=1e-6)
        found = weights @ F.one_hot(self.classes.clamp(min=0), self.num_classes).to(own)
        scores = self.classifier((features,)) + self.factor * (found + 0.01).log()
        self.remember(own, labels)
        return dict(loss=F.cross_entropy(scores, labels))


@MODELS.register_module()
class Reconciled(LeadHead):
    """Beside 2: neighbouring gradients agree, without a memory (arXiv 2406.05222).

    L' is 1 minus the cosine of the gradient of this module's loss at its input and that
    of the loss before at the same map, image by image.
    """

    def __init__(self, site, **options):
        super().__init__(site, **options)
        self.needs_bank = True  # for what heads of a step share
        self.first = site.module.index == 0
        self.start = site.module.parts[0]
        self.reads = frozenset()
        self.input = None

    def watch(self, model):
        def enter(_module, args):
            if not torch.is_grad_enabled() or self.first:
                return args
            self.input = args[0].detach().requires_grad_()
            return self.input, *args[1:]

        model.get_submodule(self.start).register_forward_pre_hook(enter)

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
