"""VideoPoet: one language model over text, images, videos and sound, and every task is a prefix that it goes on from.

After Kondratyuk et al. 2023, "VideoPoet: A Large Language Model for Zero-Shot Video Generation". Videos are codes of MAGVIT-v2,
sound is codes of SoundStream, text is the states of a frozen T5-XL behind one linear layer; all stand in one row of tokens.
Tokens of the prefix see each other in both directions, those of the output only what is before them, and only the output is
learned (section 3.2). A task differs from another in what stands in the prefix and in the output (section 4.1, figure 2).

From the paper: the special tokens and their order, the ranges of ids, the lengths, sound level by level, what an image leaves
out, and the shares of images and videos over training. The paper gives no widths, no depths and no layer; those here are
ours: pre-norm blocks of 12 D^2 weights, rotary positions in the row, one table for input and output, and the widths and depths
of GPT-3 (Brown et al. 2020, table 2.1) whose name is nearest. So no count here is one of the paper's. Its text vocabulary
has no ids here, since text is never predicted. Stylisation and the continuation of sound are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tubelet.core.errors import UserError
from tubelet.core.types import Condition
from tubelet.nn.attention import CrossAttention, KeyValues, Rope, SelfAttention
from tubelet.nn.mlp import MLP
from tubelet.nn.positions import RotaryEmbedding, grid_positions, sincos
from tubelet.nn.subtokens import MASK, split_ids
from tubelet.nn.window_rows import from_windows, to_windows

EPS = 1e-6
MAX_TEXT = 64
SPECIALS = 256
SOURCES = 64


class Special(IntEnum):
    """Marks within a row: an id each. The paper names them and gives them 0 to 255, the numbers are ours.

    PAD fills rows of a batch and is seen by none; TEXT holds the place of one text state. `_I` is input, `_O` output.
    """

    PAD = 0
    TEXT = 1
    BOS = 2
    EOS = 3
    BOT_I = 4
    EOT_I = 5
    BOV_I = 6
    EOV_I = 7
    BOA_I = 8
    EOA_I = 9
    RES = 10
    BOV_O = 11
    EOV_O = 12
    BOA_O = 13
    EOA_O = 14
    SOURCE = 128
    """The first of `SOURCES` ids: where the data came from."""


class Task(IntEnum):
    """Task tokens. Text-to-video, image-to-video, text-to-image and generation from nothing share one (section 4.1)."""

    GENERATE = 32
    FRAME_PREDICTION = 33
    INPAINTING = 34
    OUTPAINTING = 35
    VIDEO_TO_AUDIO = 36
    AUDIO_TO_VIDEO = 37
    TEXT_TO_AUDIO = 38
    """Ours: the paper makes sound for films."""


@dataclass(frozen=True)
class Layout:
    """Which ids are what: special tokens, then visual codes, then the codes of each level of sound (section 3.1).

    Raises UserError when a size is below 1.
    """

    visual: int = 2**18
    levels: int = 4
    codes: int = 1024

    def __post_init__(self) -> None:
        if min(self.visual, self.levels, self.codes) < 1:
            raise UserError("a layout needs at least one visual code, audio level and audio code; raise what is below 1")

    @property
    def visual_range(self) -> range:
        """Ids of visual codes: 256 to 262,399 in the paper."""
        return range(SPECIALS, SPECIALS + self.visual)

    def audio_range(self, level: int) -> range:
        """Ids of one level's codes; no two levels share one. Raises UserError on a level that is not there."""
        if not 0 <= level < self.levels:
            raise UserError(f"there is no audio level {level}; choose one below {self.levels}")
        start = SPECIALS + self.visual + level * self.codes
        return range(start, start + self.codes)

    @property
    def size(self) -> int:
        """How many ids there are: 266,496 in the paper, without its text vocabulary."""
        return SPECIALS + self.visual + self.levels * self.codes

    def visual_ids(self, codes: Tensor) -> Tensor:
        """Codes of a video `(..., T, H, W)`, from 0, as a row of ids `(..., T*H*W)`, frame by frame, row by row.

        Raises UserError on a code out of range.
        """
        _within("visual code", codes, range(self.visual))
        return codes.flatten(-3) + SPECIALS  # (..., T*H*W)

    def visual_codes(self, ids: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """The inverse: ids `(..., T*H*W)` as codes `(..., T, H, W)`. Raises UserError on an id that is not visual, or a wrong
        number of them."""
        _within("visual id", ids, self.visual_range)
        if ids.shape[-1] != math.prod(shape):
            raise UserError(f"{ids.shape[-1]} ids do not make a video of {shape} tokens; give {math.prod(shape)}")
        return ids.unflatten(-1, shape) - SPECIALS  # (..., T, H, W)

    def audio_ids(self, codes: Tensor) -> Tensor:
        """Codes of sound `(..., levels, T)`, from 0, as ids `(..., levels*T)`: the whole first level, then the next.

        Raises UserError on a code out of range or another number of levels.
        """
        _within("audio code", codes, range(self.codes))
        if codes.ndim < 2 or codes.shape[-2] != self.levels:
            raise UserError(f"sound has {self.levels} levels of codes, got {tuple(codes.shape)}; give (..., {self.levels}, T)")
        return (codes + self._starts(codes.device)).flatten(-2)  # (..., levels*T)

    def audio_codes(self, ids: Tensor) -> Tensor:
        """The inverse: ids `(..., levels*T)` as codes `(..., levels, T)`. Raises UserError on an id of another level."""
        if ids.shape[-1] % self.levels:
            raise UserError(f"{ids.shape[-1]} ids do not divide into {self.levels} levels; give a multiple")
        codes = ids.unflatten(-1, (self.levels, -1)) - self._starts(ids.device)  # (..., levels, T)
        _within("audio id in its level", codes, range(self.codes))
        return codes

    def _starts(self, device: torch.device) -> Tensor:
        return torch.tensor([[self.audio_range(level).start] for level in range(self.levels)], device=device)  # (levels, 1)

    def choices(self, ids: Tensor) -> list[range]:
        """What may stand at each place of a row like `ids (L,)`: any code of the same kind and level, or the same special."""
        kinds = [self.visual_range, *(self.audio_range(level) for level in range(self.levels))]
        return [next((kind for kind in kinds if one in kind), range(one, one + 1)) for one in ids.tolist()]


def _within(name: str, values: Tensor, allowed: range) -> None:
    if values.numel() and not (int(values.min()) >= allowed.start and int(values.max()) < allowed.stop):
        low, high = int(values.min()), int(values.max())
        raise UserError(f"a {name} must be in {allowed.start} to {allowed.stop - 1}, got {low} to {high}; correct it")


@dataclass(frozen=True)
class Row:
    """One sequence: `ids (L,)`, of which the first `prefix` are given and the others are learned or generated."""

    ids: Tensor
    prefix: int


def _row(
    layout: Layout,
    task: Task,
    *,
    text: int,
    source: int,
    seen: Tensor | None = None,
    heard: Tensor | None = None,
    video: Tensor | None = None,
    audio: Tensor | None = None,
    image: bool = False,
) -> Row:
    """Figure 2, left to right. What is absent leaves no token behind, not even its marks."""
    if not 0 <= text <= MAX_TEXT:
        raise UserError(f"a prompt has at most {MAX_TEXT} text tokens, got {text}; shorten it")
    if not 0 <= source < SOURCES:
        raise UserError(f"there are {SOURCES} sources, got number {source}; choose one below")

    def marked(begin: Special, ids: Tensor, end: Special) -> list[int]:
        return [begin, *ids.tolist(), end]

    given: list[int] = [Special.BOS, task]
    if text:
        given += [Special.BOT_I, *[Special.TEXT] * text, Special.EOT_I]
    if seen is not None:
        given += marked(Special.BOV_I, layout.visual_ids(seen), Special.EOV_I)
    if heard is not None:
        given += marked(Special.BOA_I, layout.audio_ids(heard), Special.EOA_I)
    given += [Special.SOURCE + source]
    if video is not None and video.shape[-1] != video.shape[-2]:
        given += [Special.RES]  # square is what goes without saying
    made: list[int] = []
    if video is not None:
        made += marked(Special.BOV_O, layout.visual_ids(video), Special.EOV_O)
    if audio is not None:
        made += marked(Special.BOA_O, layout.audio_ids(audio), Special.EOA_O)
    # An image neither ends the video nor the row: it is how a video begins.
    made = made[:-1] if image else [*made, Special.EOS]
    return Row(torch.tensor(given + made), len(given))


def text_to_video(layout: Layout, video: Tensor, text: int = 0, source: int = 0) -> Row:
    """Codes of a `video (T, H, W)` from `text` tokens; from nothing when there are none. One frame is an image (T = 1).

    Raises UserError, as every task does, on codes out of range, on more than 64 text tokens and on an unknown source.
    """
    return _row(layout, Task.GENERATE, text=text, source=source, video=video, image=len(video) == 1)


def image_to_video(layout: Layout, video: Tensor, text: int = 0, source: int = 0) -> Row:
    """The first frame of `video (T, H, W)` is given, the others follow. The codec is causal: a first frame is an image."""
    seen, rest = _parted(video, 1)
    return _row(layout, Task.GENERATE, text=text, source=source, seen=seen, video=rest)


def frame_prediction(layout: Layout, video: Tensor, given: int, text: int = 0, source: int = 0) -> Row:
    """The first `given` token frames of `video (T, H, W)` are given, the others follow. Also UserError when none would."""
    seen, rest = _parted(video, given)
    return _row(layout, Task.FRAME_PREDICTION, text=text, source=source, seen=seen, video=rest)


def painting(layout: Layout, masked: Tensor, video: Tensor, outside: bool, text: int = 0, source: int = 0) -> Row:
    """Codes `masked (T, H, W)` of a video with a hole, made after its pixels were taken out, to the codes of the whole.

    `outside`: the hole is around what is left (outpainting), otherwise within it (inpainting). Given are the codes of what can
    be seen, not a mask of codes: a code sees farther than its cell (MAGVIT, Yu et al. 2023, section 3.2).
    """
    if masked.shape != video.shape:
        raise UserError(f"a video of {tuple(video.shape)} tokens has a hole of {tuple(masked.shape)}; give both in one size")
    task = Task.OUTPAINTING if outside else Task.INPAINTING
    return _row(layout, task, text=text, source=source, seen=masked, video=video)


FILM_TASKS = ("text to image", "text to video", "image to video", "frame prediction", "inpainting", "outpainting")
"""What is made of a prompt and of words of films; `film_rows` puts their rows together."""


def reads_words(task: str) -> bool:
    """Whether a prompt stands in a task's prefix: everywhere but in frame prediction, which is to go by what is seen alone.

    The exception is ours. Raises UserError when there is no such task.
    """
    if task not in FILM_TASKS:
        raise UserError(f"there is no task {task!r}; choose one of {', '.join(FILM_TASKS)}")
    return task != "frame prediction"


def film_rows(
    task: str, layout: Layout, video: Tensor, masked: Tensor | None = None, given: int = 1, text: int = 0
) -> tuple[Row, Tensor]:
    """Rows of one of `FILM_TASKS` for a batch: the row of the first, which says what stands where, and all ids `(B, L)`.

    Codes of films `video (B, T, H, W)`; in- and outpainting also read those of films with a hole, `masked` like `video`.
    `given` is the number of known token frames of frame prediction; a picture is a film's first token frame. Raises UserError
    on an unknown task and where there is nothing to read or to make.
    """
    prompt = text if reads_words(task) else 0
    seen: Tensor | None = None
    made, one = video, video[0]
    if task == "text to image":
        made = video[:, :1]
        row = text_to_video(layout, one[:1], prompt)
    elif task == "text to video":
        row = text_to_video(layout, one, prompt)
    elif task == "image to video":
        row = image_to_video(layout, one, prompt)
        seen, made = video[:, :1], video[:, 1:]
    elif task == "frame prediction":
        row = frame_prediction(layout, one, given, prompt)
        seen, made = video[:, :given], video[:, given:]
    else:
        if masked is None:
            raise UserError(f"{task} reads films with a hole, none are there; give their words, too")
        row = painting(layout, masked[0], one, task == "outpainting", prompt)
        seen = masked
    ids = row.ids.to(video.device).repeat(len(video), 1)  # (B, L)
    place = torch.arange(len(row.ids))
    visual = row.ids >= layout.visual_range.start
    if seen is not None:
        ids[:, visual & (place < row.prefix)] = layout.visual_ids(seen)
    ids[:, visual & (place >= row.prefix)] = layout.visual_ids(made)
    return row, ids


def video_to_audio(layout: Layout, video: Tensor, audio: Tensor, text: int = 0, source: int = 0) -> Row:
    """Codes of sound `(levels, T)` for the codes of a video `(T, H, W)`."""
    return _row(layout, Task.VIDEO_TO_AUDIO, text=text, source=source, seen=video, audio=audio)


def audio_to_video(layout: Layout, audio: Tensor, video: Tensor, text: int = 0, source: int = 0) -> Row:
    """Codes of a video `(T, H, W)` for the codes of sound `(levels, T)`."""
    return _row(layout, Task.AUDIO_TO_VIDEO, text=text, source=source, heard=audio, video=video)


def text_to_audio(layout: Layout, audio: Tensor, text: int, source: int = 0) -> Row:
    """Codes of sound `(levels, T)` from `text` tokens."""
    return _row(layout, Task.TEXT_TO_AUDIO, text=text, source=source, audio=audio)


def _parted(video: Tensor, given: int) -> tuple[Tensor, Tensor]:
    if not 0 < given < len(video):
        raise UserError(f"of {len(video)} token frames {given} cannot be given; give at least 1 and leave at least 1")
    return video[:given], video[given:]


def cut(text: Condition) -> Condition:
    """The states that a row has places for: the first `MAX_TEXT`."""
    return Condition(text.states[:, :MAX_TEXT], text.mask[:, :MAX_TEXT])


def together(rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Rows as `ids (B, L)`, padded behind, and `prefix (B,)`. Grouping rows of one length leaves next to no padding."""
    ids = nn.utils.rnn.pad_sequence([row.ids for row in rows], batch_first=True, padding_value=Special.PAD)  # (B, L)
    return ids, torch.tensor([row.prefix for row in rows])


def image_share(progress: float) -> float:
    """Share of images at `progress` in [0, 1] of training: 0.9 in the first quarter, then 0.1 (section 4.2)."""
    if not 0.0 <= progress <= 1.0:
        raise UserError(f"progress must be in [0, 1], got {progress}; give the share of training that is done")
    return 0.9 if progress < 0.25 else 0.1


@dataclass(frozen=True)
class Mixture:
    """Tasks by name and their shares, which need not sum to one. The paper states none: they belong to a recipe.

    Raises UserError when a share is negative or all are 0.
    """

    shares: Mapping[str, float]

    def __post_init__(self) -> None:
        if min(self.shares.values(), default=0.0) < 0 or not 0.0 < sum(self.shares.values()) < math.inf:
            raise UserError("shares of tasks must be at least 0 and one above 0; correct them")

    def draw(self, generator: torch.Generator) -> str:
        """A name, by its share."""
        weights = torch.tensor(list(self.shares.values()), dtype=torch.float64)  # (tasks,)
        return list(self.shares)[int(torch.multinomial(weights, 1, generator=generator))]


def draw_task(images: Mixture, videos: Mixture, progress: float, generator: torch.Generator) -> tuple[bool, str]:
    """Whether the next batch is of images, by `image_share`, and which of their or of the videos' tasks it trains."""
    image = float(torch.rand((), generator=generator, dtype=torch.float64)) < image_share(progress)
    return image, (images if image else videos).draw(generator)


@dataclass(frozen=True)
class VideoPoetConfig:
    """Sizes of a `VideoPoet`; `text` is the width of the text states. Raises UserError when they do not fit each other."""

    width: int = 1024
    heads: int = 16
    depth: int = 24
    text: int = 2048
    layout: Layout = Layout()

    def __post_init__(self) -> None:
        if min(self.width, self.heads, self.depth, self.text) < 1:
            raise UserError("every size of a VideoPoet must be at least 1; raise the one that is not")
        if self.width % (2 * self.heads):
            raise UserError(f"{self.heads} heads need an even multiple as width, got {self.width}; try {64 * self.heads}")


def visible(prefix: Tensor, real: Tensor, queries: int) -> Tensor:
    """Who may look at whom, boolean `(B, 1, queries, M)`, for the last `queries` of M tokens.

    `prefix (B,)` is how many tokens see each other in both directions; whatever is behind them sees what is before it and
    itself. `real (B, M)`: whether a token is seen at all.
    """
    M = real.shape[1]
    keys = torch.arange(M, device=real.device)
    past = keys <= keys[M - queries :, None]  # (queries, M)
    given = (keys < prefix[:, None])[:, None]  # (B, 1, M)
    return ((past | given) & real[:, None])[:, None]  # (B, 1, queries, M)


class Cache:
    """Keys and values of the tokens read so far, by layer, and which of them are `real (B, M)`."""

    def __init__(self, depth: int) -> None:
        self.layers = [KeyValues() for _ in range(depth)]
        self.real: Tensor | None = None


class PrefixBlock(nn.Module):
    """Pre-norm self-attention and MLP, 12 D^2 weights; what is seen is the mask's affair."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim, EPS)
        self.attention = SelfAttention(dim, heads, qk_norm=False, bias=True)
        self.mlp_norm = nn.LayerNorm(dim, EPS)
        self.mlp = MLP(dim, 4 * dim)

    def forward(self, x: Tensor, rope: Rope, mask: Tensor, past: KeyValues | None) -> Tensor:
        """`x (B, L, D)`; `rope` its positions; `mask (B, 1, L, M)`; `past` holds the M - L tokens before."""
        x = x + self.attention(self.attention_norm(x), rope, mask, past=past)
        return x + self.mlp(self.mlp_norm(x))


class VideoPoet(nn.Module):
    """Rows of ids and text states in, logits of every next id out."""

    def __init__(self, config: VideoPoetConfig) -> None:
        super().__init__()
        self.config = config
        D = config.width
        self.tokens = nn.Embedding(config.layout.size, D)
        self.text = nn.Linear(config.text, D)
        self.rope = RotaryEmbedding((D // config.heads,), base=10_000.0)
        self.blocks = nn.ModuleList(PrefixBlock(D, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(D, EPS)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fill every parameter: for a module built on the meta device, after `to_empty`.

        As GPT-2 (Radford et al. 2019, section 2.3): 0.02, and less by the root of the residuals' number where one ends.
        """
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.tokens.weight, std=0.02)
        for name, module in self.blocks.named_modules():
            if name.endswith(("attention.out", "mlp.down")) and isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02 / (2 * self.config.depth) ** 0.5)

    def forward(
        self, ids: Tensor, prefix: Tensor, text: Condition | None = None, cache: Cache | None = None, last: bool = False
    ) -> Tensor:
        """Ids `(B, L)`, the number of given ones `prefix (B,)` and text states to logits `(B, L, V)`, or the last `(B, 1, V)`.

        The n-th TEXT id of a row is the n-th of its states; one that is masked is as if it was not there. With a `cache`, ids
        are those behind the ones it holds, whose first must have been the whole prefix; the cache grows by them, in place.
        """
        holds = ids == Special.TEXT  # (B, L)
        real = ids != Special.PAD
        x = self.tokens(ids)  # (B, L, D)
        if text is not None and text.states.shape[1]:
            place = (holds.cumsum(1) - 1).clamp(0, text.states.shape[1] - 1)  # (B, L)
            states = self.text(text.states)  # (B, K, D)
            x = torch.where(holds[..., None], states.gather(1, place[..., None].expand(-1, -1, states.shape[-1])), x)
            real = torch.where(holds, text.mask.gather(1, place), real)
        if cache is not None:
            cache.real = real = real if cache.real is None else torch.cat([cache.real, real], dim=1)  # (B, M)
        L = ids.shape[1]
        # Counted over real tokens alone, so that a row is the same with and without masked text.
        positions = (real.cumsum(1) - 1)[:, -L:, None]  # (B, L, 1)
        rope, mask = self.rope(positions), visible(prefix, real, L)
        for i, block in enumerate(self.blocks):
            x = block(x, rope, mask, None if cache is None else cache.layers[i])
        return F.linear(self.norm(x[:, -1:] if last else x), self.tokens.weight)

    def step(self, prefix: int, text: Condition | None = None) -> Callable[[Tensor, Cache | None], Tensor]:
        """What a decoder calls: `(ids, cache) -> logits (B, V)` of the id behind the last; one prefix for all rows.

        Without a cache ids are the whole row, with one only what it does not hold yet.
        """

        def next_logits(ids: Tensor, cache: Cache | None) -> Tensor:
            states = text if cache is None or cache.real is None else None  # a cache holds what the prefix said
            return self(ids, torch.full((len(ids),), prefix, device=ids.device), states, cache, last=True)[:, 0]  # (B, V)

        return next_logits

    def cache(self) -> Cache:
        """An empty one."""
        return Cache(self.config.depth)


