"""vdt-tasks: one VDT under its unified mask learns every task at once; what is it worth at each?

Paper: VDT (Lu et al. 2023), section 3.3, unified spatial-temporal mask modeling.
Command: tubelet train vdt-tasks
Cost: 28 minutes of a core beside another training: films 26, the rest for measures.
Score: PSNR of what is made against the simplest thing: prediction 21.5 (30.7), backward 20.2 (19.9), interpolation 21.9 (20.3),
single frame 20.4 (19.1), completion 24.9 (23.1); docs/lineage.md. A run leaves
table.json, table.md and sheet.png in its folder.

Training draws a mask for each film, in the proportions of the released code: the first half is known, the last half, every
fourth frame, one frame, some frames or nothing, and in one film of five blocks of cells in the middle are missing. The network
reads no words. Then each task is measured on the same test episodes, beside truth through the codec and the simplest thing:
a known frame held, or the hole filled with the backdrop. Velocity of the main object in made frames is measured
against exact state where what is given tells it, beside what truth reads by the same tracker, a body that keeps its velocity
(between two known frames: the straight line) and one that stands still. PSNR is of made pixels alone. Laws are judged on
whole films; those of films made from nothing by what each film shows, since nothing says what it should have shown.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from tubelet.data.stream import Source
from tubelet.diffusion.paths import VPLinear
from tubelet.evaluate.caption import read
from tubelet.evaluate.distance import distances, features
from tubelet.evaluate.fidelity import psnr
from tubelet.evaluate.laws import LAWS
from tubelet.evaluate.reading import Reading
from tubelet.evaluate.report import Case, Tally, through_codec
from tubelet.evaluate.tasks import MOVING, Add, motion
from tubelet.generate.engine import Engine, Sampling
from tubelet.generate.layouts import Chain
from tubelet.models.vdt import VDT, VDTConfig
from tubelet.recipes.lent import Lent, borrow, check_kinds, latents, thinned
from tubelet.recipes.lineage import (
    Figures,
    Row,
    case_of,
    compare,
    completed,
    device_of,
    encoded,
    engine_of,
    episodes_of,
    held_out_loss,
    macs,
    millions,
    plain,
    train_row,
)
from tubelet.recipes.vdt_conditioning import LAW_COLUMNS
from tubelet.tasks.masks import MASKS, RELEASED, Grid, check_shares
from tubelet.tasks.region import in_pixels
from tubelet.train.lineage import Completing, MaskedFilmObjective
from tubelet.train.loop import TrainConfig
from tubelet.train.optim import OptimizerConfig
from tubelet.train.text_to_video import TextToVideo
from tubelet.worlds.base import Episode


@dataclass(frozen=True)
class Task:
    """A task: the mask that sets it, the simplest thing to do, and whether what is given says how things move."""

    mask: str
    simplest: str
    moves: bool


TASKS = {
    "predict": Task("predict", "last frame held", True),
    "backward": Task("backward", "first frame held", True),
    "interpolate": Task("interpolate", "frame before held", True),
    "single frame": Task("first", "frame held", False),
    "completion": Task("blocks", "hole filled with the backdrop", True),
    "unconditional": Task("unconditional", "first frame held", False),
}
CODED = "truth through the codec"
OTHERS = 1_000_000
"""Test seeds from here on are truth that no film is measured against."""


@dataclass(frozen=True)
class VDTTasks:
    """Sizes, training and measures. Channels are the run's."""

    GIVEN: ClassVar = ("vdt.in_channels", "vdt.conditioning", "vdt.learn_sigma")

    whole: str = "worlds-64"
    """A system, or the folder of a finished run of worlds-64."""
    rows: tuple[str, ...] = tuple(TASKS)
    """Which tasks are measured; the simplest thing and truth always stand beside them."""
    kinds: tuple[str, ...] = (*MOVING, "collision")
    every: int = 2
    """Every so many frames of a clip are its film: all of them teach too little in an hour."""
    vdt: VDTConfig = field(default_factory=lambda: VDTConfig(width=160, depth=6, heads=5, patch=2, in_channels=8, classes=1))
    masks: dict[str, float] = field(default_factory=lambda: dict(RELEASED))
    """Proportions of masks in training."""
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=2500,
            batch=32,
            warmup=50,
            optimizer=OptimizerConfig(learning_rate=3e-3, learning_rate_adamw=1e-3),
            checkpoint_minutes=4.0,
        )
    )
    sampling: Sampling = field(default_factory=lambda: Sampling(steps=25, guidance=1.0, solver="ddim"))
    n: int = 60
    """Test episodes, the kinds in turn."""

    def __post_init__(self) -> None:
        check_shares(self.masks)

    def run(self, folder: Path) -> Path:
        """Every task that is not yet measured; returns the table's file. Raises UserError when nothing is lent."""
        check_kinds(self.kinds)
        whole = borrow(self.whole, folder, device_of(self.train))
        shown, seen = thinned(whole, self.every)
        lent = replace(whole, **seen)
        episodes = episodes_of(lent, self.kinds, self.n)
        truth = np.stack([episode.video for episode in episodes])  # (n, T, H, W, 3)
        others = features(np.stack([episode.video for episode in episodes_of(lent, self.kinds, self.n, OTHERS)]))

        @functools.cache
        def trained() -> tuple[Engine, dict[str, Figures]] | None:
            source = latents(whole, self.kinds, shown)(self.train.seed)
            return self._trained(folder / "VDT", lent, source, [case_of(episode) for episode in episodes])

        @functools.cache
        def coded() -> np.ndarray:
            return np.stack(list(through_codec(lent.codec, list(truth), episodes[0].fps)))

        def made(name: str, _: Path) -> Row | None:
            found = trained()
            if found is None:
                return None
            engine, figures = found
            masks, holes = _masks(TASKS[name].mask, lent, self.n)
            films, seconds = completed(engine, episodes, masks, self.sampling)
            row = _judged(name, np.where(holes[..., None], films, truth), episodes, holes, features(truth))
            floor = moving(truth, episodes, holes).get("velocity") if TASKS[name].moves else None
            beside = {} if floor is None else {"velocity/truth": floor}
            return Row(row.figures | beside | figures[name] | {"seconds": seconds}, row.shown)

        def simplest(name: str, _: Path) -> Row:
            holes = _masks(TASKS[name].mask, lent, self.n)[1]
            films = np.stack([filled(film, hole) for film, hole in zip(truth, holes, strict=True)])
            return _judged(name, films, episodes, holes, others)

        def through(name: str, _: Path) -> Row:
            holes = _masks(TASKS[name].mask, lent, self.n)[1]
            return _judged(name, np.where(holes[..., None], coded(), truth), episodes, holes, others)

        rows: dict[str, Callable[[Path], Row | None]] = {}
        chosen: dict[str, tuple[str, ...]] = {}
        for name, task in TASKS.items():
            several = {name: made, f"{name}, {task.simplest}": simplest, f"{name}, {CODED}": through}
            rows |= {row: functools.partial(measure, name) for row, measure in several.items()}
            chosen[name] = tuple(several)
        everything = np.ones(truth.shape[:-1], bool)
        rows["unconditional, truth"] = lambda _: _judged("unconditional", truth, episodes, everything, others)
        chosen["unconditional"] += ("unconditional, truth",)
        columns = (
            ("velocity error", "velocity", plain()),
            ("truth's", "velocity/truth", plain()),
            ("velocity kept", "velocity/constant", plain()),
            ("standing still", "velocity/copy", plain()),
            ("found", "found", plain()),
            ("PSNR", "psnr", plain(1)),
            *((law, f"law/{law}", plain()) for law in LAW_COLUMNS),
            ("can be read", "trackable", plain()),
            ("Frechet", "frechet", plain(1)),
            ("KID", "kid", plain()),
            ("held-out loss", "loss", plain(4)),
            ("parameters", "parameters", millions),
            ("MACs", "macs", millions),
            ("training, s", "train_seconds", plain(0)),
            ("s a film", "seconds", plain()),
        )
        wanted = [row for name in self.rows for row in chosen.get(name, (name,))]
        return compare(folder, self, rows, columns, wanted)

    def _trained(
        self, place: Path, lent: Lent, source: Source, cases: Sequence[Case]
    ) -> tuple[Engine, dict[str, Figures]] | None:
        """What samples the one network, and for each task its held-out loss and cost; None when training was stopped."""
        torch.manual_seed(self.train.seed)  # the initial weights
        frames = lent.cells[0]
        chain = Chain(VPLinear(), "eps", spacing="trailing")
        vdt = replace(self.vdt, in_channels=lent.codec.channels, conditioning="mask", learn_sigma=True)
        model = TextToVideo(lent.text, Completing(VDT(vdt), chain.path))
        cost = macs(model.denoiser.to(lent.device), lent, frames)
        result = train_row(place, model, MaskedFilmObjective(masks=self.masks), source, self.train)
        if result is None:
            return None
        average, figures = result
        clean, texts = encoded(lent, cases), [case.text for case in cases]
        losses = {
            name: held_out_loss(average, MaskedFilmObjective(masks={task.mask: 1.0}), clean, texts)
            for name, task in TASKS.items()
        }
        own = {name: {"loss": loss, "macs": cost, **figures} for name, loss in losses.items()}
        return engine_of(lent, average, chain, vdt.patch), own


