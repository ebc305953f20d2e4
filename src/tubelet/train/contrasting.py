"""What a CLIP is trained on: clips and captions that belong together, each against all others of its batch (figure 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tubelet.core.errors import UserError
from tubelet.models.clip import CLIP, loss
from tubelet.text.bpe import PAD, Tokenizer
from tubelet.train.classify import as_pixels


def read(tokenizer: Tokenizer, captions: Sequence[str], limit: int) -> Tensor:
    """Captions as ids `(B, L)`, each closed by the end token, the largest id; of a longer one than `limit` the end is cut."""
    end = tokenizer.size
    rows = [[*tokenizer.encode(text)[: limit - 1], end] for text in captions]
    longest = max(len(row) for row in rows)
    return torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])  # (B, L)


@dataclass(frozen=True)
class ContrastObjective:
    """`(model, batch, rng) -> losses`; a batch has `video (B, T, H, W, 3)` uint8 and a `caption` for each clip."""

    tokenizer: Tokenizer

    def __call__(self, model: CLIP, batch: dict[str, Any], rng: torch.Generator) -> dict[str, Tensor]:
        """Returns "loss" and "accuracy": in which share of the batch a clip's own caption is the nearest."""
        missing = [name for name in ("video", "caption") if name not in batch]
        if missing:
            raise UserError(f"a CLIP is trained on clips with captions, the batch lacks {missing[0]!r}; render them first")
        pixels = as_pixels(batch["video"])  # (B, 3, T, H, W)
        output = model(pixels, read(self.tokenizer, batch["caption"], model.config.context).to(pixels.device))
        own = torch.arange(len(pixels), device=pixels.device)
        return {"loss": loss(output), "accuracy": (output.logits.detach().argmax(1) == own).float().mean()}
