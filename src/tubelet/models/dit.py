"""DiT: a transformer over patches of image latents that predicts noise, conditioned on a step number and a class.

After Scalable Diffusion Models with Transformers (Peebles & Xie 2023): latents of a frozen autoencoder are cut into p x p
patches, embedded linearly, given fixed sin-cos positions, and pass a row of blocks (section 3.2). Four kinds of block differ in
how the condition enters; adaLN-Zero, which starts as the identity, is by far the best (figure 5). Quality follows compute,
which the patch size sets at nearly the same number of parameters (section 5). It knows no schedule: `t` is a number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from tubelet.core.errors import UserError
from tubelet.core.types import Condition
from tubelet.core.weights import load_tensors
from tubelet.nn.adaln_zero import AdaLNBlock, TimestepEmbedding, init_as_dit, sincos_plane
from tubelet.nn.attention import CrossAttention, SelfAttention
from tubelet.nn.blocks import EncoderBlock
from tubelet.nn.conditioning import AdaLN, modulate
from tubelet.nn.ids import check_ids
from tubelet.nn.mlp import MLP
from tubelet.nn.patch import patchify, token_grid, unpatchify

CONDITIONINGS = ("in-context", "cross-attention", "adaln", "adaln-zero")


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of a `DiT`. Raises UserError when they do not fit each other.

    `patch` is the side of a token in latent cells; `classes` the number of labels, to which the table adds the null label. With
    `learn_sigma` the output has twice the channels: the noise, then the interpolation between the two bounds of the
    variance. `conditioning` (section 3.2) "in-context": step and class are two tokens in front of the image's;
    "cross-attention": image tokens look at those two after looking at each other; "adaln": their sum sets shift and
    scale of every layer norm; "adaln-zero": and the weight of every residual. With `text_width`, that of a text encoder's
    states, a prompt stands where the label did: the mean of its states through a linear, and there is no table of labels.
    """

    width: int = 384
    depth: int = 12
    heads: int = 6
    patch: int = 2
    in_channels: int = 4
    classes: int = 1000
    learn_sigma: bool = True
    conditioning: Literal["in-context", "cross-attention", "adaln", "adaln-zero"] = "adaln-zero"
    text_width: int = 0

    def __post_init__(self) -> None:
        sizes = (self.width, self.depth, self.heads, self.patch, self.in_channels, self.classes)
        if min(sizes) < 1 or self.text_width < 0:
            raise UserError("every size of a DiT must be at least 1, and text_width at least 0; raise the one that is not")
        if self.width % self.heads or self.width % 4:
            raise UserError(f"{self.heads} heads need a width that they and 4 divide, got {self.width}; try {64 * self.heads}")
        if self.conditioning not in CONDITIONINGS:
            raise UserError(
                f"conditioning must be one of {', '.join(CONDITIONINGS)}, got {self.conditioning!r}; choose one of them"
            )

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)


class CrossBlock(nn.Module):
    """A ViT's block with cross-attention to the condition between self-attention and MLP (section 3.2)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim, eps=1e-6)
        self.attention = SelfAttention(dim, heads, qk_norm=False, bias=True)
        self.cross_norm = nn.LayerNorm(dim, eps=1e-6)
        self.cross = CrossAttention(dim, heads, dim, qk_norm=False, bias=True)
        self.mlp_norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, 4 * dim, "tanh")

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """`x (B, L, D)`, the condition's tokens `context (B, M, D)`."""
        x = x + self.attention(self.attention_norm(x))
        x = x + self.cross(self.cross_norm(x), context)
        return x + self.mlp(self.mlp_norm(x))


