"""codec-table: which codec should the denoiser live on? Both codecs at equal compute, by temporal stride and channels.

Paper: the trade that latent diffusion (Rombach et al. 2022, section 4.1) asks of every codec, here with laws for FID.
Command: tubelet train codec-table
Cost: not measured, the table has not been run yet; `--set rows=[...]` chooses rows.
Score: none yet; a run writes table.json and table.md in its folder.

Equal compute means: `balanced` settings (equal multiply-accumulates per pixel frame), the same clips and the same steps
for every codec; then one small denoiser of equal width, depth and token count on each codec's latents, again for the same
steps. A PSNR that looks acceptable may hide a codec through which nothing moves evenly, so the law card of truth through
the codec stands beside it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from tubelet.codecs.base import Codec
from tubelet.codecs.causal_conv import CausalConvConfig
from tubelet.codecs.transformer import TransformerConfig
from tubelet.core.errors import UserError
from tubelet.core.files import read_json, whole_file, write_json
from tubelet.core.log import note
from tubelet.evaluate.report import evaluate_system, truth_figures
from tubelet.generate.system import load
from tubelet.models.spacetime import SpacetimeConfig
from tubelet.recipes.worlds import Clips, WorldsRecipe
from tubelet.runtime.device import seconds_per_call
from tubelet.text.own import OwnTextConfig
from tubelet.train.loop import TrainConfig
from tubelet.train.optim import OptimizerConfig

CODEC_FIGURES = (
    "codec/psnr",
    "codec/psnr_foreground",
    "codec/caption/shape",
    "codec/law/inertia",
    "codec/law/gravity",
    "codec/law/steady",
)
FILM_FIGURES = ("caption/colour/in", "caption/shape/in", "caption/event/in", "law/gravity/in", "law/steady/in")


@dataclass(frozen=True)
class CodecTable:
    """The rows, and the budget that all share. A row is "NAME-tSTRIDE-cCHANNELS"."""

    rows: tuple[str, ...] = (
        *(f"{name}-t{stride}-c8" for name in ("causal_conv", "transformer") for stride in (1, 2, 4)),
        *(f"causal_conv-{row}" for row in ("t1-c4", "t1-c16", "t4-c16")),
    )
    clips: Clips = field(default_factory=lambda: Clips(codec=3000, codec_frames=17, codec_fps=8.0, denoiser=6000))
    codec_train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=1000, batch=4, warmup=50, optimizer=OptimizerConfig(learning_rate=2e-3, learning_rate_adamw=2e-3)
        )
    )
    denoise: TrainConfig = field(default_factory=lambda: TrainConfig(steps=600, batch=64, warmup=60))
    n: int = 100
    """Prompts per figure."""

    def run(self, folder: Path) -> Path:
        """Every row that is not yet measured; returns the table's file. Raises UserError on a row that cannot be."""
        recipes = {row: self.recipe(row) for row in self.rows}
        results: dict[str, dict[str, float]] = {}
        for row, recipe in recipes.items():
            done = folder / row / "figures.json"
            if not done.exists():
                self._share_clips(folder, recipe, folder / row)
                system = recipe.run(folder / row)
                if not (system / "system.json").exists():
                    note("stopped; the same command goes on from there")
                    return folder
                write_json(done, self.measure(system, recipe))
            results[row] = read_json(done)
        write_json(folder / "table.json", results)
        with whole_file(folder / "table.md") as temporary:
            temporary.write_text(markdown(results), encoding="utf-8")
        note(markdown(results))
        return folder / "table.md"

    def recipe(self, row: str) -> WorldsRecipe:
        """The road of one row."""
        try:
            name, stride_text, channels_text = row.split("-")
            stride, channels = int(stride_text.removeprefix("t")), int(channels_text.removeprefix("c"))
            patch = {1: (4, 2, 2), 2: (2, 2, 2), 4: (1, 2, 2)}[
                stride
            ]  # 80 tokens for 17 frames of 64 x 64, whatever the stride
        except (ValueError, KeyError) as error:
            raise UserError(
                f"a row is NAME-tSTRIDE-cCHANNELS with stride 1, 2 or 4, got {row!r}; e.g. causal_conv-t4-c8"
            ) from error
        if name not in ("causal_conv", "transformer"):
            raise UserError(f"there is no codec {name!r}; choose causal_conv or transformer")
        kernel = 1 if stride == 1 else 3
        return WorldsRecipe(
            name=row,
            clips=self.clips,
            codec=name,  # type: ignore[arg-type]
            causal_conv=CausalConvConfig.balanced(stride, channels, kernel),
            transformer=TransformerConfig.balanced(stride, channels, kernel),
            codec_train=self.codec_train,
            denoiser=SpacetimeConfig(width=192, depth=6, heads=3, in_channels=channels, patch=patch, text_width=192),
            text=OwnTextConfig(vocab_size=1024, width=192, depth=2, heads=3),
            denoise=replace(self.denoise, compile=False),
            captions={"short": 1.0},
        )

    def _share_clips(self, folder: Path, recipe: WorldsRecipe, row: Path) -> None:
        """Render the codecs' clips once, for all rows."""
        if not (folder / "render.json").exists():
            recipe.render(folder)
            write_json(folder / "render.json", {"render": 0.0})
        row.mkdir(parents=True, exist_ok=True)
        if not (row / "clips").exists():
            (row / "clips").symlink_to((folder / "clips").resolve())
        write_json(row / "render.json", {"render": 0.0})

    def measure(self, system: Path, recipe: WorldsRecipe) -> dict[str, float]:
        """Figures of the codec and of the denoiser's films."""
        whole = load(system)
        codec = whole.codec
        truth = truth_figures(self.n, ("in",), codec=codec)
        films = evaluate_system(whole, self.n, 1, splits=("in",))
        height, width = recipe.clips.size
        cells = 1 + (recipe.clips.frames - 1) // codec.strides.t
        rate = cells * (height // codec.strides.h) * (width // codec.strides.w) * codec.channels
        return {
            "rate": rate / (recipe.clips.frames * height * width * 3),
            **speeds(codec, recipe.clips.frames, height, width),
            **{name: truth[name] for name in CODEC_FIGURES if name in truth},
            **{name: films[name] for name in FILM_FIGURES if name in films},
        }


@torch.no_grad()
def speeds(codec: Codec, frames: int, height: int, width: int) -> dict[str, float]:
    """Clips per second that the codec encodes and decodes, eight at a time."""
    first = next(codec.parameters())
    device = first.device
    pixels = torch.zeros(8, 3, frames, height, width, dtype=first.dtype, device=device)
    latents = codec.encode(pixels)
    return {
        "encode/clips_per_second": 8 / seconds_per_call(lambda: codec.encode(pixels), device, 1.0),
        "decode/clips_per_second": 8 / seconds_per_call(lambda: codec.decode(latents), device, 1.0),
    }


def markdown(results: dict[str, dict[str, float]]) -> str:
    """The table as a page holds it."""
    names = list(dict.fromkeys(name for figures in results.values() for name in figures))
    head = "| row | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 1) + "|\n"
    rows = "".join(
        f"| {row} | " + " | ".join(f"{figures[n]:.3g}" if n in figures else "" for n in names) + " |\n"
        for row, figures in results.items()
    )
    return f"Measured {time.strftime('%Y-%m-%d')} with `tubelet train codec-table`.\n\n{head}{rows}"


def recipe() -> CodecTable:
    """The whole table."""
    return CodecTable()
