"""recaptioning: what do captions matter? One small denoiser, trained on five blends of bad captions and of a captioner's.

Paper: DALL-E 3 (Betker et al. 2023), sections 2 and 3: captions written by a captioner, and a few original ones among them.
Command: tubelet train recaptioning
Cost: 65 minutes on one core beside another training (captions 18, nine a row at 800 steps), after captioner.
Score: all facets of expanded prompts .02 / .27 / .34 / .44 / .44 as the share rises, of short ones .12 / .22 / .16 / .10 /
.09: docs/lineage.md. A run leaves table.json, table.md, captions.json and sheet.png in its folder.

On one run's latents the worlds' own captions are made as bad as the web's (curate.degrade), and a captioner writes dense ones
of what it sees of each clip. The trainings differ in the share of its captions alone, chosen anew at each draw. Each is asked
with short prompts and with the same prompts expanded to dense ones: a model that has read long captions wants long prompts.
captions.json says how much of a scene either kind of caption names rightly. Clips have one object and every second frame.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from tubelet.core.config import to_dict
from tubelet.core.errors import UserError
from tubelet.core.files import write_json
from tubelet.core.types import Video
from tubelet.curate.captioners import CoCaCaptioner, load_captioner
from tubelet.curate.degrade import KIND, Rates, alt_text
from tubelet.curate.recaption import Caption, add_captions, captions_of
from tubelet.data.schema import Record
from tubelet.data.shards import SEAL, ShardDataset
from tubelet.data.stream import TensorSource, names_of
from tubelet.evaluate.caption import FACETS
from tubelet.evaluate.report import make_cases
from tubelet.evaluate.tasks import MOVING
from tubelet.generate.engine import Sampling
from tubelet.models.spacetime import Spacetime, SpacetimeConfig
from tubelet.recipes.captioner import score
from tubelet.recipes.lent import Lent, borrow, check_kinds, latents, thinned
from tubelet.recipes.lineage import Row, compare, device_of, film_denoiser, film_figures, plain, truth_rows
from tubelet.text import TOKENIZER_FILE
from tubelet.text.bpe import Tokenizer
from tubelet.text.bpe import train as train_tokenizer
from tubelet.text.expand import RuleExpander
from tubelet.text.own import OwnTextConfig, OwnTextEncoder
from tubelet.train.loop import TrainConfig
from tubelet.train.optim import OptimizerConfig
from tubelet.worlds.expand import compose_dense, parse_scene
from tubelet.worlds.grammar import parse

SOURCE = "captioner"
"""What the captioner's captions are called, whichever it is."""
ASKED = ("short", "expanded")
"""Ways of asking."""
OTHERS = 1_000_000
"""Test seeds from here on are truth that no prompt is made of."""


