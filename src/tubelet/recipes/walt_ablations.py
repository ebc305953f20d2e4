"""walt-ablations: a small W.A.L.T, and what changes when one thing does: windows, AdaLN-LoRA, self-conditioning, noise.

Paper: W.A.L.T (Gupta et al. 2023), table 3: windows, self-conditioning, AdaLN-LoRA, zero terminal signal-to-noise ratio.
Command: tubelet train walt-ablations
Cost: 121 minutes on half a core beside much other work (57 of processor time), with `--set train.precision=bf16`.
Score: colour .71 and distance 27.4 for the base, .57 and 33.8 with full attention: docs/lineage.md. A run leaves table.json,
table.md and sheet.png in its folder.

Films from words, of every fourth frame of clips with one object; all rows see the same clips, words and steps. The base has
windows of all frames and half of each side, corrections of rank 2, its last estimate in nine of ten steps, and a chain whose
last step is pure noise. Its held-out loss is of v on a row's own chain: that of the row without zero terminal SNR does not
compare with the others. In the paper (FVD on UCF-101, base 60.7): full attention 59.9 at 0.6 of the speed, rank 256 52.5,
no self-conditioning 109.9, no zero terminal SNR 91.0. What channels of the latent do is asked by codec-table.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from tubelet.diffusion.paths import VariancePreserving, VPLinear, zero_terminal_snr
from tubelet.evaluate.caption import FACETS
from tubelet.evaluate.report import make_cases
from tubelet.evaluate.tasks import MOVING
from tubelet.generate.engine import Sampling
from tubelet.generate.layouts import Chain
from tubelet.models.walt import WALT, WALTConfig
from tubelet.recipes.lent import Lent, borrow, check_kinds, latents, thinned
from tubelet.recipes.lineage import (
    Figures,
    Row,
    compare,
    device_of,
    film_row,
    macs,
    macs_of,
    millions,
    plain,
    train_row,
    truth_rows,
)
from tubelet.runtime.device import seconds_per_call
from tubelet.train.lineage import FilmObjective, Recalling
from tubelet.train.loop import TrainConfig
from tubelet.train.optim import OptimizerConfig
from tubelet.train.text_to_video import TextToVideo

ROWS = (
    "base",
    "windows of whole frames",
    "full attention",
    "rank 32",
    "no self-conditioning",
    "no zero terminal SNR",
)
"""Each but the first changes one thing of it."""
LARGE = 4
"""So many times the height and width, what windows save is counted and timed, too: at 80 tokens it is next to nothing."""
OTHERS = 1_000_000
"""Test seeds from here on are truth that no prompt is made of."""


@dataclass(frozen=True)
class WALTAblations:
    """Sizes, training and measures. Channels, the width of words and the grid are the run's."""

    whole: str = "worlds-64"
    """A system, or the folder of a finished run of worlds-64."""
    rows: tuple[str, ...] = ROWS
    """Which are trained; what truth scores always stands beside them."""
    kinds: tuple[str, ...] = MOVING
    every: int = 4
    """Every so many frames of a clip are its film."""
    width: int = 192
    depth: int = 4
    heads: int = 6
    patch: int = 2
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=700,
            batch=64,
            warmup=50,
            optimizer=OptimizerConfig(learning_rate=3e-3, learning_rate_adamw=1e-3),
            checkpoint_minutes=4.0,
        )
    )
    text_drop: float = 0.1
    self_conditioning: float = 0.9
    """How often a step of training is given an estimate."""
    sampling: Sampling = field(default_factory=lambda: Sampling(steps=50, guidance=2.0, solver="ddim"))
    n: int = 128
    """Prompts."""

    def run(self, folder: Path) -> Path:
        """Every row that is not yet measured; returns the table's file. Raises UserError when nothing is lent."""
        check_kinds(self.kinds)
        lent = borrow(self.whole, folder, device_of(self.train))
        frames, seen = thinned(lent, self.every)
        source = functools.cache(lambda: latents(lent, self.kinds, frames))
        cases = {"in": make_cases(self.kinds, self.n, **seen)}
        others = make_cases(self.kinds, self.n, **seen, seed=OTHERS)

        def trained(name: str, place: Path) -> Row | None:
            torch.manual_seed(self.train.seed)  # the initial weights
            chain = Chain(path_of(name), "v", spacing="trailing")
            network = WALT(self.network(name, lent, len(frames)))
            model = TextToVideo(lent.text, Recalling(network, chain.path, name != "no self-conditioning"))
            cost = macs(model.denoiser.to(lent.device), lent, len(frames))
            objective = FilmObjective(text_drop=self.text_drop, self_conditioning=self.self_conditioning)
            result = train_row(place, model, objective, source()(self.train.seed), self.train)
            # As it samples: all words, and always an estimate where there is one.
            asked = FilmObjective(text_drop=0.0, self_conditioning=1.0)
            row = film_row(result, lent, chain, self.patch, cases, self.sampling, FACETS, asked, cost)
            return None if row is None else Row(row.figures | self.large(name, lent, len(frames)), row.shown)

        rows: dict[str, Callable[[Path], Row | None]] = {name: functools.partial(trained, name) for name in ROWS}
        truth = truth_rows(lent, cases, others, FACETS)
        columns = (
            *((facet, f"{facet}/in", plain()) for facet in FACETS),
            ("steady", "law/steady", plain()),
            ("Frechet", "frechet", plain(1)),
            ("KID", "kid", plain()),
            ("held-out loss", "loss", plain(4)),
            ("parameters", "parameters", millions),
            ("MACs", "macs", millions),
            ("training, s", "train_seconds", plain(0)),
            ("s a film", "seconds", plain(3)),
            (f"MACs, {LARGE} x the side", "large/macs", lambda value: f"{value / 1e9:.1f} G"),
            ("s a forward", "large/seconds", plain(3)),
        )
        return compare(folder, self, {**rows, **truth}, columns, (*self.rows, *truth))

    def large(self, name: str, lent: Lent, frames: int) -> Figures:
        """What a forward costs on films of `LARGE` times the height and width, windows as much larger; weights are random."""
        config = self.network(name, lent, frames)
        frames, *sides = config.grid
        wide = {"grid": config.grid, "frame": config.frame, "window": config.window}
        wide = {key: (*shape[:-2], *(LARGE * side for side in shape[-2:])) for key, shape in wide.items()}
        network = WALT(replace(config, **wide)).to(lent.device).eval()
        z = torch.zeros(1, config.channels, frames, *(LARGE * self.patch * side for side in sides), device=lent.device)
        t, text = torch.full((1,), 500.0, device=lent.device), lent.text.encode(["a large red ball bounces once"])

        @torch.no_grad()
        def forward() -> None:
            network(z, t, text=text)

        return {"large/macs": macs_of(forward), "large/seconds": seconds_per_call(forward, lent.device, 5.0)}

    def network(self, name: str, lent: Lent, frames: int) -> WALTConfig:
        """The sizes of a row's network."""
        rows, columns = (side // self.patch for side in lent.cells[1:])
        base = WALTConfig(
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            channels=lent.codec.channels,
            patch=self.patch,
            grid=(frames, rows, columns),
            frame=(rows, columns),
            window=(frames, rows // 2, columns // 2),
            text_width=lent.text.width,
        )
        changes = {
            "windows of whole frames": replace(base, window=base.grid),
            "full attention": replace(base, window=base.grid, alternate=False),
            "rank 32": replace(base, rank=32),
        }
        return changes.get(name, base)


def path_of(name: str) -> VariancePreserving:
    """The chain of a row."""
    return VPLinear() if name == "no zero terminal SNR" else zero_terminal_snr(VPLinear())


def recipe() -> WALTAblations:
    """The experiment."""
    return WALTAblations()
