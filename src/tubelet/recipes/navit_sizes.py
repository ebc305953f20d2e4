"""navit-sizes: clips of any aspect, packed as they are, or made square first? Four classifiers at equal compute.

Paper: NaViT (Dehghani et al. 2023), sections 2.1, 2.2 and 3; figure 4 is on token dropping.
Command: tubelet train navit-sizes
Cost: 25 minutes on one core beside another training.
Score: both right .940 packed, .916 with tokens dropped, .964 stretched, .804 padded: docs/lineage.md. A run leaves table.json,
table.md and sheet.png, one clip as each row sees it, in its folder.

One network names the event and the colour of the main object of clips of five sizes. The rows differ in what becomes of a clip:
it keeps its size, is stretched to a square, or is shrunk into the square with its aspect and padded. All are packed into as
many tokens a step, for as many steps; where tokens are dropped, packs are filled with more clips by the mean rate of dropping.
So compute is equal and the clips seen are not: the paper's first claim; its second is that aspects help. Test clips are made
what the row's training clips were, and shown whole. In the paper NaViT matches the best ViT with a quarter of its compute.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tubelet.core.errors import UserError
from tubelet.data.schema import Record
from tubelet.data.stream import PackStream
from tubelet.evaluate.report import world_of
from tubelet.media.resize import Fit, resize
from tubelet.models.navit import NaViT, NaViTConfig
from tubelet.nn.dropping import BetaRate, keep_tokens
from tubelet.nn.patch import token_grid
from tubelet.recipes.lineage import Figures, Row, compare, plain, train_row
from tubelet.recipes.worlds import Job, in_memory
from tubelet.train.classify import as_pixels
from tubelet.train.loop import TrainConfig
from tubelet.train.optim import OptimizerConfig
from tubelet.worlds.constants import COLORS, TEST_SEEDS
from tubelet.worlds.grammar import parse

FRAMES, FPS = 15, 8.0
"""A patch of two frames takes 1 + 2k of them."""
KINDS = ("slide", "fall", "bounce", "parabola", "collision", "occlude")
"""Events with a main object that has a colour."""
SIZES = ((64, 64), (48, 80), (80, 48), (48, 96), (96, 48))
"""Heights and widths of the clips in turn, of about one area; sides are whole patches."""
SIDE = 64
"""Of the square, in pixels."""
TRAIN_SEED = 2_070_000_000
"""First seed of the training clips, among the worlds' training seeds."""
BLANK = 0.0
"""The gray of padding, in [-1, 1]."""
FACETS = {"event": len(KINDS), "colour": len(COLORS), "both": len(KINDS) * len(COLORS)}
"""What is named, and how many answers there are."""
SPLITS = ("in", "held_out")
SHOWN = SIZES.index((48, 96))
"""The training clip that stands on the sheet, as each row sees it."""


@dataclass(frozen=True)
class Way:
    """What becomes of a clip: `fit` as in `media.resize`, None where it keeps its size; and which tokens are dropped."""

    fit: Fit | None = None
    drop: BetaRate | None = None


WAYS = {
    "packed": Way(),
    "packed, tokens dropped": Way(drop=BetaRate(0.5, 0.85)),
    "stretched to a square": Way("stretch"),
    "padded to a square": Way("pad"),
}


@dataclass(frozen=True)
class Clips:
    """Clips in memory, uint8 `(T, H, W, 3)` of any sizes, each with the numbers of its event and of its colour, `(2,)`."""

    video: Sequence[Tensor]
    label: Sequence[Tensor]

    def __len__(self) -> int:
        return len(self.video)

    def read(self, index: int) -> Record:
        return Record(f"clip-{index}", {"video": self.video[index], "label": self.label[index]}, {})


