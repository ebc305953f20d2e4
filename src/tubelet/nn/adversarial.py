"""What makes a decoder paint texture: a discriminator of patches, the hinge losses, and how much it may say.

The discriminator is pix2pix's (Isola et al. 2017, 1611.07004, appendix 6.1.2); the hinge Lim & Ye 2017 (1705.02894);
the weight, which keeps the adversarial gradient as large as that of reconstruction, VQGAN's (Esser et al. 2021, 2012.09841,
equation 7).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Perceptual = Callable[[Tensor, Tensor], Tensor]
"""A distance between images, `(n, 3, H, W)` in [-1, 1] twice to `(n,)`, differentiable in both. None is shipped."""


class PatchDiscriminator(nn.Module):
    """Images `(B, C, H, W)` to a logit per patch, `(B, 1, h, w)`; above 0 says real.

    `layers` convolutions of stride 2 and two of stride 1, 4x4 each, double the `width` up to eightfold; with 3 layers a patch
    is 70 x 70 pixels. Batch norms (not behind the first) see real and made images in separate calls.
    """

    def __init__(self, channels: int = 3, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, width, 4, stride=2, padding=1)
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        now = width
        for n in range(1, layers + 1):
            out = width * min(2**n, 8)
            self.convs.append(nn.Conv2d(now, out, 4, stride=2 if n < layers else 1, padding=1, bias=False))
            self.norms.append(nn.BatchNorm2d(out))
            now = out
        self.last = nn.Conv2d(now, 1, 4, padding=1)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fill every parameter and buffer: weights normal of deviation 0.02, gains so around 1, as released."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.reset_parameters()
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
                nn.init.normal_(module.weight, mean=1.0, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.first(x.to(self.first.weight.dtype)), 0.2)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            h = F.leaky_relu(norm(conv(h)), 0.2)
        return self.last(h).float()  # (B, 1, h, w)


def held(discriminator: nn.Module, x: Tensor) -> Tensor:
    """The discriminator's logits of `x`, whose gradient reaches `x` and none of its parameters."""
    constants = {name: p.detach() for name, p in discriminator.named_parameters()}
    return torch.func.functional_call(discriminator, constants, x)


def hinge(real: Tensor, made: Tensor) -> Tensor:
    """The discriminator's loss from logits of real and of made images, a scalar: zero once they are above 1 and below -1."""
    return (F.relu(1 - real).mean() + F.relu(1 + made).mean()) / 2


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last: Tensor) -> Tensor:
    """The norm of reconstruction's gradient at the `last` layer over that of the adversarial loss, at most 10^4; a constant.

    Both losses are scalars whose graphs are kept. Raises RuntimeError when one does not depend on `last`.
    """
    wanted, given = (torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (reconstruction, adversarial))
    return (wanted / (given + 1e-4)).clamp(max=1e4).detach()
