"""The loss that pulls what belongs together to one place: pairs of a batch against all others of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tubelet.core.errors import UserError


def contrastive_loss(logits: Tensor) -> Tensor:
    """Symmetric cross-entropy of scaled similarities `(B, B)` in which row i belongs with column i, in nats, `()`.

    The mean of both directions (CLIP, Radford et al. 2021, figure 3). A batch of one has nothing to tell apart and loses 0.
    Raises UserError when the matrix is not square.
    """
    if logits.ndim != 2 or logits.shape[0] != logits.shape[1]:
        raise UserError(f"similarities must be square, got {tuple(logits.shape)}; give as many images as texts")
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits.float(), own) + F.cross_entropy(logits.float().T, own)) / 2
