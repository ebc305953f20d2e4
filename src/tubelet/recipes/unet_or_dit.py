"""unet-or-dit: pictures from words by a U-Net and by a DiT at equal compute, and by DiT's four ways of conditioning.

Paper: DiT (Peebles & Xie 2023), tables 2 and 4 and figure 5; DDPM (Ho et al. 2020); latent diffusion (Rombach et al. 2022).
Command: tubelet train unet-or-dit
Cost: 71 minutes on one core beside much other work.
Score: colour .96 (U-Net), .83 (adaLN-Zero), .79 (adaLN), .74 (cross-attention), .66 (in-context): docs/lineage.md. A run leaves
table.json, table.md and sheet.png in its folder.

Pictures are first frames of clips with one object. All networks are trained as ADM and DiT are, on noise and its variance
over DDPM's chain, read the same words from the run's encoder, which stays as it is, and are sampled alike. The U-Net looks at
token states, as Stable Diffusion's does; in a DiT their mean stands where the paper has a class. The U-Net is trained for as
many steps as make its multiply-accumulates those of the DiT with adaLN-Zero, the four DiTs for equal steps. In the paper
adaLN-Zero is best, then adaLN, cross-attention and in-context (FID after 400,000 steps of XL/2: 19.5, 25.2, 26.1, 35.2).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

import torch

from tubelet.diffusion.paths import VPLinear
from tubelet.evaluate.report import make_cases
from tubelet.evaluate.tasks import MOVING
from tubelet.generate.engine import Sampling
from tubelet.generate.layouts import Chain
from tubelet.generate.published import OnePicture
from tubelet.models.dit import DiT, DiTConfig
from tubelet.models.unet import UNet, UNetConfig
from tubelet.recipes.lent import Lent, borrow, check_kinds, latents
from tubelet.recipes.lineage import (
    Row,
    compare,
    device_of,
    film_row,
    macs,
    millions,
    plain,
    scaled,
    train_row,
    truth_rows,
    unet_split,
)
from tubelet.train.lineage import PictureObjective
from tubelet.train.loop import TrainConfig
from tubelet.train.optim import OptimizerConfig
from tubelet.train.text_to_video import TextToVideo

FACETS = ("colour", "shape", "size")
Conditioning = Literal["in-context", "cross-attention", "adaln", "adaln-zero"]
WAYS: dict[str, Conditioning] = {
    "DiT, adaLN-Zero": "adaln-zero",
    "DiT, adaLN": "adaln",
    "DiT, cross-attention": "cross-attention",
    "DiT, in-context": "in-context",
}
ROWS = ("U-Net", *WAYS)
SPLITS = ("in", "held_out")
OTHERS = 1_000_000
"""Test seeds from here on are truth that no prompt is made of."""
EQUAL = "DiT, adaLN-Zero"
"""The row whose compute the U-Net's equals."""


@dataclass(frozen=True)
class UNetOrDiT:
    """Sizes, training and measures. Channels and the width of words are the run's."""

    GIVEN: ClassVar = (
        "dit.in_channels",
        "dit.text_width",
        "dit.classes",
        "dit.conditioning",
        "dit.learn_sigma",
        "unet.channels",
        "unet.context",
        "unet.size",
        "unet.learn_sigma",
    )

    whole: str = "worlds-64"
    """A system, or the folder of a finished run of worlds-64."""
    rows: tuple[str, ...] = ROWS
    """Which are trained; what truth scores always stands beside them."""
    kinds: tuple[str, ...] = MOVING
    """Clips whose first frames are the pictures."""
    dit: DiTConfig = field(
        default_factory=lambda: DiTConfig(width=192, depth=6, heads=3, patch=2, in_channels=8, text_width=256)
    )
    unet: UNetConfig = field(
        default_factory=lambda: UNetConfig(
            width=48, multipliers=(1, 2, 2), blocks=1, attention=(0, 1), heads=4, context=256, channels=8, learn_sigma=True,
            dropout=0.0, groups=16, size=8,
        )
    )  # fmt: skip
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=1600,
            batch=128,
            warmup=60,
            optimizer=OptimizerConfig(learning_rate=3e-3, learning_rate_adamw=1e-3),
            checkpoint_minutes=4.0,
        )
    )
    """Of a DiT."""
    text_drop: float = 0.1
    sampling: Sampling = field(default_factory=lambda: Sampling(steps=50, guidance=2.0, solver="ddim"))
    n: int = 192
    """Prompts of each split."""

    def run(self, folder: Path) -> Path:
        """Every row that is not yet measured; returns the table's file. Raises UserError when nothing is lent."""
        check_kinds(self.kinds)
        lent = borrow(self.whole, folder, device_of(self.train))
        source = functools.cache(lambda: latents(lent, self.kinds, [0]))
        cases = {split: make_cases(self.kinds, self.n, split, size=lent.size, frames=1) for split in SPLITS}
        others = make_cases(self.kinds, self.n, size=lent.size, frames=1, seed=OTHERS)
        objective = PictureObjective(text_drop=self.text_drop)

        def trained(name: str, place: Path) -> Row | None:
            torch.manual_seed(self.train.seed)  # the initial weights
            chain = Chain(VPLinear(), "eps", spacing="trailing")
            network, cells = self.network(name, lent)
            model = TextToVideo(lent.text, OnePicture(network, chain.path))
            cost = macs(model.denoiser.to(lent.device), lent, 1)
            config = scaled(self.train, self.macs(EQUAL, lent) / cost if name == "U-Net" else 1.0)
            by = unet_split if name == "U-Net" else None
            result = train_row(place, model, objective, source()(config.seed), config, by)
            asked = replace(objective, text_drop=0.0)  # as it samples: all words
            return film_row(result, lent, chain, cells, cases, self.sampling, FACETS, asked, cost)

        rows: dict[str, Callable[[Path], Row | None]] = {name: functools.partial(trained, name) for name in ROWS}
        truth = truth_rows(lent, cases, others, FACETS)
        columns = (
            *((f"{facet}, {split.replace('_', '-')}", f"{facet}/{split}", plain()) for split in SPLITS for facet in FACETS),
            ("Frechet", "frechet", plain(1)),
            ("KID", "kid", plain()),
            ("held-out loss", "loss", plain(4)),
            ("parameters", "parameters", millions),
            ("MACs", "macs", millions),
            ("steps", "steps", plain(0)),
            ("training, s", "train_seconds", plain(0)),
            ("s a picture", "seconds", plain(3)),
        )
        return compare(folder, self, {**rows, **truth}, columns, (*self.rows, *truth))

    def network(self, name: str, lent: Lent) -> tuple[DiT | UNet, int]:
        """A row's network, and what rows and columns of its latents must be multiples of."""
        channels, width = lent.codec.channels, lent.text.width
        if name == "U-Net":
            unet = replace(self.unet, channels=channels, context=width, size=lent.cells[1], learn_sigma=True)
            return UNet(unet), unet.stride
        dit = replace(self.dit, in_channels=channels, text_width=width, classes=1, conditioning=WAYS[name], learn_sigma=True)
        return DiT(dit), dit.patch

    def macs(self, name: str, lent: Lent) -> float:
        """Multiply-accumulates of a row's network on one picture."""
        network, _ = self.network(name, lent)
        return macs(OnePicture(network, VPLinear()).to(lent.device), lent, 1)


def recipe() -> UNetOrDiT:
    """The experiment."""
    return UNetOrDiT()
