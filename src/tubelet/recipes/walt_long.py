"""walt-long: a W.A.L.T that goes on: films four windows long, each window knowing the last frames of the one before.

Paper: W.A.L.T (Gupta et al. 2023), section 3.4, autoregressive generation, and 3.2, joint training on images and videos.
Command: tubelet train walt-long
Cost: 24 minutes of a core beside another training: films 19, long films 5.
Score: the change into a window over that inside windows 1.14 with frames known, 2.08 without, truth 1.05; captions .08 to .16
(docs/lineage.md). A run leaves table.json, table.md and sheet.png in its folder.

Nine frames, every second one of a clip of billiard balls: a film that has neither beginning nor end and goes on from anywhere.
In half of the films of training the first one or two latent frames are given beside the noise, with a mask that says so; one
step in ten sees pictures, which are first frames. A long film is a window from words alone, then windows that are given the
last two frames of what there is. A latent here is one frame, so they are taken as they are, where the paper decodes and encodes
again. All rows sample one network: with guidance over the known frames, without, and not knowing them, each window for itself;
the first window of all three is the same. Figures of a window are of the frames that it added; of the caption those facets
count that last, so not the direction. One of each: in how many frames each object named is there once; stray: colours that
nobody named. Seam: the change into a window over the mean change inside windows, so that 1 shows nothing.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tubelet.core.errors import UserError
from tubelet.core.log import progress
from tubelet.core.types import Video
from tubelet.diffusion.paths import VPLinear, zero_terminal_snr
from tubelet.evaluate.caption import FACETS
from tubelet.evaluate.reading import Reading
from tubelet.evaluate.report import Case, make_cases, through_codec
from tubelet.evaluate.tasks import changes
from tubelet.generate.engine import Engine, Request, Sampling
from tubelet.generate.layouts import Chain
from tubelet.generate.roll import roll, window_seed
from tubelet.models.walt import WALT, WALTConfig
from tubelet.recipes.lent import Lent, borrow, check_kinds, latents, thinned
from tubelet.recipes.lineage import (
    Figures,
    Row,
    compare,
    device_of,
    encoded,
    engine_of,
    facet_figures,
    held_out_loss,
    macs,
    millions,
    plain,
    train_row,
)
from tubelet.tasks.timeline import Span, Timeline, plan
from tubelet.train.lineage import Continuing, FilmObjective
from tubelet.train.loop import TrainConfig
from tubelet.train.optim import OptimizerConfig
from tubelet.train.text_to_video import TextToVideo

ROWS = ("last frames known", "no guidance over frames", "each window for itself")
"""One network, sampled in three ways."""
LASTING = tuple(facet for facet in FACETS if facet != "direction")
"""What a caption says of every window of a film."""


@dataclass(frozen=True)
class WALTLong:
    """Sizes, training and measures. Channels, the width of words and the grid are the run's."""

    whole: str = "worlds-64"
    """A system, or the folder of a finished run of worlds-64."""
    rows: tuple[str, ...] = ROWS
    """Which are measured; what truth scores always stands beside them."""
    kinds: tuple[str, ...] = ("billiard",)
    """Clips of the training, and films that are asked for."""
    every: int = 2
    """Every so many frames of a clip are its film."""
    windows: int = 4
    """Windows of a long film."""
    known: int = 2
    """Latent frames that a window knows of the one before: 1 or 2, as in training."""
    width: int = 192
    depth: int = 4
    heads: int = 6
    patch: int = 2
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=640,
            batch=48,
            warmup=50,
            optimizer=OptimizerConfig(learning_rate=3e-3, learning_rate_adamw=1e-3),
            checkpoint_minutes=4.0,
        )
    )
    objective: FilmObjective = field(default_factory=lambda: FilmObjective(frame_prediction=0.5, image_share=0.1))
    sampling: Sampling = field(default_factory=lambda: Sampling(steps=25, guidance=2.0, solver="ddim"))
    frame_guidance: float = 1.5
    """Guidance over the known frames; that over words is the sampling's."""
    n: int = 40
    """Films, the kinds in turn."""

    def __post_init__(self) -> None:
        if self.windows < 2 or self.known not in (1, 2):
            raise UserError(
                f"a long film has at least 2 windows that know 1 or 2 frames, got windows={self.windows}, known={self.known}; "
                "correct them"
            )
        if not self.objective.frame_prediction:
            raise UserError("a film goes on from frames that training has shown; set objective.frame_prediction above 0")

    def run(self, folder: Path) -> Path:
        """Every row that is not yet measured; returns the table's file. Raises UserError when nothing is lent."""
        check_kinds(self.kinds)
        lent = borrow(self.whole, folder, device_of(self.train))
        if lent.codec.strides.t > 1:
            raise UserError("known frames are taken as they are where a latent is one frame; use a run with such a codec")
        frames, seen = thinned(lent, self.every)
        window, new = len(frames), len(frames) - self.known
        if new < 1:
            raise UserError(f"a window of {window} frames adds nothing to {self.known} known ones; set every lower")
        total = window + (self.windows - 1) * new
        cases = make_cases(self.kinds, self.n, **{**seen, "frames": total})
        truth = [case.truth for case in cases]
        # Each window adds these frames.
        begins = [0, *range(window, total, new)]
        parts = [slice(begin, end) for begin, end in zip(begins, [*begins[1:], total], strict=True)]

        @functools.cache
        def trained() -> tuple[Engine, Figures] | None:
            return self._trained(folder / "WALT", lent, frames, seen)

        def sampled(name: str, _: Path) -> Row | None:
            found = trained()
            if found is None:
                return None
            engine, figures = found
            if name == "each window for itself":
                films, seconds = self._apart(engine, cases, lent, window)
            else:
                films, seconds = self._continued(_guided(engine, name, self.frame_guidance), cases, lent, window, total)
            return Row({**judged(films, cases, parts), **figures, "seconds": seconds}, films[0][:: self.windows])

        def through(_: Path) -> Row:
            films = list(through_codec(lent.codec, truth, cases[0].fps))
            return Row(judged(films, cases, parts), films[0][:: self.windows])

        rows: dict[str, Callable[[Path], Row | None]] = {name: functools.partial(sampled, name) for name in ROWS}
        beside = {
            "truth": lambda _: Row(judged(truth, cases, parts), truth[0][:: self.windows]),
            "truth through the codec": through,
        }
        numbers = range(1, self.windows + 1)
        columns = (
            *((f"caption, window {number}", f"caption/{number}", plain()) for number in numbers),
            *((f"one of each, {number}", f"one_of_each/{number}", plain()) for number in numbers),
            *((f"stray, {number}", f"stray/{number}", plain()) for number in numbers),
            ("seam", "seam", plain()),
            ("change inside", "inside", plain()),
            ("held-out loss", "loss", plain(4)),
            ("with frames known", "loss/known", plain(4)),
            ("parameters", "parameters", millions),
            ("MACs", "macs", millions),
            ("training, s", "train_seconds", plain(0)),
            ("s a film", "seconds", plain()),
        )
        return compare(folder, self, {**rows, **beside}, columns, (*self.rows, *beside))

    def network(self, lent: Lent, frames: int) -> WALTConfig:
        """The sizes of the network."""
        rows, columns = (side // self.patch for side in lent.cells[1:])
        return WALTConfig(
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            channels=lent.codec.channels,
            patch=self.patch,
            grid=(frames, rows, columns),
            frame=(rows, columns),
            window=(frames, rows // 2, columns // 2),
            text_width=lent.text.width,
            predict=True,
        )

    def _trained(self, place: Path, lent: Lent, frames: range, seen: dict[str, Any]) -> tuple[Engine, Figures] | None:
        """What samples the one network, its losses and cost; None when training was stopped."""
        torch.manual_seed(self.train.seed)  # the initial weights
        chain = Chain(zero_terminal_snr(VPLinear()), "v", spacing="trailing")
        model = TextToVideo(lent.text, Continuing(WALT(self.network(lent, len(frames))), chain.path, True))
        cost = macs(model.denoiser.to(lent.device), lent, len(frames))
        source = latents(lent, self.kinds, frames)(self.train.seed)
        result = train_row(place, model, self.objective, source, self.train)
        if result is None:
            return None
        average, figures = result
        short = make_cases(self.kinds, self.n, **seen)
        clean, texts = encoded(lent, short), [case.text for case in short]
        # As it samples: all words, always an estimate, and the first frames or, at a share of next to 0, the same draws
        # without them.
        for name, share in (("loss", 1e-12), ("loss/known", 1.0)):
            asked = FilmObjective(text_drop=0.0, self_conditioning=1.0, frame_prediction=share)
            figures[name] = held_out_loss(average, asked, clean, texts)
        return engine_of(lent, average, chain, self.patch), {**figures, "macs": cost}

    def _continued(
        self, engine: Engine, cases: Sequence[Case], lent: Lent, window: int, total: int
    ) -> tuple[list[np.ndarray], float]:
        """A film of `total` frames for each case, window after window, uint8 `(T, H, W, 3)`; seconds of denoising for each."""
        nothing = (False,) * total
        windows = plan(nothing, [Span(0, total)], window, self.known)
        shape = (1, lent.codec.channels, total, *lent.cells[1:])
        films, timings = [], {"text": 0.0, "denoise": 0.0, "decode": 0.0}
        with progress("going on", "films") as advance:
            for number, case in enumerate(cases):
                line = Timeline(torch.zeros(shape, device=lent.device), nothing)
                made = roll(engine, [case.text], number, line, windows, self.sampling, timings=timings)
                films.append(Video(engine.decode(made, timings), case.fps).to_uint8()[0])
                advance(number + 1, len(cases))
        return films, timings["denoise"] / len(cases)

    def _apart(
        self, engine: Engine, cases: Sequence[Case], lent: Lent, window: int, batch: int = 8
    ) -> tuple[list[np.ndarray], float]:
        """As `_continued`, each window made from words alone and, but for the first, without the frames that it would know."""
        parts, seconds = [], 0.0
        for number in range(self.windows):
            # The noise of each window is the one that it has where films go on.
            requests = [Request(case.text, window_seed(seed, number)) for seed, case in enumerate(cases)]
            pixels, timings = engine.sample(requests, lent.size, window, self.sampling, batch=batch)
            parts.append(Video(pixels, cases[0].fps).to_uint8()[:, self.known if number else 0 :])
            seconds += timings["denoise"] / len(cases)
        return list(np.concatenate(parts, axis=1)), seconds


def _guided(engine: Engine, name: str, guidance: float) -> Engine:
    """The engine with the guidance over known frames that a row asks for."""
    denoiser = engine.denoiser
    assert isinstance(denoiser, Continuing), "a network that goes on"
    scale = 1.0 if name == "no guidance over frames" else guidance
    return replace(engine, denoiser=Continuing(denoiser.network, denoiser.path, denoiser.recalls, scale).eval())


def judged(films: Sequence[np.ndarray], cases: Sequence[Case], parts: Sequence[slice]) -> Figures:
    """What uint8 films `(T, H, W, 3)` show of their captions in each of `parts`, and how they pass from one to the next.

    Of part N: `FACET/N` as `facet_figures`, and the mean of those that last `caption/N`; `one_of_each/N` and `stray/N` as
    `evaluate.tasks` has them. `seam`: the mean change into parts over `inside`, the mean change within them in levels of 255; 1
    where nothing moves.
    """
    values: dict[str, list[float]] = defaultdict(list)
    figures: Figures = {}
    for number, part in enumerate(parts, start=1):
        shown = facet_figures([film[part] for film in films], cases, FACETS, str(number))
        lasting = [shown[f"{facet}/{number}"] for facet in LASTING if f"{facet}/{number}" in shown]
        figures |= {**shown, f"caption/{number}": float(np.mean(lasting))}
        for film, case in zip(films, cases, strict=True):
            tracks = Reading(film[part], case.fps).tracks
            wanted = [thing["color"] for thing in case.wanted["objects"]]
            found = [tracks.get(colour) for colour in wanted]
            values[f"one_of_each/{number}"].append(
                float(np.mean([0.0 if track is None else float(track.single.mean()) for track in found]))
            )
            strays = [name for name, track in tracks.items() if name not in wanted and track.present.mean() > 0.2]
            values[f"stray/{number}"].append(float(len(strays)))
    borders = [part.start - 1 for part in parts[1:]]
    for film in films:
        steps = changes(film)
        inside = float(np.delete(steps, borders).mean())
        values["inside"].append(inside)
        values["seam"].append(float(steps[borders].mean()) / inside if inside > 0.05 else 1.0)
    return figures | {name: float(np.mean(several)) for name, several in values.items()}


def recipe() -> WALTLong:
    """The experiment."""
    return WALTLong()
