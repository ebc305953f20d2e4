"""What a text-to-video system is trained on: denoise captioned latents at random noise levels, text encoder included.

The captions of a share of samples are emptied, so that the same network also knows the unconditional score and guidance
has something to steer away from (Ho & Salimans 2022, algorithm 1). A share of steps sees only the first latent frame: an
image is a one-frame film, and images and films are learned together (Sora report; W.A.L.T, section 3.1).

A step may see some frames of each clip instead of all, each at its own place in time: positions are rotary, so frames 2, 3, 9
and 14 of a film are a film too. It costs what it shows, as NaViT's dropped tokens do (Dehghani et al. 2023, section 3.2), and
teaches where things go before all frames teach how they get there.

A step may also be told some of its films: a mask says which cells are known, and one network learns every task.
"""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tubelet.core.errors import UserError
from tubelet.core.types import Condition
from tubelet.diffusion.objectives import Prediction, flow_loss, packed_flow_loss
from tubelet.diffusion.paths import SigmaSampling
from tubelet.nn.patch import Grid, patch_positions, token_grid
from tubelet.tasks.masks import MASKS, check_shares, draw_name
from tubelet.text.base import TextEncoder
from tubelet.text.own import OwnTextEncoder


class TextToVideo(nn.Module):
    """`text` (prompts -> states) and `denoiser` (latents, sigma, states -> output); they learn together, or text is frozen."""

    def __init__(self, text: TextEncoder, denoiser: nn.Module) -> None:
        super().__init__()
        self.text, self.denoiser = text, denoiser

    @property
    def patch(self) -> Grid:
        """Latent frames, rows and columns that one token of the denoiser spans."""
        return self.denoiser.config.patch  # type: ignore[union-attr, return-value]

    def forward(self, z: Tensor, sigma: Tensor, condition: Condition, positions: Tensor | None = None) -> Tensor:
        return self.denoiser(z, sigma, condition, positions)

    def forward_packed(
        self,
        z: Sequence[Tensor],
        sigma: Sequence[Tensor],
        condition: Condition,
        positions: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """`forward` for S samples `(C, T, H, W)` of any sizes."""
        return self.denoiser.forward_packed(z, sigma, condition, positions)  # type: ignore[operator]

    def read(
        self, captions: Sequence[str], split: float, rng: random.Random, device: torch.device, whole: bool = False
    ) -> Condition:
        """Token states of a step's captions; `split` as in `Tokenizer.encode`, where the encoder learns. `whole`: such an
        encoder gets as many tokens as it ever reads, the last of them padding."""
        if isinstance(self.text, OwnTextEncoder):
            ids, mask = self.text.tokenize(captions, split=split, rng=rng)
            if whole:
                more = self.text.config.max_tokens - ids.shape[1]
                ids, mask = F.pad(ids, (0, more)), F.pad(mask, (0, more))  # (B, max_tokens)
            return self.text(ids.to(device), mask.to(device))
        condition = self.text.encode(captions)
        return Condition(condition.states.to(device), condition.mask.to(device))


def some_frames(count: int, shape: Grid, patch: Grid, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` token frames of latents of `shape` (T, H, W), in order: the latent frames they span and their tokens' places.

    Every token frame is as likely as any other; where a patch spans several frames the first is always among them, since it
    is a patch of another kind. Returns int64 `(T',)` and `(L', 3)`, as `patch_positions`.
    """
    t, h, w = token_grid(shape, patch)
    order = torch.rand(t, generator=rng, device=rng.device).cpu()
    if patch[0] > 1:
        order[0] = -1.0
    kept = order.argsort()[:count].sort().values  # (count,)
    first, span = kept * patch[0] - (patch[0] - 1), torch.arange(patch[0])
    frames = (first[:, None] + span).flatten()
    places = patch_positions((t, h, w), patch).view(t, h * w, 3)[kept].flatten(0, 1)  # (L', 3)
    return frames[frames >= 0], places


def in_cells(masks: Tensor, patch: Grid) -> Tensor:
    """Masks of tokens `(B, t, h, w)` as masks of latent cells: a patch is known or not as a whole.

    `(B, T, H, W)`, or `(B, T)` where no mask differs between cells of a frame: a noise level per frame costs less than one per
    cell.
    """
    masks = torch.cat([masks[:, :1], masks[:, 1:].repeat_interleave(patch[0], 1)], dim=1)  # (B, T, h, w)
    if bool((masks == masks[:, :, :1, :1]).all()):
        return masks[:, :, 0, 0]
    return masks.repeat_interleave(patch[1], 2).repeat_interleave(patch[2], 3)  # (B, T, H, W)


def _dice(rng: torch.Generator) -> torch.Generator:
    """`rng`, or on an accelerator a CPU generator seeded by it: a hundred small draws there would each wait for the device."""
    if rng.device.type == "cpu":
        return rng
    return torch.Generator().manual_seed(int(torch.randint(2**31 - 1, (), generator=rng, device=rng.device)))


@dataclass(frozen=True, kw_only=True)
class TextToVideoObjective:
    """`(model, batch, rng) -> losses`; a batch has `latent (B, C, T, h, w)`, `foreground (B, T, h, w)` uint8 and `caption`.

    A pack (`data.stream.PackStream`) has lists of S latents `(C, T, h, w)` and foregrounds `(T, h, w)` of any sizes instead.
    """

    prediction: Prediction = "skip"
    sampling: SigmaSampling = field(default_factory=SigmaSampling)
    text_drop: float = 0.1
    """Share of captions emptied."""
    split: float = 0.1
    """Chance that a merge of the tokenizer is left out, so that words no caption has are made of pieces that were trained."""
    image_share: float = 0.1
    """Share of steps on the first latent frame alone."""
    frames: int = 0
    """Token frames that a step on films sees of each clip, drawn anew for each step; 0: all."""
    masks: dict[str, float] = field(default_factory=dict)
    """Proportions of `tubelet.tasks.masks` among steps on films; "unconditional" is plain text to video. Empty: only that."""
    haze: float = 0.0
    """Greatest noise level at which what a mask leaves known is shown; each sample draws its own below it."""
    foreground: float = 4.0
    """Weight of a cell full of saturated colour against 1 for the rest."""
    uniform: bool = False
    """Films of one size take one form: captions are padded to the longest that the own encoder reads and noise levels stand per
    frame, so that a network that is compiled has one graph for each size. What takes another form, images and masks that
    part the cells of a frame, is computed as it is. Values are the same to rounding."""

    def __post_init__(self) -> None:
        for name in ("text_drop", "split", "image_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise UserError(f"{name} is a share and must lie in [0, 1], got {getattr(self, name)}; correct it")
        if self.frames < 0:
            raise UserError(f"frames must be at least 0, got {self.frames}; 0 is all")
        if not 0.0 <= self.haze < 1.0:
            raise UserError(f"haze is a noise level and must lie in [0, 1), got {self.haze}; 0 shows what is known clean")
        if self.foreground < 0.0:
            raise UserError(f"foreground must be at least 0, got {self.foreground}; 1 weighs all cells alike")
        if self.masks:
            check_shares(self.masks)

    def __call__(self, model: TextToVideo, batch: dict[str, Any], rng: torch.Generator) -> dict[str, Tensor]:
        """Returns "loss" (velocity space) and its quartiles over sigma."""
        missing = [name for name in ("latent", "foreground", "caption") if name not in batch]
        if missing:
            raise UserError(
                f"text-to-video is trained on latents with captions, the batch lacks {missing[0]!r}; encode the clips first"
            )
        if isinstance(batch["latent"], list):
            return self._packed(model, batch, rng)
        latents, foreground = batch["latent"].float(), batch["foreground"]
        draws = torch.rand(len(latents) + 1, generator=rng, device=rng.device).tolist()
        captions = ["" if draw < self.text_drop else text for text, draw in zip(batch["caption"], draws[1:], strict=True)]
        network: Any = model
        masked: dict[str, Any] = {}
        if draws[0] < self.image_share:
            latents, foreground = latents[:, :, :1], foreground[:, :1]
        elif self.frames:
            shape = (latents.shape[2], latents.shape[3], latents.shape[4])
            kept, places = some_frames(self.frames, shape, model.patch, rng)
            latents, foreground = latents[:, :, kept], foreground[:, kept]
            network = functools.partial(model, positions=places.to(latents.device))
        if self.masks and latents.shape[2] > 1:
            masked = self._masked(latents, model.patch, rng)
        if self.uniform and latents.shape[2] > 1 and not masked:
            masked = {"mask": latents.new_ones(len(latents), latents.shape[2])}  # (B, T): nothing is known
        odd = self.uniform and ("mask" not in masked or masked["mask"].ndim == 4)
        share = foreground[:, None].float() / 255  # (B, 1, T, h, w)
        t, h, w = token_grid((latents.shape[2], latents.shape[3], latents.shape[4]), model.patch)
        chance = random.Random(int(draws[0] * 2**32))  # noqa: S311  a seed, no secret
        with torch.compiler.set_stance("force_eager") if odd else contextlib.nullcontext():
            condition = model.read(captions, self.split, chance, latents.device, whole=self.uniform)
            return flow_loss(
                network,
                latents,
                condition,
                rng,
                sampling=self.sampling,
                weight=1 + (self.foreground - 1) * share,
                tokens=t * h * w,
                prediction=self.prediction,
                **masked,
            )

    def _masked(self, latents: Tensor, patch: Grid, rng: torch.Generator) -> dict[str, Any]:
        """One recipe for the step, a mask of its own and a haze for each sample. Nothing where all is to be made."""
        name = draw_name(self.masks, rng)
        if name == "unconditional":
            return {}
        grid = token_grid((latents.shape[2], latents.shape[3], latents.shape[4]), patch)
        dice = _dice(rng)
        masks = in_cells(torch.stack([MASKS[name](grid, dice) for _ in range(len(latents))]), patch)
        haze = self.haze * torch.rand(len(latents), generator=rng, device=rng.device)
        return {"mask": masks.to(latents.device), "haze": haze.to(latents.device)}

    def _packed(self, model: TextToVideo, batch: dict[str, Any], rng: torch.Generator) -> dict[str, Tensor]:
        draws = torch.rand(len(batch["latent"]) + 1, generator=rng, device=rng.device).tolist()
        captions = ["" if draw < self.text_drop else text for text, draw in zip(batch["caption"], draws[1:], strict=True)]
        latents: list[Tensor] = []
        weights: list[Tensor] = []
        places: list[Tensor] = []
        masks: list[Tensor | None] = []
        hazes: list[float] = []
        patch, dice = model.patch, _dice(rng)
        for one, foreground in zip(batch["latent"], batch["foreground"], strict=True):
            image, haze = torch.rand(2, generator=rng, device=rng.device).tolist()
            grid = token_grid((one.shape[1], one.shape[2], one.shape[3]), patch)
            if image < self.image_share:
                kept, own = torch.arange(1), patch_positions((1, *grid[1:]), patch)
            else:
                kept, own = some_frames(self.frames or grid[0], (one.shape[1], one.shape[2], one.shape[3]), patch, rng)
            shown = (len(own) // (grid[1] * grid[2]), *grid[1:])  # tokens (t, h, w) of what is kept
            name = draw_name(self.masks, rng) if self.masks and shown[0] > 1 else "unconditional"
            masks.append(None if name == "unconditional" else in_cells(MASKS[name](shown, dice)[None], patch)[0])
            hazes.append(haze * self.haze)
            latents.append(one[:, kept].float())
            weights.append(1 + (self.foreground - 1) * foreground[None, kept].float() / 255)  # (1, T', h, w)
            places.append(own.to(one.device))
        chance = random.Random(int(draws[0] * 2**32))  # noqa: S311  a seed, no secret
        condition = model.read(captions, self.split, chance, latents[0].device)
        return packed_flow_loss(
            functools.partial(model.forward_packed, positions=places),
            latents,
            condition,
            rng,
            sampling=self.sampling,
            weight=weights,
            mask=masks,
            haze=hazes,
            tokens=[len(own) for own in places],
            prediction=self.prediction,
        )
