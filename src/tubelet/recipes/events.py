"""events: which event does a clip show? Nine classifiers at one budget: what each way of attending to time buys.

Paper: ViViT (Arnab et al. 2021), tables 2 and 3; with C3D (2015), TimeSformer (2021), VTN (2021) and NaViT (2023).
Command: tubelet train events
Cost: 50 minutes on one core beside another training: three to seven minutes a classifier, nine for C3D, which takes fp32.
Score: .976 (TimeSformer) to 1.000 (C3D, ViViT 2) on test seeds, .947 (average) to 1.000 on held-out ones: docs/lineage.md.
A run leaves table.json, table.md and sheet.png in its folder, and attention.png in those of ViViT 1 and 2.

All see the same clips of 64 x 64 pixels for the same number of steps, with the same optimiser; they differ in the room alone.
Accuracy is on test seeds and on held-out compositions (colour and shape, size and event), which no training clip shows; beside
it stand chance, and what is left of it when the frames of every clip come in one other order, or are all the first.

Patches are 16 pixels, as in the papers: in a trial of 150 steps, patches of 8 cost five times as much and learned no faster.
A clip is then 128 to 256 tokens, where attention is a seventh of the work of a joint model, while it is two fifths at the
paper's 3136; so both counts of multiply-accumulates are given, and what factorising saves is to be read from the second.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tubelet.data.stream import TensorSource
from tubelet.evaluate.report import world_of
from tubelet.media.sheet import contact_sheet, save_sheet
from tubelet.models import c3d, navit, timesformer, vivit, vtn
from tubelet.nn.blocks import EncoderBlock
from tubelet.recipes.lineage import Figures, Row, compare, millions, plain, train_row
from tubelet.recipes.worlds import Job, in_memory
from tubelet.runtime.device import choose_device, seconds_per_call
from tubelet.train.classify import ClassifyObjective, as_pixels
from tubelet.train.loop import TrainConfig
from tubelet.train.optim import OptimizerConfig
from tubelet.worlds.constants import KINDS, TEST_SEEDS

FRAMES, SIZE, FPS, PATCH, WIDTH, DEPTH, HEADS = 16, 64, 8.0, 16, 128, 4, 4
TRAIN_SEED = 2_000_000_000
"""First seed of the training clips, among the worlds' training seeds."""
SHOWN = ("fall", "bounce", "parabola", "collision")
"""Events whose first test clip stands in attention.png: they differ in what happens when."""
ATTENDED = ("ViViT 1", "ViViT 2")
"""Rows with a class token whose attention is drawn."""
_VIVIT = vivit.ViViTConfig(
    width=WIDTH, depth=DEPTH, heads=HEADS, temporal_depth=2, frames=FRAMES, size=SIZE, tubelet=(2, PATCH, PATCH),
    classes=len(KINDS),
)  # fmt: skip


class _NaViT(nn.Module):
    """NaViT on clips of one size, whose patches of two frames take 1 + 2k of them."""

    def __init__(self) -> None:
        super().__init__()
        config = navit.NaViTConfig(width=WIDTH, depth=DEPTH, heads=HEADS, patch=(2, PATCH, PATCH), outputs=len(KINDS))
        self.inner = navit.NaViT(config)

    def forward(self, video: Tensor) -> Tensor:
        return self.inner(video[:, :, : FRAMES - 1])


ROOMS: dict[str, Callable[[], nn.Module]] = {
    "C3D": lambda: c3d.C3D(c3d.C3DConfig(classes=len(KINDS), frames=FRAMES, size=SIZE, width=8, hidden=256)),
    "TimeSformer": lambda: timesformer.TimeSformer(
        timesformer.TimeSformerConfig(
            width=WIDTH, depth=DEPTH, heads=HEADS, frames=FRAMES, size=SIZE, patch=PATCH, classes=len(KINDS)
        )
    ),
    "VTN": lambda: vtn.VTN(
        vtn.VTNConfig(
            width=WIDTH, depth=DEPTH, heads=HEADS, temporal_depth=2, temporal_hidden=4 * WIDTH, window=8, positions=64,
            frames=FRAMES, size=SIZE, patch=PATCH, classes=len(KINDS), head_dropout=0.1,
        )
    ),
    "ViViT 1": lambda: vivit.ViViT(_VIVIT),
    "ViViT 2": lambda: vivit.ViViT(replace(_VIVIT, kind="encoder")),
    "ViViT 3": lambda: vivit.ViViT(replace(_VIVIT, kind="self-attention", pool="mean")),
    "ViViT 4": lambda: vivit.ViViT(replace(_VIVIT, kind="dot-product", pool="mean")),
    "ViViT average": lambda: vivit.ViViT(replace(_VIVIT, kind="average")),
    "NaViT": _NaViT,
}  # fmt: skip
PUBLISHED: dict[str, tuple[Callable[[Any], nn.Module], Any]] = {
    "C3D": (c3d.C3D, c3d.SIZES["487"]),
    "TimeSformer": (timesformer.TimeSformer, timesformer.SIZES["B"]),
    "VTN": (vtn.VTN, vtn.SIZES["B"]),
    "ViViT 1": (vivit.ViViT, vivit.SIZES["B/16x2"]),
    "ViViT 2": (vivit.ViViT, vivit.SIZES["B/16x2-FE"]),
    "ViViT 3": (vivit.ViViT, vivit.SIZES["B/16x2-FSA"]),
    "ViViT 4": (vivit.ViViT, vivit.SIZES["B/16x2-FDP"]),
    "ViViT average": (vivit.ViViT, vivit.SIZES["B/16x2-AVG"]),
}
"""The same networks and their sizes as published. NaViT's has images alone."""