@dataclass(frozen=True)
class NamingObjective:
    """`(model, batch, rng) -> losses` on packs with lists `video` and `label`, as `Clips` has them."""

    drop: BetaRate | None = None

    def __call__(self, model: NaViT, batch: dict[str, Any], rng: torch.Generator) -> dict[str, Tensor]:
        """Returns "loss", the sum of both cross-entropies, and the accuracies "event" and "colour"."""
        clips = [as_pixels(video[None])[0] for video in batch["video"]]  # (3, T, H, W) each
        kept: list[Tensor] | None = None
        if self.drop is not None:
            own = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=rng, device=rng.device)))
            lengths = [tokens_of(video, model.config.patch) for video in batch["video"]]
            rates = self.drop(lengths, own).tolist()
            kept = [keep_tokens(length, rate, own) for length, rate in zip(lengths, rates, strict=True)]
        label = torch.stack(batch["label"])  # (S, 2)
        both = model.forward_packed(clips, kept).float().split((len(KINDS), len(COLORS)), dim=1)  # (S, kinds), (S, colours)
        losses = [F.cross_entropy(logits, label[:, facet], label_smoothing=0.05) for facet, logits in enumerate(both)]
        right = [(logits.detach().argmax(1) == label[:, facet]).float().mean() for facet, logits in enumerate(both)]
        return {"loss": losses[0] + losses[1], "event": right[0], "colour": right[1]}


@dataclass(frozen=True)
class NaViTSizes:
    """What all rows share."""

    rows: tuple[str, ...] = tuple(WAYS)
    navit: NaViTConfig = field(
        default_factory=lambda: NaViTConfig(
            width=128, depth=4, heads=4, patch=(2, 16, 16), max_frames=8, max_side=6, outputs=len(KINDS) + len(COLORS)
        )
    )
    clips: int = 9000
    """Training clips, all events and sizes alike."""
    n: int = 450
    """Test clips of each split."""
    budget: int = 4224
    """Tokens of a step: 33 squares."""
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=1000,
            batch=1,
            warmup=40,
            optimizer=OptimizerConfig(learning_rate=3e-3, learning_rate_adamw=2e-3, weight_decay=0.01),
        )
    )
    """A batch is a number of packs."""
    workers: int = 2

    def __post_init__(self) -> None:
        if self.navit.outputs != len(KINDS) + len(COLORS):
            raise UserError(f"the network names {len(KINDS)} events and {len(COLORS)} colours; set navit.outputs to their sum")

    def run(self, folder: Path) -> Path:
        """Every row that is not yet measured; returns the table's file. Raises UserError on an unknown one."""
        own = functools.cache(self._clips)

        def trained(name: str, place: Path) -> Row | None:
            way, patch = WAYS[name], self.navit.patch
            clips = as_shown(own("train"), way.fit)
            tokens = [tokens_of(video, patch) for video in clips.video]
            # Equal compute: a pack is filled with what is left of its clips on average.
            budget = round(self.budget / (1 - way.drop.mean)) if way.drop else self.budget
            source = PackStream(clips, tokens, budget, self.train.seed)
            torch.manual_seed(self.train.seed)  # the initial weights
            result = train_row(place, NaViT(self.navit), NamingObjective(way.drop), source, self.train)
            if result is None:
                return None
            model, cost = result
            assert isinstance(model, NaViT), "a copy of the model"
            figures: Figures = {}
            for split in SPLITS:
                figures |= {f"{facet}/{split}": value for facet, value in measure(model, as_shown(own(split), way.fit)).items()}
            seen = self.train.steps * self.train.batch * budget / (sum(tokens) / len(tokens)) * (1 - source.padding)
            blank = blank_share([tuple(video.shape[1:3]) for video in own("train").video]) if way.fit == "pad" else 0.0
            return Row(
                figures
                | cost
                | {
                    "clips": seen,
                    "clips_per_second": seen / cost["train_seconds"],
                    "padding": 1 - (1 - source.padding) * (1 - blank),
                },
                shown(clips.video[SHOWN], way.drop, patch).numpy(),
            )

        columns = (
            *((f"{facet}, {split.replace('_', '-')}", f"{facet}/{split}", plain(3)) for split in SPLITS for facet in FACETS),
            ("clips seen", "clips", plain(0)),
            ("clips a second", "clips_per_second", plain(0)),
            ("padding", "padding", lambda value: f"{value:.1%}"),
            ("training, s", "train_seconds", plain(0)),
        )
        chance = {f"{facet}/{split}": 1 / n for split in SPLITS for facet, n in FACETS.items()}
        rows: dict[str, Callable[[Path], Row | None]] = {name: functools.partial(trained, name) for name in WAYS}
        return compare(folder, self, {**rows, "chance": lambda _: Row(chance)}, columns, (*self.rows, "chance"))

    def _clips(self, split: str) -> Clips:
        """Clips of a split, the sizes in turn, into memory."""
        count = self.clips if split == "train" else self.n
        jobs = [_job(split, place) for place in range(count)]
        video: list[Tensor] = [torch.empty(0)] * count
        label = list(video)
        for size in SIZES:
            places = [place for place, job in enumerate(jobs) if job.size == size]
            if not places:
                continue
            rendered, captions = in_memory([jobs[place] for place in places], self.workers, f"{split}, {size[0]} x {size[1]}")
            for place, one, said in zip(places, rendered, captions, strict=True):
                color = parse(said[0]["text"])["objects"][0]["color"]
                video[place] = one
                label[place] = torch.tensor([KINDS.index(jobs[place].kind or ""), COLORS.index(color)])
        return Clips(video, label)


