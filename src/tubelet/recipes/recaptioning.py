"""recaptioning: what do captions matter? One denoiser, trained on five blends of bad captions and of a captioner's.

Paper: DALL-E 3 (Betker et al. 2023), sections 2 and 3: captions written by a captioner, and a few original ones among them.
Command: tubelet train recaptioning
Cost: not measured, it has not been run yet; five trainings of an eighth of worlds-64 each, after worlds-64 and captioner.
Score: none yet; a run leaves table.json, table.md, captions.json and recaptioning.png in its folder.

On one run's latents the worlds' own captions are made as bad as the web's (curate.degrade), and a captioner writes dense ones
of what it sees of each clip. The trainings differ in the share of its captions alone, chosen anew at each draw. Each is asked
with short prompts and with the same prompts expanded to dense ones: a model that has read long captions wants long prompts.
captions.json says how much of a scene either kind of caption names rightly.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from tubelet.core.config import from_dict, to_dict
from tubelet.core.errors import UserError
from tubelet.core.files import read_json, whole_file, write_json
from tubelet.core.log import note
from tubelet.core.types import Video
from tubelet.curate.captioners import CoCaCaptioner, load_captioner
from tubelet.curate.degrade import KIND, Rates, alt_text
from tubelet.curate.recaption import Caption, add_captions, captions_of
from tubelet.data.schema import Record
from tubelet.data.shards import SEAL, ShardDataset
from tubelet.data.stream import names_of
from tubelet.evaluate.caption import FACETS
from tubelet.evaluate.report import Case, evaluate_clips, make_cases
from tubelet.generate.system import System, load
from tubelet.media.sheet import contact_sheet, save_sheet
from tubelet.recipes.captioner import score
from tubelet.recipes.worlds import PROMPTS, WorldsRecipe
from tubelet.runtime.device import choose_device
from tubelet.text.expand import RuleExpander
from tubelet.train.loop import TrainConfig
from tubelet.train.optim import OptimizerConfig
from tubelet.worlds.constants import KINDS
from tubelet.worlds.expand import compose_dense, parse_scene
from tubelet.worlds.grammar import parse

SOURCE = "captioner"
"""What the captioner's captions are called, whichever it is."""
ASKED = {"short": None, "expanded": RuleExpander(parse_scene, compose_dense)}
"""Ways of asking, and what rewrites the prompts."""