@dataclass(frozen=True)
class Events:
    """What all classifiers share."""

    rows: tuple[str, ...] = tuple(ROOMS)
    clips: int = 13_500
    """Training clips, all kinds alike: the run sees each of them twice or three times, so that nothing is learned by heart."""
    n: int = 450
    """Test clips of each split."""
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=1000,
            batch=32,
            warmup=40,
            optimizer=OptimizerConfig(learning_rate=3e-3, learning_rate_adamw=2e-3, weight_decay=0.01),
        )
    )
    workers: int = 2

    def run(self, folder: Path) -> Path:
        """Every classifier that is not yet measured; returns the table's file. Raises UserError on an unknown one."""
        clips = functools.cache(self._clips)

        def trained(name: str, place: Path) -> Row | None:
            torch.manual_seed(self.train.seed)  # the initial weights
            config = self.train
            if name == "C3D" and choose_device(config.device).type == "cpu":
                # torch 2.13: some of the bf16 gradient of narrow 3-D kernels is memory that nothing was written to.
                config = replace(config, precision="fp32")
            source = TensorSource(clips("train"), None, seed=config.seed)
            result = train_row(place, ROOMS[name](), ClassifyObjective(), source, config)
            if result is None:
                return None
            model, cost = result
            figures = measure(model, {split: clips(split) for split in ("in", "held_out")}) | {"macs": macs(ROOMS[name])}
            if name in PUBLISHED:
                room, sizes = PUBLISHED[name]
                figures["macs/published"] = macs(lambda: room(sizes), sizes.frames, sizes.size)
            if isinstance(model, vivit.ViViT) and name in ATTENDED:
                save_sheet(attention(model, clips("in")["video"]), place / "attention.png")
            bounce = KINDS.index("bounce")
            clip = clips("in")["video"][bounce]
            return Row(figures | cost, lit(clip, decisive(model, clip, bounce)))

        columns = (
            ("test seeds", "in", plain(3)),
            ("held-out compositions", "held_out", plain(3)),
            ("frames in another order", "in/shuffled", plain(3)),
            ("first frame alone", "in/still", plain(3)),
            ("parameters", "parameters", millions),
            ("MACs", "macs", millions),
            ("as published", "macs/published", lambda value: f"{value / 1e9:.1f} G"),
            ("clips a second", "clips_per_second", plain(0)),
            ("training, s", "train_seconds", plain(0)),
        )
        rows = {name: functools.partial(trained, name) for name in ROOMS}
        chance = {"chance": lambda _: Row({"in": 1 / len(KINDS), "held_out": 1 / len(KINDS)})}
        return compare(folder, self, {**rows, **chance}, columns, (*self.rows, *chance))

    def _clips(self, split: str) -> dict[str, Tensor]:
        """Clips of a split and the numbers of their kinds, into memory."""
        jobs = [_job(split, place) for place in range(self.clips if split == "train" else self.n)]
        video, _ = in_memory(jobs, self.workers, split)
        return {"video": video, "label": torch.tensor([KINDS.index(job.kind or "") for job in jobs])}


def _job(split: str, place: int) -> Job:
    kind = KINDS[place % len(KINDS)]
    seed = TRAIN_SEED + place if split == "train" else TEST_SEEDS[place]
    return Job(world_of(kind), seed, (SIZE, SIZE), FRAMES, FPS, kind, "held_out" if split == "held_out" else "train")


@torch.no_grad()
def measure(model: nn.Module, tests: Mapping[str, Mapping[str, Tensor]]) -> Figures:
    """Accuracy on each split, `SPLIT`, and of each event, `SPLIT/EVENT`; `SPLIT/shuffled` with the frames of all clips in one
    other order, `SPLIT/still` with the first frame alone; and clips a second."""
    device = next(model.parameters()).device
    order = torch.from_numpy(np.random.RandomState(0).permutation(FRAMES))
    out: Figures = {}
    for split, clips in tests.items():
        video, label = clips["video"], clips["label"]
        right = named(model, video) == label  # (B,)
        out[split] = float(right.float().mean())
        out |= {f"{split}/{kind}": float(right[label == k].float().mean()) for k, kind in enumerate(KINDS)}
        out[f"{split}/shuffled"] = float((named(model, video[:, order]) == label).float().mean())
        out[f"{split}/still"] = float((named(model, video[:, :1].expand_as(video)) == label).float().mean())
    many = torch.zeros(8, 3, FRAMES, SIZE, SIZE, device=device)
    return out | {"clips_per_second": 8 / seconds_per_call(lambda: model(many), device, 1.0)}


