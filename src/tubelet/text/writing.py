"""Captions as a captioner's ids and back: a start token for each style, the tokenizer's tokens, an end token.

A caption begins with a token that says its style, so that one network writes short and dense ones (the two fine-tunings of
DALL-E 3, Betker et al. 2023, section 2.1, as one).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tubelet.core.errors import UserError
from tubelet.text.bpe import PAD, Tokenizer

STYLES = ("short", "dense")


@dataclass(frozen=True)
class Writing:
    """Captions as ids of a captioner: those of `tokenizer`, one start token for each style, one end token."""

    tokenizer: Tokenizer
    limit: int = 128
    """Tokens of the longest caption, start and end included."""

    @property
    def size(self) -> int:
        """How many ids there are."""
        return self.tokenizer.size + len(STYLES) + 1

    @property
    def end(self) -> int:
        return self.tokenizer.size + len(STYLES)

    def start(self, style: str) -> int:
        """The token that a caption of a style begins with. Raises UserError on an unknown style."""
        if style not in STYLES:
            raise UserError(f"there is no style {style!r} of caption; choose {' or '.join(STYLES)}")
        return self.tokenizer.size + STYLES.index(style)

    def encode(self, captions: Sequence[str], styles: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids `(B, L)` and mask `(B, L)`. A caption that is too long loses its end, and its end token."""
        rows = [
            [self.start(style), *self.tokenizer.encode(text), self.end][: self.limit]
            for text, style in zip(captions, styles, strict=True)
        ]
        longest = max(len(row) for row in rows)
        ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])  # (B, L)
        lengths = torch.tensor([len(row) for row in rows])
        return ids, torch.arange(longest) < lengths[:, None]

    def decode(self, ids: Tensor) -> list[str]:
        """The captions of `(B, L)`, up to the end token."""
        texts = []
        for row in ids.tolist():
            upto = row.index(self.end) if self.end in row else len(row)
            texts.append(self.tokenizer.decode([i for i in row[:upto] if i < self.tokenizer.size and i != PAD]))
        return texts