@dataclass(frozen=True)
class Recaptioning:
    """What all trainings share, and the blends in which they differ. Raises UserError when the blends cannot be."""

    whole: str = "runs/worlds-64"
    """The folder of a finished run on the worlds, whose latents, codec and networks are used."""
    captioner: str = "runs/captioner"
    """The folder of a trained captioner; `world` takes the worlds' own dense captions, as one without mistakes would write."""
    start: str | None = None
    """A system to go on from, of the same codec and networks; without one the denoiser begins anew."""
    blends: tuple[float, ...] = (0.0, 0.65, 0.8, 0.95, 1.0)
    """Shares of the captioner's captions, in whole hundredths."""
    clips: int = 12_000
    """The first so many clips of the run."""
    rates: Rates = field(default_factory=Rates)
    sketch: TrainConfig | None = field(
        default_factory=lambda: TrainConfig(
            steps=325,
            batch=64,
            warmup=30,
            end=0.5,
            optimizer=OptimizerConfig(learning_rate=4.5e-3, learning_rate_adamw=2e-3),
            compile=True,
            checkpoint_minutes=4.0,
        )
    )
    denoise: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=375,
            batch=24,
            warmup=10,
            optimizer=OptimizerConfig(learning_rate=2.25e-3, learning_rate_adamw=1e-3),
            compile=True,
            checkpoint_minutes=4.0,
        )
    )
    n: int = 54
    """Prompts, each asked both ways."""

    def __post_init__(self) -> None:
        shares = all(0.0 <= share <= 1.0 for share in self.blends)
        if not self.blends or not shares or len({round(100 * share) for share in self.blends}) < len(self.blends):
            raise UserError(f"blends are different shares in [0, 1], got {list(self.blends)}; correct them")
        if self.clips < 1 or self.n < 1:
            raise UserError(f"clips and n must be at least 1, got {self.clips} and {self.n}; raise them")

    def run(self, folder: Path) -> Path:
        """Captions, every training, and the table; returns the table's file.

        Raises UserError without the run or the captioner, and when `folder` was begun with other settings.
        """
        whole = Path(self.whole)
        if not (whole / "export.json").exists():
            raise UserError(f"{whole} holds no finished run on the worlds; run tubelet train worlds-64 first, or set whole")
        base = from_dict(WorldsRecipe, read_json(whole / "recipe.json"))
        recipes = {name_of(share): self.recipe(base, share) for share in self.blends}
        captioned = self.captioner == "world" or (folder / "latents" / SEAL).exists()
        captioner = None if captioned else load_captioner(self.captioner)
        self._check_start(whole, base)
        self._claim(folder)
        self.caption(folder, whole, base, captioner)
        places: dict[str, Path] = {}
        results: dict[str, dict[str, float]] = {}
        for name, recipe in recipes.items():
            place = folder / name
            self._share(folder, whole, place)
            places[name] = recipe.run(place)
            if not (places[name] / "system.json").exists():
                return folder
            done = place / "figures.json"
            if not done.exists():
                write_json(done, measure(load(places[name]), self.n))
            results[name] = read_json(done)
        config = base.clips
        cases = make_cases(KINDS, self.n, size=config.size, frames=config.frames, fps=config.fps)
        results["truth"] = {
            name: value for asked in ASKED for name, value in following([case.truth for case in cases], cases, asked).items()
        }
        rows, texts = [], []
        for prompt in PROMPTS[:3]:
            for name, system in places.items():
                rows.append(load(system).generate(prompt, seed=0).video.to_uint8()[0])
                texts.append(f"{name}: {prompt}")
        save_sheet(contact_sheet(rows, texts), folder / "recaptioning.png")
        write_json(folder / "table.json", results)
        with whole_file(folder / "table.md") as temporary:
            temporary.write_text(markdown(results), encoding="utf-8")
        note(markdown(results))
        return folder / "table.md"

    def recipe(self, base: WorldsRecipe, share: float) -> WorldsRecipe:
        """The training on one blend."""
        return replace(
            base,
            name=name_of(share),
            start=self.start,
            sketch=self.sketch,
            denoise=self.denoise,
            decoder_train=None,
            captions={self.written: share, KIND: 1.0 - share},
        )

    @property
    def written(self) -> str:
        """What the captioner's captions go by in proportions."""
        return "dense" if self.captioner == "world" else f"dense@{SOURCE}"

    def caption(self, folder: Path, whole: Path, base: WorldsRecipe, captioner: CoCaCaptioner | None) -> None:
        """The run's latents with degraded captions and the captioner's beside their own, once; and what either are worth."""
        if not (folder / "latents" / SEAL).exists():
            codec = base.load_codec(whole).to(choose_device("auto"))

            @torch.no_grad()
            def look(record: Record) -> np.ndarray:
                latent = record.tensors["latent"][None].float().to(codec.mean.device)  # (1, C, T', h, w)
                return Video(codec.decode(latent), 1.0).to_uint8()[0]

            def write(records: Sequence[Record]) -> list[list[Caption]]:
                said = [[] for _ in records] if captioner is None else captions_of(captioner, records, look, SOURCE, ("dense",))
                return [[alt_text(record, self.rates), *more] for record, more in zip(records, said, strict=True)]

            who = {"captioner": "world"} if captioner is None else captioner.identity
            settings = {**who, "rates": to_dict(self.rates)}
            add_captions(ShardDataset(whole / "latents"), folder / "latents", write, settings, count=self.clips)
        if not (folder / "captions.json").exists():
            write_json(folder / "captions.json", worth(ShardDataset(folder / "latents"), (KIND, self.written)))

    def _claim(self, folder: Path) -> None:
        """All trainings of a folder share their settings; only what is asked of them may change."""
        path = folder / "recipe.json"
        fixed = {name: value for name, value in to_dict(self).items() if name not in ("blends", "n")}
        if not path.exists():
            write_json(path, fixed)
        begun = read_json(path)
        changed = [name for name in fixed if begun.get(name) != fixed[name]]
        if changed:
            raise UserError(
                f"{folder} holds a run with other settings of {changed[0]!r}; use another --out, or the same settings"
            )

    def _check_start(self, whole: Path, base: WorldsRecipe) -> None:
        """Latents of one codec mean nothing to a denoiser of another."""
        if self.start is not None:
            ours, theirs = base.load_codec(whole), load(self.start, device="cpu", dtype="float32").codec
            if not (ours.channels == theirs.channels and torch.equal(ours.mean, theirs.mean)):
                raise UserError(f"{self.start} has another codec than {whole}; start from a system that was trained on it")

    def _share(self, folder: Path, whole: Path, place: Path) -> None:
        """The captioned latents, the codec and the tokenizer, and that they are done."""
        place.mkdir(parents=True, exist_ok=True)
        if not (place / "latents").exists():
            (place / "latents").symlink_to((folder / "latents").resolve())
        if self.start is None:
            codec = whole / "codec-polished.safetensors"
            shutil.copyfile(codec if codec.exists() else whole / "codec.safetensors", place / "codec.safetensors")
            if (whole / "tokenizer.json").exists():
                shutil.copyfile(whole / "tokenizer.json", place / "tokenizer.json")
        for stage in ("render", "train_codec", "encode"):
            write_json(place / f"{stage}.json", {stage: 0.0})


