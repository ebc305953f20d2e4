"""retrieval: a CLIP of clips and captions, asked to find the one among 256.

Paper: CLIP (Radford et al. 2021), section 2.3; frames are pooled by a learned query.
Command: tubelet train retrieval
Cost: not measured, it has not been run yet.
Score: none yet; a run writes figures.json and a sheet of captions with the clip that each finds.

Sets of 256 test clips whose captions all differ, of the training distribution and of held-out compositions. Where the wrong
clip or caption is found, `confused/FACET` says in which share of the mistakes that facet differs from what was asked for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tubelet.core.files import write_json
from tubelet.core.log import note
from tubelet.core.weights import save_module
from tubelet.data.stream import TensorSource
from tubelet.evaluate.report import world_of
from tubelet.media.sheet import contact_sheet, save_sheet
from tubelet.models.clip import CLIP, CLIPConfig
from tubelet.recipes.worlds import Job, in_memory
from tubelet.text.bpe import Tokenizer
from tubelet.text.bpe import train as train_tokenizer
from tubelet.train.classify import as_pixels
from tubelet.train.contrasting import ContrastObjective, read
from tubelet.train.loop import TrainConfig, train
from tubelet.train.optim import OptimizerConfig
from tubelet.worlds import WORLDS
from tubelet.worlds.constants import KINDS, TEST_SEEDS

SIZE, FRAMES, FPS = 64, 9, 4.0
"""Clips of two seconds, as the denoiser's, at half their rate."""
TRAIN_SEED = 2_060_000_000
"""First seed of the training clips, among the worlds' training seeds."""


@dataclass(frozen=True)
class Retrieval:
    """The network, the clips and the training."""

    clip: CLIPConfig = field(
        default_factory=lambda: CLIPConfig(
            embed=192, image=SIZE, patch=8, image_width=192, image_depth=4, vocab=1025, context=48, text_width=192,
            text_depth=3, video="attention",
        )
    )  # fmt: skip
    clips: int = 12_000
    n: int = 256
    """Clips of a test set, each to be found among all of them."""
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=800,
            batch=64,
            warmup=60,
            optimizer=OptimizerConfig(learning_rate=3e-3, learning_rate_adamw=1e-3),
            checkpoint_minutes=4.0,
        )
    )
    workers: int = 2

    def run(self, folder: Path) -> Path:
        """Render, train, search; returns the file of figures."""
        jobs = [_job("train", place) for place in range(self.clips)]
        video, captions = in_memory(jobs, self.workers, "train")
        path = folder / "tokenizer.json"
        if not path.exists():
            texts = [one["text"] for several in captions[:6000] for one in several]
            train_tokenizer(texts, self.clip.vocab - 1).save(path)
        tokenizer = Tokenizer.load(path)
        torch.manual_seed(self.train.seed)
        source = TensorSource({"video": video}, captions, seed=self.train.seed, proportions={"short": 0.7, "human": 0.3})
        result = train(CLIP(self.clip), ContrastObjective(tokenizer), source, self.train, folder / "train")
        if not result.finished:
            return folder
        model = result.ema
        assert isinstance(model, CLIP)
        save_module(folder / "clip.safetensors", model)
        figures: dict[str, float] = {}
        for split in ("in", "held_out"):
            tests = distinct(split, self.n)
            clips, said = in_memory(tests, self.workers, split)
            texts = [several[0]["text"] for several in said]
            cosines = similarities(model, tokenizer, clips, texts)
            scenes = [_scene(job) for job in tests]
            figures |= {f"{name}/{split}": value for name, value in found(cosines, scenes).items()}
            if split == "in":
                nearest = cosines.argmax(0)[:12].tolist()
                save_sheet(contact_sheet([clips[i].numpy() for i in nearest], texts[:12]), folder / "found.png")
        write_json(folder / "figures.json", figures)
        note("\n".join(f"{name}: {value:.3f}" for name, value in figures.items()))
        return folder / "figures.json"


def _job(split: str, place: int) -> Job:
    kind = KINDS[place % len(KINDS)]
    seed = TRAIN_SEED + place if split == "train" else TEST_SEEDS[place]
    return Job(world_of(kind), seed, (SIZE, SIZE), FRAMES, FPS, kind, "held_out" if split == "held_out" else "train")


def _scene(job: Job) -> Mapping[str, Any]:
    episode = WORLDS[job.world].sample(job.seed, *job.size, job.frames, job.fps, kind=job.kind, split=job.split)
    return episode.tags["scene"]


def distinct(split: str, count: int, tries: int = 8) -> list[Job]:
    """The first `count` test clips of a split whose captions all differ; fewer where `tries` times as many hold no more."""
    seen: set[str] = set()
    jobs: list[Job] = []
    for place in range(count * tries):
        job = _job(split, place)
        episode = WORLDS[job.world].sample(job.seed, *job.size, 2, FPS, kind=job.kind, split=job.split)
        if episode.short not in seen:
            seen.add(episode.short)
            jobs.append(job)
        if len(jobs) == count:
            break
    return jobs


@torch.no_grad()
def similarities(model: CLIP, tokenizer: Tokenizer, video: Tensor, texts: Sequence[str], batch: int = 32) -> Tensor:
    """Cosines of uint8 clips `(B, T, H, W, 3)` with texts, `(B, B')`."""
    model.eval()
    device = next(model.parameters()).device
    clips = torch.cat([model.embed_image(as_pixels(part.to(device))) for part in video.split(batch)])  # (B, E)
    words = model.embed_text(read(tokenizer, texts, model.config.context).to(device))  # (B', E)
    return (clips @ words.T).float().cpu()


def found(cosines: Tensor, scenes: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """R@1 and R@5 of both directions of `(B, B)` cosines whose clip i belongs with text i, and what mistakes get wrong."""
    own = torch.arange(len(cosines))
    out: dict[str, float] = {}
    wrong: dict[str, list[bool]] = defaultdict(list)
    for name, table in (("text_to_clip", cosines.T), ("clip_to_text", cosines)):
        order = table.argsort(dim=1, descending=True)
        for k in (1, 5):
            out[f"{name}/R@{k}"] = float((order[:, :k] == own[:, None]).any(1).float().mean())
        for asked, got in zip(own.tolist(), order[:, 0].tolist(), strict=True):
            if asked != got:
                for facet, differs in _differences(scenes[asked], scenes[got]).items():
                    wrong[facet].append(differs)
    out |= {f"confused/{facet}": float(np.mean(values)) for facet, values in wrong.items()}
    return out | {"chance": 1.0 / len(cosines)}


def _differences(asked: Mapping[str, Any], got: Mapping[str, Any]) -> dict[str, bool]:
    """Facet -> whether two scenes differ in it."""
    out = {"event": asked.get("kind") != got.get("kind"), "direction": asked.get("direction") != got.get("direction")}
    things = [list(scene.get("objects") or scene.get("strokes") or []) for scene in (asked, got)]
    for facet, key in (("colour", "color"), ("shape", "shape"), ("size", "size")):
        out[facet] = [one.get(key) for one in things[0]] != [one.get(key) for one in things[1]]
    return out


def recipe() -> Retrieval:
    """The search."""
    return Retrieval()