def _job(split: str, place: int) -> Job:
    # Every size comes with every event.
    size, kind = SIZES[place % len(SIZES)], KINDS[place // len(SIZES) % len(KINDS)]
    seed = TRAIN_SEED + place if split == "train" else TEST_SEEDS[place]
    return Job(world_of(kind), seed, size, FRAMES, FPS, kind, "held_out" if split == "held_out" else "train")


def tokens_of(video: Tensor, patch: tuple[int, int, int]) -> int:
    """How many tokens a clip `(T, H, W, 3)` is."""
    t, h, w = token_grid((video.shape[0], video.shape[1], video.shape[2]), patch)
    return t * h * w


def as_shown(clips: Clips, how: Fit | None) -> Clips:
    """Clips made square as `media.resize` does, or as they are."""
    if how is None:
        return clips
    return Clips([squared(video, how) for video in clips.video], clips.label)


def squared(video: Tensor, how: Fit) -> Tensor:
    """A uint8 clip `(T, H, W, 3)` as a square one, `(T, SIDE, SIDE, 3)`."""
    pixels = resize(as_pixels(video[None]), (SIDE, SIDE), fit=how, background=BLANK)[0]  # (3, T, SIDE, SIDE)
    return pixels.add(1.0).mul(127.5).round().to(torch.uint8).permute(1, 2, 3, 0).contiguous()  # (T, SIDE, SIDE, 3)


def blank_share(sizes: Sequence[Sequence[int]]) -> float:
    """Share of a square that stays empty when clips of these heights and widths are shrunk into it, on average."""
    return sum(1 - min(size) / max(size) for size in sizes) / len(sizes)


@torch.no_grad()
def measure(model: NaViT, clips: Clips, batch: int = 64) -> Figures:
    """Share of clips whose `event`, `colour` and `both` are named rightly."""
    device = next(model.parameters()).device
    # Neighbours of one size are computed in one call.
    order = sorted(range(len(clips)), key=lambda place: clips.video[place].shape)
    right: list[Tensor] = []
    for begin in range(0, len(order), batch):
        places = order[begin : begin + batch]
        logits = model.forward_packed([as_pixels(clips.video[place][None].to(device))[0] for place in places])  # (S, outputs)
        named = torch.stack([part.argmax(1) for part in logits.split((len(KINDS), len(COLORS)), dim=1)], dim=1)  # (S, 2)
        right.append(named.cpu() == torch.stack([clips.label[place] for place in places]))
    each = torch.cat(right).double()  # (n, 2)
    return {"event": float(each[:, 0].mean()), "colour": float(each[:, 1].mean()), "both": float(each.prod(1).mean())}


def shown(video: Tensor, drop: BetaRate | None, patch: tuple[int, int, int]) -> Tensor:
    """A uint8 clip `(T, H, W, 3)` with the tokens that training would drop of it in gray, at the mean rate."""
    if drop is None:
        return video
    t, h, w = token_grid((video.shape[0], video.shape[1], video.shape[2]), patch)
    seen = torch.zeros(t * h * w, dtype=torch.bool)
    seen[keep_tokens(len(seen), drop.mean, torch.Generator().manual_seed(0))] = True
    cells = seen.view(t, h, w)
    # The first patch spans one frame, the others patch[0] each.
    cells = torch.cat([cells[:1], cells[1:].repeat_interleave(patch[0], 0)])  # (T, h, w)
    cells = cells.repeat_interleave(patch[1], 1).repeat_interleave(patch[2], 2)  # (T, H, W)
    return torch.where(cells[..., None], video, torch.full_like(video, 127))


def recipe() -> NaViTSizes:
    """All of them."""
    return NaViTSizes()
