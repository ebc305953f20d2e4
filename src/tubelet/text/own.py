"""The project's own small text encoder: subword tokens through a short bidirectional transformer, trained with the denoiser.

Pre-norm blocks with RMSNorm, rotary positions (RoFormer, Su et al. 2021, section 3.2), QK-norm and SwiGLU; the
captions of a world have a few hundred words, so two layers learn what each token needs to know of its neighbours
("left" of which object) while the denoiser learns to draw.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tubelet.core.errors import UserError
from tubelet.core.types import Condition
from tubelet.nn.attention import Rope, SelfAttention
from tubelet.nn.mlp import SwiGLU
from tubelet.nn.norms import RMSNorm
from tubelet.nn.positions import RotaryEmbedding
from tubelet.text.base import TextEncoder, checked_prompts
from tubelet.text.bpe import FIRST_MERGE, PAD, Tokenizer

_CACHE_LIMIT = 200_000


@dataclass(frozen=True)
class OwnTextConfig:
    """Sizes of the own encoder. `vocab_size` must be at least the tokenizer's; `max_tokens` counts the start token."""

    vocab_size: int = 1024
    width: int = 256
    depth: int = 2
    heads: int = 4
    max_tokens: int = 128

    def __post_init__(self) -> None:
        if self.heads < 1 or self.width % (2 * self.heads):
            raise UserError(f"width {self.width} does not divide into {self.heads} heads of even width; choose a multiple")
        if self.vocab_size < FIRST_MERGE or self.depth < 0 or self.max_tokens < 1:
            raise UserError(f"a text encoder needs vocab_size >= {FIRST_MERGE}, depth >= 0, max_tokens >= 1; correct it")


class TextBlock(nn.Module):
    """Bidirectional self-attention and SwiGLU on `(B, L, D)`, each behind a norm and added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(width)
        self.attention = SelfAttention(width, heads)
        self.mlp_norm = RMSNorm(width)
        self.mlp = SwiGLU(width, hidden=math.ceil(width * 8 / 3 / 16) * 16)

    def forward(self, x: Tensor, rope: Rope, mask: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope=rope, mask=mask)
        return x + self.mlp(self.mlp_norm(x))


class OwnTextEncoder(TextEncoder):
    """Token embedding, `depth` blocks, final RMSNorm. `.blocks` can be compiled or sharded from outside."""

    trainable = True

    def __init__(self, config: OwnTextConfig | None = None, tokenizer: Tokenizer | None = None) -> None:
        """Without a tokenizer prompts are read byte by byte. Raises UserError when the tokenizer has more ids than `config`."""
        super().__init__()
        self.config = config = config if config is not None else OwnTextConfig()
        self.tokenizer = tokenizer if tokenizer is not None else Tokenizer()
        if self.tokenizer.size > config.vocab_size:
            raise UserError(f"the tokenizer has {self.tokenizer.size} ids, vocab_size is {config.vocab_size}; raise vocab_size")
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.rope = RotaryEmbedding((config.width // config.heads,), base=10_000.0)
        self.blocks = nn.ModuleList(TextBlock(config.width, config.heads) for _ in range(config.depth))
        self.norm = RMSNorm(config.width)
        self._ids: dict[str, tuple[list[int], bool]] = {}
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Blocks start as the identity, so that at first every token stands for itself."""
        nn.init.normal_(self.embed.weight)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
            elif isinstance(module, RMSNorm) and module.weight is not None:
                nn.init.ones_(module.weight)
        for block in self.blocks:
            assert isinstance(block, TextBlock)
            nn.init.zeros_(block.attention.out.weight)
            nn.init.zeros_(block.mlp.down.weight)

    @property
    def width(self) -> int:
        return self.config.width

    def truncated(self, prompt: str) -> bool:
        """Whether the prompt has more than `max_tokens` tokens; the rest is not read."""
        return self._tokens(prompt)[1]

    def tokenize(
        self, prompts: Sequence[str], *, split: float = 0.0, rng: random.Random | None = None
    ) -> tuple[Tensor, Tensor]:
        """Ids `(B, L)` int64, padded with 0, and mask `(B, L)`, both on the CPU; cut at `max_tokens` (see `truncated`).

        `split` and `rng`: words cut in two by chance while training, as `Tokenizer.encode` says.
        """
        prompts = checked_prompts(prompts)
        if split > 0:
            rows = [self.tokenizer.encode(prompt, split=split, rng=rng)[: self.config.max_tokens] for prompt in prompts]
        else:
            rows = [self._tokens(prompt)[0] for prompt in prompts]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows], dtype=torch.int64)  # (B, L)
        return ids, ids != PAD

    def forward(self, ids: Tensor, mask: Tensor) -> Condition:
        """Ids `(B, L)` and mask `(B, L)` to token states `(B, L, D)`; padded states are zero."""
        x = self.embed(ids)  # (B, L, D)
        rope = self.rope(torch.arange(ids.shape[1], device=ids.device)[:, None])
        for block in self.blocks:
            x = block(x, rope, mask[:, None, None, :])
        return Condition(self.norm(x) * mask[..., None], mask)

    def _encode(self, prompts: list[str]) -> Condition:
        ids, mask = self.tokenize(prompts)
        device = self.embed.weight.device
        return self(ids.to(device), mask.to(device))

    def _tokens(self, prompt: str) -> tuple[list[int], bool]:
        found = self._ids.get(prompt)
        if found is None:
            if len(self._ids) >= _CACHE_LIMIT:
                self._ids.clear()
            ids = self.tokenizer.encode(prompt)
            found = self._ids[prompt] = ids[: self.config.max_tokens], len(ids) > self.config.max_tokens
        return found
