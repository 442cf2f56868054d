"""What a memory could carry: the leads of docs/memory_bank.md, as auxiliary heads.

Each head is a MAN head without a bank whose loss has a second term, which reads a
memory that outlives the batch. Memories are buffers, so they are fixed in size, saved
and resumed with the head. Names that begin with Det are of detectors, whose features
are those at the centers of the objects. To compare, from the folder of the clone:

    PYTHONPATH=examples mim run man_mm compare @benchmarks/comparisons/memory_leads.txt
"""

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn

from man_mm import MANClsHead, MANDetHead
from man_mm.aux_heads.classifier import count_classes, label_scores
from man_mm.aux_heads.detector import num_classes
from man_mm.core.local_losses import total_loss


class Lead:
    """What all heads share: the loss is (L + w L') / (1 + w), with L' from `term`.

    Divided by the sum of the weights, L' does not also raise the rate of the module.

    Args:
        site: Where the head sits.
        weight: The weight w.
        momentum: Share of the old value in each update of a running mean. The first
            updates are plain averages.
        **options: Options of `MANClsHead` or `MANDetHead`.
    """

    def __init__(self, site, weight=0.2, momentum=0.99, **options):
        super().__init__(site, use_bank=False, **options)
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

    def running(self, old: Tensor, new: Tensor, seen: Tensor) -> Tensor:
        """A running mean after one more update, which follows ``seen`` others."""
        return torch.lerp(new, old, (seen / (seen + 1)).clamp(max=self.momentum))


class ClsLead(Lead, MANClsHead):
    """A lead of classifiers."""

    def __init__(self, site, **options):
        super().__init__(site, **options)
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


class DetLead(Lead, MANDetHead):
    """A lead of detectors with one dense head."""

    def __init__(self, site, **options):
        super().__init__(site, **options)
        self.num_classes = num_classes(site.model)
        self.width = self.detector.head.in_channels
        self.deep = site.model.bbox_head.in_channels
        self.finest = []
        self.detector.head.register_forward_pre_hook(
            lambda _, args: self.finest.append(args[0][0])
        )

    def forward(self, maps, targets, bank):
        loss = total_loss(super().forward(maps, targets, bank))
        features, labels = at_objects(self.finest.pop(), targets)
        return self.joined(loss, features, labels, maps)

    def watch_deep(self, model, remember):
        """Calls ``remember`` with what the real head reads, and the labels."""
        samples = []
        model.register_forward_pre_hook(
            lambda _, args, kwargs: samples.append(kwargs.get('data_samples')),
            with_kwargs=True,
        )

        def seen(_module, args):
            if model.training:
                remember(*at_objects(args[0][0].detach(), samples[-1]))
            samples.clear()

        model.bbox_head.register_forward_pre_hook(seen)


def at_objects(map_: Tensor, samples) -> tuple[Tensor, Tensor]:
    """The vectors ``(N, C)`` of a map at the centers of N objects, and their labels."""
    vectors, labels = [], []
    for values, sample in zip(map_, samples, strict=True):
        boxes = sample.gt_instances.bboxes
        x, y = (boxes[:, :2] + boxes[:, 2:]).T / 2
        height, width = sample.pad_shape[:2]
        rows, columns = map_.shape[2:]
        x, y = x / width * columns, y / height * rows
        x, y = x.long().clamp(0, columns - 1), y.long().clamp(0, rows - 1)
        vectors.append(values[:, y, x].T)
        labels.append(sample.gt_instances.labels)
    return torch.cat(vectors), torch.cat(labels)


class ClassMeans:
    """Remembers the mean of something, class by class."""

    def new_means(self, size: int) -> None:
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


class PrototypeTerm(ClassMeans):
    """1: features are drawn to the deep prototype of their class.

    Args:
        site: Where the head sits.
        temperature: Of the softmax over cosines.
        load_from: Checkpoint of another training by `Prototypes`, whose prototypes are
            read and never updated (6: transfer).
        **options: Options of `Lead`.
    """

    def __init__(self, site, temperature=0.3, load_from=None, **options):
        super().__init__(site, **options)
        self.temperature = temperature
        self.new_means(self.deep)
        self.is_frozen = load_from is not None
        if self.is_frozen:
            state = torch.load(load_from, map_location='cpu', weights_only=False)
            self.means = state['optimizer']['local_learning']['heads']['0.means']
        self.project = nn.Linear(self.width, self.means.shape[1])

    def watch(self, model):
        if not self.is_frozen:
            self.watch_deep(model, self.remember)

    def term(self, features, labels, maps, loss):
        means = self.means - self.means.mean(0)
        cosines = F.normalize(self.project(features)) @ F.normalize(means).T
        return F.cross_entropy(cosines / self.temperature, labels)


@MODELS.register_module()
class Prototypes(PrototypeTerm, ClsLead):
    """Of classifiers."""


@MODELS.register_module()
class DetPrototypes(PrototypeTerm, DetLead):
    """Of detectors."""


@MODELS.register_module()
class SoftLabels(ClassMeans, ClsLead):
    """1: targets are mixed with what the real head says of the class, on average."""

    def __init__(self, site, uniform=False, **options):
        super().__init__(site, **options)
        self.uniform = uniform  # a control, which knows nothing
        self.new_means(self.num_classes)

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
class NextGradient(ClassMeans, ClsLead):
    """2: the gradient of the next module's loss at its input, by class or channel."""

    def __init__(self, site, by_class=False, **options):
        super().__init__(site, **options)
        self.by_class = by_class
        self.following = site.ahead[0].name
        self.labels = None
        self.new_means(site.own[-1].channels)

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


class Queue:
    """Remembers vectors of earlier batches, with their labels."""

    def new_queue(self, length: int, size: int) -> None:
        self.project = nn.Linear(self.width, size)
        self.register_buffer('remembered', torch.zeros(length, size))
        self.register_buffer('classes', torch.full((length,), -1))

    @torch.no_grad()
    def remember(self, vectors: Tensor, labels: Tensor) -> None:
        kept = len(self.remembered) - len(vectors)
        self.remembered = torch.cat([vectors.detach(), self.remembered[:kept]])
        self.classes = torch.cat([labels, self.classes[:kept]])


class ContrastTerm(Queue):
    """3: supervised contrastive loss with the batch and a queue behind it.

    Without ``use_queue``, a control, the batch alone.
    """

    def __init__(
        self, site, length=512, size=32, temperature=0.1, use_queue=True, **options
    ):
        super().__init__(site, **options)
        self.temperature = temperature
        self.use_queue = use_queue
        self.new_queue(length, size)

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
class Contrast(ContrastTerm, ClsLead):
    """Of classifiers."""


@MODELS.register_module()
class DetContrast(ContrastTerm, DetLead):
    """Of detectors."""


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
            mean.copy_(self.running(mean, new, self.seen))
        self.seen += 1

    def term(self, features, labels, maps, loss):
        return F.cross_entropy(self.reader(self.project(features)), labels)


@MODELS.register_module()
class Retrieval(Queue, ClsLead):
    """5: attention over remembered vectors adds their labels to the scores."""

    def __init__(self, site, length=512, size=32, temperature=0.1, **options):
        super().__init__(site, **options)
        self.temperature = temperature
        self.new_queue(length, size)
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
        def enter(_module, args):
            if not torch.is_grad_enabled():
                return args
            self.input = args[0].detach().requires_grad_()
            return self.input, *args[1:]

        if not self.is_first:  # nothing in front could agree
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