class DiT(nn.Module):
    """Noised latents, step numbers and labels in; noise and variance out, zero before training."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        D, kind = config.width, config.conditioning
        self.adaptive = kind in ("adaln", "adaln-zero")
        self.patch_in = nn.Linear(config.patch**2 * config.in_channels, D)
        self.timestep = TimestepEmbedding(D)
        self.labels = None if config.text_width else nn.Embedding(config.classes + 1, D)
        self.text_in = nn.Linear(config.text_width, D) if config.text_width else None
        self.blocks = nn.ModuleList()
        for _ in range(config.depth):
            if self.adaptive:
                block = AdaLNBlock(D, config.heads, gates=kind == "adaln-zero")
            elif kind == "cross-attention":
                block = CrossBlock(D, config.heads)
            else:
                block = EncoderBlock(D, config.heads, activation="tanh")
            self.blocks.append(block)
        self.head_norm = nn.LayerNorm(D, eps=1e-6, elementwise_affine=not self.adaptive)
        self.head_adaln = AdaLN(D, 2) if self.adaptive else None
        self.head = nn.Linear(D, config.patch**2 * config.out_channels)
        self.init_weights()

    def init_weights(self) -> None:
        """Fill every parameter: for a module built on the meta device, after `to_empty`.

        As released (`nn.adaln_zero.init_as_dit`), the head and its modulation zero, so that the output is zero for every kind
        of block.
        """
        init_as_dit(self)
        nn.init.zeros_(self.head.weight)
        if self.head_adaln is not None:
            nn.init.zeros_(self.head_adaln.out.weight)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | Condition) -> Tensor:
        """Latents `x (B, C, H, W)`, step numbers `t (B,)` in [0, 1000), labels `(B,)` to `(B, 2C, H, W)`, or C channels.

        Label `config.classes` is the null label. With `text_width` the labels are prompts: token states `(B, M, text_width)`
        and their mask, the null one an empty prompt's. Any height and width that the patch divides fit: positions count
        patches from the corner. Raises UserError when x does not divide into patches, for a label that is none,
        and when the shapes do not belong together.
        """
        c, B = self.config, len(x)
        if x.ndim != 4 or x.shape[1] != c.in_channels:
            raise UserError(f"latents must be (B, {c.in_channels}, H, W), got {tuple(x.shape)}; encode images accordingly")
        asked = label.shape if isinstance(label, Tensor) else label.mask.shape[:1]
        if t.shape != (B,) or asked != (B,):
            raise UserError(
                f"{B} latents need {B} step numbers and {B} labels, got {tuple(t.shape)} and {tuple(asked)}; "
                "give one of each per latent"
            )
        patch, dtype = (1, c.patch, c.patch), self.patch_in.weight.dtype
        z = x[:, :, None]  # (B, C, 1, H, W)
        grid = token_grid((1, x.shape[2], x.shape[3]), patch)
        places = sincos_plane(c.width, grid[1], grid[2], x.device)  # (L, D)
        h = self.patch_in(patchify(z, patch).to(dtype)).float() + places  # (B, L, D)
        step, kind = self.timestep(t), self._kind(label)  # (B, D) each
        if self.adaptive:
            given = (step + kind)[:, None]  # (B, 1, D)
            for block in self.blocks:
                h = block(h, given)
        else:
            h, given = h.to(dtype), torch.stack([step, kind], dim=1)  # (B, L, D), (B, 2, D)
            if c.conditioning == "in-context":
                h = torch.cat([given.to(h.dtype), h], dim=1)  # (B, 2 + L, D)
                for block in self.blocks:
                    h = block(h)
                h = h[:, 2:]  # (B, L, D)
            else:
                for block in self.blocks:
                    h = block(h, given)
        h = self.head_norm(h)
        if self.head_adaln is not None:
            shift, scale = self.head_adaln(given).chunk(2, dim=-1)  # (B, 1, D) each
            h = modulate(h, shift, scale)
        out = self.head(h.to(dtype)).to(x.dtype)  # (B, L, p*p*2C)
        return unpatchify(out, grid, patch)[:, :, 0]  # (B, 2C, H, W)

    def _kind(self, label: Tensor | Condition) -> Tensor:
        """What is asked for as one vector, `(B, D)`."""
        if isinstance(label, Tensor) and self.labels is not None:
            check_ids("labels", label, self.config.classes + 1)
            return self.labels(label)
        if isinstance(label, Tensor) or self.text_in is None:
            raise UserError("prompts are given to a DiT with text_width, always, and to no other; correct the call")
        if label.states.shape[2] != self.config.text_width:
            raise UserError(
                f"this DiT reads states of width {self.config.text_width}, got {tuple(label.states.shape)}; "
                "take the text encoder that it was built for"
            )
        real = label.mask[..., None].to(label.states.dtype)  # (B, M, 1)
        said = (label.states * real).sum(1) / real.sum(1).clamp(min=1)  # (B, text_width)
        return self.text_in(said.to(self.text_in.weight.dtype))


# What the published weights call our modules; applied in this order to a parameter's name.
PUBLISHED_NAMES = (
    ("patch_in.", "x_embedder.proj."),
    ("timestep.up.", "t_embedder.mlp.0."),
    ("timestep.down.", "t_embedder.mlp.2."),
    ("labels.", "y_embedder.embedding_table."),
    ("head_adaln.out.", "final_layer.adaLN_modulation.1."),
    ("head.", "final_layer.linear."),
    (".attention.qkv.", ".attn.qkv."),
    (".attention.out.", ".attn.proj."),
    (".mlp.up.", ".mlp.fc1."),
    (".mlp.down.", ".mlp.fc2."),
    (".adaln.out.", ".adaLN_modulation.1."),
)


def load_published(path: str | Path, model: DiT) -> None:
    """Fill a model from published weights: a safetensors file with the parameter names of facebookresearch/DiT.

    The authors distribute a pickle, which is never opened here; who trusts it writes its tensors as safetensors once. The
    positions in the file are compared with ours and dropped. Raises UserError when names, shapes, positions or finiteness do
    not hold; the model is then unchanged.
    """
    c = model.config
    if c.text_width:
        raise UserError("the published weights were trained with labels, the model reads prompts; build it without text_width")
    if c.conditioning != "adaln-zero":
        raise UserError(f"only adaLN-Zero weights were published, the model is {c.conditioning}; build it with adaln-zero")
    names = {}
    for ours in model.state_dict():
        theirs = ours
        for old, new in PUBLISHED_NAMES:
            theirs = theirs.replace(old, new)
        names[theirs] = ours
    shapes = {theirs: model.state_dict()[ours].shape for theirs, ours in names.items()}
    # A convolution of stride p there, channels slowest; a linear over a patch whose channels are fastest here.
    shapes["x_embedder.proj.weight"] = torch.Size((c.width, c.in_channels, c.patch, c.patch))

    tensors = load_tensors(path)
    places = tensors.pop("pos_embed", None)
    missing, unknown = sorted(names.keys() - tensors.keys()), sorted(tensors.keys() - names.keys())
    missing += ["pos_embed"] if places is None else []
    wrong = sorted(n for n in names.keys() & tensors.keys() if tensors[n].shape != shapes[n])
    if places is None or missing or unknown or wrong:
        raise UserError(
            f"{path} does not hold the published weights of this DiT (missing {missing[:3]}, unknown {unknown[:3]}, "
            f"wrong shape {wrong[:3]}); take the size and patch that it was trained with"
        )
    broken = sorted(n for n, value in tensors.items() if not value.isfinite().all())
    if broken:
        raise UserError(f"{path} holds values that are not finite ({broken[:3]}); restore it from its source")
    side = math.isqrt(places.shape[-2]) if places.ndim > 1 else 0
    own = sincos_plane(c.width, side, side)[None]  # (1, L, D)
    if places.shape != own.shape or not torch.allclose(places.float(), own, atol=1e-2):
        raise UserError(f"{path} was trained with other positions than DiT's sin-cos table; load it with its own code")
    tensors["x_embedder.proj.weight"] = tensors["x_embedder.proj.weight"].permute(0, 2, 3, 1).flatten(1)  # (D, p*p*C)
    model.load_state_dict({ours: tensors[theirs] for theirs, ours in names.items()})


def tiny(config: DiTConfig) -> DiTConfig:
    """A config of the same shape, small enough for tests."""
    return replace(config, width=32, depth=2, heads=2, classes=10)


def example(config: DiTConfig, batch: int = 1, side: int = 32) -> tuple[Tensor, Tensor, Tensor | Condition]:
    """Random inputs for `forward`: latents of `side` cells, by default those of a 256 px image, step numbers and labels, or
    prompts of 16 tokens."""
    x, t = torch.randn(batch, config.in_channels, side, side), torch.rand(batch) * 999  # (B, C, H, W), (B,)
    if config.text_width:
        return x, t, Condition(torch.randn(batch, 16, config.text_width), torch.ones(batch, 16, dtype=torch.bool))
    return x, t, torch.randint(config.classes, (batch,))


def stated(config: DiTConfig) -> str:
    """The input that `example` makes, in words."""
    patch = f"{config.patch} x {config.patch}"
    asked = f"16 tokens of width {config.text_width}" if config.text_width else f"one of {config.classes} classes"
    return f"{config.in_channels} x 32 x 32 latents (C, H, W), patch {patch}, {asked}"


# Width, depth and heads (table 1), each with three patch sizes.
SIZES: dict[str, DiTConfig] = {
    f"{name}/{patch}": DiTConfig(width, depth, heads, patch)
    for name, width, depth, heads in (("S", 384, 12, 6), ("B", 768, 12, 12), ("L", 1024, 24, 16), ("XL", 1152, 28, 16))
    for patch in (2, 4, 8)
}
