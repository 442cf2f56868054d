"""Gradients of a backbone: of local losses, of exact steps, and from one graph."""

import copy

import torch
from mmengine.registry import MODELS, init_default_scope
from torch import nn
from torch.utils._pytree import tree_leaves

from man_mm.backbones import find_units
from man_mm.backbones.images import image_channels, trial_sides
from man_mm.core import ExactSteps, LocalLearner, split


class MeanHead(nn.Module):
    def forward(self, maps, targets, bank):
        (map_,) = maps.values()
        return map_.square().mean()


def build_backbone(cfg):
    for package in ('mmdet', 'mmpretrain'):
        init_default_scope(package)
    torch.manual_seed(0)
    model = nn.Module()
    model.backbone = MODELS.build(copy.deepcopy(cfg))
    model.train()
    for module in model.modules():
        module.drop_prob = 0.0  # paths that are dropped at random
    return model


def images_for(cfg):
    """Two images of the smallest size that a backbone takes."""
    backbone = build_backbone(cfg).backbone
    generator = torch.Generator().manual_seed(1)
    *sides, last = trial_sides(backbone)
    for side in sides:
        images = torch.randn(
            2, image_channels(backbone), side, side, generator=generator
        )
        try:
            with torch.no_grad():
                backbone(images)
        except (RuntimeError, ValueError, AssertionError):
            continue
        return images
    return torch.randn(2, image_channels(backbone), last, last, generator=generator)


def loss_of(output):
    maps = [x for x in tree_leaves(output) if isinstance(x, torch.Tensor)]
    return sum(x.square().mean() for x in maps)


def everywhere(units):
    return [unit.name for unit in units[:-1]]


def gradients_of(model):
    return {name: param.grad for name, param in model.named_parameters()}


def local_gradients(cfg, images, cuts=everywhere):
    """The network's own loss, and the gradients of it and of local losses."""
    model = build_backbone(cfg)
    units = find_units(model)
    modules = split(model, units, cuts(units))
    heads = [MeanHead() for _ in modules[1:]]
    torch.manual_seed(2)
    with LocalLearner(model, modules, heads).step():
        output = model.backbone(images)
    loss = loss_of(output)
    loss.backward()
    return loss.detach(), gradients_of(model)


def gradients_of_one_graph(cfg, images, cuts=everywhere):
    """The same of each loss only what reaches its own module, from one graph of all."""
    model = build_backbone(cfg)
    units = find_units(model)
    modules = split(model, units, cuts(units))
    maps = {}
    for module in modules[:-1]:
        unit = module.units[-1]

        def keep(_module, args, output, unit=unit):
            maps[unit.name] = unit.map_of(output, args)

        model.get_submodule(unit.name).register_forward_hook(keep)
    torch.manual_seed(2)
    last = loss_of(model.backbone(images))
    names = {param: name for name, param in model.named_parameters()}
    found = {}
    for module in modules:
        loss = last if module.is_last else maps[module.cut].square().mean()
        grads = torch.autograd.grad(
            loss, module.params, retain_graph=True, allow_unused=True
        )
        found.update(
            {names[p]: grad for p, grad in zip(module.params, grads, strict=True)}
        )
    return last.detach(), found


def exact_gradients(cfg, images, cuts=everywhere):
    """Of an exact step."""
    model = build_backbone(cfg)
    units = find_units(model)
    modules = split(model, units, cuts(units))
    steps = ExactSteps(LocalLearner(model, modules, [MeanHead() for _ in modules[1:]]))
    torch.manual_seed(2)
    with steps.step():
        loss = loss_of(model.backbone(images))
    loss.backward()
    steps.replay()
    return gradients_of(model)


def plain_gradients(cfg, images):
    """Of plain back-propagation."""
    model = build_backbone(cfg)
    torch.manual_seed(2)
    loss_of(model.backbone(images)).backward()
    return gradients_of(model)


def same(a, b, rounding=0.0):
    """Whether gradients are equal up to rounding, relative to the largest of all."""
    largest = max(float(grad.abs().max()) for grad in b.values() if grad is not None)

    def close(x, y):
        return torch.allclose(x, y, rtol=1e-4, atol=1e-7 + rounding * largest)

    return all(
        (a[key] is None) == (b[key] is None)
        and (a[key] is None or close(a[key], b[key]))
        for key in b
    )