def loss(logits: Tensor, ids: Tensor, prefix: Tensor) -> Tensor:
    """Mean cross-entropy of the output in nats, `()`: of ids behind each row's `prefix (B,)`, padding aside (section 3.2).

    logits `(B, L, V)` and ids `(B, L)` as of `VideoPoet.forward`. A batch without output loses 0.
    """
    place = torch.arange(1, ids.shape[1], device=ids.device)
    learned = (place >= prefix[:, None]) & (ids[:, 1:] != Special.PAD)  # (B, L - 1)
    # Picked first: logits of 266,496 ids are the largest tensor by far, and the prefix's are never looked at.
    total = F.cross_entropy(logits[:, :-1][learned].float(), ids[:, 1:][learned], reduction="sum")
    return total / learned.sum().clamp(min=1)


# Super-resolution (section 3.3): all codes of a finer grid at once, in steps, and not one after the other.


@dataclass(frozen=True)
class SuperResolutionConfig:
    """Sizes of a `SuperResolution`. Raises UserError when they do not fit each other.

    `depth` is in rounds of three layers, one for each of `windows (T, H, W)`: upright, level and through time. A code is two
    digits below `factor`. The paper gives parameters (1 and 0.5 billion), no widths: there is no default.
    """

    width: int
    heads: int
    depth: int
    windows: tuple[tuple[int, int, int], ...]
    text: int = 2048
    factor: int = 512

    def __post_init__(self) -> None:
        if min(self.width, self.heads, self.depth, self.text, self.factor) < 1:
            raise UserError("every size of a SuperResolution must be at least 1; raise the one that is not")
        if self.width % self.heads or self.width % 16:
            raise UserError(f"the width must be a multiple of 16 and of {self.heads} heads, got {self.width}; correct it")
        if len(self.windows) != 3 or any(t < 1 or h < 2 or w < 2 or h % 2 or w % 2 for t, h, w in self.windows):
            raise UserError(f"three windows of even height and width are needed, got {self.windows}; take those of STAGES")


