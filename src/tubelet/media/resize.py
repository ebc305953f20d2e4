"""Change the height and width of a video, antialiased, with a stated rule for a different aspect ratio."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from tubelet.core.errors import UserError

Fit = Literal["crop", "pad", "stretch"]
Mode = Literal["bicubic", "area"]
FITS: tuple[str, ...] = ("crop", "pad", "stretch")
MODES: tuple[str, ...] = ("bicubic", "area")


def resize(
    pixels: Tensor, size: tuple[int, int], *, fit: Fit = "crop", mode: Mode = "bicubic", background: float = -1.0
) -> Tensor:
    """Resize `(B, C, T, H, W)` to `(B, C, T, *size)`, floating point, same range of values.

    `fit`: `crop` keeps the aspect ratio and cuts the longer side evenly, `pad` keeps it and fills up with `background`,
    `stretch` does not keep it. `mode`: `bicubic` (Keys 1981, a = -0.5 with the kernel widened when shrinking; overshoot is
    clipped to the input's range) or `area` (mean over the covered cells).
    Raises UserError for an impossible size or an unknown rule.
    """
    assert pixels.ndim == 5, f"pixels are (B, C, T, H, W), got {tuple(pixels.shape)}"
    assert pixels.is_floating_point(), "resize works on floating point; convert uint8 first"
    height, width = size
    if height < 1 or width < 1:
        raise UserError(f"size must be at least 1x1, got {height}x{width}; give height x width in pixels")
    if fit not in FITS:
        raise UserError(f"there is no fit {fit!r}; choose one of {', '.join(FITS)}")
    if mode not in MODES:
        raise UserError(f"there is no resize mode {mode!r}; choose one of {', '.join(MODES)}")
    source_height, source_width = pixels.shape[-2:]
    if (source_height, source_width) == (height, width):
        return pixels
    if fit == "crop":
        # Cutting before scaling costs less, and is off by less than one source pixel.
        scale = min(source_height / height, source_width / width)
        kept_height = min(source_height, max(1, round(height * scale)))
        kept_width = min(source_width, max(1, round(width * scale)))
        top, left = (source_height - kept_height) // 2, (source_width - kept_width) // 2
        pixels = pixels[..., top : top + kept_height, left : left + kept_width]  # (B, C, T, kept height, kept width)
        return _interpolate(pixels, height, width, mode)
    if fit == "pad":
        scale = min(height / source_height, width / source_width)
        inner_height = min(height, max(1, round(source_height * scale)))
        inner_width = min(width, max(1, round(source_width * scale)))
        inner = _interpolate(pixels, inner_height, inner_width, mode)
        top, left = (height - inner_height) // 2, (width - inner_width) // 2
        edges = (left, width - inner_width - left, top, height - inner_height - top)
        return F.pad(inner, edges, value=background)  # (B, C, T, height, width)
    return _interpolate(pixels, height, width, mode)


def _interpolate(pixels: Tensor, height: int, width: int, mode: Mode) -> Tensor:
    B, C, T, H, W = pixels.shape
    if (height, width) == (H, W):
        return pixels
    images = pixels.transpose(1, 2).reshape(B * T, C, H, W)  # (B*T, C, H, W)
    if mode == "area":
        images = F.interpolate(images, (height, width), mode="area")  # (B*T, C, height, width)
    else:
        low, high = images.amin(), images.amax()
        images = F.interpolate(images, (height, width), mode="bicubic", antialias=True)  # (B*T, C, height, width)
        images = images.clamp(low, high)
    return images.reshape(B, T, C, height, width).transpose(1, 2)  # (B, C, T, height, width)
