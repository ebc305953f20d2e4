"""autoencoders: latent diffusion's autoencoder and MAGVIT-v2's tokenizer, with and without an adversary.

Paper: latent diffusion (Rombach et al. 2022), section 3.1 and appendix G; MAGVIT-v2 (Yu et al. 2023), section 3.2.
Command: tubelet train autoencoders
Cost: 83 minutes on one core beside other work: 5 and 8 for KL-f8 without and with an adversary, 17, 33 and 20 for MAGVIT-v2.
Score: perceptual distance .269 without and .247 with an adversary (35.4 and 34.1 dB), MAGVIT-v2 .604, .567 and .408 inflated:
docs/lineage.md. A run leaves table.json, table.md, sheet.png and each row's codec.safetensors in its folder.

Both are trained by their own losses as released, but for the perceptual term, for which no network is shipped. KL-f8 sees
pictures, single frames of clips of one object; MAGVIT-v2 sees five frames in a row. Rows of one codec have the same first
weights, clips and steps, so those with an adversary cost more; it joins for the last third of the steps. "Inflated" spends
the first third on a tokenizer of pictures of the same widths, as many frames a step, which then becomes the tokenizer of
films. Time is not halved: a word of four frames holds no moving thing at these sizes (docs/log.md, 2026-11-25). All are judged
on the same films, KL-f8 frame by frame: what the law card and the captions' judge still read of truth, and the perceptual
distance of `recipes.cascade`. Latent diffusion has its adversary against blur, which errors of pixels reward; MAGVIT-v2 is
inflated from pictures.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tubelet.codecs.base import Codec
from tubelet.codecs.image_kl import ImageKL, ImageKLConfig, ImageKLLossConfig
from tubelet.codecs.losses import to_pixels
from tubelet.codecs.magvit2 import MAGVIT2, Discriminator3d, MAGVIT2Config, Weights, inflate
from tubelet.codecs.tokenizer import usage
from tubelet.core.config import to_dict
from tubelet.core.errors import UserError
from tubelet.core.files import write_json
from tubelet.core.weights import save_module
from tubelet.data.stream import TensorSource
from tubelet.evaluate.caption import FACETS
from tubelet.evaluate.report import make_cases, through_codec
from tubelet.evaluate.tasks import MOVING
from tubelet.nn.adversarial import PatchDiscriminator
from tubelet.recipes.cascade import perceptual
from tubelet.recipes.lent import check_kinds
from tubelet.recipes.lineage import Figures, Row, compare, encode_all, macs_of, millions, plain, scaled, train_row
from tubelet.recipes.tokenizers import clips_of, read_back
from tubelet.train.adversary import Contest, KLContestObjective, MAGVITContestObjective, contest_split
from tubelet.train.loop import TrainConfig
from tubelet.train.optim import OptimizerConfig

INFLATED = "MAGVIT-v2, inflated"
PICTURES = ("KL-f8", "KL-f8, adversary")
ROWS = (*PICTURES, "MAGVIT-v2", "MAGVIT-v2, adversary", INFLATED)
TRAIN_SEED = 2_130_000_000
"""First seed of the training clips, among the worlds' training seeds."""
STATISTICS = 256
"""Training clips that the statistics of KL-f8's latents are measured on."""


def _training(steps: int, batch: int) -> TrainConfig:
    """Betas as latent diffusion's; a `clip` that lets both players' gradients through."""
    optimizer = OptimizerConfig(learning_rate=2e-3, learning_rate_adamw=5e-4, betas=(0.5, 0.9))
    return TrainConfig(steps=steps, batch=batch, warmup=40, clip=1e6, optimizer=optimizer, checkpoint_minutes=4.0)


