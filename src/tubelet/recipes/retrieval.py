"""retrieval: a CLIP of clips and captions, asked to find the one among 256.

Paper: CLIP (Radford et al. 2021), section 2.3; frames are pooled by a learned query.
Command: tubelet train retrieval
Cost: half an hour on one core beside another training.
Score: R@1 of 256 .938 text to clip and .945 clip to text, held-out compositions .895 and .867. A run leaves table.json,
table.md and found.png, captions with the clip that each finds, in its folder.

Sets of 256 test clips whose captions all differ, of the training distribution and of held-out compositions. Where the wrong
clip or caption is found, `confused/FACET` says in which share of the mistakes that facet differs from what was asked for.

A set of 256 has several clips that differ in one word, so a batch must have them too: 128 clips a step, and many steps rather
than fine patches. The text tower can be lent to a denoiser (`tubelet train text-encoders`), hence the share of human captions.
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

from tubelet.core.config import from_file, to_dict
from tubelet.core.errors import UserError
from tubelet.core.files import whole_file, write_json
from tubelet.core.log import note
from tubelet.core.weights import load_module, save_module
from tubelet.data.stream import TensorSource
from tubelet.evaluate.report import world_of
from tubelet.media.sheet import contact_sheet, save_sheet
from tubelet.models.clip import CLIP, CLIPConfig
from tubelet.recipes.lineage import Figures, markdown, plain
from tubelet.recipes.worlds import Job, in_memory
from tubelet.runtime.cpu import use_fast_attention
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
CAPTIONS = {"short": 0.8, "human": 0.2}
"""In which proportions the kinds of captions are read."""
WAYS, RANKS = ("text_to_clip", "clip_to_text"), (1, 5)
FACETS = {
    "event": "kind", "direction": "direction", "speed": "speed", "place": "place", "count": "count", "gravity": "moon"
}  # fmt: skip
"""Facet -> its name in a scene; colours, shapes and sizes are those of its things."""
COLUMNS = (
    *((f"{way.replace('_', ' ')}, R@{k}", f"{way}/R@{k}", plain(3)) for way in WAYS for k in RANKS),
    *((f"{facet} confused", f"confused/{facet}", plain()) for facet in (*FACETS, "colour", "shape", "size")),
)


@dataclass(frozen=True)
class Retrieval:
    """The network, the clips and the training."""

    clip: CLIPConfig = field(
        default_factory=lambda: CLIPConfig(
            embed=192, image=SIZE, patch=16, image_width=192, image_depth=4, vocab=1025, context=48, text_width=192,
            text_depth=3, video="attention",
        )
    )  # fmt: skip
    clips: int = 24_000
    n: int = 256
    """Clips of a test set, each to be found among all of them."""
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=1500,
            batch=128,
            warmup=60,
            optimizer=OptimizerConfig(learning_rate=3e-3, learning_rate_adamw=2e-3),
            compile=True,
            checkpoint_minutes=4.0,
        )
    )
    workers: int = 2

    def run(self, folder: Path) -> Path:
        """Render, train, search; returns the table's file."""
        use_fast_attention()
        jobs = [_job("train", place) for place in range(self.clips)]
        video, captions = in_memory(jobs, self.workers, "train")
        path = folder / "tokenizer.json"
        if not path.exists():
            texts = [one["text"] for several in captions[:6000] for one in several]
            train_tokenizer(texts, self.clip.vocab - 1).save(path)
        tokenizer = Tokenizer.load(path)
        torch.manual_seed(self.train.seed)
        source = TensorSource({"video": video}, captions, seed=self.train.seed, proportions=CAPTIONS)
        result = train(CLIP(self.clip), ContrastObjective(tokenizer), source, self.train, folder / "train")
        if not result.finished:
            return folder
        model = result.ema
        assert isinstance(model, CLIP)
        save_module(folder / "clip.safetensors", model)
        write_json(folder / "clip.json", to_dict(model.config))
        table: dict[str, Figures] = {}
        for split, name in (("in", "test seeds"), ("held_out", "held-out compositions")):
            tests = distinct(split, self.n)
            clips, said = in_memory(tests, self.workers, split)
            texts = [several[0]["text"] for several in said]
            cosines = similarities(model, tokenizer, clips, texts)
            table[name] = found(cosines, [_scene(job) for job in tests])
            if split == "in":
                save_sheet(sheet(cosines, clips, texts), folder / "found.png")
        table["chance"] = {f"{way}/R@{k}": k / self.n for way in WAYS for k in RANKS}
        write_json(folder / "table.json", table)
        with whole_file(folder / "table.md") as temporary:
            temporary.write_text(markdown(table, COLUMNS), encoding="utf-8")
        note(markdown(table, COLUMNS))
        return folder / "table.md"


def load_clip(folder: str | Path) -> tuple[CLIP, Tokenizer]:
    """The trained CLIP of a run and the tokenizer of its words. Raises UserError when the folder holds no finished run."""
    folder = Path(folder)
    if not (folder / "clip.json").exists():
        raise UserError(f"{folder} holds no finished run of retrieval; tubelet train retrieval makes one in runs/retrieval")
    model = CLIP(from_file(CLIPConfig, folder / "clip.json"))
    load_module(folder / "clip.safetensors", model)
    return model.eval(), Tokenizer.load(folder / "tokenizer.json")


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


def found(cosines: Tensor, scenes: Sequence[Mapping[str, Any]]) -> Figures:
    """R@1 and R@5 of both directions of `(B, B)` cosines whose clip i belongs with text i, and what mistakes get wrong."""
    own = torch.arange(len(cosines))
    out: Figures = {}
    wrong: dict[str, list[bool]] = defaultdict(list)
    for name, table in zip(WAYS, (cosines.T, cosines), strict=True):
        order = table.argsort(dim=1, descending=True)
        for k in RANKS:
            out[f"{name}/R@{k}"] = float((order[:, :k] == own[:, None]).any(1).float().mean())
        for asked, got in zip(own.tolist(), order[:, 0].tolist(), strict=True):
            if asked != got:
                for facet, differs in _differences(scenes[asked], scenes[got]).items():
                    wrong[facet].append(differs)
    return out | {f"confused/{facet}": float(np.mean(values)) for facet, values in wrong.items()}


def sheet(cosines: Tensor, clips: Tensor, texts: Sequence[str], rows: int = 12) -> np.ndarray:
    """The first `rows` texts, each above the clip that it finds; where that is another's, the caption of that one, too."""
    nearest = cosines.argmax(0)[:rows].tolist()
    titles = [texts[asked] if i == asked else f"{texts[asked]} Found: {texts[i]}" for asked, i in enumerate(nearest)]
    return contact_sheet([clips[i].numpy() for i in nearest], titles)


def _differences(asked: Mapping[str, Any], got: Mapping[str, Any]) -> dict[str, bool]:
    """Facet -> whether two scenes differ in it."""
    out = {facet: asked.get(key) != got.get(key) for facet, key in FACETS.items()}
    things = [list(scene.get("objects") or scene.get("strokes") or []) for scene in (asked, got)]
    for facet, key in (("colour", "color"), ("shape", "shape"), ("size", "size")):
        out[facet] = [one.get(key) for one in things[0]] != [one.get(key) for one in things[1]]
    return out


def recipe() -> Retrieval:
    """The search."""
    return Retrieval()
