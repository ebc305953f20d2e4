"""What the denoisers of the lineage are trained on: chains of a thousand steps, with each paper's own loss.

DDPM's U-Net (Ho et al. 2020), DiT (Peebles & Xie 2023) and VDT (Lu et al. 2023) predict noise and, as ADM does, its variance
(`diffusion.hybrid`); W.A.L.T (Gupta et al. 2023) predicts v, most of the time with its last estimate in view
(`diffusion.chain`). All are told a step number. As the engine's network of films and noise levels, `Forecast` and `Completing`
are VDT, `Recalling` and `Continuing` are W.A.L.T, `generate.published.OnePicture` is the other two.

A model is `TextToVideo`: a text encoder, here one that has been trained already and stays as it is, and such a network.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
from tubelet.tasks.given import Given
from tubelet.tasks.masks import MASKS, RELEASED, check_shares, draw_name
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


class Completing(nn.Module):
    """A VDT under its unified mask, as a network of whole films: cells at noise level 0 are known, the others are made."""

    def __init__(self, network: VDT, path: VariancePreserving) -> None:
        super().__init__()
        self.network, self.path = network, path

    def forward(self, z: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """Films `z (B, C, T, H, W)`, clean where they are known, and noise levels `sigma (B,)`, `(B, T)` or `(B, T, H, W)` to
        the noise of the cells to be made, like z and zero in known ones. It reads no words. Raises UserError where cells to be
        made have several noise levels: the network is told one step.
        """
        level = sigma.flatten(1).amax(1) if sigma.ndim > 1 else sigma  # (B,)
        wide = sigma.reshape(*sigma.shape, *[1] * (4 - sigma.ndim))  # (B, T or 1, H or 1, W or 1)
        known = (wide == 0).expand(-1, *z.shape[2:])  # (B, T, H, W)
        if not bool((known | (wide == level.view(-1, 1, 1, 1))).all()):
            raise UserError("this model knows a cell or it makes it; give a mask of 0 and 1 alone")
        out = self.network(z, self.path.told_step(level), clean=z, mask=known)[:, : z.shape[1]]  # (B, C, T, H, W)
        return out.masked_fill(known[:, None], 0.0)


class Recalling(nn.Module):
    """A W.A.L.T as the engine's network; with `recalls` each step of a solver is told what the step before it estimated."""

    def __init__(self, network: WALT, path: VariancePreserving, recalls: bool) -> None:
        super().__init__()
        self.network, self.path, self.recalls = network, path, recalls

    def forward(self, z: Tensor, sigma: Tensor, condition: Condition, estimate: Tensor | None = None) -> Tensor:
        """`z (B, C, T, H, W)`, noise levels `sigma (B,)` and an estimate of x like z, or none, to v like z."""
        return self.network(z, self.path.told_step(sigma), text=condition, estimate=estimate)

    def begin(self) -> Callable[..., Tensor]:
        """The network of one run of a solver, which starts without an estimate."""
        last: Tensor | None = None

        def network(z: Tensor, sigma: Tensor, condition: Condition, **more: Any) -> Tensor:
            nonlocal last
            # Where guidance sets in or ends, the batch has another size.
            known = last if self.recalls and last is not None and last.shape == z.shape else None
            v = self(z, sigma, condition, known, **more)
            last = estimate_of(v, z, sigma, self.path)
            return v

        return network


class Continuing(Recalling):
    """A W.A.L.T built with `predict`, which is told known frames beside the noise: films go on window after window.

    `guidance` over the known frames, as over words: the answer without them plus so many times what they change; 1 asks once.
    With words guided too, both answers are.
    """

    takes_given = True

    def __init__(self, network: WALT, path: VariancePreserving, recalls: bool, guidance: float = 1.0) -> None:
        super().__init__(network, path, recalls)
        self.guidance = guidance

    def forward(
        self, z: Tensor, sigma: Tensor, condition: Condition, estimate: Tensor | None = None, given: Given | None = None
    ) -> Tensor:
        """As `Recalling`, with what is `given` of the films, of one of them or of as many as divide the batch.

        Raises UserError where a frame is known in part.
        """
        if given is None:
            return super().forward(z, sigma, condition, estimate)
        known = given.mask.eq(0).flatten(2)  # (b, T, H*W)
        if not torch.equal(known.all(2), known.any(2)):
            raise UserError("this model knows whole frames; give none that is known in part")
        times = len(z) // len(given.clean)  # with words and without
        clean, frames = given.clean.repeat(times, 1, 1, 1, 1), known.all(2).repeat(times, 1)  # (B, C, T, H, W), (B, T)
        t = self.path.told_step(sigma)
        return self.network(z, t, text=condition, estimate=estimate, clean=clean, known=frames)

    def begin(self) -> Callable[..., Tensor]:
        """As `Recalling`; the answers with known frames and without each recall their own."""
        told, untold = super().begin(), super().begin()

        def network(z: Tensor, sigma: Tensor, condition: Condition, given: Given | None = None) -> Tensor:
            if given is None or not bool(given.mask.eq(0).any()):
                return untold(z, sigma, condition)
            v = told(z, sigma, condition, given=given)
            if self.guidance == 1:
                return v
            without = untold(z, sigma, condition)
            return without + self.guidance * (v - without)

        return network


