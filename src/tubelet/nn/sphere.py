"""Ways on the unit sphere."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tubelet.core.errors import UserError


def slerp(a: Tensor, b: Tensor, share: float | Tensor) -> Tensor:
    """Between `a (..., E)` and `b (..., E)` along the sphere: a at share 0, b at 1, both exactly (Shoemake 1985).

    `share` is a number or broadcasts to `(..., 1)`. Unit vectors stay unit vectors; of others, noise for one, the angle is
    that of their directions. Raises UserError when two vectors are opposite, since no way between them is the shortest.
    """
    u, v = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    # Not the arc cosine: it loses half of the digits between near vectors.
    angle = 2 * torch.atan2((u - v).norm(dim=-1, keepdim=True), (u + v).norm(dim=-1, keepdim=True))  # (..., 1)
    sine = angle.sin()
    if bool((angle > 3.14).logical_and(sine < 1e-4).any()):
        raise UserError("opposite vectors have no shortest way between them; go through a third one")
    near = angle < 1e-4
    share = torch.as_tensor(share, dtype=angle.dtype, device=angle.device)
    safe = sine.masked_fill(near, 1.0)
    left = torch.where(near, 1 - share, ((1 - share) * angle).sin() / safe)
    right = torch.where(near, share.expand_as(angle), (share * angle).sin() / safe)
    return left * a + right * b
