"""Small networks that several files of tests train."""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

from man_mm.core import LocalLearner, Unit, split
from man_mm.core.cut_hooks import CutHooks

IMAGES = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0])
WIDTH = 4
OPTIMIZERS = {
    'sgd': lambda params: torch.optim.SGD(
        params, 0.1, momentum=0.9, weight_decay=1e-2, nesterov=True
    ),
    'adamw': lambda params: torch.optim.AdamW(params, 1e-2),
    'rmsprop': lambda params: torch.optim.RMSprop(params, 1e-2),
}


class PooledHead(nn.Module):
    """Classifies from every map that it is given, earlier modules' included."""

    def __init__(self, maps=1):
        super().__init__()
        self.classifier = nn.Linear(maps * WIDTH, 3)

    def forward(self, maps, targets, bank):
        pooled = torch.cat([map_.mean((2, 3)) for map_ in maps.values()], 1)
        return F.cross_entropy(self.classifier(pooled), targets)


def stage(in_channels):
    return nn.Sequential(
        nn.Conv2d(in_channels, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH), nn.ReLU()
    )


def build_model(depth):
    torch.manual_seed(0)
    stages = {f'stage{i + 1}': stage(WIDTH if i else 2) for i in range(depth)}
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 3))
    return nn.Sequential(OrderedDict(**stages, classifier=pool))


class GlobalSkip(nn.Module):
    """A front layer, stages, and a classifier that reads both; in float64."""

    def __init__(self, depth=3):
        super().__init__()
        torch.manual_seed(0)
        self.front = nn.Conv2d(2, WIDTH, 3, padding=1)
        self.body = nn.Sequential(*(stage(WIDTH) for _ in range(depth)))
        self.classifier = nn.Linear(WIDTH, 3)
        self.double()

    def forward(self, x):
        shallow = self.front(x)
        return self.tail(self.body(shallow), shallow)

    def tail(self, x, shallow):
        return self.classifier((x + shallow).mean((2, 3)))


class EntryHead(PooledHead):
    """Reads its own map and what enters the first unit."""

    reads = frozenset(['entry'])

    def __init__(self):
        super().__init__(2)

    def forward(self, maps, targets, bank):
        *_, own = maps.values()
        return super().forward({'entry': maps['entry'], 'own': own}, targets, bank)


def build_global_skip(depth=3, kind=LocalLearner, bank=None, **kwargs):
    """With heads that read what enters the first unit, if there is a bank."""
    model = GlobalSkip(depth)
    units = [Unit(f'body.{i}', i) for i in range(depth)]
    modules = split(model, units, [unit.name for unit in units[:-1]])
    torch.manual_seed(1)
    head = PooledHead if bank is None else EntryHead
    heads = [head().double() for _ in range(depth - 1)]
    return kind(model, modules, heads, bank, **kwargs)


def build(depth, cuts=None, bank=None, model=None, kind=LocalLearner):
    model = model or build_model(depth)
    units = [Unit(f'stage{i + 1}', i) for i in range(depth)]
    cuts = [unit.name for unit in units[:-1]] if cuts is None else cuts
    torch.manual_seed(1)
    heads = [PooledHead(i + 1 if bank is not None else 1) for i in range(len(cuts))]
    return kind(model, split(model, units, cuts), heads, bank)


def all_params(learner):
    return [*learner.model.parameters(), *learner.heads.parameters()]


def model_loss(model):
    return F.cross_entropy(model(IMAGES), LABELS)


def train_step(learner, optimizer, backward=None):
    with learner.step(LABELS, backward):
        loss = model_loss(learner.model)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def equal(a, b):
    """Bitwise equality of nested dicts and lists of tensors and plain values."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def count_hooks(model):
    return sum(
        len(hooks)
        for module in model.modules()
        for name, hooks in vars(module).items()
        if name.endswith('hooks')
    )


def update_at_once(optimizer):
    def backward(loss, module, complete):
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return backward


class LeakyCuts(CutHooks):
    """Negative control: hands on the output with its graph."""

    def cut(self, end, output):
        super().cut(end, output)
        return output


class LeakyLearner(LocalLearner):
    """Negative control: its cuts leak."""

    def __init__(self, model, *args, **kwargs):
        super().__init__(model, *args, **kwargs)
        self._cuts = LeakyCuts(model)


def learned_map():
    """A map ``(2, 3, 4, 5)`` with a graph, of values that tell each place."""
    weight = torch.ones(2, 3, 4, 5, requires_grad=True)
    return weight * torch.arange(120.0).view(2, 3, 4, 5)


def retain(loss, module, complete):
    loss.backward(retain_graph=True)
