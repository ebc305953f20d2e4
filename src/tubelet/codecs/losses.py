"""What a codec is trained on: weighted reconstruction under noisy latents, without KL, perceptual or adversarial terms.

Noise on the latents in place of a KL term follows l-DeTok (Yang et al. 2025, section 3.2). Small moving things carry the
meaning of a clip and few of its pixels, so saturated pixels weigh more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tubelet.codecs.base import Codec
from tubelet.core.errors import UserError


@dataclass(frozen=True)
class CodecLossConfig:
    """Weights of the terms; all errors are of pixels in [-1, 1]."""

    l1: float = 1.0
    l2: float = 1.0
    gradient: float = 1.0
    """Difference of horizontal and vertical pixel differences: edges."""
    temporal: float = 0.0
    """Difference of frame-to-frame differences: flicker."""
    foreground: float = 5.0
    """Weight of foreground pixels against 1 for the rest."""
    noise: float = 0.2
    """Largest latent noise, relative to the batch's deviation per channel; each clip draws its level uniformly from 0 to it."""

    def __post_init__(self) -> None:
        terms = {name: getattr(self, name) for name in ("l1", "l2", "gradient", "temporal")}
        if min(terms.values()) < 0.0 or sum(terms.values()) <= 0.0:
            raise UserError(f"weights {', '.join(terms)} of a codec's loss must be at least 0 and not all 0; correct them")
        if self.foreground <= 0.0 or self.noise < 0.0:
            raise UserError(
                f"foreground must be above 0 and noise at least 0, got {self.foreground} and {self.noise}; correct them"
            )


def foreground_mask(pixels: Tensor, threshold: float = 0.25, reach: int = 2) -> Tensor:
    """Where saturated colour is, grown by `reach` pixels: `(B, 3, T, H, W)` in [-1, 1] to bool `(B, 1, T, H, W)`.

    Chroma is max(rgb) - min(rgb) as a share of the full range. The worlds paint objects in saturated colours (chroma above .45)
    and all else in greys (below .1).
    """
    chroma = (pixels.amax(1) - pixels.amin(1)) / 2  # (B, T, H, W)
    hot = (chroma > threshold).to(pixels.dtype)
    # A square maximum is one along rows, then one along columns.
    grown = F.max_pool2d(hot, (1, 2 * reach + 1), stride=1, padding=(0, reach))
    grown = F.max_pool2d(grown, (2 * reach + 1, 1), stride=1, padding=(reach, 0))
    return grown[:, None] > 0.5  # (B, 1, T, H, W)


def psnr(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio in dB of pixels in [-1, 1], `(B, 3, T, H, W)` each, clipped to that range; a scalar.

    `mask (B, 1 or 3, T, H, W)` restricts it to pixels that are True or 1. Where nothing is left to compare, or nothing differs,
    it is 99.
    """
    error = (a.float().clamp(-1, 1) - b.float().clamp(-1, 1)).square()
    if mask is None:
        return _decibels(error.mean())
    chosen = mask.expand_as(error)
    return _decibels((error * chosen).sum() / chosen.sum().clamp(min=1))


def _decibels(square: Tensor) -> Tensor:
    """Mean squared error of pixels in [-1, 1], whose peak is 2, as a PSNR up to 99."""
    return -10 * (square / 4).clamp(min=10**-9.9).log10()


def to_pixels(video: Tensor) -> Tensor:
    """uint8 `(B, T, H, W, 3)`, or float `(B, 3, T, H, W)` in [-1, 1] as it is, to float `(B, 3, T, H, W)` in [-1, 1]."""
    if video.ndim != 5:
        raise UserError(f"a batch of video has five axes, got {tuple(video.shape)}; stack clips of one size")
    if video.dtype == torch.uint8:
        return video.permute(0, 4, 1, 2, 3).float().div(127.5).sub(1.0)  # (B, 3, T, H, W)
    return video


def codec_loss(codec: Codec, video: Tensor, rng: torch.Generator, config: CodecLossConfig | None = None) -> dict[str, Tensor]:
    """Encode, disturb, decode, compare.

    `video` is uint8 `(B, T, H, W, 3)` or float `(B, 3, T, H, W)` in [-1, 1]. Returns scalars: `loss` to be minimised, its
    unweighted terms `l1`, `l2`, `gradient` and, where it has a weight and there is more than one frame, `temporal`; and without
    gradient `psnr`, `psnr_foreground`: dB of what came back through the noise, not clipped.
    """
    config = config or CodecLossConfig()
    pixels = to_pixels(video)
    raw = codec.encode_raw(pixels)  # (B, C, T', h, w)
    # Relative to the deviation: an encoder cannot escape the noise by growing its latents.
    deviation = raw.detach().std(dim=(0, 2, 3, 4), correction=0, keepdim=True)
    level = config.noise * torch.rand(len(raw), 1, 1, 1, 1, generator=rng, device=raw.device)
    noise = torch.randn(raw.shape, generator=rng, device=raw.device)
    restored = codec.decode_raw(raw + level * deviation * noise)  # (B, 3, T, H, W)

    error = restored - pixels
    # Written out in the memory order of the errors: broadcasting over three innermost channels is slow on a CPU.
    foreground = torch.empty_like(pixels).copy_(foreground_mask(pixels))
    weight = 1 + (config.foreground - 1) * foreground
    weight = weight / weight.mean()
    down = (error[..., 1:, :] - error[..., :-1, :]).abs() * weight[..., 1:, :]
    right = (error[..., 1:] - error[..., :-1]).abs() * weight[..., 1:]
    square = error.square()
    terms = {
        "l1": (error.abs() * weight).mean(),
        "l2": (square * weight).mean(),
        "gradient": (down.mean() + right.mean()) / 2,
    }
    if config.temporal and error.shape[2] > 1:
        terms["temporal"] = ((error[:, :, 1:] - error[:, :, :-1]).abs() * weight[:, :, 1:]).mean()
    loss = sum((getattr(config, name) * value for name, value in terms.items()), error.new_zeros(()))
    square = square.detach()
    report = {
        "psnr": _decibels(square.mean()),
        "psnr_foreground": _decibels((square * foreground).sum() / foreground.sum().clamp(min=1)),
    }
    return {"loss": loss, **terms, **report}


@dataclass(frozen=True)
class CodecObjective:
    """The training loop's objective for a codec: `(model, batch, rng) -> losses`, of which `loss` is optimised."""

    config: CodecLossConfig = CodecLossConfig()

    def __call__(self, model: Codec, batch: dict[str, Any], rng: torch.Generator) -> dict[str, Tensor]:
        """`batch["video"]` is uint8 `(B, T, H, W, 3)`."""
        if "video" not in batch:
            raise UserError(
                f"a codec is trained on 'video', the batch has {', '.join(batch) or 'nothing'}; read shards of pixels"
            )
        return codec_loss(model, batch["video"], rng, self.config)