def _masks(name: str, lent: Lent, n: int) -> tuple[Tensor, np.ndarray]:
    """A mask for each of n films, the same in every run: latent cells `(n, T', h, w)`, and pixels, boolean `(n, T, H, W)`."""
    size: Grid = lent.cells
    masks = torch.stack([MASKS[name](size, torch.Generator().manual_seed(number)) for number in range(n)])
    return masks, in_pixels(masks, lent.codec.strides).numpy() > 0


def filled(film: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """The simplest thing in the place of a hole, boolean `(T, H, W)`, of a uint8 film `(T, H, W, 3)`.

    Whole frames are the known one before them, or else the one behind; of a film that is missing as a whole, the first. A part
    of a frame is the backdrop, the median of each row.
    """
    known = np.flatnonzero(~hole.any((1, 2)))
    backdrop = np.median(film, axis=(0, 2), keepdims=True).astype(np.uint8)  # (1, H, 1, 3)
    out = np.where(hole[..., None], backdrop, film)
    for frame in np.flatnonzero(hole.all((1, 2))):
        before = known[known < frame]
        source = before[-1] if len(before) else known[0] if len(known) else 0
        out[frame] = film[source]
    return out


def moving(clips: np.ndarray, episodes: Sequence[Episode], holes: np.ndarray) -> Figures:
    """`evaluate.tasks.motion` of each run of frames in which something is missing, over all uint8 clips `(n, T, H, W, 3)`.

    `holes` boolean `(n, T, H, W)`.
    """
    values: dict[str, list[float]] = defaultdict(list)
    for clip, episode, hole in zip(clips, episodes, holes, strict=True):
        _velocities(lambda figure, value: values[figure].append(value), clip, episode, hole)
    return {figure: float(np.mean(several)) for figure, several in values.items()}


def _velocities(add: Add, clip: np.ndarray, episode: Episode, hole: np.ndarray) -> None:
    """`moving` of one clip."""
    missing = hole.any((1, 2))
    T = len(clip)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], missing, [False]]).astype(int)))
    exact = np.stack([episode.state["x"][:, 0], episode.state["y"][:, 0]], 1)  # (T, 2)
    for begin, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        if end == T:
            motion(add, clip, episode, range(max(begin, 1), T), 1)
        elif begin == 0:
            motion(add, clip, episode, range(end), -1)
        else:  # from one known frame to another
            line = (exact[end] - exact[begin - 1]) / (end - begin + 1)
            motion(add, clip, episode, range(begin, end), 1, line)


def _judged(name: str, clips: np.ndarray, episodes: Sequence[Episode], holes: np.ndarray, beside: Tensor) -> Row:
    """What uint8 clips `(n, T, H, W, 3)` are worth as answers to a task whose holes are boolean `(n, T, H, W)`.

    `beside (n, D)` are features of the truth that films made from nothing are compared with.
    """
    values: dict[str, list[float]] = defaultdict(list)
    tally = Tally()
    for clip, episode, hole in zip(clips, episodes, holes, strict=True):
        reading, scene = Reading(clip, episode.fps), episode.tags["scene"]
        if hole.all():
            scene = read(reading)
            values["trackable"].append(float(scene["trackable"]))
        else:
            values["psnr"].append(psnr(episode.video, clip, hole))
        tally.add(reading, scene, tuple(LAWS), caption=False)
    figures = {figure: float(np.mean(several)) for figure, several in values.items()}
    figures |= moving(clips, episodes, holes) if TASKS[name].moves else {}
    figures |= {figure: value for figure, value in tally.figures().items() if figure.count("/") == 1}
    if name == "unconditional":
        figures |= distances(beside, features(clips))
    return Row(figures, clips[0])


def recipe() -> VDTTasks:
    """The experiment."""
    return VDTTasks()
