"""Local learning in a plain PyTorch loop: `LocalLearner` and `MemoryBank`, no mmengine.

Trains a small convolutional network on scikit-learn's handwritten digits with K = 3
gradient-isolated modules, a few seconds on a CPU:

    python examples/plain_loop.py
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from man_mm.core import LocalLearner, MemoryBank, StagePartition, Unit, split

CHANNELS = {'stage1': 32, 'stage2': 64, 'stage3': 128}


class PooledHead(nn.Module):
    """Auxiliary head: one more stage (the SLM), pooling, a linear classifier.

    Args:
        names: Units whose maps are read; the last is the module's own output, the
            others are earlier modules' maps in the memory bank.
    """

    def __init__(self, names):
        super().__init__()
        *self.earlier, self.own = names
        self.slm = stage(CHANNELS[self.own], 64, 2)
        self.classifier = nn.Linear(sum(CHANNELS[n] for n in self.earlier) + 64, 10)

    def forward(self, maps, targets, bank):
        read = [self.slm(maps[self.own]), *(maps[name] for name in self.earlier)]
        pooled = torch.cat([map_.mean((2, 3)) for map_ in read], 1)
        return F.cross_entropy(self.classifier(pooled), targets)


def stage(in_channels, channels, stride):
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    )


def build():
    model = nn.Sequential(
        OrderedDict(
            stage1=stage(1, 32, 1),
            stage2=stage(32, 64, 2),
            stage3=stage(64, 128, 2),
            classifier=nn.Sequential(
                nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)
            ),
        )
    )
    units = [Unit(name, index) for index, name in enumerate(CHANNELS)]
    modules = split(model, units, StagePartition().cuts(units))
    names = list(CHANNELS)
    heads = [PooledHead(names[: index + 1]) for index in range(len(modules) - 1)]
    return LocalLearner(model, modules, heads, bank=MemoryBank())


def load_digits_as_tensors():
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels))
    return images, labels, order[:1400], order[1400:]


def main(epochs=8, batch=64):
    torch.manual_seed(0)
    images, labels, train, test = load_digits_as_tensors()
    learner = build()
    params = [*learner.model.parameters(), *learner.heads.parameters()]
    optimizer = torch.optim.AdamW(params, lr=2e-3)
    for epoch in range(epochs):
        for index in train[torch.randperm(len(train))].split(batch):
            # The backward pass of a module runs inside the forward pass, at its cut.
            with learner.step(targets=labels[index]):
                loss = F.cross_entropy(learner.model(images[index]), labels[index])
            loss.backward()  # the last module
            optimizer.step()
            optimizer.zero_grad()
        learner.model.eval()
        with torch.no_grad():
            hits = learner.model(images[test]).argmax(1) == labels[test]
        learner.model.train()
        local = '  '.join(
            f'{name} {value:.3f}' for name, value in learner.losses.items()
        )
        accuracy = hits.float().mean().item()
        print(f'epoch {epoch + 1}  {local}  loss {loss:.3f}  accuracy {accuracy:.3f}')
    return accuracy


if __name__ == '__main__':
    main()
