"""What a super-resolution model is shown in training: blurred, resampled, noisy pictures, and small crops.

A cascade's upsampler is conditioned on the picture of the stage before. Trained on clean small pictures it would trust every
flaw that stage makes, so they are corrupted a little (Ho et al. 2021, "Cascaded Diffusion Models"). As in unCLIP (Ramesh et al.
2022, section 2.1): a fixed Gaussian blur from 64 to 256 px, a random mixture after BSRGAN (Zhang et al. 2021) from 256 to
1024 px, and in both random crops of a fourth of the target's side.

Pictures are `(B, C, H, W)` in [-1, 1] and keep their size. All randomness comes from the generator that is passed.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tubelet.core.errors import UserError

BSR_KERNEL = 7
BSR_BLUR = (0.1, 1.5)
"""Standard deviations along the two axes of a random blur, pixels."""
BSR_SHRINK = (0.5, 1.0)
"""Share of the side that remains before a picture is brought back to its size."""
BSR_NOISE = (1 / 255, 25 / 255)
"""Standard deviation of the noise, as a share of the whole range of values."""


def gaussian_kernel(size: int, sigma: tuple[float, float], angle: float = 0.0) -> Tensor:
    """A Gaussian with deviations `sigma` (pixels) along its own x and y axis, turned by `angle` (radians), `(size, size)`.

    It sums to one. Raises UserError when size is even or a deviation is not positive.
    """
    if size < 1 or size % 2 == 0:
        raise UserError(f"a kernel has a middle only when its size is odd, got {size}; try {abs(size) + 1}")
    if min(sigma) <= 0:
        raise UserError(f"a blur's deviations must be positive, got {sigma}; leave the blur away for none")
    place = torch.arange(size) - size // 2
    y, x = torch.meshgrid(place, place, indexing="ij")  # (size, size) each
    along = (x * math.cos(angle) + y * math.sin(angle)) / sigma[0]
    across = (y * math.cos(angle) - x * math.sin(angle)) / sigma[1]
    kernel = torch.exp(-(along**2 + across**2) / 2)
    return kernel / kernel.sum()


def blur(images: Tensor, kernel: Tensor) -> Tensor:
    """Every channel convolved with `kernel (k, k)`; beyond its edges a picture is mirrored.

    Raises UserError when a side is not larger than half the kernel.
    """
    C, half = images.shape[1], len(kernel) // 2
    if min(images.shape[-2:]) <= half:
        raise UserError(f"{tuple(images.shape[-2:])} pixels are too few for a kernel of {len(kernel)}; take a smaller kernel")
    padded = F.pad(images, [half] * 4, mode="reflect")  # (B, C, H + 2 half, W + 2 half)
    return F.conv2d(padded, kernel.to(images).expand(C, 1, -1, -1), groups=C)  # (B, C, H, W)


def gaussian_blur(images: Tensor, size: int = 3, sigma: float = 0.6) -> Tensor:
    """The corruption of unCLIP's first upsampler, 64 to 256 px: a Gaussian of 3 x 3 pixels, deviation 0.6."""
    return blur(images, gaussian_kernel(size, (sigma, sigma)))


def bsr(images: Tensor, generator: torch.Generator) -> Tensor:
    """A random corruption for every picture of the batch, as for unCLIP's second upsampler, 256 to 1024 px; in [-1, 1].

    Two anisotropic Gaussian blurs, one loss of resolution by a random filter and one Gaussian noise, coloured or grey, in
    random order. BSRGAN's compression and camera noise are left out, and the ranges, which the paper does not give, are ours
    and mild: what is corrupted is a condition, not a photograph to restore. Raises UserError when a side is below 8 pixels.
    """
    if images.ndim != 4 or min(images.shape[-2:]) < BSR_KERNEL + 1:
        raise UserError(f"pictures must be (B, C, H, W) of 8 pixels or more, got {tuple(images.shape)}; pass larger ones")
    return torch.cat([_corrupt(image, generator) for image in images.split(1)])  # (B, C, H, W)


def _corrupt(image: Tensor, generator: torch.Generator) -> Tensor:
    size = image.shape[-2:]
    for step in torch.randperm(4, generator=generator, device=generator.device).tolist():
        if step < 2:
            sigma = _uniform(*BSR_BLUR, generator), _uniform(*BSR_BLUR, generator)
            image = blur(image, gaussian_kernel(BSR_KERNEL, sigma, _uniform(0, math.pi, generator)))
        elif step == 2:
            share = _uniform(*BSR_SHRINK, generator)
            image = _resize(image, [max(BSR_KERNEL // 2 + 1, round(side * share)) for side in size], generator)
        else:
            grey = _uniform(0, 1, generator) < 0.5
            sigma = 2 * _uniform(*BSR_NOISE, generator)
            shape = (1, 1 if grey else image.shape[1], *image.shape[-2:])
            image = image + sigma * torch.randn(shape, generator=generator, device=generator.device).to(image)
    return F.interpolate(image, list(size), mode="bicubic", align_corners=False).clamp(-1, 1)


def _resize(image: Tensor, size: list[int], generator: torch.Generator) -> Tensor:
    mode = ("nearest-exact", "area", "bilinear", "bicubic")[int(_uniform(0, 4, generator))]
    if mode in ("bilinear", "bicubic"):
        return F.interpolate(image, size, mode=mode, align_corners=False, antialias=True)
    return F.interpolate(image, size, mode=mode)


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * torch.rand((), generator=generator, device=generator.device).item()


def aligned_crops(low: Tensor, high: Tensor, generator: torch.Generator, share: int = 4) -> tuple[Tensor, Tensor]:
    """The same random place of a target `high (B, C, H, W)` and of its condition `low (B, C, h, w)`, one for each pair.

    The crop's side is the target's divided by `share`. An upsampler of convolutions alone is trained on such crops and run on
    whole pictures. Raises UserError when the target is not a whole multiple of the condition in both sides, or the condition
    does not divide by `share`.
    """
    (h, w), (H, W) = low.shape[-2:], high.shape[-2:]
    if H % h or W % w or H // h != W // w or len(low) != len(high):
        raise UserError(f"targets {tuple(high.shape)} are no multiple of {tuple(low.shape)}; pass matching pairs of one ratio")
    if share < 1 or h % share or w % share:
        raise UserError(f"{h} x {w} pixels do not divide into {share}; resize the condition or take another share")
    ratio, rows, columns = H // h, h // share, w // share
    small, large = [], []
    for i in range(len(low)):
        y = int(torch.randint(h - rows + 1, (), generator=generator, device=generator.device))
        x = int(torch.randint(w - columns + 1, (), generator=generator, device=generator.device))
        small.append(low[i, :, y : y + rows, x : x + columns])
        large.append(high[i, :, ratio * y : ratio * (y + rows), ratio * x : ratio * (x + columns)])
    return torch.stack(small), torch.stack(large)  # (B, C, h/share, w/share), (B, C, H/share, W/share)
