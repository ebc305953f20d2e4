"""vdt-conditioning: how is a film's beginning told to a network that predicts the rest? VDT's three ways at equal steps.

Paper: VDT (Lu et al. 2023), section 3 and the table on Physion: adaptive layer norm, cross-attention, token concatenation.
Command: tubelet train vdt-conditioning
Cost: 50 minutes of a core beside another training: 12, 16 and 19 for the three, the rest for films.
Score: velocity error and share of frames in which the thing is found, adaptive norm .84, .19; cross-attention .80, .20; token
concatenation .35, .37; a held frame .26, 1.00 (docs/lineage.md). A run leaves table.json, table.md and sheet.png in its folder.

All three see the same clips and steps, know the same first half of each and read no words. Velocity of the main object in made
frames is measured against exact state, beside what truth reads by the same tracker, keeping the last velocity and standing
still. Laws are judged on the whole film, so that "last frame held" says what the known half alone is worth. In the paper
concatenation is best, cross-attention near it, adaptive norm far behind (FVD 129.1, 134.9, 270.8).
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch

from tubelet.core.errors import UserError
from tubelet.diffusion.paths import VPLinear
from tubelet.evaluate.laws import LAWS
from tubelet.evaluate.reading import Reading
from tubelet.evaluate.report import Tally, through_codec
from tubelet.evaluate.tasks import MOVING, motion
from tubelet.generate.engine import Sampling
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
from tubelet.train.lineage import Forecast, ForecastObjective
from tubelet.train.loop import TrainConfig
from tubelet.train.optim import OptimizerConfig
from tubelet.train.text_to_video import TextToVideo
from tubelet.worlds.base import Episode

Conditioning = Literal["adaln", "cross-attention", "concat"]
WAYS: dict[str, Conditioning] = {
    "adaptive layer norm": "adaln",
    "cross-attention": "cross-attention",
    "token concatenation": "concat",
}
LAW_COLUMNS = ("inertia", "gravity", "momentum", "impenetrability", "steady")


@dataclass(frozen=True)
class VDTConditioning:
    """Sizes, training and measures. Channels are the run's."""

    GIVEN: ClassVar = ("vdt.in_channels", "vdt.conditioning", "vdt.learn_sigma")

    whole: str = "worlds-64"
    """A system, or the folder of a finished run of worlds-64."""
    rows: tuple[str, ...] = tuple(WAYS)
    """Which are trained; what truth scores always stands beside them."""
    kinds: tuple[str, ...] = (*MOVING, "collision")
    every: int = 2
    """Every so many frames of a clip are its film: all of them teach too little in an hour."""
    known: int = 4
    """Latent frames at the beginning that are given."""
    vdt: VDTConfig = field(default_factory=lambda: VDTConfig(width=160, depth=6, heads=5, patch=2, in_channels=8, classes=1))
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=2000,
            batch=32,
            warmup=50,
            optimizer=OptimizerConfig(learning_rate=3e-3, learning_rate_adamw=1e-3),
            checkpoint_minutes=4.0,
        )
    )
    sampling: Sampling = field(default_factory=lambda: Sampling(steps=50, guidance=1.0, solver="ddim"))
    n: int = 200
    """Test episodes, the kinds in turn."""

    def run(self, folder: Path) -> Path:
        """Every row that is not yet measured; returns the table's file. Raises UserError when nothing is lent."""
        check_kinds(self.kinds)
        whole = borrow(self.whole, folder, device_of(self.train))
        shown, seen = thinned(whole, self.every)
        lent, frames = replace(whole, **seen), len(shown)
        if not 2 <= self.known < frames:
            raise UserError(f"known must lie in 2 .. {frames - 1}, got {self.known}; one frame has no velocity")
        source = functools.cache(lambda: latents(whole, self.kinds, shown))
        episodes = episodes_of(lent, self.kinds, self.n)
        begin = lent.codec.strides.pixel_shape(self.known, 1, 1)[0]  # pixel frames that are known
        objective = ForecastObjective(known=self.known)

        def trained(name: str, place: Path) -> Row | None:
            torch.manual_seed(self.train.seed)  # the initial weights
            chain = Chain(VPLinear(), "eps", spacing="trailing")
            vdt = replace(self.vdt, in_channels=lent.codec.channels, conditioning=WAYS[name], learn_sigma=True)
            model = TextToVideo(lent.text, Forecast(VDT(vdt), chain.path))
            cost = macs(model.denoiser.to(lent.device), lent, frames, self.known)
            result = train_row(place, model, objective, source()(self.train.seed), self.train)
            if result is None:
                return None
            average, figures = result
            cases = [case_of(episode) for episode in episodes]
            loss = held_out_loss(average, objective, encoded(lent, cases), [case.text for case in cases])
            masks = torch.ones(self.n, *lent.cells)
            masks[:, : self.known] = 0
            made, seconds = completed(engine_of(lent, average, chain, vdt.patch), episodes, masks, self.sampling)
            made[:, :begin] = np.stack([episode.video[:begin] for episode in episodes])
            own = judged(made, episodes, begin) | {"loss": loss, "macs": cost, "seconds": seconds}
            return Row(own | figures, made[0])

        rows: dict[str, Callable[[Path], Row | None]] = {name: functools.partial(trained, name) for name in WAYS}
        simple = self._simple(lent, episodes, begin)
        columns = (
            ("velocity error", "velocity", plain()),
            ("found", "found", plain()),
            *((law, f"law/{law}", plain()) for law in LAW_COLUMNS),
            ("held-out loss", "loss", plain(4)),
            ("parameters", "parameters", millions),
            ("MACs", "macs", millions),
            ("training, s", "train_seconds", plain(0)),
            ("s a film", "seconds", plain()),
        )
        return compare(folder, self, {**rows, **simple}, columns, (*self.rows, *simple))

    def _simple(self, lent: Lent, episodes: Sequence[Episode], begin: int) -> dict[str, Callable[[Path], Row]]:
        """The rows that need no network."""
        truth = np.stack([episode.video for episode in episodes])

        def held(_: Path) -> Row:
            still = truth.copy()
            still[:, begin:] = truth[:, begin - 1 : begin]
            figures = judged(still, episodes, begin)
            return Row(figures | {"velocity": judged(truth, episodes, begin)["velocity/copy"]}, still[0])

        def coded(_: Path) -> Row:
            clips = np.stack(list(through_codec(lent.codec, list(truth), episodes[0].fps)))
            return Row(judged(clips, episodes, begin), clips[0])

        return {
            "last velocity kept": lambda _: Row({"velocity": judged(truth, episodes, begin)["velocity/constant"]}),
            "last frame held": held,
            "truth through the codec": coded,
            "truth": lambda _: Row(judged(truth, episodes, begin), truth[0]),
        }


def judged(clips: np.ndarray, episodes: Sequence[Episode], begin: int) -> Figures:
    """Velocity errors and `found` from frame `begin` on, as `evaluate.tasks` has them, and the law card of whole films.

    `clips` uint8 `(n, T, H, W, 3)`; a law is named `law/LAW`, where an episode's kind has it.
    """
    values: dict[str, list[float]] = defaultdict(list)
    tally = Tally()
    for clip, episode in zip(clips, episodes, strict=True):
        motion(lambda name, value: values[name].append(value), clip, episode, range(begin, len(clip)), 1)
        tally.add(Reading(clip, episode.fps), episode.tags["scene"], tuple(LAWS), caption=False)
    out = {name: float(np.mean(several)) for name, several in values.items()}
    return out | {name: value for name, value in tally.figures().items() if name.count("/") == 1}


def recipe() -> VDTConditioning:
    """The experiment."""
    return VDTConditioning()
