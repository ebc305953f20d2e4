"""captioner: a CoCa that says what a clip shows, in one sentence or in detail.

Paper: CoCa (Yu et al. 2022) as DALL-E 3 uses it (Betker et al. 2023, section 2): pretrained to contrast and caption, then asked
for short and for dense captions.
Command: tubelet train captioner
Cost: 65 minutes on one core beside other trainings: 2,200 updates, then 1,200 more with the rate raised again.
Score: events 1.00, direction .96, shape .94, size .92, colour .85 of dense captions on test seeds: docs/lineage.md. A run
leaves table.json, table.md, and short.png and dense.png, test clips under their captions, in its folder. What it leaves
captions any film (tubelet caption) and any data set (tubelet curate recaption).

Attributes and events are read from the captions by the world's own grammar and held against the scene, on test seeds and on
held-out compositions; beside them stands what the captions of other clips would score. Patches are of 16 pixels, which makes
frames a quarter as long as patches of 8 and leaves time for three times as many clips.
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

from tubelet.core.files import whole_file, write_json
from tubelet.core.log import note
from tubelet.curate.captioners import save_captioner, write
from tubelet.data.stream import TensorSource
from tubelet.evaluate.report import world_of
from tubelet.media.sheet import contact_sheet, save_sheet
from tubelet.models.coca import CoCa, CoCaConfig
from tubelet.recipes.lineage import Figures, markdown, plain
from tubelet.recipes.worlds import Job, in_memory
from tubelet.runtime.cpu import use_fast_attention
from tubelet.text.bpe import Tokenizer
from tubelet.text.bpe import train as train_tokenizer
from tubelet.text.writing import STYLES, Writing
from tubelet.train.captioning import CaptionObjective
from tubelet.train.loop import TrainConfig, train
from tubelet.train.optim import OptimizerConfig
from tubelet.worlds import WORLDS
from tubelet.worlds.constants import KINDS, TEST_SEEDS
from tubelet.worlds.grammar import parse

SIZE, FRAMES, FPS = 64, 9, 4.0
"""Clips of two seconds, as the denoiser's, at half their rate."""
TRAIN_SEED = 2_050_000_000
"""First seed of the training clips, among the worlds' training seeds."""
CHANCE = "/chance"
COLUMNS = tuple((facet, facet, plain(3)) for facet in ("colour", "shape", "size", "direction", "event"))


class Captioned:
    """A source of clips with a caption of one style each, drawn anew."""

    def __init__(self, inner: TensorSource, captions: Sequence[Sequence[Mapping[str, str]]]) -> None:
        self.inner, self.captions = inner, captions

    def draw(self, count: int) -> dict[str, Any]:
        batch = self.inner.draw(count)
        # Styles in turn, so that every batch has both.
        styles = [STYLES[place % len(STYLES)] for place in range(count)]
        texts = [
            next(one["text"] for one in self.captions[index] if one["kind"] == style)
            for index, style in zip(batch["index"].tolist(), styles, strict=True)
        ]
        return {**batch, "caption": texts, "style": styles}

    def state(self) -> dict[str, Any]:
        return self.inner.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        self.inner.restore(state)


