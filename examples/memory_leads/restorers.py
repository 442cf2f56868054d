"""A lead of super-resolution: classes are codes of a codebook of patches."""

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor

from man_mm import MANSRHead
from man_mm.core.local_losses import total_loss

from .leads import Lead, PrototypeTerm, samples_of
from .memories import ClassMeans


class SRLead(Lead, MANSRHead):
    """A lead of super-resolution, at every fourth pixel of the map in either direction.

    A pixel stands for the patch of the target behind it and its eight neighbours, less
    the patch's mean. Codes are running means of the patches that are nearest to them;
    the first ones are patches of the first batch.

    Args:
        site: Where the head sits.
        num_codes: Number of codes.
        **options: Options of `Lead`.
    """

    every = 4

    def __init__(self, site, num_codes=32, **options):
        super().__init__(site, **options)
        self.num_classes = num_codes
        self.width = self.lateral.out_channels
        self.deep = site.path[-1].channels
        self.last = site.path[-1].name
        shuffle = self.upsample[-1].upscale_factor
        self.factor = shuffle // site.own[-1].stride
        size = self.upsample[0].out_channels // shuffle**2 * (3 * self.factor) ** 2
        self.codebook = ClassMeans(num_codes, size, self.momentum)
        self.features = []
        self.slm.register_forward_hook(lambda *args: self.features.append(args[2]))

    def forward(self, maps, targets, bank):
        loss = total_loss(super().forward(maps, targets, bank))
        features = self.at_pixels(self.features.pop())
        codes = self.codes_of(self.patches(targets.gt_img))
        return self.joined(loss, features, codes, maps)

    def at_pixels(self, map_: Tensor) -> Tensor:
        """The vectors ``(N, C)`` of a map at the pixels."""
        return map_[..., :: self.every, :: self.every].flatten(2).mT.flatten(0, 1)

    def patches(self, images: Tensor) -> Tensor:
        """The patches ``(N, size)`` of images ``(B, 3, H, W)`` at the pixels."""
        patches = F.unfold(
            images,
            3 * self.factor,
            padding=self.factor,
            stride=self.every * self.factor,
        )
        patches = patches.mT.flatten(0, 1)
        return patches - patches.mean(1, keepdim=True)

    @torch.no_grad()
    def codes_of(self, patches: Tensor) -> Tensor:
        """The nearest code ``(N,)`` of each patch."""
        if not self.codebook.seen.any():
            spread = torch.linspace(0, len(patches) - 1, self.num_classes)
            first = patches[spread.round().long().to(patches.device)]
            self.codebook.remember(first, torch.arange(len(first), device=first.device))
        return torch.cdist(patches, self.codebook.means).argmin(1)

    def watch_deep(self, model, remember):
        """Calls ``remember`` with the last unit's output at the pixels, and codes."""
        samples = samples_of(model)

        def seen(_module, _args, output):
            if model.training and samples:
                patches = self.patches(samples.pop().gt_img)
                codes = self.codes_of(patches)
                remember(self.at_pixels(output.detach()), codes)
                self.codebook.remember(patches, codes)

        model.get_submodule(self.last).register_forward_hook(seen)


@MODELS.register_module()
class SRPrototypes(PrototypeTerm, SRLead):
    """1: see `PrototypeTerm`."""
