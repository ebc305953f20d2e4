"""VideoPoet: one language model over text, images, videos and sound, and every task is a prefix that it goes on from.

After Kondratyuk et al. 2023, "VideoPoet: A Large Language Model for Zero-Shot Video Generation". Videos are codes of MAGVIT-v2,
sound is codes of SoundStream, text is the states of a frozen T5-XL behind one linear layer; all stand in one row of tokens.
Tokens of the prefix see each other in both directions, those of the output only what is before them, and only the output is
learned (section 3.2). A task differs from another in what stands in the prefix and in the output (section 4.1, figure 2).

From the paper: the special tokens and their order, the ranges of ids, the lengths, sound level by level, what an image leaves
out, and the shares of images and videos over training. The paper gives no widths, no depths and no layer; those here are
ours: pre-norm blocks of 12 D^2 weights, rotary positions in the row, one table for input and output, and the widths and depths
of GPT-3 (Brown et al. 2020, table 2.1) whose name is nearest. So no count here is one of the paper's. Its text vocabulary
has no ids here, since text is never predicted. Stylisation and the continuation of sound are left out. What makes films larger
is `models.super_resolution`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tubelet.core.errors import UserError
from tubelet.core.types import Condition
from tubelet.nn.attention import KeyValues, Rope, SelfAttention
from tubelet.nn.ids import check_ids
from tubelet.nn.mlp import MLP
from tubelet.nn.positions import RotaryEmbedding

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
        Raises UserError for ids that are none, and for more TEXT ids than states or states of another width.
        """
        check_ids("ids", ids, self.tokens.num_embeddings)
        holds = ids == Special.TEXT  # (B, L)
        real = ids != Special.PAD
        x = self.tokens(ids)  # (B, L, D)
        if text is not None and text.states.shape[2] != self.config.text:
            raise UserError(
                f"this model reads states of width {self.config.text}, got {tuple(text.states.shape)}; take the text "
                "encoder that it was built for"
            )
        if text is not None and text.states.shape[1]:
            check_ids("numbers of TEXT ids", holds.sum(1), text.states.shape[1] + 1)
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


# The catalogue


def tiny(config: VideoPoetConfig) -> VideoPoetConfig:
    """A config of the same shape, small enough for tests."""
    return replace(config, width=32, heads=4, depth=2, text=24, layout=Layout(visual=32, levels=config.layout.levels, codes=8))


COUNTED_VIDEO = (5, 16, 16)
"""Tokens of the video that a size is counted at: 17 frames of 128 x 128."""


def example(config: VideoPoetConfig, batch: int = 1) -> tuple[Tensor, Tensor, Condition]:
    """Random inputs for `forward`, with 64 text states: rows of text-to-video `(B, L)` and their prefix `(B,)`."""
    condition = Condition(torch.randn(batch, MAX_TEXT, config.text), torch.ones(batch, MAX_TEXT, dtype=torch.bool))
    # The marks are made on the CPU: on the meta device no row can be put together.
    with torch.device("cpu"):
        row = text_to_video(config.layout, torch.zeros(COUNTED_VIDEO, dtype=torch.long), MAX_TEXT)
        video = torch.randint(0, config.layout.visual, (batch, *COUNTED_VIDEO))
        ids = row.ids.repeat(batch, 1)  # (B, L)
        ids[:, row.prefix + 1 : -2] = config.layout.visual_ids(video)
    return ids.to(torch.get_default_device()), torch.full((batch,), row.prefix), condition


def stated(config: VideoPoetConfig) -> str:
    """The input that `example` makes, in words."""
    T, H, W = COUNTED_VIDEO
    read = f"{MAX_TEXT} text tokens, {T} x {H} x {W} video tokens (T, H, W), {config.layout.size:,} ids"
    return f"{read}; sizes are ours, named as the paper's"


# The names are the paper's, the sizes are not (see above): GPT-3 Medium, XL and 6.7B, with 16 heads where that table has 24.
SIZES: dict[str, VideoPoetConfig] = {
    "300M": VideoPoetConfig(1024, 16, 24),
    "1B": VideoPoetConfig(2048, 16, 24),
    "8B": VideoPoetConfig(4096, 32, 32),
}
