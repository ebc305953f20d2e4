"""ddpm: small pictures out of noise in pixels, with fixed and with learned variances, in many steps and in few.

Paper: DDPM (Ho et al. 2020), sections 3.2 to 3.4 and table 2; Improved DDPM (Nichol & Dhariwal 2021), section 3.1.
Command: tubelet train ddpm
Cost: 22 minutes on one core beside another training. It renders its own pictures.
Score: bound in 50 steps 4.95 bits (beta), 3.30 (beta tilde), 2.60 (learned); distance 141, 47, 53; DDIM fails: docs/lineage.md.
A run leaves table.json, table.md and sheet.png in its folder.

First frames of clips, 32 x 32, without words. Two trainings of equal steps: L_simple, sampled with variance beta, with beta
tilde and by DDIM, and the hybrid, which answers its variances. All are asked on 50 and on 250 of the chain's 1000 steps; the
bound is that of the chain of these steps, on pictures that no training has seen. In the papers L_simple makes the better
pictures of a long chain, the hybrid has the better bound, and keeps its quality in few steps.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from tubelet.core.errors import UserError
from tubelet.core.types import Video
from tubelet.data.stream import TensorSource
from tubelet.diffusion.objectives import denoiser
from tubelet.diffusion.paths import VPLinear, spaced_sigmas
from tubelet.diffusion.solvers import SOLVERS
from tubelet.evaluate.distance import distances, features
from tubelet.evaluate.report import make_cases, world_of
from tubelet.models.unet import UNet, UNetConfig
from tubelet.recipes.lent import check_kinds
from tubelet.recipes.lineage import Figures, Row, compare, millions, on_sheet, plain
from tubelet.recipes.worlds import Job, in_memory
from tubelet.runtime.device import fast_bf16
from tubelet.train.classify import as_pixels
from tubelet.train.loop import TrainConfig, train
from tubelet.train.optim import OptimizerConfig
from tubelet.train.pixels import PixelObjective, ShortChain, answers
from tubelet.worlds.constants import PHYS2D_KINDS

FIXED = {"L_simple, beta": 1.0, "L_simple, beta tilde": -1.0}
"""Rows whose variance is not learned."""
DDIM, HYBRID = "L_simple, DDIM", "hybrid"
ROWS = (*FIXED, DDIM, HYBRID)
TRAIN_SEED = 2_080_000_000
"""First seed of the training pictures, among the worlds' training seeds."""
OTHERS = 1_000_000
"""Test seeds from here on are truth that is compared with truth."""


