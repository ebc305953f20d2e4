"""CLIP's text tower as Stable Diffusion reads it: the states of all 77 tokens after the last norm, padding included.

After Radford et al. 2021 (section 2.4) and High-Resolution Image Synthesis with Latent Diffusion Models (Rombach et al. 2022,
2112.10752). Stable Diffusion 1 was trained with every row filled up to 77 and nothing masked, so a padded token is as real as
any other. Weights and tokenizer come from a checkpoint's folder (`tubelet.generate.layouts`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tubelet.core.errors import UserError
from tubelet.core.types import Condition
from tubelet.nn.blocks import EncoderBlock
from tubelet.text.base import TextEncoder
from tubelet.text.clip_bpe import CLIPTokenizer

EPS = 1e-5


@dataclass(frozen=True)
class CLIPTextConfig:
    """Sizes of a text tower. Raises UserError when they do not fit each other."""

    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    vocab: int = 49_408
    context: int = 77

    def __post_init__(self) -> None:
        if min(self.width, self.depth, self.heads, self.hidden, self.vocab) < 1 or self.context < 2:
            raise UserError("every size of a text tower must be at least 1, its context 2; raise the one that is not")
        if self.width % self.heads:
            raise UserError(f"{self.heads} heads do not divide the width {self.width}; try {max(1, self.width // 64)}")


class CLIPText(TextEncoder):
    """Prompts to token states `(B, context, D)`, float32, with a mask of ones. It never trains."""

    trainable = False

    def __init__(self, config: CLIPTextConfig, tokenizer: CLIPTokenizer) -> None:
        """Raises UserError when the tokenizer has more ids than the tower."""
        super().__init__()
        largest = max(tokenizer.vocab.values())
        if largest >= config.vocab:
            raise UserError(f"the tokenizer has the id {largest}, the text tower {config.vocab} ids; take both from one model")
        self.config, self.tokenizer = config, tokenizer
        self.tokens = nn.Embedding(config.vocab, config.width)
        self.positions = nn.Parameter(torch.zeros(config.context, config.width))
        self.blocks = nn.ModuleList(
            EncoderBlock(config.width, config.heads, config.hidden, eps=EPS, activation="quick") for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width, EPS)

    @property
    def width(self) -> int:
        return self.config.width

    def truncated(self, prompt: str) -> bool:
        return len(self.tokenizer.encode(prompt)) > self.config.context

    def forward(self, ids: Tensor) -> Tensor:
        """Ids `(B, L)` to states `(B, L, D)`; each token sees itself and those before it."""
        x = self.tokens(ids) + self.positions[: ids.shape[1]]  # (B, L, D)
        for block in self.blocks:
            x = block(x, causal=True)
        return self.norm(x)

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> Condition:
        rows = [self.tokenizer.row(prompt, self.config.context) for prompt in prompts]
        ids = torch.tensor(rows, device=self.positions.device)  # (B, L)
        return Condition(self(ids).float(), torch.ones_like(ids, dtype=torch.bool))
