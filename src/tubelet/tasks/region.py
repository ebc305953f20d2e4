"""Tasks in space: make what a mask covers, keep the rest.

Pixels become latent cells: a cell is made anew if any of its pixels is to be made, so that nothing of what is to go away is
seen by the network. The pixels outside the mask are put back after decoding, exactly.
"""

from __future__ import annotations

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


def put_back(made: Tensor, original: Tensor, mask: Tensor) -> Tensor:
    """The film `made` inside the mask `(B, T, H, W)`, `original` outside, `(B, 3, T, H, W)` each; soft masks blend."""
    soft = mask[:, None].clamp(0, 1)
    return soft * made + (1 - soft) * original
