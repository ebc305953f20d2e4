"""scaling: one recipe at base, 4 x and 32 x compute, the same sentences and seeds from each.

Paper: the Sora report (Brooks et al. 2024), "Scaling transformers for video generation".
Command: tubelet train scaling
Cost: 45 minutes on one core beside another training, after worlds-64: trainings 30, figures 15.
Score: colour 0.00 / 0.35 / 0.69, event 0.06 / 0.33 / 0.65: docs/lineage.md. A run writes table.json, table.md and scaling.png
in its folder.

The two short trainings are worlds-64 with 1/32 and 1/8 of its updates (sketch and films alike, schedules as long as
they are), on its codec and latents; 32 x is the system that worlds-64 left.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tubelet.core.errors import UserError
from tubelet.core.files import read_json, whole_file, write_json
from tubelet.core.log import note
from tubelet.evaluate.report import evaluate_system, make_cases
from tubelet.generate.system import System, load
from tubelet.media.sheet import contact_sheet, save_sheet
from tubelet.recipes import worlds_64
from tubelet.recipes.lineage import encode_all, held_out_loss
from tubelet.recipes.worlds import PROMPTS, WorldsRecipe
from tubelet.train.text_to_video import TextToVideo, TextToVideoObjective
from tubelet.worlds.constants import KINDS

FIGURES = (
    "caption/colour/in",
    "caption/shape/in",
    "caption/direction/in",
    "caption/event/in",
    "law/inertia/in",
    "law/gravity/in",
    "law/permanence/in",
    "law/steady/in",
)
WHOLE = 32


@dataclass(frozen=True)
class Scaling:
    """Which shares of the whole run, and where it lies."""

    whole: str = "runs/worlds-64"
    """The folder of a finished run of worlds-64."""
    factors: tuple[int, ...] = (1, 4)
    n: int = 54
    """Prompts per figure."""

    def run(self, folder: Path) -> Path:
        """The short trainings and the table of all; returns the table's file. Raises UserError without the whole run."""
        whole = Path(self.whole)
        if not (whole / "export.json").exists():
            raise UserError(f"{whole} holds no finished run of worlds-64; run tubelet train worlds-64 first, or set whole")
        places = {WHOLE: whole / "system"}
        for factor in self.factors:
            place = folder / f"{factor}x"
            _share(whole, place)
            system = self.recipe(factor).run(place)
            if not (system / "system.json").exists():
                return folder
            places[factor] = system
        results: dict[str, dict[str, float]] = {}
        for factor in sorted(places):
            done = folder / f"{factor}x.json"
            if not done.exists():
                figures = evaluate_system(load(places[factor]), self.n, 1, splits=("in",))
                figures |= {"loss": self.loss(load(places[factor], dtype="float32"))}
                write_json(done, {name: figures[name] for name in ("loss", *FIGURES) if name in figures})
            results[f"{factor}x"] = read_json(done)
        rows, texts = [], []
        for prompt in PROMPTS[:3]:
            for factor in sorted(places):
                rows.append(load(places[factor]).generate(prompt, seed=0).video.to_uint8()[0])
                texts.append(f"{factor}x: {prompt}")
        save_sheet(contact_sheet(rows, texts), folder / "scaling.png")
        write_json(folder / "table.json", results)
        with whole_file(folder / "table.md") as temporary:
            temporary.write_text(markdown(results), encoding="utf-8")
        note(markdown(results))
        return folder / "table.md"

    def loss(self, system: System, rounds: int = 4) -> float:
        """The training's loss on test clips of every kind, all cells alike, at the same levels and noises for each system."""
        config = system.config
        cases = make_cases(KINDS, self.n, size=config.size, frames=config.frames, fps=config.fps)
        video = torch.from_numpy(np.stack([case.truth for case in cases]))
        latents = encode_all(system.codec.encode, video, str(system.device)).to(system.device)
        films = TextToVideoObjective(
            prediction=system.engine.prediction,
            sampling=worlds_64.recipe().sigma,
            text_drop=0.0,
            split=0.0,
            image_share=0.0,
            foreground=1.0,
        )

        def objective(model: TextToVideo, batch: dict[str, Any], rng: torch.Generator) -> dict[str, Tensor]:
            return films(model, batch | {"foreground": torch.zeros_like(batch["latent"][:, 0], dtype=torch.uint8)}, rng)

        model = TextToVideo(system.text, system.denoiser)
        return held_out_loss(model, objective, latents, [case.text for case in cases], rounds)

    def recipe(self, factor: int) -> WorldsRecipe:
        """worlds-64 at `factor` / 32 of its updates."""
        whole = worlds_64.recipe()
        assert whole.sketch is not None, "worlds-64 has a sketch"

        def part(steps: int) -> int:
            return max(1, steps * factor // WHOLE)

        return replace(
            whole,
            name=f"{factor}x",
            decoder_train=None,
            sketch=replace(whole.sketch, steps=part(whole.sketch.steps), warmup=part(whole.sketch.warmup * 4)),
            denoise=replace(whole.denoise, steps=part(whole.denoise.steps), sample_every=0),
        )


def _share(whole: Path, place: Path) -> None:
    """The clips, codec, latents and tokenizer of the whole run, and that they are done."""
    place.mkdir(parents=True, exist_ok=True)
    for name in ("clips", "latents"):
        if not (place / name).exists():
            (place / name).symlink_to((whole / name).resolve())
    codec = whole / "codec-polished.safetensors"
    shutil.copyfile(codec if codec.exists() else whole / "codec.safetensors", place / "codec.safetensors")
    shutil.copyfile(whole / "tokenizer.json", place / "tokenizer.json")
    for stage in ("render", "train_codec", "encode"):
        write_json(place / f"{stage}.json", {stage: 0.0})


def markdown(results: dict[str, dict[str, float]]) -> str:
    """The table as a page holds it: a row for each share of compute."""
    names = list(dict.fromkeys(name for figures in results.values() for name in figures))
    lines = ["| compute | " + " | ".join(name.removesuffix("/in") for name in names) + " |", "|---" * (len(names) + 1) + "|"]
    for row, figures in results.items():
        lines.append(f"| {row} | " + " | ".join(f"{figures.get(name, float('nan')):.2f}" for name in names) + " |")
    return "\n".join(lines) + "\n"


def recipe() -> Scaling:
    """The three."""
    return Scaling()
