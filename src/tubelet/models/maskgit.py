"""MAGVIT-v2's generator: a bidirectional transformer that fills in hidden tokens of a clip.

After Language Model Beats Diffusion (Yu et al. 2023, section 3.2), whose masked language model is MAGVIT's (Yu et al. 2022,
section 3.2): BERT (Devlin et al. 2019), post-norm, with learned positions, in front of the tokens one for the class. A token of
2^18 is two words of 2^9, whose embeddings are summed and whose two heads share them. A token is hidden whole, both words at
once: the paper leaves that open. Which tokens are hidden and in what order they are chosen is said in `decoding.masked`.

With `text_width` a prompt's token states stand where the paper has the one token for the class: that is ours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tubelet.core.errors import UserError
from tubelet.core.types import Condition
from tubelet.nn.attention import SelfAttention
from tubelet.nn.ids import check_ids
from tubelet.nn.mlp import MLP
from tubelet.nn.subtokens import MASK, split_ids

EPS = 1e-12


@dataclass(frozen=True)
class MaskGITConfig:
    """Sizes of a `MaskGIT`. Raises UserError when they do not fit each other.

    `length` is the most tokens of a clip, frames slowest; a token is a word of each of `groups` vocabularies of `words`;
    `classes` the number of labels, to which the table adds the null label; with `text_width`, that of a text encoder's states,
    prompts are read instead. `dropout` acts on residuals while training.
    """

    width: int = 1024
    depth: int = 24
    heads: int = 16
    length: int = 5 * 16 * 16
    groups: int = 2
    words: int = 2**9
    classes: int = 101
    text_width: int = 0
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if min(self.width, self.depth, self.heads, self.length, self.groups, self.words, self.classes) < 1 or (
            self.text_width < 0
        ):
            raise UserError("every size of a MaskGIT must be at least 1, and text_width at least 0; raise the one that is not")
        if self.width % self.heads:
            raise UserError(f"{self.heads} heads need a width that they divide, got {self.width}; try {64 * self.heads}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout must be in [0, 1), got {self.dropout}; 0.1 is the published one")


class BERTBlock(nn.Module):
    """Post-norm residual block: attention, then MLP, a layer norm behind each sum (Devlin et al. 2019)."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention, self.attention_norm = SelfAttention(dim, heads, qk_norm=False, bias=True), nn.LayerNorm(dim, EPS)
        self.mlp, self.mlp_norm = MLP(dim, 4 * dim, "tanh"), nn.LayerNorm(dim, EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`x (B, L, D)`; `mask (B, 1, 1, L)`, True where a token is real; None: all are."""
        x = self.attention_norm(x + self.dropout(self.attention(x, mask=mask)))
        return self.mlp_norm(x + self.dropout(self.mlp(x)))


class MaskGIT(nn.Module):
    """Tokens of which some are hidden, and a label, in; logits of every place's words out."""

    def __init__(self, config: MaskGITConfig) -> None:
        super().__init__()
        self.config = config
        D = config.width
        self.words = nn.Parameter(torch.empty(config.groups, config.words, D))
        self.mask = nn.Parameter(torch.empty(D))
        self.labels = None if config.text_width else nn.Embedding(config.classes + 1, D)
        self.text_in = nn.Linear(config.text_width, D) if config.text_width else None
        self.segments = nn.Embedding(2, D)
        self.positions = nn.Parameter(torch.empty(1 + config.length, D))
        self.norm_in, self.dropout = nn.LayerNorm(D, EPS), nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(BERTBlock(D, config.heads, config.dropout) for _ in range(config.depth))
        self.head, self.head_norm = nn.Linear(D, D), nn.LayerNorm(D, EPS)
        self.bias = nn.Parameter(torch.empty(config.groups, config.words))
        self.init_weights()

    def init_weights(self) -> None:
        """Fill every parameter: for a module built on the meta device, after `to_empty`. As BERT: all of deviation 0.02, cut at
        two deviations, biases zero, gains one."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
            if isinstance(module, (nn.Linear, nn.LayerNorm)):
                nn.init.zeros_(module.bias)
        for table in (self.words, self.mask, self.positions):
            nn.init.trunc_normal_(table, std=0.02, a=-0.04, b=0.04)
        nn.init.zeros_(self.bias)

    def forward(self, tokens: Tensor, label: Tensor | Condition | None = None, hinted: Tensor | None = None) -> Tensor:
        """`tokens (B, L)`, ids below words^groups or MASK where hidden, to logits `(B, L, groups, words)`.

        Args:
            label: `(B,)`; None for the null label `config.classes`, which is also the one without guidance. With `text_width`
                prompts: token states `(B, M, text_width)`, an empty prompt's for guidance.
            hinted: `(B, L)`, True where a token hints at what stands there and is no choice (MAGVIT's COMMIT); None: nowhere.

        A shorter clip, such as an image, takes the first places. Raises UserError when tokens do not fit.
        """
        c, (B, L) = self.config, tokens.shape
        if c.length < L:
            raise UserError(f"a clip has {L} tokens, this model holds {c.length}; cut it or build a longer one")
        if hinted is not None and hinted.shape != (B, L):
            raise UserError(f"{B} clips of {L} tokens need hints ({B}, {L}); give one for each token")
        check_ids("tokens", tokens, c.words**c.groups, MASK)
        front, mask = self._front(label, B, L)  # (B, M, D), (B, 1, 1, M + L)
        digits = split_ids(tokens.clamp(min=0), c.groups, c.words)  # (B, L, G)
        x = sum((self.words[g][digits[..., g]] for g in range(c.groups)), self.mask.new_zeros(()))  # (B, L, D)
        x = torch.where((tokens == MASK)[..., None], self.mask, x)
        segments = torch.zeros_like(tokens) if hinted is None else hinted.long()
        x = torch.cat([front, x], dim=1)  # (B, M + L, D)
        # What stands in front has one place: the states of a prompt know their order.
        M = front.shape[1]
        places = torch.cat([self.positions[:1].expand(M, -1), self.positions[1 : 1 + L]])  # (M + L, D)
        x = x + places + self.segments(F.pad(segments, (M, 0)))
        x = self.dropout(self.norm_in(x))
        for block in self.blocks:
            x = block(x, mask)
        x = self.head_norm(F.gelu(self.head(x[:, M:]), approximate="tanh"))  # (B, L, D)
        return (x @ self.words.flatten(0, 1).T).unflatten(-1, (c.groups, c.words)) + self.bias  # (B, L, G, V)

    def _front(self, label: Tensor | Condition | None, B: int, L: int) -> tuple[Tensor, Tensor | None]:
        """What stands in front of L tokens, `(B, M, D)`, and which of all are real, `(B, 1, 1, M + L)`, None: all."""
        if self.text_in is not None:
            if not isinstance(label, Condition) or len(label) != B or label.states.shape[2] != self.config.text_width:
                raise UserError(
                    f"this MaskGIT reads {B} prompts of width {self.config.text_width}; give their states, an empty one's too"
                )
            return self.text_in(label.states), F.pad(label.mask, (0, L), value=True)[:, None, None]
        assert self.labels is not None, "labels or prompts"
        if isinstance(label, Condition):
            raise UserError("this MaskGIT reads labels, no prompts; build it with text_width")
        if label is None:
            label = torch.full((B,), self.config.classes, device=self.mask.device)
        if label.shape != (B,):
            raise UserError(f"{B} clips need labels ({B},), got {tuple(label.shape)}; give one of each per clip")
        check_ids("labels", label, self.config.classes + 1)
        return self.labels(label)[:, None], None


def token_loss(logits: Tensor, ids: Tensor, where: Tensor, smoothing: float = 1e-4) -> Tensor:
    """Cross-entropy of the right tokens `ids (B, L)` over the places `where (B, L)`, in nats per token, `()`.

    A token's is the sum over its groups; the mean is over the places of a clip, then over clips (as released). MAGVIT trains
    on all places, hidden, hinted and seen (section 3.2); MaskGIT on the hidden ones. A clip without any place loses 0.
    """
    digits = split_ids(ids, logits.shape[2], logits.shape[3])  # (B, L, G)
    flat = F.cross_entropy(logits.float().flatten(0, 2), digits.flatten(), label_smoothing=smoothing, reduction="none")
    each = flat.view(digits.shape).sum(-1) * where  # (B, L)
    return (each.sum(-1) / where.sum(-1).clamp(min=1)).mean()


def guided(
    model: MaskGIT,
    tokens: Tensor,
    label: Tensor | Condition,
    hinted: Tensor | None = None,
    scale: float = 1.0,
    null: Condition | None = None,
) -> Tensor:
    """`model(tokens, label, hinted)` under classifier-free guidance, in one doubled batch: null + scale * (given - null).

    The null branch knows neither label nor hints: what is hinted is hidden to it (as released). Where prompts are read, `null`
    are as many empty ones.
    """
    unknown = tokens if hinted is None else tokens.masked_fill(hinted, MASK)
    seen = torch.zeros_like(tokens, dtype=torch.bool) if hinted is None else hinted
    labels: Tensor | Condition
    if isinstance(label, Condition):
        if null is None:
            raise UserError("guidance of prompts needs the empty one; give it as null")
        labels = Condition.cat([label, null])
    else:
        labels = torch.cat([label, torch.full_like(label, model.config.classes)])
    both = model(torch.cat([tokens, unknown]), labels, torch.cat([seen, torch.zeros_like(seen)]))
    given, without = both.chunk(2)  # (B, L, G, V) each
    return without + scale * (given - without)


def tiny(config: MaskGITConfig) -> MaskGITConfig:
    """A config of the same shape, small enough for tests."""
    return replace(config, width=32, depth=2, heads=2, length=12, words=8, classes=10)


def example(config: MaskGITConfig, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Random inputs for `forward`: a clip of `length` tokens, a third hidden, a sixth hints, and a label."""
    L = config.length
    tokens = torch.randint(config.words**config.groups, (batch, L))  # (B, L)
    place = torch.arange(L).expand(batch, -1)
    return tokens.masked_fill(place % 3 == 0, MASK), torch.randint(config.classes, (batch,)), place % 6 == 1


def stated(config: MaskGITConfig) -> str:
    """The input that `example` makes, in words."""
    return f"{config.length} tokens of {config.words**config.groups:,} words, one of {config.classes} classes"


# The masked language model of tables 1 and 2; the classes are UCF-101's.
SIZES: dict[str, MaskGITConfig] = {"MLM": MaskGITConfig()}