@dataclass(frozen=True)
class Captioner:
    """The network, the clips and the training."""

    coca: CoCaConfig = field(
        default_factory=lambda: CoCaConfig(
            width=192, heads=6, image_depth=2, image_hidden=512, text_depth=2, text_hidden=512, image=SIZE, patch=16,
            queries=48, frames=FRAMES, video_depth=2, vocab=1027,
        )
    )  # fmt: skip
    clips: int = 24_000
    n: int = 270
    """Test clips of each split."""
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=3400,
            batch=64,
            warmup=60,
            optimizer=OptimizerConfig(learning_rate=3e-3, learning_rate_adamw=2e-3),
            compile=True,
            checkpoint_minutes=4.0,
        )
    )
    workers: int = 2

    def run(self, folder: Path) -> Path:
        """Render, train, caption the test clips; returns the table's file."""
        use_fast_attention()
        video, captions = self._clips("train", self.clips)
        path = folder / "tokenizer.json"
        if not path.exists():
            some = [one["text"] for several in captions[:6000] for one in several]
            train_tokenizer(some, self.coca.vocab - len(STYLES) - 1).save(path)
        writing = Writing(Tokenizer.load(path))
        torch.manual_seed(self.train.seed)
        model = CoCa(self.coca)
        source = Captioned(TensorSource({"video": video}, None, seed=self.train.seed), captions)
        result = train(model, CaptionObjective(writing), source, self.train, folder / "train")
        if not result.finished:
            return folder
        average = result.ema
        assert isinstance(average, CoCa)
        save_captioner(folder, average, writing, FRAMES, FPS)
        table: dict[str, Figures] = {}
        for split, title in (("in", "test seeds"), ("held_out", "held-out compositions")):
            clips, _ = self._clips(split, self.n)
            scenes = [self._scene(split, place) for place in range(self.n)]
            for style in STYLES:
                texts = write(average, writing, clips.numpy(), style)
                figures = score(texts, scenes)
                table[f"{style}, {title}"] = {name: value for name, value in figures.items() if not name.endswith(CHANCE)}
                table[f"{style}, {title}, of other clips"] = {
                    name.removesuffix(CHANCE): value for name, value in figures.items() if name.endswith(CHANCE)
                }
                if split == "in":
                    rows = [np.asarray(clip) for clip in clips[:12]]
                    save_sheet(contact_sheet(rows, texts[:12]), folder / f"{style}.png")
        write_json(folder / "table.json", table)
        with whole_file(folder / "table.md") as temporary:
            temporary.write_text(markdown(table, COLUMNS), encoding="utf-8")
        note(markdown(table, COLUMNS))
        return folder / "table.md"

    def _job(self, split: str, place: int) -> Job:
        kind = KINDS[place % len(KINDS)]
        seed = TRAIN_SEED + place if split == "train" else TEST_SEEDS[place]
        rule = "held_out" if split == "held_out" else "train"
        return Job(world_of(kind), seed, (SIZE, SIZE), FRAMES, FPS, kind, rule)

    def _scene(self, split: str, place: int) -> Mapping[str, Any]:
        job = self._job(split, place)
        episode = WORLDS[job.world].sample(job.seed, *job.size, job.frames, job.fps, kind=job.kind, split=job.split)
        return episode.tags["scene"]

    def _clips(self, split: str, count: int) -> tuple[Tensor, list[list[dict[str, str]]]]:
        return in_memory([self._job(split, place) for place in range(count)], self.workers, split)


def score(texts: Sequence[str], scenes: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Share of what a scene names that its caption says: `colour`, `shape`, `size`, `direction`, `event`; and `/chance`, the
    captions of other clips of the list."""
    out: dict[str, float] = {}
    others = np.random.RandomState(0).permutation(len(texts))
    for suffix, order in (("", range(len(texts))), (CHANCE, others)):
        found: dict[str, list[bool]] = defaultdict(list)
        for place, scene in zip(order, scenes, strict=True):
            said = parse(texts[place])
            found["event"].append(said.get("kind") == scene.get("kind"))
            if "direction" in scene:
                found["direction"].append(said.get("direction") == scene["direction"])
            things, named = list(scene.get("objects", [])), list(said.get("objects", []))
            for facet, key in (("colour", "color"), ("shape", "shape"), ("size", "size")):
                if things and key in things[0]:
                    pairs = zip(named, things, strict=False)
                    found[facet].append(len(named) >= len(things) and all(n.get(key) == t.get(key) for n, t in pairs))
        out |= {f"{name}{suffix}": float(np.mean(values)) for name, values in found.items()}
    return out


def recipe() -> Captioner:
    """The captioner."""
    return Captioner()