def name_of(share: float) -> str:
    """A blend's folder and row."""
    return f"recaptioned-{round(100 * share):03d}" if share else "degraded"


def worth(dataset: ShardDataset, kinds: Sequence[str], most: int = 2000) -> dict[str, float]:
    """`KIND/FACET`: how often a caption of a kind names that of its scene rightly; `KIND/words`: its length.

    Over the first `most` records; their scenes are read from the world's own short captions.
    """
    captions = [dataset.facts(index)["captions"] for index in range(min(most, len(dataset)))]
    scenes = [parse(next(one["text"] for one in several if one["kind"] == "short")) for several in captions]
    out: dict[str, float] = {}
    for kind in kinds:
        texts = [next(one["text"] for one in several if kind in names_of(one)) for several in captions]
        out |= {f"{kind}/{name}": value for name, value in score(texts, scenes).items()}
        out[f"{kind}/words"] = float(np.mean([len(text.split()) for text in texts]))
    return out


def measure(system: System, n: int, batch: int = 16) -> dict[str, float]:
    """`ASKED/FACET`: how films of `n` test prompts, asked both ways, follow their captions; `ASKED/all`: in every facet."""
    config = system.config
    cases = make_cases(KINDS, n, size=config.size, frames=config.frames, fps=config.fps)
    out: dict[str, float] = {}
    for asked, expander in ASKED.items():
        films: list[np.ndarray] = []
        for first in range(0, n, batch):
            part = cases[first : first + batch]
            seeds = list(range(first, first + len(part)))
            made = system.generate_batch([case.text for case in part], seeds, expander=expander)
            films += [clip.video.to_uint8()[0] for clip in made]
        out |= following(films, cases, asked)
    return out


def following(films: Sequence[np.ndarray], cases: Sequence[Case], asked: str) -> dict[str, float]:
    """How well uint8 clips `(T, H, W, 3)` follow the prompts of their cases."""
    figures = evaluate_clips(films, [case.wanted for case in cases], cases[0].fps)
    out = {f"{asked}/{facet}": figures[f"caption/{facet}"] for facet in FACETS if f"caption/{facet}" in figures}
    kinds = [kind for kind in KINDS if f"kind/{kind}" in figures]
    counts = [figures[f"kind/{kind}/n"] for kind in kinds]
    return out | {f"{asked}/all": float(np.average([figures[f"kind/{kind}"] for kind in kinds], weights=counts))}


def markdown(results: dict[str, dict[str, float]]) -> str:
    """The table as a page holds it: a row for each blend, and the truth's."""
    names = list(dict.fromkeys(name for figures in results.values() for name in figures))
    lines = ["| captions | " + " | ".join(name.replace("/", ": ") for name in names) + " |", "|---" * (len(names) + 1) + "|"]
    for row, figures in results.items():
        lines.append(f"| {row} | " + " | ".join(f"{figures.get(name, float('nan')):.2f}" for name in names) + " |")
    return "\n".join(lines) + "\n"


def recipe() -> Recaptioning:
    """The experiment."""
    return Recaptioning()
