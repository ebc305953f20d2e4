"""unclip: pictures by way of a CLIP embedding, with and without a prior, and whether the better of two draws is better.

Paper: DALL-E 2 (Ramesh et al. 2022), sections 2 to 5 and figures 3 to 6 and 8.
Command: tubelet train unclip
Cost: 47 minutes on one core beside much other work, and retrieval.
Score: without words colour .73 (caption's embedding), .91 (diffusion prior), .93 (best of two), .87 (autoregressive prior);
with words .95 to .97 in every row: docs/lineage.md. A run leaves table.json, table.md and sheet.png in its folder,
manipulations.json and manipulations.png.

Pictures are first frames of clips with one object. A small CLIP is trained on them and their captions, or that of a finished
run of retrieval is lent. One decoder, the U-Net of unet-or-dit that is told an embedding besides the words, serves all rows,
which differ in the embedding alone: none, the caption's own in an image's place, one draw or the better of two from a diffusion
prior, one from an autoregressive prior. "true embedding" is what a perfect prior would give, "another's embedding" that of the
next prompt's picture: what the decoder believes when words and embedding disagree. Columns "no words" show what the embedding
alone says; there the first row is told nothing and scores chance. In the paper (MS-COCO, small models) the decoder is best with
a prior, then without embedding, then with the caption's embedding: FID 7.99, 9.16, 16.55.

The diffusion prior is guided, the autoregressive one in a row of its own, which is trained once more with captions dropped; it
is sampled from the upper half of the dot products. "autoregressive prior" reads every caption and is not guided.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tubelet.core.errors import UserError
from tubelet.core.files import write_json
from tubelet.core.log import note
from tubelet.core.types import Condition, Video
from tubelet.data.stream import TensorSource
from tubelet.diffusion.guidance import guided
from tubelet.diffusion.objectives import denoiser
from tubelet.diffusion.paths import VPLinear
from tubelet.diffusion.solvers import SOLVERS
from tubelet.evaluate.distance import distances, features
from tubelet.evaluate.fidelity import psnr
from tubelet.evaluate.report import Case, make_cases
from tubelet.evaluate.tasks import MOVING
from tubelet.generate.engine import Engine, Sampling
from tubelet.generate.layouts import Chain
from tubelet.media.sheet import contact_sheet, save_sheet
from tubelet.models.clip import CLIP, CLIPConfig
from tubelet.models.glide import DecoderCondition, DecoderConfig
from tubelet.models.unclip import (
    AutoregressiveConfig,
    AutoregressivePrior,
    DiffusionPrior,
    PriorConfig,
    dot_level,
    fit_dots,
    invert,
    keep_better,
    text_difference,
)
from tubelet.models.unet import UNet, UNetConfig
from tubelet.nn.principal import PCA, Buckets, fit_buckets, fit_pca
from tubelet.nn.sphere import slerp
from tubelet.recipes.lent import Lent, borrow, check_kinds, latents
from tubelet.recipes.lineage import (
    Figures,
    Row,
    compare,
    device_of,
    encoded,
    engine_of,
    facet_figures,
    films,
    macs_of,
    millions,
    on_sheet,
    plain,
    truth_rows,
)
from tubelet.recipes.retrieval import Retrieval, load_clip
from tubelet.text.bpe import Tokenizer
from tubelet.text.bpe import train as train_tokenizer
from tubelet.train.classify import as_pixels
from tubelet.train.contrasting import ContrastObjective, read
from tubelet.train.loop import Objective, TrainConfig, train
from tubelet.train.optim import OptimizerConfig
from tubelet.train.optim import split as by_place
from tubelet.train.text_to_video import TextToVideo
from tubelet.train.unclip import (
    CodesObjective,
    Decoder,
    DecoderObjective,
    Prepared,
    PriorObjective,
    draw,
    draw_codes,
    ids_and_mask,
    told,
    wordless,
)
from tubelet.worlds.constants import COLORS

FACETS = ("colour", "shape", "size")
SPLITS = ("in", "held_out")
GUIDED = "autoregressive prior, guided"
ROWS = (
    "text alone",
    "caption's embedding",
    "diffusion prior",
    "diffusion prior, best of two",
    "autoregressive prior",
    GUIDED,
    "true embedding",
    "another's embedding",
)
OTHERS = 1_000_000
"""Test seeds from here on are truth that no prompt is made of."""
SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
"""How far pictures go towards another caption (figure 5)."""
MANIPULATED, ACROSS, SHOWN_ROWS = 64, 8, 3
"""Pictures that are manipulated, those in a row of the sheet, and rows of each kind."""
N = TypeVar("N", bound=nn.Module)


def _training(steps: int) -> TrainConfig:
    optimizer = OptimizerConfig(learning_rate=3e-3, learning_rate_adamw=1e-3)
    return TrainConfig(steps=steps, batch=128, warmup=60, optimizer=optimizer, checkpoint_minutes=4.0)


class Stopped(Exception):  # noqa: N818  not an error: someone asked for it
    """A training that others need was stopped before its end."""


@dataclass(frozen=True)
class UnCLIP:
    """Sizes, training and measures. Channels and the width of words are the run's, that of embeddings the CLIP's."""

    GIVEN: ClassVar = (
        "unet.channels",
        "unet.context",
        "unet.size",
        "unet.learn_sigma",
        "prior.embed",
        "prior.text_width",
        "codes.embed",
        "codes.vocab",
        "codes.context",
    )

    whole: str = "worlds-64"
    """A system, or the folder of a finished run of worlds-64."""
    retrieval: str = ""
    """The folder of a finished run of retrieval, whose CLIP is lent; empty: one is trained on the pictures."""
    rows: tuple[str, ...] = ROWS
    """Which are measured; what truth scores always stands beside them."""
    kinds: tuple[str, ...] = MOVING
    """Clips whose first frames are the pictures."""
    clip: CLIPConfig = field(default_factory=lambda: Retrieval().clip)
    unet: UNetConfig = field(
        default_factory=lambda: UNetConfig(
            width=48, multipliers=(1, 2, 2), blocks=1, attention=(0, 1), heads=4, context=256, channels=8, learn_sigma=True,
            dropout=0.0, groups=16, size=8,
        )
    )  # fmt: skip
    tokens: int = 4
    """States that an embedding adds to the words of the decoder."""
    prior: PriorConfig = field(default_factory=lambda: PriorConfig(192, 4, 3, context=64))
    codes: AutoregressiveConfig = field(
        default_factory=lambda: AutoregressiveConfig(
            width=192, depth=3, heads=3, text_width=128, text_depth=2, text_heads=2, components=24, buckets=64, dots=16,
        )
    )  # fmt: skip
    clip_train: TrainConfig = field(default_factory=lambda: _training(900))
    decoder_train: TrainConfig = field(default_factory=lambda: _training(1800))
    prior_train: TrainConfig = field(default_factory=lambda: _training(1000))
    codes_train: TrainConfig = field(default_factory=lambda: _training(700))
    sampling: Sampling = field(default_factory=lambda: Sampling(steps=50, guidance=2.0, solver="ddim"))
    prior_sampling: Sampling = field(default_factory=lambda: Sampling(steps=64, guidance=1.25, solver="ddim"))
    """As many steps as the paper's, of DDIM, and the guidance of its best score."""
    n: int = 128
    """Prompts of each split."""

    def run(self, folder: Path) -> Path:
        """Every row that is not yet measured, then the manipulations; returns the table's file.

        Raises UserError when nothing is lent.
        """
        check_kinds(self.kinds)
        if self.n < 2:
            raise UserError(f"another's embedding needs at least 2 prompts, got n={self.n}; raise it")
        clip = load_clip(self.retrieval) if self.retrieval else None
        lent = borrow(self.whole, folder, device_of(self.decoder_train))
        parts = _Parts(self, lent, folder, clip)
        cases = {split: make_cases(self.kinds, self.n, split, size=lent.size, frames=1) for split in SPLITS}
        others = make_cases(self.kinds, self.n, size=lent.size, frames=1, seed=OTHERS)

        def measured(name: str, _: Path) -> Row | None:
            try:
                return _measured(parts, name, cases)
            except Stopped:
                return None

        rows: dict[str, Callable[[Path], Row | None]] = {name: functools.partial(measured, name) for name in ROWS}
        truth = truth_rows(lent, cases, others, FACETS)
        columns = (
            *((f"{facet}, {split.replace('_', '-')}", f"{facet}/{split}", plain()) for split in SPLITS for facet in FACETS),
            *((f"{facet}, no words", f"{facet}/wordless", plain()) for facet in FACETS),
            ("Frechet", "frechet", plain(1)),
            ("KID", "kid", plain()),
            ("embedding's cosine", "cosine/in", plain()),
            ("held-out", "cosine/held_out", plain()),
            ("of its codes", "codes", plain()),
            ("picture's cosine", "picture", plain()),
            ("parameters", "parameters", millions),
            ("MACs", "macs", millions),
            ("of the prior", "prior/parameters", millions),
            ("s an embedding", "prior/seconds", plain(3)),
            ("s a picture", "seconds", plain(3)),
        )
        path = compare(folder, self, {**rows, **truth}, columns, (*self.rows, *truth))
        if path == folder:
            return folder
        try:
            _manipulated(parts, cases["in"][:MANIPULATED])
        except Stopped:
            return folder
        return path


