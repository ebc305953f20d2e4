"""events: which event does a clip show? Nine classifiers at one budget: what each way of attending to time buys.

Paper: ViViT (Arnab et al. 2021), tables 2 and 3; with C3D (2015), TimeSformer (2021), VTN (2021) and NaViT (2023).
Command: tubelet train events
Cost: not measured, it has not been run yet; `--set models=[...]` chooses.
Score: none yet; a run leaves table.json and table.md in its folder.

All see the same clips of 64 x 64 pixels for the same number of steps, with the same optimiser; they differ in the room alone.
Accuracy is on test seeds and on held-out compositions (colour and shape, size and event), which no training clip shows.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tubelet.core.errors import UserError
from tubelet.core.files import read_json, whole_file, write_json
from tubelet.core.log import note
from tubelet.data.stream import TensorSource
from tubelet.evaluate.report import world_of
from tubelet.models import c3d, navit, timesformer, vivit, vtn
from tubelet.recipes.worlds import Job, in_memory
from tubelet.runtime.device import seconds_per_call
from tubelet.train.classify import ClassifyObjective, as_pixels
from tubelet.train.loop import TrainConfig, train
from tubelet.train.optim import OptimizerConfig
from tubelet.worlds.constants import KINDS, TEST_SEEDS

FRAMES, SIZE, FPS, WIDTH, DEPTH, HEADS = 16, 64, 8.0, 128, 4, 4
TRAIN_SEED = 2_000_000_000
"""First seed of the training clips, among the worlds' training seeds."""
_VIVIT = vivit.ViViTConfig(
    width=WIDTH, depth=DEPTH, heads=HEADS, temporal_depth=2, frames=FRAMES, size=SIZE, tubelet=(2, 8, 8), classes=len(KINDS)
)


class _NaViT(nn.Module):
    """NaViT on clips of one size, whose patches of two frames take 1 + 2k of them."""

    def __init__(self) -> None:
        super().__init__()
        config = navit.NaViTConfig(width=WIDTH, depth=DEPTH, heads=HEADS, patch=(2, 8, 8), outputs=len(KINDS))
        self.inner = navit.NaViT(config)

    def forward(self, video: Tensor) -> Tensor:
        return self.inner(video[:, :, : FRAMES - 1])


ROOMS: dict[str, Callable[[], nn.Module]] = {
    "C3D": lambda: c3d.C3D(c3d.C3DConfig(classes=len(KINDS), frames=FRAMES, size=SIZE, width=16, hidden=256)),
    "TimeSformer": lambda: timesformer.TimeSformer(
        timesformer.TimeSformerConfig(
            width=WIDTH, depth=DEPTH, heads=HEADS, frames=FRAMES, size=SIZE, patch=8, classes=len(KINDS)
        )
    ),
    "VTN": lambda: vtn.VTN(
        vtn.VTNConfig(
            width=WIDTH,
            depth=DEPTH,
            heads=HEADS,
            temporal_depth=2,
            temporal_hidden=4 * WIDTH,
            window=8,
            positions=64,
            frames=FRAMES,
            size=SIZE,
            patch=8,
            classes=len(KINDS),
            head_dropout=0.1,
        )
    ),
    "ViViT 1": lambda: vivit.ViViT(_VIVIT),
    "ViViT 2": lambda: vivit.ViViT(replace(_VIVIT, kind="encoder")),
    "ViViT 3": lambda: vivit.ViViT(replace(_VIVIT, kind="self-attention", pool="mean")),
    "ViViT 4": lambda: vivit.ViViT(replace(_VIVIT, kind="dot-product", pool="mean")),
    "ViViT average": lambda: vivit.ViViT(replace(_VIVIT, kind="average")),
    "NaViT": _NaViT,
}