@dataclass(frozen=True)
class DDPM:
    """Sizes, training and measures."""

    GIVEN: ClassVar = ("unet.learn_sigma", "unet.channels", "unet.context")

    rows: tuple[str, ...] = ROWS
    """Which are measured; what truth scores always stands beside them."""
    kinds: tuple[str, ...] = PHYS2D_KINDS
    unet: UNetConfig = field(
        default_factory=lambda: UNetConfig(width=32, multipliers=(1, 2, 2), blocks=1, attention=(2,), dropout=0.0, groups=8)
    )
    """`size` is that of the pictures."""
    pictures: int = 8000
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=600,
            batch=64,
            warmup=40,
            optimizer=OptimizerConfig(learning_rate=3e-3, learning_rate_adamw=1e-3),
            checkpoint_minutes=4.0,
        )
    )
    """Of each of the two networks."""
    steps: tuple[int, ...] = (50, 250)
    """Lengths of the chains that are sampled."""
    n: int = 96
    """Pictures made by each."""
    bounded: int = 32
    """Test pictures that the bound is taken of."""
    workers: int = 2

    def run(self, folder: Path) -> Path:
        """Every row that is not yet measured; returns the table's file. Raises UserError for lengths that cannot be."""
        check_kinds(self.kinds)
        if not self.steps or not all(2 <= count <= len(VPLinear()) for count in self.steps):
            raise UserError(f"a chain of {len(VPLinear())} steps has shorter ones from 2 on, got {self.steps}; choose some")
        size = (self.unet.size, self.unet.size)
        cases = make_cases(self.kinds, self.n, size=size, frames=1)
        truth = np.stack([case.truth for case in cases])
        other = np.stack([case.truth for case in make_cases(self.kinds, self.n, size=size, frames=1, seed=OTHERS)])
        pictures = functools.cache(self._pictures)
        network = functools.cache(lambda learned: self._network(learned, pictures(), folder))

        def measured(name: str, _: Path) -> Row | None:
            model = network(name == HYBRID)
            return None if model is None else self._measured(name, model, truth)

        rows: dict[str, Callable[[Path], Row | None]] = {name: functools.partial(measured, name) for name in ROWS}
        same = distances(features(truth), features(other))
        figures = {f"{name}/{steps}": value for name, value in same.items() for steps in self.steps}
        rows["truth"] = lambda _: Row(figures, on_sheet(truth))
        columns = (
            *((f"Frechet, {steps}", f"frechet/{steps}", plain(1)) for steps in self.steps),
            *((f"KID, {steps}", f"kid/{steps}", plain()) for steps in self.steps),
            *((f"bits a value, {steps}", f"bound/{steps}", plain(3)) for steps in self.steps),
            ("parameters", "parameters", millions),
            *((f"s a picture, {steps}", f"seconds/{steps}", plain(3)) for steps in self.steps),
        )
        return compare(folder, self, rows, columns, (*self.rows, "truth"))

    def _pictures(self) -> Tensor:
        """Training pictures, uint8 `(n, 1, H, W, 3)`."""
        kinds = [self.kinds[place % len(self.kinds)] for place in range(self.pictures)]
        size = (self.unet.size, self.unet.size)
        jobs = [Job(world_of(kind), TRAIN_SEED + place, size, 1, 8.0, kind) for place, kind in enumerate(kinds)]
        return in_memory(jobs, self.workers, "pictures")[0]

    def _network(self, learned: bool, video: Tensor, folder: Path) -> UNet | None:
        """A trained network; None where its training was stopped."""
        torch.manual_seed(self.train.seed)  # the initial weights
        model = UNet(replace(self.unet, learn_sigma=learned, channels=3, context=0))
        source = TensorSource({"video": video}, seed=self.train.seed)
        result = train(model, PixelObjective(), source, self.train, folder / ("learned" if learned else "fixed"))
        if not result.finished:
            return None
        average = result.ema.eval()
        assert isinstance(average, UNet), "a copy of the model"
        return average

    def _measured(self, name: str, model: UNet, truth: np.ndarray) -> Row:
        """Distances, bound and seconds of a row at every length; what the longest chain makes stands on the sheet."""
        device = next(model.parameters()).device
        quick = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=fast_bf16(device))
        path, ask = VPLinear(), answers(model, FIXED.get(name, 0.0))
        figures: Figures = {"parameters": float(sum(p.numel() for p in model.parameters()))}
        made = truth
        for steps in self.steps:
            chain, rng = ShortChain(path, steps), torch.Generator().manual_seed(0)
            noise = torch.randn(self.n, 3, *truth.shape[2:4], generator=rng).to(device)  # (n, 3, H, W)
            begun = time.perf_counter()
            with quick():
                drawn = _by_ddim(model, path, noise, steps) if name == DDIM else chain.draw(ask, noise, rng)
            figures[f"seconds/{steps}"] = (time.perf_counter() - begun) / self.n
            made = Video(drawn[:, :, None], 1.0).to_uint8()  # (n, 1, H, W, 3)
            figures |= {f"{key}/{steps}": value for key, value in distances(features(truth), features(made)).items()}
            if name != DDIM:
                x = as_pixels(torch.from_numpy(truth[: self.bounded]))[:, :, 0].to(device)  # (n, 3, H, W)
                with quick():
                    figures[f"bound/{steps}"] = float(chain.bound(ask, x, rng).mean())
        return Row(figures, on_sheet(made))


@torch.no_grad()
def _by_ddim(model: UNet, path: VPLinear, noise: Tensor, steps: int) -> Tensor:
    """Pictures out of noise `(n, 3, H, W)` without randomness."""
    denoise = denoiser(lambda z, sigma, _: model(z, path.told_step(sigma)).float(), "eps", path)
    levels = spaced_sigmas(path, steps, "linspace")  # the steps that the short chain visits
    return SOLVERS["ddim"].solve(lambda z, sigma: denoise(z, sigma, None).clamp(-1, 1), noise, levels, path=path)


def recipe() -> DDPM:
    """The experiment."""
    return DDPM()