# Networks and embeddings


@dataclass(frozen=True)
class Codes:
    """Image embeddings as rows of codes (section 2.2): principal components, their buckets, and levels of dot products."""

    pca: PCA
    buckets: Buckets
    edges: Tensor

    def read(self, image: Tensor) -> Tensor:
        """Embeddings `(B, E)` to codes `(B, K)`."""
        return self.buckets.quantise(self.pca.project(image))

    def write(self, codes: Tensor) -> Tensor:
        """Codes `(B, K)` to unit embeddings `(B, E)`."""
        return F.normalize(self.pca.restore(self.buckets.dequantise(codes)), dim=-1)


class _Parts:
    """What rows share, each made when it is first asked for: CLIP, embeddings, decoder, priors.

    Raises Stopped where a training was stopped.
    """

    def __init__(self, config: UnCLIP, lent: Lent, folder: Path, clip: tuple[CLIP, Tokenizer] | None) -> None:
        self.config, self.lent, self.folder, self.lent_clip = config, lent, folder, clip
        self.chain = Chain(VPLinear(), "eps", spacing="trailing")

    @functools.cached_property
    def pictures(self) -> tuple[Tensor, list[list[dict[str, str]]]]:
        """Latents `(n, C, 1, h, w)` of the run, and their captions."""
        source = latents(self.lent, self.config.kinds, [0])(0)
        assert source.captions is not None, "a run's clips have captions"
        return source.tensors["latent"], [[dict(one) for one in several] for several in source.captions]

    @property
    def texts(self) -> list[str]:
        return [several[0]["text"] for several in self.pictures[1]]

    def source(self, seed: int, **tensors: Tensor) -> TensorSource:
        """Batches of these tensors with the pictures' captions."""
        kept = {name: value.cpu() for name, value in tensors.items()}
        return TensorSource(kept, self.pictures[1], seed=seed, proportions={"short": 1.0})

    def _trained(self, name: str, model: N, objective: Objective, config: TrainConfig, **tensors: Tensor) -> N:
        """The average of a training in the folder `name` on these tensors and the pictures' captions."""
        source = self.source(config.seed, **tensors)
        with torch.enable_grad():  # it is asked for in the midst of measuring
            by = functools.partial(by_place, inside=("blocks", "text_blocks", "down", "middle", "up"))  # alike in all networks
            result = train(model, objective, source, config, self.folder / name, split=by)
        if not result.finished:
            raise Stopped
        average = result.ema.eval()
        assert isinstance(average, type(model)), "a copy of the model"
        return average

    @functools.cached_property
    def clip(self) -> tuple[CLIP, Tokenizer]:
        """The CLIP, lent or trained on the pictures."""
        if self.lent_clip is not None:
            model, tokenizer = self.lent_clip
            return model.to(self.lent.device), tokenizer
        config = self.config
        path = self.folder / "tokenizer.json"
        if not path.exists():
            train_tokenizer(self.texts, config.clip.vocab - 1).save(path)
        tokenizer = Tokenizer.load(path)
        torch.manual_seed(config.clip_train.seed)  # the initial weights
        model = CLIP(config.clip)
        video = torch.from_numpy(self.shown(self.pictures[0]))  # (n, 1, H, W, 3)
        return self._trained("clip", model, ContrastObjective(tokenizer), config.clip_train, video=video), tokenizer

    @torch.no_grad()
    def shown(self, z: Tensor, batch: int = 256) -> np.ndarray:
        """Latents `(n, C, 1, h, w)` as the codec shows them, uint8 `(n, 1, H, W, 3)`."""
        parts = [self.lent.codec.decode(part.float().to(self.lent.device)) for part in z.split(batch)]
        return Video(torch.cat(parts), self.lent.fps).to_uint8()

    @torch.no_grad()
    def of_pictures(self, pictures: np.ndarray, batch: int = 256) -> Tensor:
        """Unit embeddings `(n, E)` of uint8 pictures `(n, 1, H, W, 3)`."""
        clip, _ = self.clip
        parts = torch.from_numpy(pictures).split(batch)
        return torch.cat([clip.embed_image(as_pixels(part).to(self.lent.device)) for part in parts]).float()

    @torch.no_grad()
    def of_texts(self, texts: Sequence[str], batch: int = 256) -> Tensor:
        """Unit embeddings `(n, E)` of captions."""
        clip, tokenizer = self.clip
        ids = read(tokenizer, texts, clip.config.context).to(self.lent.device)  # (n, L)
        return torch.cat([clip.embed_text(part) for part in ids.split(batch)]).float()

    @functools.cached_property
    def embedded(self) -> dict[str, Tensor]:
        """Embeddings of all pictures and their captions, `image` and `text (n, E)`."""
        return {"image": self.of_pictures(self.shown(self.pictures[0])), "text": self.of_texts(self.texts)}

    @functools.cached_property
    def engine(self) -> Engine:
        """The engine of the decoder; it reads words, until they are replaced by what is `Prepared`."""
        config, lent = self.config, self.lent
        embed, seed = self.clip[0].config.embed, config.decoder_train.seed
        torch.manual_seed(seed)  # the initial weights
        sizes = {"channels": lent.codec.channels, "context": lent.text.width, "size": lent.cells[1], "learn_sigma": True}
        unet = UNet(replace(config.unet, **sizes))
        condition = DecoderCondition(DecoderConfig(embed, 4 * unet.config.width, lent.text.width, config.tokens))
        model = TextToVideo(lent.text, Decoder(unet, condition, self.chain.path))
        tensors = {"latent": self.pictures[0], "image": self.embedded["image"]}
        model = self._trained("decoder", model, DecoderObjective(), config.decoder_train, **tensors)
        return engine_of(lent, model, self.chain, unet.config.stride)

    @functools.cached_property
    def prior(self) -> DiffusionPrior:
        config, embed = self.config.prior_train, self.clip[0].config.embed
        torch.manual_seed(config.seed)  # the initial weights
        model = DiffusionPrior(replace(self.config.prior, embed=embed, text_width=self.lent.text.width))
        return self._trained("prior", model, PriorObjective(text=self.lent.text), config, **self.embedded)

    @functools.cached_property
    def codes(self) -> Codes:
        """How embeddings are told in codes, by those of all pictures."""
        image, text, config = self.embedded["image"], self.embedded["text"], self.config.codes
        pca = fit_pca(image, config.components)
        return Codes(pca, fit_buckets(pca.project(image), config.buckets), fit_dots(image, text, config.dots))

    @functools.cached_property
    def autoregressive(self) -> AutoregressivePrior:
        return self._autoregressive("codes", 0.0)

    @functools.cached_property
    def autoregressive_guided(self) -> AutoregressivePrior:
        return self._autoregressive("codes-guided", 0.1)

    def _autoregressive(self, name: str, text_drop: float) -> AutoregressivePrior:
        (clip, tokenizer), config = self.clip, self.config.codes_train
        torch.manual_seed(config.seed)  # the initial weights
        sizes = replace(self.config.codes, embed=clip.config.embed, vocab=clip.config.vocab, context=clip.config.context)
        image, text = self.embedded["image"], self.embedded["text"]
        tensors = {"codes": self.codes.read(image), "dot": dot_level(image, text, self.codes.edges), "text": text}
        objective = CodesObjective(tokenizer=tokenizer, text_drop=text_drop)
        return self._trained(name, AutoregressivePrior(sizes), objective, config, **tensors)

    @torch.no_grad()
    def imagined(self, name: str, texts: Sequence[str], truth: Tensor) -> tuple[Tensor, Figures]:
        """The embeddings `(n, E)` that a row gives the decoder, and what a prior that has made them has cost.

        `truth (n, E)` are those of the true pictures.
        """
        given = {"text alone": torch.zeros_like(truth), "true embedding": truth, "another's embedding": truth.roll(1, 0)}
        if name in given:
            return given[name], {}
        text, rngs = self.of_texts(texts), [torch.Generator().manual_seed(number) for number in range(len(texts))]
        if name == "caption's embedding":
            return text, {}
        if name.startswith("autoregressive prior"):
            prior = self.autoregressive_guided if name == GUIDED else self.autoregressive
        else:
            prior = self.prior
        begun = time.perf_counter()
        if isinstance(prior, AutoregressivePrior):
            ids, mask = (x.to(text.device) for x in ids_and_mask(self.clip[1], texts, prior.config.context))
            guidance = self.config.prior_sampling.guidance if name == GUIDED else 1.0
            image = self.codes.write(draw_codes(prior, ids, mask, text, rngs, guidance=guidance))  # (n, E)
        else:
            words, draws = self.lent.text.encode(texts), 2 if name.endswith("best of two") else 1
            several = [draw(prior, text, words, self.config.prior_sampling, rngs) for _ in range(draws)]
            image = keep_better(torch.stack(several, dim=1), text)  # (n, E)
        seconds = (time.perf_counter() - begun) / len(texts)
        return image, {"prior/parameters": float(sum(p.numel() for p in prior.parameters())), "prior/seconds": seconds}