def read_words(model: TextToVideo, batch: dict[str, Any], drop: float, rng: torch.Generator) -> Condition:
    """Token states of a batch's captions, of which a share is emptied, so that guidance has something to steer away from."""
    captions: Sequence[str] = batch["caption"]
    draws = torch.rand(len(captions), generator=rng, device=rng.device).tolist()
    texts = ["" if draw < drop else text for draw, text in zip(draws, captions, strict=True)]
    return model.read(texts, 0.0, random.Random(0), batch["latent"].device)  # noqa: S311  a seed, no secret


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
class MaskedFilmObjective:
    """Noise and variance of the cells that a mask leaves to be made; the model's denoiser is a `Completing`.

    Each film draws a recipe, and a mask of it on latent cells. Known cells stand clean in the input and their error does not
    count, in neither part of the loss (the released code leaves the variances of known cells in the bound, though no sampler
    looks at them, and draws one mask for a batch). Every cell to be made counts alike.
    """

    masks: dict[str, float] = field(default_factory=lambda: dict(RELEASED))
    """Proportions of `tubelet.tasks.masks`."""

    def __post_init__(self) -> None:
        check_shares(self.masks)

    def __call__(self, model: TextToVideo, batch: dict[str, Any], rng: torch.Generator) -> dict[str, Tensor]:
        """Returns "loss" and, as `hybrid_loss`, its parts "simple" and "vlb"."""
        denoiser, latents = model.denoiser, batch["latent"].float()
        assert isinstance(denoiser, Completing), "a network that is given cells"
        size = (latents.shape[2], latents.shape[3], latents.shape[4])
        # The small draws of a mask would each wait for an accelerator.
        dice = torch.Generator().manual_seed(int(torch.randint(2**31 - 1, (), generator=rng, device=rng.device)))
        made = torch.stack([MASKS[draw_name(self.masks, dice)](size, dice) for _ in latents]).to(latents)  # (B, T, H, W)
        network = functools.partial(denoiser.network, clean=latents, mask=1 - made)
        return hybrid_loss(network, latents, rng, denoiser.path, mask=made[:, None])


@dataclass(frozen=True, kw_only=True)
class FilmObjective:
    """v of whole films, with self-conditioning where the model's denoiser, a `Recalling`, has it.

    With `frame_prediction` films are continued, too: their first frames are told beside the noise, in which they stay; the
    error of all frames counts, so that an estimate means something everywhere.
    """

    text_drop: float = 0.1
    """Share of captions emptied."""
    self_conditioning: float = 0.9
    """How often a network that recalls is given an estimate."""
    frame_prediction: float = 0.0
    """Share of films whose first latent frame, or as often the first two, are given; above 0 for a W.A.L.T with `predict`."""
    image_share: float = 0.0
    """Share of steps on the first latent frame alone."""

    def __post_init__(self) -> None:
        for name in ("text_drop", "self_conditioning", "frame_prediction", "image_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise UserError(f"{name} is a share and must lie in [0, 1], got {getattr(self, name)}; correct it")

    def __call__(self, model: TextToVideo, batch: dict[str, Any], rng: torch.Generator) -> dict[str, Tensor]:
        """Returns "loss", as `v_loss`."""
        denoiser = model.denoiser
        assert isinstance(denoiser, Recalling), "a network of films that predicts v"
        condition = read_words(model, batch, self.text_drop, rng)
        share = self.self_conditioning if denoiser.recalls else 0.0
        latents, told = batch["latent"], {}
        if self.image_share and float(torch.rand((), generator=rng, device=rng.device)) < self.image_share:
            latents = latents[:, :, :1]
        elif self.frame_prediction:
            told = {"clean": latents.float(), "known": self._first_frames(latents, rng)}

        def network(z: Tensor, t: Tensor, estimate: Tensor | None) -> Tensor:
            return denoiser.network(z, t, text=condition, estimate=estimate, **told)

        return v_loss(network, latents, rng, denoiser.path, share)

    def _first_frames(self, latents: Tensor, rng: torch.Generator) -> Tensor:
        """`(B, T)`, 1 where a frame of latents `(B, C, T, h, w)` is given."""
        B, T = len(latents), latents.shape[2]
        whether, how_many = torch.rand(2, B, generator=rng, device=rng.device).to(latents.device)  # (B,) each
        count = (whether < self.frame_prediction).long() * (1 + (how_many < 0.5).long())  # (B,)
        return (torch.arange(T, device=latents.device) < count[:, None]).float()
