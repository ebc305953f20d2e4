"""What a video classifier is trained on: name the event of a clip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tubelet.core.errors import UserError


@dataclass(frozen=True)
class ClassifyObjective:
    """`(model, batch, rng) -> losses`; a batch has `video (B, T, H, W, 3)` uint8 and `label (B,)`, the model gives logits."""

    smoothing: float = 0.05
    """Label smoothing (Szegedy et al. 2016, section 7)."""

    def __call__(self, model: nn.Module, batch: dict[str, Any], rng: torch.Generator) -> dict[str, Tensor]:
        """Returns "loss" (cross-entropy) and "accuracy"."""
        missing = [name for name in ("video", "label") if name not in batch]
        if missing:
            raise UserError(f"a classifier is trained on clips with labels, the batch lacks {missing[0]!r}; render them first")
        label = batch["label"].long()
        logits = model(as_pixels(batch["video"])).float()  # (B, classes)
        accuracy = (logits.detach().argmax(1) == label).float().mean()
        return {"loss": F.cross_entropy(logits, label, label_smoothing=self.smoothing), "accuracy": accuracy}


def as_pixels(video: Tensor) -> Tensor:
    """uint8 `(B, T, H, W, 3)` to float `(B, 3, T, H, W)` in [-1, 1]."""
    return video.permute(0, 4, 1, 2, 3).float().div(127.5).sub(1.0)  # (B, 3, T, H, W)
