"""DDPM's network of pixels: what it learns by, and what a shortened chain of its steps draws and costs.

After Ho et al. 2020 (2006.11239) and Nichol & Dhariwal 2021 (2102.09672): a network that answers noise alone is trained by
L_simple and its steps have one of two fixed variances; one that answers variances, too, by the hybrid. Both are asked on every
so many steps of the chain, with the bounds of variances taken anew for the chain of these steps (section 4 of the latter), and
their estimates of a picture are cut to [-1, 1], as both papers' code does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tubelet.diffusion.hybrid import hybrid_loss, vlb_terms
from tubelet.diffusion.paths import VariancePreserving, VPLinear, spaced_sigmas
from tubelet.diffusion.solvers import ddpm
from tubelet.models.unet import UNet
from tubelet.train.classify import as_pixels

Answers = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""`(z (B, C, H, W), t (B,)) -> (noise, v)`, each like z; v between the bounds of a step's log-variance, -1 and 1."""


@dataclass(frozen=True, kw_only=True)
class PixelObjective:
    """Noise of pictures, by the hybrid where the model, a `UNet`, answers variances, else by L_simple.

    `(model, batch, rng) -> losses`; a batch has `video (B, 1, H, W, 3)` uint8.
    """

    path: VariancePreserving = field(default_factory=VPLinear)

    def __call__(self, model: UNet, batch: dict[str, Any], rng: torch.Generator) -> dict[str, Tensor]:
        """Returns "loss"; with variances also "simple" and "vlb", as `hybrid_loss`."""
        x = as_pixels(batch["video"])[:, :, 0]  # (B, 3, H, W)
        if model.config.learn_sigma:
            return hybrid_loss(model, x, rng, self.path)
        t = torch.randint(len(self.path), (len(x),), generator=rng, device=rng.device).to(x.device)
        noise = torch.randn(x.shape, generator=rng, device=rng.device).to(x.device)
        return {"loss": (model(noised(x, noise, t, self.path), t).float() - noise).square().mean()}


def noised(x: Tensor, noise: Tensor, t: Tensor, path: VariancePreserving) -> Tensor:
    """Pictures `(B, ...)` at integer steps `(B,)`."""
    signal = path.alphas_cumprod.to(x.device)[t].view(-1, *[1] * (x.ndim - 1))
    return signal.sqrt().to(x) * x + (1 - signal).sqrt().to(x) * noise


def answers(model: UNet, fixed: float = -1.0) -> Answers:
    """What a network says of noise and variance; one that says nothing of variance has `fixed`: -1 beta tilde, 1 beta."""

    def ask(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        out = model(z, t).float()
        if model.config.learn_sigma:
            noise, v = out.chunk(2, dim=1)  # (B, C, H, W) each
            return noise, v
        return out, torch.full_like(out, fixed)

    return ask


@dataclass(frozen=True)
class ShortChain:
    """`count` steps of a chain, its first and last among them, as a chain of their own."""

    whole: VariancePreserving
    count: int

    @property
    def steps(self) -> Tensor:
        """Numbers `(count,)` in the whole chain, rising. Evenly spread, as released with Improved DDPM."""
        return torch.linspace(0, len(self.whole) - 1, self.count, dtype=torch.float64).round().long()

    @property
    def path(self) -> VariancePreserving:
        return VariancePreserving(self.whole.alphas_cumprod[self.steps])

    @torch.no_grad()
    def draw(self, ask: Answers, z: Tensor, rng: torch.Generator) -> Tensor:
        """Pictures in [-1, 1] out of noise `z (B, C, H, W)` by ancestral sampling (Ho et al. 2020, algorithm 2)."""
        said = z

        def denoise(z: Tensor, sigma: Tensor) -> Tensor:
            nonlocal said
            step = int(self.whole.told_step(sigma))
            noise, said = ask(z, torch.full((len(z),), step, device=z.device))
            return _cut(noise, z, float(self.whole.alphas_cumprod[step]))

        levels = spaced_sigmas(self.whole, self.count, "linspace")
        return ddpm(denoise, z, levels, path=self.whole, generator=rng, variance=lambda: said)

    @torch.no_grad()
    def bound(self, ask: Answers, x: Tensor, rng: torch.Generator) -> Tensor:
        """The variational bound on -log p of pictures `(B, C, H, W)` in [-1, 1], in bits per value, `(B,)`.

        One noise for each step: an unbiased estimate. Pictures have 256 levels a value.
        """
        path, steps = self.path, self.steps.tolist()
        signal = float(path.alphas_cumprod[-1])
        # What the last step still says of the picture: KL of q(z | x) from unit noise.
        prior = (signal * x.square() + (1 - signal) - 1 - math.log(1 - signal)) / 2
        total = prior.flatten(1).mean(1) / math.log(2)  # (B,)
        for i in range(self.count):
            t = torch.full((len(x),), i, device=x.device)
            z = noised(x, torch.randn(x.shape, generator=rng, device=rng.device).to(x), t, path)
            noise, v = ask(z, torch.full_like(t, steps[i]))
            now = float(path.alphas_cumprod[i])
            noise = (z - math.sqrt(now) * _cut(noise, z, now)) / math.sqrt(1 - now)
            total = total + vlb_terms(x, z, t, noise, v, path)
        return total


def _cut(noise: Tensor, z: Tensor, signal: float) -> Tensor:
    """The picture that a noise stands for at z, cut to [-1, 1]."""
    return ((z - math.sqrt(1 - signal) * noise) / math.sqrt(signal)).clamp(-1, 1)