# Rows


def _measured(parts: _Parts, name: str, cases: dict[str, list[Case]]) -> Row:
    """One row: facets of all splits and, without words, of the first; its distances; cosines with the truth."""
    lent, sampling = parts.lent, parts.config.sampling
    figures: Figures = {}
    shown: np.ndarray | None = None
    for split, several in cases.items():
        texts = [case.text for case in several]
        truth = parts.of_pictures(parts.shown(encoded(lent, several)))  # (n, E)
        image, cost = parts.imagined(name, texts, truth)
        figures |= cost
        if image.any():
            figures[f"cosine/{split}"] = float((image * truth).sum(-1).mean())
        words = lent.text.encode(texts)
        numbered = [replace(case, text=str(number)) for number, case in enumerate(several)]
        made, seconds = films(_telling(parts, image, words), numbered, lent.size, sampling)
        figures |= facet_figures(list(made), several, FACETS, split)
        if shown is None:
            shown = on_sheet(made)
            figures["parameters"] = float(sum(p.numel() for p in parts.engine.denoiser.parameters()))
            figures["macs"] = _macs(parts, image[:1], words[0:1])
            figures["picture"] = float((parts.of_pictures(made) * truth).sum(-1).mean())
            true = np.stack([case.truth for case in several])
            figures |= {**distances(features(true), features(made)), "seconds": seconds}
            unspoken, _ = films(_telling(parts, image, wordless(words)), numbered, lent.size, sampling)
            figures |= facet_figures(list(unspoken), several, FACETS, "wordless")
    if name.startswith("autoregressive prior"):
        image = parts.embedded["image"]
        figures["codes"] = float((parts.codes.write(parts.codes.read(image)) * image).sum(-1).mean())
    return Row(figures, shown)


