"""unCLIP (DALL-E 2): a prior turns a caption into a CLIP image embedding, a decoder turns that into an image.

After Ramesh et al. 2022, "Hierarchical Text-Conditional Image Generation with CLIP Latents". Here stand both priors of section
2.2, one by diffusion and one autoregressive over quantised principal components (`nn.principal`), and the manipulations of
section 3, with `nn.sphere.slerp`. The decoder and the upsamplers, networks of convolutions, are `models.glide`.

Text reaches a prior twice: as states, one for each token, and as CLIP's text embedding. Both are dropped together by
`drop_text`. Embeddings are unit vectors `(B, E)`; masks are `(B, L)`, True where a token is real. Heads of 64, a context of 77,
the initial weights and the number of dot-product levels are choices made here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tubelet.core.errors import UserError
from tubelet.nn.adaln_zero import timestep_waves
from tubelet.nn.attention import KeyValues
from tubelet.nn.blocks import EncoderBlock
from tubelet.nn.ids import check_ids

EPS = 1e-5
SCALE = 17.2
"""What image embeddings are multiplied by before noise is added (appendix C).

A component of a unit vector of 1024 then varies as the pixels do that the noise schedule was tuned for. The root of the width
(32) or standardising by statistics, as later priors do, are other conventions.
"""


@dataclass(frozen=True)
class PriorConfig:
    """Sizes of a `DiffusionPrior`. `text_width` is that of the text states, `context` how many there may be."""

    width: int = 2048
    depth: int = 24
    heads: int = 32
    embed: int = 1024
    text_width: int = 1024
    context: int = 77

    def __post_init__(self) -> None:
        _check_sizes("diffusion prior", self.depth, self.embed, self.text_width, self.context)
        _check_heads(self.width, self.heads)


@dataclass(frozen=True)
class AutoregressiveConfig:
    """Sizes of an `AutoregressivePrior`: its text encoder, its decoder, and the codes: `components` of `buckets` values each.

    `dots` is the number of levels that the dot product of text and image is told in.
    """

    width: int = 1664
    depth: int = 24
    heads: int = 26
    text_width: int = 2048
    text_depth: int = 24
    text_heads: int = 32
    embed: int = 1024
    vocab: int = 49_408
    context: int = 77
    components: int = 319
    buckets: int = 1024
    dots: int = 1024

    def __post_init__(self) -> None:
        _check_sizes("autoregressive prior", self.depth, self.text_depth, self.embed, self.vocab, self.context, self.buckets)
        _check_heads(self.width, self.heads)
        _check_heads(self.text_width, self.text_heads)
        if not 1 <= self.components <= self.embed:
            raise UserError(f"an embedding of {self.embed} has 1 to {self.embed} components, got {self.components}; take fewer")
        if self.dots < 2:
            raise UserError(f"the dot product needs at least 2 levels, got {self.dots}; raise dots")


Config = PriorConfig | AutoregressiveConfig


def _check_sizes(name: str, *sizes: int) -> None:
    if min(sizes) < 1:
        raise UserError(f"every size of a {name} must be at least 1; raise the one that is not")


def _check_heads(width: int, heads: int) -> None:
    if heads < 1 or width < 2 or width % (2 * heads):
        raise UserError(f"{heads} heads need an even multiple as width, got {width}; try {64 * max(1, heads)}")


def _check_context(length: int, context: int) -> None:
    if length > context:
        raise UserError(f"a text has {length} tokens, the context holds {context}; cut it")


def _init(model: nn.Module, *towers: nn.ModuleList) -> None:
    """Linears normal with the root of their inputs, what ends a block smaller, since each adds twice to the residual stream."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    for blocks in towers:
        for block in blocks:
            assert isinstance(block, EncoderBlock)
            for linear in (block.attention.out, block.mlp.down):
                nn.init.normal_(linear.weight, std=(linear.in_features * 2 * len(blocks)) ** -0.5)


# The diffusion prior


