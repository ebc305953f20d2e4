"""Tasks in space: make what a mask covers, keep the rest.

Pixels become latent cells: a cell is made anew if any of its pixels is to be made, so that nothing of what is to go away is
seen by the network. The pixels outside the mask are put back after decoding, exactly.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tubelet.core.errors import UserError
from tubelet.core.types import Strides
from tubelet.tasks.given import Given


def cells(mask: Tensor, strides: Strides) -> Tensor:
    """A pixel mask `(B, T, H, W)`, above .5 where to be made, as a mask of latent cells `(B, T', h, w)` of 0 and 1."""
    T = strides.latent_shape(mask.shape[1], mask.shape[2], mask.shape[3])[0]
    hot = (mask > 0.5).float()
    small = F.max_pool2d(hot, (strides.h, strides.w))  # (B, T, h, w)
    if strides.t == 1:
        return small
    rest = small[:, 1:].unflatten(1, (T - 1, strides.t)).amax(2) if T > 1 else small[:, 1:]
    return small[:, :1] if T == 1 else F.pad(rest, (0, 0, 0, 0, 1, 0)) + F.pad(small[:, :1], (0, 0, 0, 0, 0, T - 1))


def in_pixels(mask: Tensor, strides: Strides) -> Tensor:
    """The pixels `(B, T, H, W)` that a mask of latent cells `(B, T', h, w)` covers: what `cells` turns back into it."""
    frames = torch.cat([mask[:, :1], mask[:, 1:].repeat_interleave(strides.t, 1)], dim=1)  # (B, T, h, w)
    return frames.repeat_interleave(strides.h, 2).repeat_interleave(strides.w, 3)


def inpaint(clean: Tensor, mask: Tensor, strides: Strides) -> Given:
    """Make what a pixel mask `(B, T, H, W)` covers of a film whose latents are `clean`.

    Raises UserError when the mask has another size or covers nothing.
    """
    small = cells(mask, strides)
    if small.shape != (clean.shape[0], *clean.shape[2:]):
        raise UserError(
            f"the mask covers {tuple(mask.shape[1:])} pixels (T, H, W), the film has latents {tuple(clean.shape[2:])}; "
            "give a mask of the film's size"
        )
    if not bool(small.any()):
        raise UserError("the mask covers nothing; mark what is to be made in white")
    return Given(clean, small)


def around(film: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A film `(B, 3, T, H, W)` in the middle of a larger canvas, and the mask `(T, *size)` of what is to be made around it.

    Its edge is repeated outwards, so that the codec sees nothing foreign beside it. Raises UserError when the canvas is not
    larger.
    """
    tall, wide = size[0] - film.shape[3], size[1] - film.shape[4]
    if min(tall, wide) < 0 or max(tall, wide) == 0:
        raise UserError(f"a canvas of {size[0]}x{size[1]} leaves nothing around {film.shape[3]}x{film.shape[4]}; enlarge it")
    top, left = tall // 2, wide // 2
    canvas = F.pad(film, (left, wide - left, top, tall - top, 0, 0), mode="replicate")  # (B, 3, T, *size)
    mask = film.new_ones(film.shape[2], *size)
    mask[:, top : top + film.shape[3], left : left + film.shape[4]] = 0
    return canvas, mask


def box(
    shape: tuple[int, int, int], top: int, left: int, bottom: int, right: int, begin: int = 0, end: int | None = None
) -> Tensor:
    """A mask `(T, H, W)` that covers rows `top` to `bottom`, columns `left` to `right`, frames `begin` to `end` (excluded).

    Raises UserError when the box covers nothing or leaves the film.
    """
    T, H, W = shape
    end = T if end is None else end
    if not (0 <= top < bottom <= H and 0 <= left < right <= W and 0 <= begin < end <= T):
        raise UserError(
            f"the box {top},{left},{bottom},{right} of frames {begin} to {end} is empty or leaves the film of {T} frames of "
            f"{H}x{W}; give top,left,bottom,right inside it"
        )
    mask = torch.zeros(shape)
    mask[begin:end, top:bottom, left:right] = 1
    return mask


def put_back(made: Tensor, original: Tensor, mask: Tensor) -> Tensor:
    """The film `made` inside the mask `(B, T, H, W)`, `original` outside, `(B, 3, T, H, W)` each; soft masks blend."""
    soft = mask[:, None].clamp(0, 1)
    return soft * made + (1 - soft) * original