@torch.no_grad()
def named(model: nn.Module, video: Tensor, batch: int = 50) -> Tensor:
    """The number of the event that a model names in each of uint8 clips `(B, T, H, W, 3)`, `(B,)`."""
    device = next(model.parameters()).device
    return torch.cat([model(as_pixels(part.to(device))).argmax(1).cpu() for part in video.split(batch)])


def macs(build: Callable[[], nn.Module], frames: int = FRAMES, size: int = SIZE) -> float:
    """Multiply-accumulates of one forward on one clip, attention included, which torch counts on the meta device alone."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        build()(torch.zeros(1, 3, frames, size, size))
    return counter.get_total_flops() / 2


# What decides, and when


def decisive(model: nn.Module, clip: Tensor, label: int) -> Tensor:
    """How much the logit of `label` hangs on each place of a uint8 clip `(T, H, W, 3)`: `(T/2, H/4, W/4)`.

    Absolute gradients (Simonyan et al. 2014, section 3.1), summed over channels and averaged over cells.
    """
    pixels = as_pixels(clip[None].to(next(model.parameters()).device)).requires_grad_()  # (1, 3, T, H, W)
    (gradient,) = torch.autograd.grad(model(pixels)[0, label], pixels)
    return F.avg_pool3d(gradient.abs().sum(1), (2, 4, 4))[0].cpu()  # (T/2, H/4, W/4)


@torch.no_grad()
def attended(model: vivit.ViViT, clip: Tensor) -> Tensor:
    """How much the class token of Model 1 or 2 sees of each token of a uint8 clip `(T, H, W, 3)`: `(T', h, w)`.

    Attention rollout (Abnar & Zuidema 2020, section 3); of Model 2 a frame's share in time times a place's share in it.
    """
    video = as_pixels(clip[None].to(next(model.parameters()).device))  # (1, 3, T, H, W)
    x = model.tokens(video)  # (1, T', L, D)
    T, L = x.shape[1:3]
    if model.temporal is not None:
        seen = rollout(model.encoder, x.flatten(0, 1))[:, 0, 1:]  # (T', L)
        seen = rollout(model.temporal, model.frame_features(video))[0, 0, 1:, None] * seen
    else:
        seen = rollout(model.encoder, x.flatten(1, 2))[0, 0, 1:].unflatten(0, (T, L))  # (T', L)
    return seen.unflatten(1, (round(L**0.5), -1)).cpu()  # (T', h, w)


def rollout(encoder: vivit.Encoder, tokens: Tensor) -> Tensor:
    """How much of each token of `(B, L, D)` has come into each through all blocks, `(B, 1 + L, 1 + L)`; rows sum to 1."""
    x = encoder.embed(tokens)  # (B, 1 + L, D)
    stays = torch.eye(x.shape[1], device=x.device)
    flow = stays.expand(len(x), -1, -1)
    for block in encoder.blocks:
        assert isinstance(block, EncoderBlock), "Models 1 and 2 are made of plain blocks"
        looks = vivit.attention_map(block.attention, block.attention_norm(x)).mean(1)  # (B, 1 + L, 1 + L)
        flow = (looks + stays) / 2 @ flow
        x = block(x)
    return flow


def lit(clip: Tensor, heat: Tensor) -> np.ndarray:
    """A uint8 clip `(T, H, W, 3)` in the light of `heat (T', h, w)`: one frame for each of T', uint8 `(T', H + 8, W, 3)`.

    What is cold is dark. The bar below a frame is its share of all heat, the longest as wide as the frame.
    """
    H, W = clip.shape[1:3]
    warm = (heat - heat.amin()) / (heat.amax() - heat.amin()).clamp(min=1e-12)
    light = F.interpolate(warm[None], (H, W), mode="bilinear")[0]  # (T', H, W)
    frames = clip[:: len(clip) // len(heat)][: len(heat)].float() * (0.2 + 0.8 * light[..., None])
    bars = torch.full((len(heat), 8, W, 3), 250.0)
    shares = heat.sum((1, 2))
    for bar, share in zip(bars, shares / shares.amax().clamp(min=1e-12), strict=True):
        bar[2:, : round(W * float(share))] = 60.0
    return torch.cat([frames, bars], dim=1).round().to(torch.uint8).numpy()  # (T', H + 8, W, 3)


def attention(model: vivit.ViViT, video: Tensor) -> np.ndarray:
    """A sheet of clips, those of `SHOWN` in `video (B, T, H, W, 3)`, and below each what the class token sees of it."""
    rows: dict[str, np.ndarray] = {}
    for kind in SHOWN:
        clip = video[KINDS.index(kind)]
        rows[kind] = clip[:: model.config.tubelet[0]].numpy()
        rows[f"{kind}, as it is looked at"] = lit(clip, attended(model, clip))
    return contact_sheet(list(rows.values()), list(rows))


def recipe() -> Events:
    """All of them."""
    return Events()
