"""worlds-64-decoder: the shipped system's codec learns to render every size. The decoder alone; no latent changes.

Paper: the Sora report (2024), "Sampling flexibility": one model for clips of any size.
Command: tubelet train worlds-64-decoder
Cost: 16 minutes on one core beside other trainings, after worlds-64-gpu: films 15, table 1.
Score: PSNR of test clips, foreground PSNR (before): 64 x 64 43.8, 32.4 dB (43.1, 31.7), 64 x 112 47.6, 34.0 (46.7, 33.2), 112 x
64 45.1, 31.4 (35.3, 27.7), 96 x 96 44.9, 33.1 (32.3, 28.0); 64 x 96, in no step, 46.5, 33.4 (45.6, 32.5). table.json has them.

The codec of worlds-64 saw clips of 64 x 64 pixels alone, where the floor begins at one and the same row of its cells. At other
sizes it begins at another, which was drawn as a red line, and the judges read a red thing. Encoder and latents stay what the
denoiser has learned.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tubelet.codecs import Codec
from tubelet.codecs.losses import CodecLossConfig, CodecObjective
from tubelet.core.errors import UserError
from tubelet.core.files import write_json
from tubelet.core.log import note
from tubelet.data.stream import TensorSource, Turns
from tubelet.evaluate.fidelity import foreground_psnr, psnr
from tubelet.evaluate.report import make_cases, through_codec
from tubelet.generate.folder import save_system
from tubelet.generate.system import load
from tubelet.recipes.worlds import Job, in_memory
from tubelet.runtime.cpu import restore
from tubelet.train.loop import TrainConfig, train
from tubelet.train.optim import OptimizerConfig
from tubelet.worlds.constants import KINDS

TRAIN_SEED = 1_100_000_000
"""First seed of the clips, among the worlds' training seeds."""


@dataclass(frozen=True)
class Decoder:
    """Which system, which clips, how long."""

    start: str = "runs/worlds-64-gpu/system"
    """A system, by name or folder, whose decoder is trained further."""
    sizes: tuple[tuple[int, int], ...] = ((64, 64), (96, 96), (64, 64), (64, 112), (64, 64), (112, 64), (80, 80), (128, 72))
    """Sizes (height, width) of a step's clips, in turn."""
    clips: int = 1000
    """Of each entry of `sizes`."""
    frames: int = 5
    fps: float = 2.0
    persist: float = 0.22
    """Share of persist2d; the rest is phys2d."""
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=2500,
            batch=8,
            warmup=50,
            optimizer=OptimizerConfig(learning_rate=1.5e-3, learning_rate_adamw=1.5e-3),
            checkpoint_minutes=3.0,
        )
    )
    loss: CodecLossConfig = field(default_factory=lambda: CodecLossConfig(l1=0.5, gradient=0.5, noise=0.1))
    n: int = 27
    """Test clips of each size that the table is made of."""
    workers: int = 2

    def run(self, folder: Path) -> Path:
        """Trains, writes folder/system and folder/table.json; returns the system. Raises UserError when nothing can start."""
        system = load(self.start, device=self.train.device, dtype="float32")
        if not self.sizes or self.clips < self.train.batch:
            raise UserError("sizes must not be empty, and clips at least train.batch; correct them")
        for size in self.sizes:
            system.codec.strides.latent_shape(self.frames, *size)
        codec, before = restore(load(self.start, device=self.train.device, dtype="float32").codec), system.codec
        assert isinstance(codec, Codec), "the same module"
        for name, parameter in codec.named_parameters():
            parameter.requires_grad_(not name.startswith(("encoder", "merge")))
        result = train(codec, CodecObjective(self.loss), self.source(), self.train, folder / "decoder")
        if not result.finished:
            note("stopped; the same command goes on from there")
            return folder
        after = result.ema.eval()
        assert isinstance(after, Codec), "a copy of the model"
        write_json(folder / "table.json", self.table(before, after))
        config = system.config
        save_system(
            folder / "system",
            name=config.name,
            codec=(config.codec.name, after),
            denoiser=(config.denoiser.name, system.denoiser),
            text=(config.text.name, system.text),
            size=config.size,
            frames=config.frames,
            fps=config.fps,
            prediction=system.engine.prediction,
            defaults=config.defaults,
            training={**config.training, "decoder_steps": result.step},
            expander=config.expander,
        )
        note(f"{folder / 'system'}")
        return folder / "system"

    def source(self) -> Turns:
        """Clips of every size as pixels, a step of one size after the other."""
        seeds, sources = itertools.count(TRAIN_SEED), []
        for size in self.sizes:
            jobs = [
                Job("persist2d" if i % 100 < round(100 * self.persist) else "phys2d", next(seeds), size, self.frames, self.fps)
                for i in range(self.clips)
            ]
            video, _ = in_memory(jobs, self.workers, f"clips of {size[0]}x{size[1]}")
            sources.append(TensorSource({"video": video}, seed=self.train.seed))
        return Turns(sources)

    def table(self, before: Codec, after: Codec) -> dict[str, float]:
        """PSNR of test clips through both codecs, whole and foreground, at every size and one of which no step had any."""
        out: dict[str, float] = {}
        for size in dict.fromkeys((*self.sizes, (64, 96))):
            cases = make_cases(KINDS, self.n, size=size, frames=self.frames, fps=self.fps)
            truths = [case.truth for case in cases]
            for name, codec in (("before", before), ("after", after)):
                made = list(through_codec(codec, truths, self.fps))
                for measure, of in (("psnr", psnr), ("psnr_foreground", foreground_psnr)):
                    values = [of(truth, clip) for truth, clip in zip(truths, made, strict=True)]
                    out[f"{size[0]}x{size[1]}/{measure}/{name}"] = float(np.mean(values))
        for name, value in out.items():
            note(f"{name} {value:.1f}")
        return out


def recipe() -> Decoder:
    """Goes on from where `tubelet train worlds-64-gpu` leaves its system."""
    return Decoder()