@dataclass(frozen=True)
class Autoencoders:
    """Clips, networks, training and measures."""

    rows: tuple[str, ...] = ROWS
    """Which are trained; what truth scores always stands beside them."""
    kinds: tuple[str, ...] = MOVING
    clips: int = 2000
    size: tuple[int, int] = (64, 64)
    frames: int = 9
    fps: float = 4.0
    seen: int = 5
    """Frames that a step of MAGVIT-v2 sees of a clip, in one stretch; stretches begin where others end."""
    kl: ImageKLConfig = field(default_factory=lambda: ImageKLConfig(width=16, blocks=1, groups=8, size=64))
    kl_loss: ImageKLLossConfig = field(default_factory=lambda: ImageKLLossConfig(start=530))
    kl_train: TrainConfig = field(default_factory=lambda: _training(800, 16))
    patch_width: int = 16
    patch_layers: int = 2
    """Of the discriminator of patches, which are 34 pixels wide."""
    magvit: MAGVIT2Config = field(
        default_factory=lambda: MAGVIT2Config(
            channels=12, width=16, residuals=1, halve_time=(False, False, False), groups=8, size=(5, 64, 64)
        )
    )
    magvit_loss: Weights = field(default_factory=lambda: Weights(start=1333, entropy_steps=1333))
    magvit_train: TrainConfig = field(default_factory=lambda: _training(2000, 4))
    clip_width: int = 8
    clip_multipliers: tuple[int, ...] = (2, 4, 4)
    clip_groups: int = 4
    """Of the discriminator of clips."""
    n: int = 96
    """Test clips."""
    workers: int = 2

    def run(self, folder: Path) -> Path:
        """Every row that is not yet measured; returns the table's file.

        Raises UserError on an unknown kind, on clips that do not fit the codecs and on an adversary that would never begin.
        """
        check_kinds(self.kinds)
        self._check()
        cases = make_cases(self.kinds, self.n, size=self.size, frames=self.frames, fps=self.fps)
        truth = np.stack([case.truth for case in cases])
        clips = functools.cache(
            lambda: clips_of(self.kinds, self.clips, self.size, self.frames, self.fps, self.workers, TRAIN_SEED)[0]
        )

        def measured(made: np.ndarray) -> Row:
            return Row({**read_back(made, cases), "perceptual": perceptual(truth, made)}, made[0])

        def trained(name: str, place: Path) -> Row | None:
            made = self._trained(name, clips(), place)
            if made is None:
                return None
            codec, figures = made
            save_module(place / "codec.safetensors", codec)
            write_json(place / "codec.json", to_dict(codec.config))
            row = measured(np.stack(list(through_codec(codec, list(truth), self.fps))))
            if isinstance(codec, MAGVIT2):
                figures |= {"used": usage(words_of(codec, torch.from_numpy(truth)), 2**codec.channels)["used"]}
            figures |= {
                "macs": macs_of(codec, torch.zeros(1, 3, self.seen, *self.size, device=codec.mean.device)) / self.seen,
                "parameters": float(sum(p.numel() for p in codec.parameters())),
            }
            return replace(row, figures={**row.figures, **figures})

        rows: dict[str, Callable[[Path], Row | None]] = {
            **{name: functools.partial(trained, name) for name in ROWS},
            "truth": lambda _: measured(truth),
        }
        columns = (
            ("PSNR", "psnr", plain(1)),
            ("of foreground", "psnr_foreground", plain(1)),
            ("perceptual", "perceptual", plain(3)),
            *((facet, f"caption/{facet}", plain()) for facet in FACETS),
            ("steady", "law/steady", plain()),
            ("words used", "used", plain(3)),
            ("parameters", "parameters", millions),
            ("MACs of a frame", "macs", millions),
            ("steps", "steps", plain(0)),
            ("training, s", "train_seconds", plain(0)),
        )
        return compare(folder, self, rows, columns, (*self.rows, "truth"))

    def _check(self) -> None:
        for strides in (self.kl.stride, self.magvit.strides.h):
            if any(side % strides for side in self.size):
                raise UserError(f"clips of {self.size[0]} x {self.size[1]} do not divide into cells of {strides}; change size")
        if not 0 < self.seen <= self.frames:
            raise UserError(f"a step sees 1 to {self.frames} frames of a clip, got seen={self.seen}; correct it")
        for frames in (self.seen, self.frames):
            self.magvit.strides.latent_shape(frames, *self.size)
        for name, start, train in (
            ("kl", self.kl_loss.start, self.kl_train),
            ("magvit", self.magvit_loss.start, self.magvit_train),
        ):
            if start >= train.steps:
                raise UserError(
                    f"the adversary would begin at step {start} of {train.steps}; lower {name}_loss.start, or raise "
                    f"{name}_train.steps"
                )

    def _trained(self, name: str, clips: Tensor, place: Path) -> tuple[Codec, Figures] | None:
        """A row's codec and what its training took; None when it was stopped."""
        if name == INFLATED:
            return self._inflated(clips, place)
        one = self._kl if name in PICTURES else self._magvit
        return one("adversary" in name, clips, place)

    def _kl(self, adversary: bool, clips: Tensor, place: Path) -> tuple[Codec, Figures] | None:
        """KL-f8 on pictures; its statistics are those of their latents."""
        how = self.kl_train
        torch.manual_seed(how.seed)  # the initial weights
        codec = ImageKL(self.kl)
        judge = PatchDiscriminator(width=self.patch_width, layers=self.patch_layers) if adversary else None
        source = TensorSource({"video": stretches(clips, 1)}, seed=how.seed)
        objective = KLContestObjective(config=self.kl_loss)
        result = train_row(place, Contest(codec, judge), objective, source, how, contest_split)
        if result is None:
            return None
        average, figures = result[0].codec, result[1]
        raw = encode_all(average.encode_raw, clips[:STATISTICS], str(average.mean.device))
        average.set_statistics(raw.mean((0, 2, 3, 4)), raw.std((0, 2, 3, 4)))
        return average, figures

    def _magvit(self, adversary: bool, clips: Tensor, place: Path) -> tuple[Codec, Figures] | None:
        """MAGVIT-v2's tokenizer on films, from random weights."""
        torch.manual_seed(self.magvit_train.seed)  # the initial weights
        codec = MAGVIT2(self.magvit)
        model = Contest(codec, self._judge() if adversary else None)
        return self._on_films(model, clips, self.magvit_train, place)

    def _inflated(self, clips: Tensor, place: Path) -> tuple[Codec, Figures] | None:
        """A third of the steps on pictures, then inflated and trained on films, which alone the adversary sees."""
        torch.manual_seed(self.magvit_train.seed)  # the initial weights
        flat = replace(self.magvit, temporal_kernel=1, halve_time=(False,) * len(self.magvit.halve_time))
        how = scaled(self.magvit_train, 1 / 3)
        pictures = TensorSource({"video": stretches(clips, 1)}, seed=how.seed)
        objective = MAGVITContestObjective(weights=self.magvit_loss)
        first = train_row(
            place / "pictures",
            Contest(MAGVIT2(flat)),
            objective,
            pictures,
            replace(how, batch=how.batch * self.seen),  # as many frames
            contest_split,
        )
        if first is None:
            return None
        image, before = first
        assert isinstance(image.codec, MAGVIT2), "a copy of the model"
        torch.manual_seed(self.magvit_train.seed)  # of the discriminator, as where nothing is inflated
        codec = MAGVIT2(self.magvit)
        inflate(codec, image.codec.cpu())
        model = Contest(codec, self._judge())
        model.step.copy_(image.step)  # one schedule of entropy and adversary over both
        following = self._on_films(model, clips, replace(self.magvit_train, steps=self.magvit_train.steps - how.steps), place)
        if following is None:
            return None
        trained, after = following
        return trained, after | {name: before[name] + after[name] for name in ("steps", "train_seconds")}

    def _judge(self) -> Discriminator3d:
        return Discriminator3d((self.seen, *self.size), self.clip_width, self.clip_multipliers, self.clip_groups)

    def _on_films(self, model: Contest, clips: Tensor, how: TrainConfig, place: Path) -> tuple[Codec, Figures] | None:
        source = TensorSource({"video": stretches(clips, self.seen)}, seed=how.seed)
        result = train_row(place, model, MAGVITContestObjective(weights=self.magvit_loss), source, how, contest_split)
        return None if result is None else (result[0].codec, result[1])


def stretches(clips: Tensor, frames: int) -> Tensor:
    """Clips `(n, T, H, W, 3)` cut to `(m, frames, H, W, 3)`; where `frames` is above 1 each begins where the last ended."""
    parts = clips.unfold(1, frames, max(1, frames - 1))  # (n, parts, H, W, 3, frames)
    return parts.flatten(0, 1).movedim(-1, 1).contiguous()


@torch.no_grad()
def words_of(codec: MAGVIT2, video: Tensor, batch: int = 8) -> Tensor:
    """uint8 clips `(n, T, H, W, 3)` as words `(n, T', h, w)`."""
    return torch.cat([codec.tokens(to_pixels(part.to(codec.mean.device))).cpu() for part in video.split(batch)])


def recipe() -> Autoencoders:
    """The experiment."""
    return Autoencoders()