class DiffusionPrior(nn.Module):
    """A causal transformer over text states, text embedding, timestep, noised image embedding and a query, in this order.

    What leaves at the query, the last place, is the un-noised image embedding itself, not the noise (equation 2). In and
    out it is scaled by `SCALE`; the text embedding, which no noise is added to, is not.
    """

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.config = config
        D = config.width
        self.states_in = nn.Linear(config.text_width, D)
        self.text_in = nn.Linear(config.embed, D)
        self.time_up = nn.Linear(D, D)
        self.time_down = nn.Linear(D, D)
        self.image_in = nn.Linear(config.embed, D)
        self.query = nn.Parameter(torch.zeros(D))
        self.positions = nn.Parameter(torch.zeros(config.context + 4, D))
        self.blocks = nn.ModuleList(EncoderBlock(D, config.heads, eps=EPS) for _ in range(config.depth))
        self.norm = nn.LayerNorm(D, EPS)
        self.out = nn.Linear(D, config.embed)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fill every parameter: for a module built on the meta device, after `to_empty`."""
        _init(self, self.blocks)
        nn.init.normal_(self.query, std=0.02)
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, z: Tensor, t: Tensor, text: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        """Noised scaled embeddings `z (B, E)`, step numbers `t (B,)` in [0, 1000), text embeddings `(B, E)`, text states
        `(B, L, text_width)` and their `mask (B, L)` to scaled embeddings `(B, E)`.

        Padding is never looked at, so a short text needs none. Raises UserError when the text is too long or shapes differ.
        """
        c, (B, L) = self.config, states.shape[:2]
        _check_context(L, c.context)
        if states.shape[2] != c.text_width:
            raise UserError(
                f"this prior reads states of width {c.text_width}, got {tuple(states.shape)}; take its text encoder"
            )
        if z.shape != (B, c.embed) or text.shape != z.shape or t.shape != (B,) or mask.shape != (B, L):
            raise UserError(
                f"{B} texts of {L} tokens need two embeddings ({B}, {c.embed}), {B} step numbers and a mask ({B}, {L}), got "
                f"{tuple(z.shape)}, {tuple(text.shape)}, {tuple(t.shape)}, {tuple(mask.shape)}; give one of each per text"
            )
        waves = timestep_waves(t, c.width).to(self.time_up.weight.dtype)  # (B, D)
        time = self.time_down(F.silu(self.time_up(waves)))  # (B, D)
        rest = [self.text_in(text), time, self.image_in(z), self.query.expand(B, -1)]
        x = torch.cat([self.states_in(states), torch.stack(rest, dim=1)], dim=1)  # (B, L + 4, D)
        x = x + torch.cat([self.positions[:L], self.positions[c.context :]])
        seen = F.pad(mask, (0, 4), value=True)[:, None, None]  # (B, 1, 1, L + 4)
        for block in self.blocks:
            x = block(x, mask=seen, causal=True)
        return self.out(self.norm(x[:, -1]))  # (B, E)


def prior_loss(output: Tensor, image: Tensor) -> Tensor:
    """Mean squared error of a prior's output `(B, E)` against unit image embeddings `(B, E)`, scaled here (eq. 2), `()`."""
    return F.mse_loss(output, SCALE * image)


def keep_better(draws: Tensor, text: Tensor) -> Tensor:
    """Of several draws per text `(B, S, E)` the one with the largest dot product with the text embedding `(B, E)`, `(B, E)`.

    The paper draws two (section 2.2). The first wins a tie.
    """
    best = torch.einsum("bse,be->bs", draws, text).argmax(1)  # (B,)
    return draws[torch.arange(len(draws), device=draws.device), best]  # (B, E)


def _rows(count: int, rate: float, generator: torch.Generator, device: torch.device) -> Tensor:
    if not 0 <= rate <= 1:
        raise UserError(f"a drop rate must be in [0, 1], got {rate}; correct it")
    return (torch.rand(count, generator=generator, device=generator.device) < rate).to(device)  # (B,)


def drop_text(text: Tensor, mask: Tensor, generator: torch.Generator, rate: float = 0.1) -> tuple[Tensor, Tensor]:
    """Text embeddings `(B, E)` and masks `(B, L)` of which each pair is emptied with probability `rate`, for guidance.

    A dropped text is zeros, which no unit vector is, and a mask without a token. Called by the training step, which owns the
    randomness. Raises UserError when the rate is outside [0, 1].
    """
    gone = _rows(len(text), rate, generator, text.device)[:, None]  # (B, 1)
    return text.masked_fill(gone, 0.0), mask & ~gone


# The autoregressive prior


def fit_dots(image: Tensor, text: Tensor, levels: int = 1024) -> Tensor:
    """Edges `(levels - 1,)` between equally frequent levels of the dot product of matching embeddings `(S, E)`."""
    products = (image * text).sum(-1).sort().values  # (S,)
    # As `torch.quantile`, which holds no more than 2^24 values.
    at = torch.arange(1, levels, device=image.device, dtype=torch.float64) / levels * (len(products) - 1)  # (levels - 1,)
    low = at.long()
    return torch.lerp(products[low], products[(low + 1).clamp(max=len(products) - 1)], (at - low).to(products.dtype))