def _macs(parts: _Parts, image: Tensor, words: Condition) -> float:
    """Multiply-accumulates of one forward of the decoder."""
    z = torch.zeros(1, parts.lent.codec.channels, 1, *parts.lent.cells[1:], device=image.device)
    return macs_of(parts.engine.denoiser, z, torch.full((1,), 0.5, device=image.device), told(image, words))


def _telling(parts: _Parts, image: Tensor, words: Condition) -> Engine:
    """The engine whose prompts are the numbers of these embeddings and words."""
    return replace(parts.engine, text=Prepared(told(image, words)))


# Manipulations


def _manipulated(parts: _Parts, cases: list[Case]) -> None:
    """Inversion, interpolation and text difference (section 3), the decoder without words: manipulations.png and .json."""
    path = parts.folder / "manipulations.json"
    if path.exists():
        return
    z = encoded(parts.lent, cases)  # (n, C, 1, h, w)
    pictures = parts.shown(z)
    image = parts.of_pictures(pictures)  # (n, E)
    noise = _inverted(parts, z, image)
    again = _redrawn(parts, noise, image)
    other = torch.randn(z.shape, generator=torch.Generator().manual_seed(0)).to(z)
    figures = {
        "inversion/psnr": psnr(pictures, again),
        "inversion/psnr/other noise": psnr(pictures, _redrawn(parts, other, image)),
    }
    rows: dict[str, np.ndarray] = {}
    for i in range(min(SHOWN_ROWS, len(cases) // 2)):
        varied = _redrawn(parts, other[: ACROSS - 2], image[i].expand(min(ACROSS - 2, len(z)), -1))
        title = f"{i + 1}. The picture, itself out of its noise, and out of other noise"
        rows[title] = np.concatenate([pictures[i], again[i], *varied])
        a, b, shares = 2 * i, 2 * i + 1, torch.linspace(0, 1, ACROSS, device=z.device)[:, None]  # (ACROSS, 1)
        ends = [torch.stack([x[a].flatten(), x[b].flatten()])[:, None].expand(-1, ACROSS, -1) for x in (noise, image)]
        flat, between = (slerp(start, end, shares) for start, end in ends)  # (ACROSS, C*h*w), (ACROSS, E)
        made = _redrawn(parts, flat.unflatten(1, z.shape[1:]), between)
        rows[f"{i + 1}. From {cases[a].text!r} to {cases[b].text!r}"] = np.concatenate(list(made))

    recoloured = [_recoloured(case) for case in cases]
    direction = text_difference(
        parts.of_texts([case.text for case in recoloured]), parts.of_texts([case.text for case in cases])
    )
    edits = [_redrawn(parts, noise, slerp(image, direction, share)) for share in SHARES]
    for share, edited in zip(SHARES, edits, strict=True):
        figures |= facet_figures(list(edited), recoloured, ("colour",), f"towards {share}")
    for i in range(min(SHOWN_ROWS, len(cases))):
        rows[f"{i + 1}. Towards {recoloured[i].text!r}"] = np.concatenate([edited[i] for edited in edits])
    save_sheet(contact_sheet(list(rows.values()), list(rows)), parts.folder / "manipulations.png")
    write_json(path, figures)
    note("\n".join(f"{name}: {value:.3f}" for name, value in figures.items()))


def _recoloured(case: Case) -> Case:
    """The same wish with its main object in a colour that nothing in it has."""
    first, *rest = case.wanted["objects"]
    used, place = [one["color"] for one in (first, *rest)], COLORS.index(first["color"])
    colour = next(colour for colour in (*COLORS[place:], *COLORS) if colour not in used)
    wanted = {**case.wanted, "objects": [{**first, "color": colour}, *rest]}
    return replace(case, text=case.text.replace(first["color"], colour, 1), wanted=wanted)


def _asked(parts: _Parts, image: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The decoder that is told embeddings `(n, E)` and no words: `(z, sigma) -> x`."""
    states = image.new_zeros(len(image), 1, parts.lent.text.width)  # (n, 1, W)
    condition = told(image, Condition(states, torch.zeros_like(states[..., 0], dtype=torch.bool)))
    return guided(denoiser(parts.engine.denoiser, "eps", parts.chain.path), condition, condition, 1.0)


@torch.no_grad()
def _inverted(parts: _Parts, z: Tensor, image: Tensor) -> Tensor:
    """The noise that latents `z (n, C, 1, h, w)` come out of, for the decoder that is told their embeddings."""
    path = parts.chain.path
    first = path.sigma_of_step(torch.zeros(1))
    levels = torch.cat([first, parts.chain.levels(parts.config.sampling.steps)[:-1].flip(0)])
    return invert(_asked(parts, image), z, levels.tolist(), path.alpha(levels).tolist(), path.noise(levels).tolist())


@torch.no_grad()
def _redrawn(parts: _Parts, noise: Tensor, image: Tensor) -> np.ndarray:
    """Pictures, uint8 `(n, 1, H, W, 3)`, out of noise `(n, C, 1, h, w)` and embeddings `(n, E)`."""
    levels = parts.chain.levels(parts.config.sampling.steps)
    return parts.shown(SOLVERS["ddim"].solve(_asked(parts, image), noise, levels, path=parts.chain.path))


def recipe() -> UnCLIP:
    """The experiment."""
    return UnCLIP()