@dataclass(frozen=True)
class Events:
    """What all classifiers share."""

    models: tuple[str, ...] = tuple(ROOMS)
    clips: int = 4500
    """Training clips, all kinds alike."""
    n: int = 450
    """Test clips of each split."""
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=500,
            batch=32,
            warmup=40,
            optimizer=OptimizerConfig(learning_rate=3e-3, learning_rate_adamw=1e-3, weight_decay=0.01),
        )
    )
    workers: int = 2

    def run(self, folder: Path) -> Path:
        """Every classifier that is not yet measured; returns the table's file. Raises UserError on an unknown model."""
        unknown = [name for name in self.models if name not in ROOMS]
        if unknown:
            raise UserError(f"there is no classifier {unknown[0]!r}; choose among {', '.join(ROOMS)}")
        results: dict[str, dict[str, float]] = {}
        source: TensorSource | None = None
        tests: dict[str, dict[str, Tensor]] = {}
        for name in self.models:
            place = folder / name.replace(" ", "_")
            if not (place / "figures.json").exists():
                if source is None:
                    source = TensorSource(self._clips("train", self.clips), None, seed=self.train.seed)
                    tests = {split: self._clips(split, self.n) for split in ("in", "held_out")}
                torch.manual_seed(self.train.seed)
                begun = time.perf_counter()
                result = train(ROOMS[name](), ClassifyObjective(), source, self.train, place)
                if not result.finished:
                    return folder
                seconds = time.perf_counter() - begun
                write_json(place / "figures.json", {**measure(result.ema, tests), "train_seconds": seconds})
                source.cursor.position = 0
            results[name] = read_json(place / "figures.json")
        write_json(folder / "table.json", results)
        with whole_file(folder / "table.md") as temporary:
            temporary.write_text(markdown(results), encoding="utf-8")
        note(markdown(results))
        return folder / "table.md"

    def _clips(self, split: str, count: int) -> dict[str, Tensor]:
        """Clips of a split and the numbers of their kinds, into memory."""
        rule = "held_out" if split == "held_out" else "train"
        jobs = []
        for place in range(count):
            kind = KINDS[place % len(KINDS)]
            seed = TRAIN_SEED + place if split == "train" else TEST_SEEDS[place]
            jobs.append(Job(world_of(kind), seed, (SIZE, SIZE), FRAMES, FPS, kind, rule))
        video, _ = in_memory(jobs, self.workers, split)
        return {"video": video, "label": torch.arange(count, dtype=torch.uint8) % len(KINDS)}


@torch.no_grad()
def measure(model: nn.Module, tests: dict[str, dict[str, Tensor]], batch: int = 50) -> dict[str, float]:
    """Accuracy on each split, parameters, multiply-accumulates and clips a second of one model."""
    model.eval()
    device = next(model.parameters()).device
    out: dict[str, float] = {}
    for split, clips in tests.items():
        right = [
            (model(as_pixels(video.to(device))).argmax(1).cpu() == label).float()
            for video, label in zip(clips["video"].split(batch), clips["label"].split(batch), strict=True)
        ]
        out[split] = float(torch.cat(right).mean())
    one = torch.zeros(1, 3, FRAMES, SIZE, SIZE, device=device)
    with FlopCounterMode(display=False) as counter:
        model(one)
    out["parameters"] = float(sum(p.numel() for p in model.parameters()))
    out["macs"] = counter.get_total_flops() / 2
    many = one.expand(8, -1, -1, -1, -1).contiguous()
    out["clips_per_second"] = 8 / seconds_per_call(lambda: model(many), device, 1.0)
    return out


def markdown(results: dict[str, dict[str, float]]) -> str:
    """The table as a page holds it."""
    heads = ("", "test seeds", "held-out compositions", "parameters", "MACs", "clips a second", "training, s")
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, f in results.items():
        cells = (
            name,
            f"{f['in']:.3f}",
            f"{f['held_out']:.3f}",
            f"{f['parameters'] / 1e6:.2f} M",
            f"{f['macs'] / 1e9:.2f} G",
            f"{f['clips_per_second']:.0f}",
            f"{f['train_seconds']:.0f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def recipe() -> Events:
    """All of them."""
    return Events()