def dot_level(image: Tensor, text: Tensor, edges: Tensor) -> Tensor:
    """The level of the dot product of image and text embeddings `(B, E)`, `(B,)` int64."""
    return torch.bucketize((image * text).sum(-1), edges)


def high_dots(count: int, levels: int, generator: torch.Generator) -> Tensor:
    """Levels `(count,)` of the top half of the distribution: what the model is told at sampling (section 2.2)."""
    return torch.randint(levels // 2, levels, (count,), generator=generator, device=generator.device)


class AutoregressivePrior(nn.Module):
    """A text encoder and a causal decoder over text states, text embedding, dot-product level and the codes, in this order.

    A code's place says which component it is of; all components share one table of `buckets` vectors.
    """

    def __init__(self, config: AutoregressiveConfig) -> None:
        super().__init__()
        self.config = config
        D, W = config.width, config.text_width
        self.tokens = nn.Embedding(config.vocab, W)
        self.text_positions = nn.Parameter(torch.zeros(config.context, W))
        self.text_blocks = nn.ModuleList(EncoderBlock(W, config.text_heads, eps=EPS) for _ in range(config.text_depth))
        self.text_norm = nn.LayerNorm(W, EPS)
        self.states_in = nn.Linear(W, D)
        self.text_in = nn.Linear(config.embed, D)
        self.dots = nn.Embedding(config.dots, D)
        self.codes = nn.Embedding(config.buckets, D)
        # The last code is never read.
        self.positions = nn.Parameter(torch.zeros(config.context + 1 + config.components, D))
        self.blocks = nn.ModuleList(EncoderBlock(D, config.heads, eps=EPS) for _ in range(config.depth))
        self.norm = nn.LayerNorm(D, EPS)
        self.out = nn.Linear(D, config.buckets)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fill every parameter: for a module built on the meta device, after `to_empty`."""
        _init(self, self.text_blocks, self.blocks)
        nn.init.normal_(self.text_positions, std=0.02)
        nn.init.normal_(self.positions, std=0.02)

    def prefix(self, ids: Tensor, mask: Tensor, text: Tensor, dot: Tensor) -> Tensor:
        """What stands before the codes, `(B, L + 2, D)`; inputs as in `forward`."""
        L, context = ids.shape[1], self.config.context
        _check_context(L, context)
        if mask.shape != ids.shape or text.shape != (len(ids), self.config.embed) or dot.shape != ids.shape[:1]:
            raise UserError(
                f"{len(ids)} captions of {L} ids need a mask ({len(ids)}, {L}), embeddings of {self.config.embed} and levels, "
                f"got {tuple(mask.shape)}, {tuple(text.shape)}, {tuple(dot.shape)}; give one of each per caption"
            )
        check_ids("ids", ids, self.config.vocab)
        check_ids("levels", dot, self.config.dots)
        x = self.tokens(ids) + self.text_positions[:L]  # (B, L, W)
        for block in self.text_blocks:
            x = block(x, mask=mask[:, None, None])
        states = self.states_in(self.text_norm(x))  # (B, L, D)
        x = torch.cat([states, torch.stack([self.text_in(text), self.dots(dot)], dim=1)], dim=1)  # (B, L + 2, D)
        return x + torch.cat([self.positions[:L], self.positions[context : context + 2]])

    def read(self, codes: Tensor, first: int = 0) -> Tensor:
        """Codes `(B, K)` of the components from `first` on as decoder inputs `(B, K, D)`."""
        check_ids("codes", codes, self.config.buckets)
        start = self.config.context + 2 + first
        return self.codes(codes) + self.positions[start : start + codes.shape[1]]

    def decode(self, x: Tensor, seen: Tensor, past: Sequence[KeyValues] | None = None) -> Tensor:
        """Decoder inputs `(B, L, D)` to logits `(B, L, buckets)`; `seen (B, M)` says which of all places so far are real."""
        for i, block in enumerate(self.blocks):
            assert isinstance(block, EncoderBlock)
            cache = None if past is None else past[i]
            x = x + block.attention(block.attention_norm(x), mask=seen[:, None, None], causal=True, past=cache)
            x = x + block.mlp(block.mlp_norm(x))
        return self.out(self.norm(x))

    def forward(self, ids: Tensor, mask: Tensor, text: Tensor, dot: Tensor, codes: Tensor) -> Tensor:
        """Ids and their mask `(B, L)`, text embeddings `(B, E)`, levels `dot (B,)`, codes `(B, K)` to logits `(B, K, buckets)`.

        The logits of a component have seen the codes of earlier ones alone. Raises UserError when the text is too long, for
        ids, levels or codes that are none, when shapes differ or K is not the number of components.
        """
        if codes.shape != (len(ids), self.config.components):
            wanted = (len(ids), self.config.components)
            raise UserError(f"codes must be {wanted}, got {tuple(codes.shape)}; quantise every component")
        before = self.prefix(ids, mask, text, dot)  # (B, L + 2, D)
        x = torch.cat([before, self.read(codes[:, :-1])], dim=1)  # (B, L + 1 + K, D)
        return self.decode(x, F.pad(mask, (0, x.shape[1] - mask.shape[1]), value=True))[:, before.shape[1] - 1 :]


# Manipulations


def text_difference(text: Tensor, base: Tensor) -> Tensor:
    """The unit direction from one caption's embedding `base (..., E)` to another's, `text (..., E)` (section 3.3).

    `slerp(image, text_difference(text, base), share)` edits an image's embedding; the paper goes to shares of 0.25 to 0.5.
    Raises UserError when the captions are the same.
    """
    difference = text - base
    if bool((difference.norm(dim=-1) == 0).any()):
        raise UserError("two equal captions have no direction between them; change one of them")
    return F.normalize(difference, dim=-1)


def invert(
    denoise: Callable[[Tensor, Tensor], Tensor],
    z: Tensor,
    levels: Sequence[float],
    alpha: Sequence[float],
    noise: Sequence[float],
) -> Tensor:
    """The noise that deterministic DDIM would have made an image from: its steps backwards (section 3).

    `denoise(z, level ())` returns the clean image. `levels` rise from where z is to where it shall go; `alpha` and `noise` are
    the path's coefficients there, z = alpha x + noise n. Exact in the limit of small steps. Raises UserError when there are not
    as many coefficients as levels, or the first level has no noise: it has no direction to go.
    """
    if not len(levels) == len(alpha) == len(noise):
        raise UserError(f"{len(levels)} levels need as many coefficients, got {len(alpha)} and {len(noise)}; give one each")
    if not levels or min(noise) <= 0:
        raise UserError("inversion begins at a level with a little noise; drop the level without")
    for now, after in pairwise(range(len(levels))):
        clean = denoise(z, z.new_tensor(levels[now]))
        z = alpha[after] * clean + noise[after] / noise[now] * (z - alpha[now] * clean)
    return z


def build(config: Config) -> nn.Module:
    """The part of unCLIP that a config is of."""
    return DiffusionPrior(config) if isinstance(config, PriorConfig) else AutoregressivePrior(config)


def tiny(config: Config) -> Config:
    """A config of the same shape, small enough for tests."""
    if isinstance(config, PriorConfig):
        return replace(config, width=32, depth=2, heads=2, embed=12, text_width=16, context=6)
    small = replace(config, width=32, depth=2, heads=2, text_width=16, text_depth=1, text_heads=2)
    return replace(small, embed=12, vocab=50, context=6, components=5, buckets=8, dots=4)


def example(config: Config, batch: int = 1) -> tuple[Tensor, ...]:
    """Random inputs for `forward`, texts as long as the context."""
    c, B = config, batch
    embeddings = torch.randn(2, B, c.embed)  # (2, B, E)
    image, text = F.normalize(embeddings, dim=-1)  # (B, E) each
    if isinstance(c, PriorConfig):
        mask = torch.ones(B, c.context, dtype=torch.bool)
        return SCALE * image, torch.rand(B) * 999, text, torch.randn(B, c.context, c.text_width), mask
    ids, mask = torch.randint(c.vocab, (B, c.context)), torch.ones(B, c.context, dtype=torch.bool)
    return ids, mask, text, torch.randint(c.dots, (B,)), torch.randint(c.buckets, (B, c.components))


def stated(config: Config) -> str:
    """The input that `example` makes, in words."""
    if isinstance(config, PriorConfig):
        return f"{config.context} text states of {config.text_width}, text and image embeddings of {config.embed}"
    return f"{config.context} text tokens, a text embedding of {config.embed}, {config.components} codes"


# Appendix C.
SIZES: dict[str, Config] = {
    "Prior": PriorConfig(),
    "AR-Prior": AutoregressiveConfig(),
}
