"""What a text-to-video system is trained on: denoise captioned latents at random noise levels, text encoder included.

The captions of a share of samples are emptied, so that the same network also knows the unconditional score and guidance
has something to steer away from (Ho & Salimans 2022, algorithm 1). A share of steps sees only the first latent frame: an
image is a one-frame film, and images and films are learned together (Sora report; W.A.L.T, section 3.1).
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tubelet.core.errors import UserError
from tubelet.core.types import Condition
from tubelet.diffusion.objectives import Prediction, flow_loss
from tubelet.diffusion.paths import SigmaSampling
from tubelet.text.own import OwnTextEncoder


class TextToVideo(nn.Module):
    """The two networks that learn together: `text` (prompts -> states) and `denoiser` (latents, sigma, states -> output)."""

    def __init__(self, text: OwnTextEncoder, denoiser: nn.Module) -> None:
        super().__init__()
        self.text, self.denoiser = text, denoiser

    def forward(self, z: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        return self.denoiser(z, sigma, condition)


@dataclass(frozen=True, kw_only=True)
class TextToVideoObjective:
    """`(model, batch, rng) -> losses`; a batch has `latent (B, C, T, h, w)`, `foreground (B, T, h, w)` uint8 and `caption`."""

    prediction: Prediction = "skip"
    sampling: SigmaSampling = field(default_factory=SigmaSampling)
    text_drop: float = 0.1
    """Share of captions emptied."""
    split: float = 0.1
    """Chance that a merge of the tokenizer is left out, so that words no caption has are made of pieces that were trained."""
    image_share: float = 0.1
    """Share of steps on the first latent frame alone."""
    foreground: float = 4.0
    """Weight of a cell full of saturated colour against 1 for the rest."""

    def __post_init__(self) -> None:
        for name in ("text_drop", "split", "image_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise UserError(f"{name} is a share and must lie in [0, 1], got {getattr(self, name)}; correct it")

    def __call__(self, model: TextToVideo, batch: dict[str, Any], rng: torch.Generator) -> dict[str, Tensor]:
        """Returns "loss" (velocity space) and its quartiles over sigma."""
        missing = [name for name in ("latent", "foreground", "caption") if name not in batch]
        if missing:
            raise UserError(
                f"text-to-video is trained on latents with captions, the batch lacks {missing[0]!r}; encode the clips first"
            )
        latents, foreground = batch["latent"].float(), batch["foreground"]
        draws = torch.rand(len(latents) + 1, generator=rng, device=rng.device).tolist()
        captions = ["" if draw < self.text_drop else text for text, draw in zip(batch["caption"], draws[1:], strict=True)]
        if draws[0] < self.image_share:
            latents, foreground = latents[:, :, :1], foreground[:, :1]
        share = foreground[:, None].float() / 255  # (B, 1, T, h, w)
        ids, mask = model.text.tokenize(captions, split=self.split, rng=random.Random(int(draws[0] * 2**32)))
        condition = model.text(ids.to(latents.device), mask.to(latents.device))
        return flow_loss(
            model,
            latents,
            condition,
            rng,
            sampling=self.sampling,
            weight=1 + (self.foreground - 1) * share,
            prediction=self.prediction,
        )