@dataclass(frozen=True)
class Recaptioning:
    """What all trainings share, and the blends in which they differ. Raises UserError when the blends cannot be."""

    GIVEN: ClassVar = ("denoiser.in_channels", "denoiser.text_width")

    whole: str = "worlds-64"
    """A system, or the folder of a finished run of worlds-64, whose latents and codec are used."""
    captioner: str = "runs/captioner"
    """The folder of a trained captioner; `world` takes the worlds' own dense captions, as one without mistakes would write."""
    blends: tuple[float, ...] = (0.0, 0.65, 0.8, 0.95, 1.0)
    """Shares of the captioner's captions, in whole hundredths. They may change in a folder."""
    kinds: tuple[str, ...] = MOVING
    every: int = 2
    """Every so many frames of a clip are its film."""
    clips: int = 12_000
    """The first so many clips of the run; those of other kinds are left out."""
    rates: Rates = field(default_factory=Rates)
    words: OwnTextConfig = field(default_factory=OwnTextConfig)
    denoiser: SpacetimeConfig = field(
        default_factory=lambda: SpacetimeConfig(width=192, depth=6, heads=3, in_channels=8, patch=(1, 2, 2))
    )
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=800,
            batch=32,
            warmup=60,
            optimizer=OptimizerConfig(learning_rate=4.5e-3, learning_rate_adamw=2e-3),
            compile=True,
            checkpoint_minutes=4.0,
        )
    )
    sampling: Sampling = field(default_factory=lambda: Sampling(guidance=2.5, shift=2.0))
    n: int = 128
    """Prompts, each asked both ways."""

    def __post_init__(self) -> None:
        shares = all(0.0 <= share <= 1.0 for share in self.blends)
        if not self.blends or not shares or len({round(100 * share) for share in self.blends}) < len(self.blends):
            raise UserError(f"blends are different shares in [0, 1], got {list(self.blends)}; correct them")
        if self.clips < 1 or self.n < 1:
            raise UserError(f"clips and n must be at least 1, got {self.clips} and {self.n}; raise them")
        check_kinds(self.kinds)

    def run(self, folder: Path) -> Path:
        """Captions, every training, and the table; returns the table's file.

        Raises UserError without the run or the captioner, and when `folder` was begun with other settings.
        """
        lent = borrow(self.whole, folder, device_of(self.train))
        frames, seen = thinned(lent, self.every)
        written = self.captioner == "world" or (folder / "latents" / SEAL).exists()
        captioner = None if written else load_captioner(self.captioner)
        short = make_cases(self.kinds, self.n, **seen)
        expand = RuleExpander(parse_scene, compose_dense).expand
        cases = {"short": short, "expanded": [replace(case, text=expand(case.text).text) for case in short]}
        others = make_cases(self.kinds, self.n, **seen, seed=OTHERS)

        @functools.cache
        def clips() -> TensorSource:
            self.caption(folder, lent, captioner)
            both = {self.written: 0.5, KIND: 0.5}
            return latents(lent, self.kinds, frames, both, foreground=True, folder=folder / "latents")(self.train.seed)

        def trained(share: float, place: Path) -> Row | None:
            every = clips()
            blend = {self.written: share, KIND: 1.0 - share}
            source = TensorSource(every.tensors, every.captions, seed=self.train.seed, proportions=blend)
            torch.manual_seed(self.train.seed)  # the initial weights
            text = OwnTextEncoder(self.words, self.tokenizer(folder, source))
            network = Spacetime(replace(self.denoiser, in_channels=lent.codec.channels, text_width=text.width))
            result = film_denoiser(place, text, network, lent, source, self.train)
            if result is None:
                return None
            engine, cost = result
            made, shown = film_figures(engine, cases, lent, self.sampling, FACETS)
            return Row(made | cost, shown)

        rows: dict[str, Callable[[Path], Row | None]] = {
            name_of(share): functools.partial(trained, share) for share in self.blends
        }
        truth = truth_rows(lent, cases, others, FACETS)
        columns = (
            *((f"{facet}, {asked}", f"{facet}/{asked}", plain()) for asked in ASKED for facet in (*FACETS, "all")),
            ("training, s", "train_seconds", plain(0)),
        )
        return compare(folder, replace(self, blends=(0.0,)), {**rows, **truth}, columns, (*rows, *truth))

    @property
    def written(self) -> str:
        """What the captioner's captions go by in proportions."""
        return "dense" if self.captioner == "world" else f"dense@{SOURCE}"

    def tokenizer(self, folder: Path, source: TensorSource) -> Tokenizer:
        """One for all trainings, learned from the captions of both kinds."""
        path = folder / TOKENIZER_FILE
        if not path.exists():
            texts = (one["text"] for several in source.captions or () for one in several)
            train_tokenizer(itertools.islice(texts, 16_000), self.words.vocab_size).save(path)
        return Tokenizer.load(path)

    def caption(self, folder: Path, lent: Lent, captioner: CoCaCaptioner | None) -> None:
        """The run's latents with degraded captions and the captioner's beside their own, once; and what either are worth."""
        if not (folder / "latents" / SEAL).exists():

            @torch.no_grad()
            def look(record: Record) -> np.ndarray:
                latent = record.tensors["latent"][None].float().to(lent.device)  # (1, C, T', h, w)
                return Video(lent.codec.decode(latent), 1.0).to_uint8()[0]

            def write(records: Sequence[Record]) -> list[list[Caption]]:
                wanted = [] if captioner is None else [record for record in records if kind_of(record) in self.kinds]
                said = captions_of(captioner, wanted, look, SOURCE, ("dense",)) if captioner and wanted else []
                more = {record.key: captions for record, captions in zip(wanted, said, strict=True)}
                return [[alt_text(record, self.rates), *more.get(record.key, [])] for record in records]

            who = {"captioner": "world"} if captioner is None else captioner.identity
            settings = {**who, "rates": to_dict(self.rates), "kinds": list(self.kinds)}
            add_captions(ShardDataset(lent.folder / "latents"), folder / "latents", write, settings, count=self.clips)
        if not (folder / "captions.json").exists():
            write_json(folder / "captions.json", worth(ShardDataset(folder / "latents"), (KIND, self.written)))


def name_of(share: float) -> str:
    """A blend's folder and row."""
    return f"recaptioned-{round(100 * share):03d}" if share else "degraded"


def kind_of(record: Record) -> str | None:
    """What happens in a clip of the worlds, by its own short caption."""
    return parse(next(one["text"] for one in record.meta["captions"] if one["kind"] == "short")).get("kind")


def worth(dataset: ShardDataset, kinds: Sequence[str], most: int = 2000) -> dict[str, float]:
    """`KIND/FACET`: how often a caption of a kind names that of its scene rightly; `KIND/words`: its length.

    Over the first `most` records that have all kinds; their scenes are read from the world's own short captions.
    """
    every = (dataset.facts(index)["captions"] for index in range(len(dataset)))
    whole = (several for several in every if set(kinds) <= {name for one in several for name in names_of(one)})
    captions = list(itertools.islice(whole, most))
    scenes = [parse(next(one["text"] for one in several if one["kind"] == "short")) for several in captions]
    out: dict[str, float] = {}
    for kind in kinds:
        texts = [next(one["text"] for one in several if kind in names_of(one)) for several in captions]
        out |= {f"{kind}/{name}": value for name, value in score(texts, scenes).items()}
        out[f"{kind}/words"] = float(np.mean([len(text.split()) for text in texts]))
    return out


def recipe() -> Recaptioning:
    """The experiment."""
    return Recaptioning()
