"""What a captioner is trained on: tell captions from each other, and say the next token (CoCa, Yu et al. 2022, section 4.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tubelet.core.errors import UserError
from tubelet.models.coca import CoCa, losses
from tubelet.text.writing import Writing
from tubelet.train.classify import as_pixels


@dataclass(frozen=True)
class CaptionObjective:
    """`(model, batch, rng) -> losses`; a batch has `video (B, T, H, W, 3)` uint8, `caption`s and the `style` of each."""

    writing: Writing

    def __call__(self, model: CoCa, batch: dict[str, Any], rng: torch.Generator) -> dict[str, Tensor]:
        """Returns "loss", "captioning" and "contrastive"."""
        missing = [name for name in ("video", "caption", "style") if name not in batch]
        if missing:
            raise UserError(f"a captioner is trained on clips with captions, the batch lacks {missing[0]!r}; render them first")
        pixels = as_pixels(batch["video"])  # (B, 3, T, H, W)
        ids, mask = (value.to(pixels.device) for value in self.writing.encode(batch["caption"], batch["style"]))
        return losses(model(pixels, ids, mask), ids, mask)
