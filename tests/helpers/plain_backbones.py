"""Backbones in plain PyTorch: adapters know classes by name."""

import torch
from torch import nn


def conv(in_channels, channels, stride=1):
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 3, stride, 1), nn.BatchNorm2d(channels)
    )


class ResNet(nn.Module):
    """A stem and two stages, with everything that `probe` could disturb."""

    def __init__(self):
        super().__init__()
        self.conv1, self.relu, self.dropout = conv(1, 4, 2), nn.ReLU(), nn.Dropout()
        self.layer1 = nn.Sequential(conv(4, 4), conv(4, 4))
        self.layer2 = nn.Sequential(conv(4, 8, 2), conv(8, 8))
        self.res_layers = ['layer1', 'layer2']

    def forward(self, x):
        x = self.relu(self.dropout(self.conv1(x)))
        return self.path(x)

    def path(self, x):
        return self.layer2(self.layer1(x))


class TwoBranches(ResNet):
    def path(self, x):
        return self.layer2(self.layer1[0](x) + self.layer1[1](x))


class LongSkip(ResNet):
    def path(self, x):
        return self.layer2(x + self.layer1(x))


class Twice(ResNet):
    def path(self, x):
        return self.layer2(self.layer1(self.layer1(x)))


class Unused(ResNet):
    def path(self, x):
        return self.layer2(self.layer1[0](x))


class Pair(nn.Sequential):
    def forward(self, x):
        return (super().forward(x),)


class Tuples(ResNet):
    def __init__(self):
        super().__init__()
        self.layer2 = nn.Sequential(conv(4, 8, 2), Pair(conv(8, 8)))


class Failing(ResNet):
    def path(self, x):
        raise ArithmeticError


def plain(kind=ResNet):
    torch.manual_seed(0)
    model = nn.Module()
    model.backbone = kind()
    return model


def state_of(model):
    """All that a probe must leave as it was."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    flags = [
        (name, module.training, len(module._forward_hooks))
        for name, module in model.named_modules()
    ]
    grads = [(p.requires_grad, p.grad is None) for p in model.parameters()]
    random = torch.get_rng_state()
    copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    return [flags, grads], {**copies, 'random': random}


def unchanged(model, call):
    values, tensors = state_of(model)
    call()
    new_values, new_tensors = state_of(model)
    equal = [torch.equal(tensors[name], new_tensors[name]) for name in tensors]
    return values == new_values and all(equal)