STAGES: dict[str, tuple[tuple[int, int, int], ...]] = {
    "5x56x32": ((1, 56, 4), (1, 8, 32), (5, 8, 8)),
    "5x112x64": ((1, 112, 2), (1, 4, 64), (5, 8, 8)),
}
"""Windows of both stages of the paper, by the tokens they make; each doubles height and width."""


class WindowLayer(nn.Module):
    """Self-attention within windows, cross-attention to the coarse tokens of the same window, to text, and an MLP; pre-norm."""

    def __init__(self, dim: int, heads: int, window: tuple[int, int, int]) -> None:
        super().__init__()
        self.window = window
        self.attention_norm, self.attention = nn.LayerNorm(dim, EPS), SelfAttention(dim, heads, qk_norm=False, bias=True)
        self.coarse_norm, self.coarse = nn.LayerNorm(dim, EPS), CrossAttention(dim, heads, dim, qk_norm=False, bias=True)
        self.text_norm, self.text = nn.LayerNorm(dim, EPS), CrossAttention(dim, heads, dim, qk_norm=False, bias=True)
        self.mlp_norm, self.mlp = nn.LayerNorm(dim, EPS), MLP(dim, 4 * dim)

    def forward(self, x: Tensor, coarse: Tensor, keep: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """`x (B, T, H, W, D)`; `coarse (B, T, H/2, W/2, D)` where `keep (B,)`; `text (B, K, D)` and its `mask (B, K)`."""
        shape = x.shape
        t, h, w = self.window
        seen = to_windows(coarse, (t, h // 2, w // 2))  # (B*n, t*h*w / 4, D)
        rows = to_windows(x, self.window)  # (B*n, t*h*w, D)
        rows = rows + self.attention(self.attention_norm(rows))
        kept = keep.repeat_interleave(len(rows) // len(keep))[:, None].expand(seen.shape[:2])  # (B*n, t*h*w / 4)
        rows = rows + self.coarse(self.coarse_norm(rows), seen, kept)
        x = from_windows(rows, self.window, shape).flatten(1, 3)  # (B, T*H*W, D)
        x = x + self.text(self.text_norm(x), text, mask)
        return (x + self.mlp(self.mlp_norm(x))).view(shape)


class SuperResolution(nn.Module):
    """Codes of a fine grid, some of them masked, and all of a coarse one to logits of every fine code."""

    def __init__(self, config: SuperResolutionConfig) -> None:
        super().__init__()
        self.config = config
        D = config.width
        # A code is two digits, so two small tables stand for one of 2^18 rows; the last row of each is the mask.
        self.high, self.low = nn.Embedding(config.factor + 1, D), nn.Embedding(config.factor + 1, D)
        self.coarse_high, self.coarse_low = nn.Embedding(config.factor, D), nn.Embedding(config.factor, D)
        self.text = nn.Linear(config.text, D)
        self.blocks = nn.ModuleList(
            WindowLayer(D, config.heads, window) for _ in range(config.depth) for window in config.windows
        )
        self.norm = nn.LayerNorm(D, EPS)
        self.head = nn.Linear(D, 2 * config.factor)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fill every parameter: for a module built on the meta device, after `to_empty`. Tables of deviation 0.02, the rest as
        torch does."""
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, (nn.Linear, nn.LayerNorm)):
                module.reset_parameters()

    def forward(self, codes: Tensor, coarse: Tensor, text: Condition, keep: Tensor | None = None) -> Tensor:
        """Codes `(B, T, H, W)`, MASK where unknown, coarse codes `(B, T, H/2, W/2)` and text to `(B, T, H, W, 2, factor)`.

        These are logits of both digits of a code, as `nn.subtokens` splits it. Where `keep (B,)` is False the coarse codes are
        hidden; text is hidden by its mask: each in a tenth of training, and for guidance. Raises UserError when grids or
        windows do not fit.
        """
        B, T, H, W = codes.shape
        if coarse.shape != (B, T, H // 2, W // 2) or H % 2 or W % 2:
            raise UserError(f"{tuple(codes.shape)} codes need half the height and width below, got {tuple(coarse.shape)}")
        n = self.config.factor
        low, high = split_ids(codes, 2, n).masked_fill((codes == MASK)[..., None], n).unbind(-1)  # 2 x (B, T, H, W)
        x = self.high(high) + self.low(low) + self._places(codes, 1)  # (B, T, H, W, D)
        low, high = split_ids(coarse, 2, n).unbind(-1)  # 2 x (B, T, H/2, W/2)
        below = self.coarse_high(high) + self.coarse_low(low) + self._places(coarse, 2)  # (B, T, H/2, W/2, D)
        keep = torch.ones(B, dtype=torch.bool, device=codes.device) if keep is None else keep
        states = self.text(text.states)  # (B, K, D)
        for block in self.blocks:
            x = block(x, below, keep, states, text.mask)
        return self.head(self.norm(x)).unflatten(-1, (2, n))

    def _places(self, codes: Tensor, scale: int) -> Tensor:
        """Sines of the middle of each cell, in fine cells: a quarter of the width for time, the rest for both sides."""
        _, T, H, W = codes.shape
        D, at = self.config.width, grid_positions(T, H, W, device=codes.device).view(T, H, W, 3)
        middle = (at[..., 1:] + 0.5) * scale - 0.5
        parts = (sincos(D // 4, at[..., 0]), sincos(3 * D // 8, middle[..., 0]), sincos(3 * D // 8, middle[..., 1]))
        return torch.cat(parts, dim=-1).to(self.high.weight.dtype)  # (T, H, W, D)


def resampled(codes: Tensor, share: Tensor, words: int, generator: torch.Generator) -> Tensor:
    """Codes `(B, ...)` of which each is drawn anew among `words` with the probability `share (B,)` of its sample.

    Noise in the space of codes (section 3.3): what a super-resolution reads in training is then no better than what a language
    model makes for it.
    """
    where, device = generator.device, codes.device
    chance = share.to(where).view(-1, *[1] * (codes.ndim - 1))  # (B, 1, ...)
    again = torch.rand(codes.shape, generator=generator, device=where) < chance
    drawn = torch.randint(words, codes.shape, generator=generator, device=where)
    return torch.where(again.to(device), drawn.to(device), codes)


def guided(
    model: SuperResolution,
    codes: Tensor,
    coarse: Tensor,
    text: Condition,
    null: Condition | None = None,
    text_scale: float = 4.0,
    coarse_scale: float = 1.0,
) -> Tensor:
    """`model(codes, coarse, text)` guided by the coarse codes and by the text, each at its own scale, in one batch.

    nothing + coarse_scale * (coarse - nothing) + text_scale * (both - coarse), as Brooks et al. 2023 ("InstructPix2Pix",
    equation 3) guide by a picture and its text; the scales are those of the first stage, the second's are 8 and 2 (section
    3.3). `null` are as many empty prompts. What a scale of 1 does not need is not computed. Raises UserError where empty
    prompts are needed and missing.
    """
    branches = [(text, True)]
    if text_scale != 1.0 or coarse_scale != 1.0:
        if null is None:
            raise UserError("guidance of a super-resolution needs empty prompts; give them as null, or set both scales to 1")
        branches += [(null, True)] + ([(null, False)] if coarse_scale != 1.0 else [])
    B, n = len(codes), len(branches)
    keep = torch.tensor([kept for _, kept in branches], device=codes.device).repeat_interleave(B)  # (n*B,)
    words = Condition.cat([said for said, _ in branches]) if n > 1 else text
    whole = model(codes.repeat(n, 1, 1, 1), coarse.repeat(n, 1, 1, 1), words, keep)  # (n*B, T, H, W, 2, factor)
    both, *rest = whole.chunk(n)
    if not rest:
        return both
    seen = rest[0]
    base = seen if n == 2 else rest[1] + coarse_scale * (seen - rest[1])
    return base + text_scale * (both - seen)


def masked_loss(logits: Tensor, codes: Tensor, hidden: Tensor) -> Tensor:
    """Mean cross-entropy of both digits of the `hidden (B, T, H, W)` ones of `codes (B, T, H, W)`, in nats, `()`."""
    goals = split_ids(codes[hidden], 2, logits.shape[-1])  # (K, 2)
    total = F.cross_entropy(logits[hidden].flatten(0, 1).float(), goals.flatten(), reduction="sum")
    return total / max(1, goals.numel())


# The catalogue

Config = VideoPoetConfig | SuperResolutionConfig


def build(config: Config) -> nn.Module:
    """The part of VideoPoet that a config is of."""
    return VideoPoet(config) if isinstance(config, VideoPoetConfig) else SuperResolution(config)


@overload
def tiny(config: VideoPoetConfig) -> VideoPoetConfig: ...
@overload
def tiny(config: SuperResolutionConfig) -> SuperResolutionConfig: ...
def tiny(config: Config) -> Config:
    """A config of the same shape, small enough for tests."""
    if isinstance(config, SuperResolutionConfig):
        windows = ((1, 4, 2), (1, 2, 4), (2, 2, 2))
        return replace(config, width=32, heads=4, depth=1, windows=windows, text=24, factor=4)
    return replace(config, width=32, heads=4, depth=2, text=24, layout=Layout(visual=32, levels=config.layout.levels, codes=8))


COUNTED_VIDEO = (5, 16, 16)
"""Tokens of the video that a size is counted at: 17 frames of 128 x 128. A super-resolution is counted at what it makes."""


def _made(config: SuperResolutionConfig) -> tuple[int, int, int]:
    """Tokens (T, H, W) that a stage makes: each of its windows is whole along its own axis."""
    (_, height, _), (_, _, width), (time, _, _) = config.windows
    return time, height, width


def example(config: Config, batch: int = 1) -> tuple[Any, ...]:
    """Random inputs for `forward`, with 64 text states: rows of text-to-video `(B, L)` and their prefix `(B,)`; or codes of
    which a half is masked `(B, T, H, W)` and coarse ones `(B, T, H/2, W/2)`."""
    condition = Condition(torch.randn(batch, MAX_TEXT, config.text), torch.ones(batch, MAX_TEXT, dtype=torch.bool))
    if isinstance(config, SuperResolutionConfig):
        T, H, W = _made(config)
        codes = torch.randint(config.factor**2, (batch, T, H, W))
        hidden = torch.arange(T * H * W).view(T, H, W) % 2 == 0
        return codes.masked_fill(hidden, MASK), torch.randint(config.factor**2, (batch, T, H // 2, W // 2)), condition
    # The marks are made on the CPU: on the meta device no row can be put together.
    with torch.device("cpu"):
        row = text_to_video(config.layout, torch.zeros(COUNTED_VIDEO, dtype=torch.long), MAX_TEXT)
        video = torch.randint(0, config.layout.visual, (batch, *COUNTED_VIDEO))
        ids = row.ids.repeat(batch, 1)  # (B, L)
        ids[:, row.prefix + 1 : -2] = config.layout.visual_ids(video)
    return ids.to(torch.get_default_device()), torch.full((batch,), row.prefix), condition


def stated(config: Config) -> str:
    """The input that `example` makes, in words."""
    T, H, W = _made(config) if isinstance(config, SuperResolutionConfig) else COUNTED_VIDEO
    if isinstance(config, SuperResolutionConfig):
        return f"{MAX_TEXT} text tokens, {T} x {H // 2} x {W // 2} video tokens below {T} x {H} x {W}, {config.factor**2:,} ids"
    return f"{MAX_TEXT} text tokens, {T} x {H} x {W} video tokens (T, H, W), {config.layout.size:,} ids"


# The names are the paper's, the sizes are not (see above): GPT-3 Medium, XL and 6.7B, with 16 heads where that table has 24;
# of the super-resolution widths and rounds of layers that make about the paper's parameters.
SIZES: dict[str, Config] = {
    "300M": VideoPoetConfig(1024, 16, 24),
    "1B": VideoPoetConfig(2048, 16, 24),
    "8B": VideoPoetConfig(4096, 32, 32),
    "SR-1B": SuperResolutionConfig(2048, 32, 4, STAGES["5x56x32"]),
    "SR-500M": SuperResolutionConfig(1280, 20, 5, STAGES["5x112x64"]),
}
