"""What the denoisers of the lineage are trained on: chains of a thousand steps, with each paper's own loss.

DDPM's U-Net (Ho et al. 2020), DiT (Peebles & Xie 2023) and VDT (Lu et al. 2023) predict noise and, as ADM does, its variance
(`diffusion.hybrid`); W.A.L.T (Gupta et al. 2023) predicts v, most of the time with its last estimate in view
(`diffusion.chain`). All are told a step number. `Forecast` and `Recalling` are VDT and W.A.L.T as the engine's network of films
and noise levels, `generate.published.OnePicture` is the other two.

A model is `TextToVideo`: a text encoder, here one that has been trained already and stays as it is, and such a network.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tubelet.core.errors import UserError
from tubelet.core.types import Condition
from tubelet.diffusion.chain import estimate_of, v_loss
from tubelet.diffusion.hybrid import hybrid_loss
from tubelet.diffusion.paths import VariancePreserving
from tubelet.generate.published import OnePicture
from tubelet.models.vdt import VDT
from tubelet.models.walt import WALT
from tubelet.text.base import TextEncoder
from tubelet.train.text_to_video import TextToVideo


class FrozenText(TextEncoder):
    """A trained encoder that does not learn along: networks that are compared all read the same states."""

    trainable = False

    def __init__(self, inner: TextEncoder) -> None:
        super().__init__()
        self.inner, self.config = inner.requires_grad_(False), inner.config

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenText:
        # A running average of weights copies the model: what is frozen may be shared.
        return self

    @property
    def width(self) -> int:
        return self.inner.width

    def truncated(self, prompt: str) -> bool:
        return self.inner.truncated(prompt)

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> Condition:
        return self.inner.encode(prompts)


class Forecast(nn.Module):
    """A VDT that predicts from earlier frames, as a network of whole films: frames at noise level 0 are the earlier ones."""

    def __init__(self, network: VDT, path: VariancePreserving) -> None:
        super().__init__()
        self.network, self.path = network, path

    def forward(self, z: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """Films `z (B, C, T, H, W)` and noise levels per frame `sigma (B, T)` to the noise of the frames to be made, like z and
        zero in those that are known. It reads no words. Raises UserError where no beginning is known.
        """
        known = 0 if sigma.ndim != 2 else int((sigma == 0).all(0).cumprod(0).sum())
        if not 0 < known < z.shape[2]:
            raise UserError("this model predicts whole frames from those before them; give a film's beginning")
        t = self.path.told_step(sigma[:, -1])  # (B,)
        out = self.network(z[:, :, known:], t, clean=z[:, :, :known])[:, : z.shape[1]]  # (B, C, T - K, H, W)
        return torch.cat([torch.zeros_like(z[:, :, :known]), out], dim=2)  # (B, C, T, H, W)


class Recalling(nn.Module):
    """A W.A.L.T as the engine's network; with `recalls` each step of a solver is told what the step before it estimated."""

    def __init__(self, network: WALT, path: VariancePreserving, recalls: bool) -> None:
        super().__init__()
        self.network, self.path, self.recalls = network, path, recalls

    def forward(self, z: Tensor, sigma: Tensor, condition: Condition, estimate: Tensor | None = None) -> Tensor:
        """`z (B, C, T, H, W)`, noise levels `sigma (B,)` and an estimate of x like z, or none, to v like z."""
        return self.network(z, self.path.told_step(sigma), text=condition, estimate=estimate)

    def begin(self) -> Callable[[Tensor, Tensor, Condition], Tensor]:
        """The network of one run of a solver, which starts without an estimate."""
        last: Tensor | None = None

        def network(z: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
            nonlocal last
            # Where guidance sets in or ends, the batch has another size.
            known = last if self.recalls and last is not None and last.shape == z.shape else None
            v = self(z, sigma, condition, known)
            last = estimate_of(v, z, sigma, self.path)
            return v

        return network


def read_words(model: TextToVideo, batch: dict[str, Any], drop: float, rng: torch.Generator) -> Condition:
    """Token states of a batch's captions, of which a share is emptied, so that guidance has something to steer away from."""
    captions: Sequence[str] = batch["caption"]
    draws = torch.rand(len(captions), generator=rng, device=rng.device).tolist()
    texts = ["" if draw < drop else text for draw, text in zip(draws, captions, strict=True)]
    return model.read(texts, 0.0, random.Random(0), batch["latent"].device)


@dataclass(frozen=True, kw_only=True)
class PictureObjective:
    """Noise and variance of the first frame; the model's denoiser is an `OnePicture`.

    `(model, batch, rng) -> losses`; a batch has `latent (B, C, T, h, w)` and `caption`.
    """

    text_drop: float = 0.1
    """Share of captions emptied."""

    def __call__(self, model: TextToVideo, batch: dict[str, Any], rng: torch.Generator) -> dict[str, Tensor]:
        """Returns "loss" and, as `hybrid_loss`, its parts "simple" and "vlb"."""
        denoiser = model.denoiser
        assert isinstance(denoiser, OnePicture), "a network of pictures"
        condition = read_words(model, batch, self.text_drop, rng)
        x = batch["latent"][:, :, 0]  # (B, C, h, w)
        return hybrid_loss(lambda z, t: denoiser.network(z, t, condition), x, rng, denoiser.path)


@dataclass(frozen=True, kw_only=True)
class ForecastObjective:
    """Noise and variance of all frames but the first `known`, which are given; the model's denoiser is a `Forecast`."""

    known: int

    def __call__(self, model: TextToVideo, batch: dict[str, Any], rng: torch.Generator) -> dict[str, Tensor]:
        """Returns "loss" and, as `hybrid_loss`, its parts "simple" and "vlb"."""
        denoiser, latents = model.denoiser, batch["latent"].float()
        assert isinstance(denoiser, Forecast), "a network that is given frames"
        network = functools.partial(denoiser.network, clean=latents[:, :, : self.known])
        return hybrid_loss(network, latents[:, :, self.known :], rng, denoiser.path)


@dataclass(frozen=True, kw_only=True)
class FilmObjective:
    """v of whole films, with self-conditioning where the model's denoiser, a `Recalling`, has it."""

    text_drop: float = 0.1
    """Share of captions emptied."""
    self_conditioning: float = 0.9
    """How often a network that recalls is given an estimate."""

    def __call__(self, model: TextToVideo, batch: dict[str, Any], rng: torch.Generator) -> dict[str, Tensor]:
        """Returns "loss", as `v_loss`."""
        denoiser = model.denoiser
        assert isinstance(denoiser, Recalling), "a network of films that predicts v"
        condition = read_words(model, batch, self.text_drop, rng)
        share = self.self_conditioning if denoiser.recalls else 0.0

        def network(z: Tensor, t: Tensor, estimate: Tensor | None) -> Tensor:
            return denoiser.network(z, t, text=condition, estimate=estimate)

        return v_loss(network, batch["latent"], rng, denoiser.path, share)
