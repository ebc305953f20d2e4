"""What a stage of super-resolution learns by and how it is asked: W.A.L.T on what plain enlargement misses.

After Photorealistic Video Generation with Diffusion Models (Gupta et al. 2023, 2312.06662), section 3.5: a stage is shown the
smaller film beside the noise, itself noised to a step of its own (Ho et al. 2021, "Cascaded Diffusion Models"), so that it does
not trust every flaw of the stage before. The paper's stages work in a tokenizer's latents and make whole films; here they work
in pixels and make the difference to a bicubic enlargement, divided by its deviation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tubelet.core.errors import UserError
from tubelet.diffusion.chain import v_loss
from tubelet.diffusion.objectives import denoiser
from tubelet.diffusion.paths import VariancePreserving, spaced_sigmas
from tubelet.diffusion.solvers import SOLVERS
from tubelet.models.walt import WALT
from tubelet.nn.conv import fold_frames, unfold_frames
from tubelet.train.classify import as_pixels


def doubled(film: Tensor) -> Tensor:
    """Films `(B, 3, T, H, W)` in [-1, 1] enlarged to `(B, 3, T, 2H, 2W)`, bicubic (Keys 1981, a = -0.5), cut to [-1, 1]."""
    frames = F.interpolate(fold_frames(film), scale_factor=2, mode="bicubic", antialias=True)  # (B*T, 3, 2H, 2W)
    return unfold_frames(frames, len(film)).clamp(-1, 1)


class Stage(nn.Module):
    """A W.A.L.T with `upscale` that doubles the height and width of films of as many frames as its grid has.

    `scale` is the deviation of what `doubled` misses, `path` the chain of both noises.
    """

    scale: Tensor

    def __init__(self, network: WALT, path: VariancePreserving, scale: float = 1.0) -> None:
        super().__init__()
        self.network, self.path = network, path
        self.register_buffer("scale", torch.tensor(scale))

    def missing(self, low: Tensor, high: Tensor) -> Tensor:
        """What the enlargement of `low (B, 3, T, H, W)` lacks of `high (B, 3, T, 2H, 2W)`, of unit deviation."""
        return (high - doubled(low)) / self.scale

    def noised(self, low: Tensor, step: Tensor, noise: Tensor) -> Tensor:
        """The smaller films `(B, 3, T, H, W)` as the network is shown them, at steps `(B,)` of the chain; step 0 is 1 %."""
        sigma = self.path.sigma_of_step(step)
        alpha, share = (value.float().view(-1, 1, 1, 1, 1) for value in (self.path.alpha(sigma), self.path.noise(sigma)))
        return alpha * low + share * noise

    @torch.no_grad()
    def upscale(self, low: Tensor, rngs: Sequence[torch.Generator], steps: int = 8, shown: int = 0) -> Tensor:
        """Films `(B, 3, T, H, W)` in [-1, 1] twice as high and wide, each by noise of its own generator.

        `steps` of DDIM, of which 1 gives the mean of all that the film could be; `shown` is the step to which the small films
        are noised. Raises UserError for steps that the chain does not have, and where the network's grid does not fit.
        """
        if not 0 <= shown < len(self.path):
            raise UserError(f"shown is a step of a chain of {len(self.path)}, got {shown}; 0 shows films nearly as they are")
        B, C, T, H, W = low.shape
        z = torch.stack([torch.randn(C, T, 2 * H, 2 * W, generator=rng) for rng in rngs]).to(low)  # (B, C, T, 2H, 2W)
        noise = torch.stack([torch.randn(C, T, H, W, generator=rng) for rng in rngs]).to(low)  # (B, C, T, H, W)
        step = torch.full((B,), shown, device=low.device)
        seen = self.noised(low, step, noise)

        def network(z: Tensor, sigma: Tensor, _: None) -> Tensor:
            return self.network(z, self.path.told_step(sigma), low=seen, low_t=step)

        denoise = denoiser(network, "v", self.path)
        levels = spaced_sigmas(self.path, steps)
        missing = SOLVERS["ddim"].solve(lambda z, sigma: denoise(z, sigma, None), z, levels, path=self.path)
        return (doubled(low) + self.scale * missing).clamp(-1, 1)


@dataclass(frozen=True, kw_only=True)
class UpscaleObjective:
    """v of what enlarging misses, seen beside the smaller film at a random level of noise; the model is a `Stage`.

    `(model, batch, rng) -> losses`; a batch has films `low (B, T, H, W, 3)` and `high (B, T, 2H, 2W, 3)`, uint8.
    """

    augmentation: int = 50
    """The smaller film is noised to a step below this one."""

    def __call__(self, model: Stage, batch: dict[str, Any], rng: torch.Generator) -> dict[str, Tensor]:
        """Returns "loss", as `v_loss`."""
        low, high = as_pixels(batch["low"]), as_pixels(batch["high"])
        step = torch.randint(self.augmentation, (len(low),), generator=rng, device=rng.device).to(low.device)
        noise = torch.randn(low.shape, generator=rng, device=rng.device).to(low.device)
        seen = model.noised(low, step, noise)

        def network(z: Tensor, t: Tensor, estimate: Tensor | None) -> Tensor:
            return model.network(z, t, estimate=estimate, low=seen, low_t=step)

        return v_loss(network, model.missing(low, high), rng, model.path)
