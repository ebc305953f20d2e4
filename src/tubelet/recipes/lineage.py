"""What experiments on the lineage share: the rows of a table, and their measures.

Rows are trained or measured one after the other; each has a folder with what it measured, so that an interrupted experiment
goes on where it stopped. What they are trained on is in `recipes.lent`.
"""

from __future__ import annotations

import copy
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from tubelet.codecs.base import Codec
from tubelet.codecs.losses import CodecObjective, to_pixels
from tubelet.core.config import to_dict, with_defaults
from tubelet.core.errors import UserError
from tubelet.core.files import read_json, whole_file, write_json
from tubelet.core.log import note, progress
from tubelet.core.types import Video
from tubelet.core.weights import load_tensors, save_module, save_tensors
from tubelet.data.stream import Source, TensorSource
from tubelet.diffusion.paths import SigmaSampling
from tubelet.evaluate.caption import follow
from tubelet.evaluate.distance import distances, features
from tubelet.evaluate.reading import Reading
from tubelet.evaluate.report import Case, evaluate_clips, through_codec, world_of
from tubelet.generate.engine import Engine, Request, Sampling
from tubelet.generate.layouts import Chain
from tubelet.media.sheet import contact_sheet, save_sheet
from tubelet.models.spacetime import Spacetime
from tubelet.recipes.lent import Lent
from tubelet.runtime.cpu import accelerate, restore, use_fast_attention
from tubelet.runtime.device import choose_device, fast_bf16
from tubelet.tasks.given import Given
from tubelet.text.base import TextEncoder
from tubelet.train.loop import Objective, TrainConfig, train
from tubelet.train.optim import Split
from tubelet.train.optim import split as by_place
from tubelet.train.text_to_video import TextToVideo, TextToVideoObjective
from tubelet.worlds import WORLDS
from tubelet.worlds.base import Episode
from tubelet.worlds.constants import TEST_SEEDS

Figures = dict[str, float]
M = TypeVar("M", bound=nn.Module)
STILL_FRAMES = 4
"""A picture is judged as a film of so many frames that stands still."""
SHOWN = 12
"""Most pictures or frames of a row on the sheet."""


# Rows and their table


@dataclass(frozen=True)
class Row:
    """What one row measured, and a clip, uint8 `(T, H, W, 3)`, that stands for it on the sheet."""

    figures: Figures
    shown: np.ndarray | None = None


Column = tuple[str, str, Callable[[float], str]]
"""Head, name of the figure, and how it is written."""


def plain(digits: int = 2) -> Callable[[float], str]:
    """A number with so many digits."""
    return lambda value: f"{value:.{digits}f}"


def millions(value: float) -> str:
    return f"{value / 1e6:.2f} M"


def compare(
    folder: Path,
    settings: Any,
    rows: Mapping[str, Callable[[Path], Row | None]],
    columns: Sequence[Column],
    chosen: Sequence[str],
) -> Path:
    """Measure every row that is not yet measured, then write table.md, table.json and sheet.png; returns table.md.

    `rows`: name -> what measures it in a folder of its own, None where it was stopped: then `folder` is returned. `settings` is
    the experiment's config, of which only `chosen`, the rows asked for, may change in a folder. Raises UserError otherwise, and
    on a row that does not exist.
    """
    unknown = [name for name in chosen if name not in rows]
    if unknown:
        raise UserError(f"there is no row {unknown[0]!r}; choose among {', '.join(rows)}")
    use_fast_attention()
    stated = {name: value for name, value in to_dict(settings).items() if name != "rows"}
    places = {name: folder / "".join(c if c.isalnum() else "-" for c in name) for name in rows}
    path = folder / "settings.json"
    if not path.exists():
        write_json(path, stated)
    found = with_defaults(settings, read_json(path))
    changed = [name for name, value in stated.items() if found.get(name) != value]
    if changed:
        raise UserError(f"{folder} was begun with other settings of {changed[0]!r}; use another --out, or the same settings")
    results: dict[str, Figures] = {}
    clips: dict[str, np.ndarray] = {}
    for name in chosen:
        place = places[name]
        if not (place / "figures.json").exists():
            note(f"{folder.name}: {name}")
            row = rows[name](place)
            if row is None:
                note(f"stopped in {name}; the same command goes on from there")
                return folder
            if row.shown is not None:
                save_tensors(place / "shown.safetensors", {"clip": torch.from_numpy(row.shown)})
            write_json(place / "figures.json", row.figures)
        results[name] = read_json(place / "figures.json")
        if (place / "shown.safetensors").exists():
            clips[name] = load_tensors(place / "shown.safetensors")["clip"].numpy()
    save_sheet(contact_sheet(list(clips.values()), list(clips), columns_frames=SHOWN), folder / "sheet.png")
    write_json(folder / "table.json", results)
    with whole_file(folder / "table.md") as temporary:
        temporary.write_text(markdown(results, columns), encoding="utf-8")
    note(markdown(results, columns))
    return folder / "table.md"


def markdown(results: Mapping[str, Figures], columns: Sequence[Column]) -> str:
    """The table as a page holds it; a figure that a row does not have is left open."""
    lines = ["| | " + " | ".join(head for head, _, _ in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, figures in results.items():
        cells = [write(figures[figure]) if figure in figures else "" for _, figure, write in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


# A trained row


def unet_split(model: nn.Module) -> Split:
    """Which weights of a model with a U-Net go to Muon: those that stand where a transformer's blocks do, as in the others."""
    return by_place(model, ("blocks", "down", "middle", "up"))


def train_row(
    place: Path,
    model: M,
    objective: Objective,
    source: Source,
    config: TrainConfig,
    by: Callable[[nn.Module], Split] | None = None,
) -> tuple[M, Figures] | None:
    """Train in a folder, or go on there: the averaged model, and what it has cost in parameters, steps and seconds of training.

    Of a `TextToVideo` the denoiser's parameters count, since its words are the same in every row. `by` says what Muon trains,
    by default what stands in blocks. The seconds are those of calls that ended, not of one that was killed. None when it was
    stopped.
    """
    clock = place / "seconds.json"
    before = float(read_json(clock)["training"]) if clock.exists() else 0.0
    begun = time.perf_counter()
    result = train(model, objective, source, config, place, split=by)
    seconds = before + time.perf_counter() - begun
    write_json(clock, {"training": seconds})
    if not result.finished:
        return None
    average = result.ema.eval()
    assert isinstance(average, type(model)), "a copy of the model"
    counted = average.denoiser if isinstance(average, TextToVideo) else average
    parameters = sum(p.numel() for p in counted.parameters())
    return average, {"parameters": float(parameters), "steps": float(result.step), "train_seconds": seconds}


def film_denoiser(
    place: Path, text: TextEncoder, network: Spacetime, lent: Lent, source: Source, how: TrainConfig
) -> tuple[Engine, Figures] | None:
    """The flagship in small, trained as it is on films alone: what samples it, and its cost as `train_row` has it.

    None when it was stopped.
    """
    objective = TextToVideoObjective(sampling=SigmaSampling(shift=3.0), image_share=0.0)
    result = train_row(place, TextToVideo(text, network), objective, source, how)
    if result is None:
        return None
    average, cost = result
    if lent.device.type == "cpu":
        accelerate(average)
    return Engine(lent.codec, average.denoiser, average.text, "skip", network.config.patch), cost


@torch.no_grad()
def macs(denoiser: nn.Module, lent: Lent, frames: int, known: int = 0, prompt: str = "a large red ball bounces once") -> float:
    """Multiply-accumulates of one forward on one film of `frames` latent frames, the first `known` of them given."""
    z = torch.zeros(1, lent.codec.channels, frames, *lent.cells[1:], device=lent.device)
    sigma = torch.full((1,), 0.5, device=lent.device)
    if known:
        sigma = (torch.arange(frames, device=lent.device) >= known).float()[None] / 2  # (1, T)
    return macs_of(denoiser, z, sigma, lent.text.encode([prompt]))


@torch.no_grad()
def macs_of(network: Callable[..., Any], *inputs: Any) -> float:
    """Multiply-accumulates of one forward."""
    if isinstance(network, nn.Module):  # what `accelerate` puts in a linear's place is not counted
        network = restore(copy.deepcopy(network))
    # torch counts the fused attention of every device but the CPU.
    fused = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}
    with FlopCounterMode(display=False, custom_mapping=fused) as counter:
        network(*inputs)
    return counter.get_total_flops() / 2


@torch.no_grad()
def held_out_loss(
    model: TextToVideo, objective: Objective, clips: Tensor, captions: Sequence[str], rounds: int = 4, batch: int = 64
) -> float:
    """The objective's loss on latents `(n, C, T, h, w)` that no training has seen, at `rounds` steps and noises of each.

    The same steps and noises for every model, so that rows of one objective compare finely.
    """
    rng = torch.Generator().manual_seed(0)
    total = 0.0
    for begin in list(range(0, len(clips), batch)) * rounds:
        part = clips[begin : begin + batch]
        losses = objective(model, {"latent": part, "caption": list(captions[begin : begin + batch])}, rng)
        total += float(losses["loss"]) * len(part) / (rounds * len(clips))
    return total


def engine_of(lent: Lent, model: TextToVideo, chain: Chain, cells: int) -> Engine:
    """The engine that samples a trained model on its chain; `cells` is what rows and columns must be multiples of."""
    if lent.device.type == "cpu":
        accelerate(model.denoiser)
    return Engine(
        lent.codec, model.denoiser, model.text, chain.prediction, (1, cells, cells), path=chain.path, levels=chain.levels
    )


# Codecs of an experiment's own


def train_codec(codec: Codec, video: Tensor, how: TrainConfig, place: Path) -> Codec | None:
    """A codec trained on uint8 clips `(n, T, H, W, 3)`, its statistics those of their latents, kept as codec.safetensors.

    None when it was stopped.
    """
    result = train(codec, CodecObjective(), TensorSource({"video": video}, seed=how.seed), how, place)
    if not result.finished:
        return None
    average = result.ema
    assert isinstance(average, Codec), "a copy of the model"
    raw = encode_all(average.encode_raw, video, device_of(how))
    average.set_statistics(raw.mean((0, 2, 3, 4)).to(average.mean), raw.std((0, 2, 3, 4)).to(average.std))
    save_module(place / "codec.safetensors", average)
    return average.eval()


@torch.no_grad()
def encode_all(encode: Callable[[Tensor], Tensor], video: Tensor, device: str, batch: int = 32) -> Tensor:
    """uint8 clips `(n, T, H, W, 3)` as latents `(n, C, T', h, w)`."""
    where = torch.device(device)
    with torch.autocast(where.type, torch.bfloat16, enabled=fast_bf16(where)):
        return torch.cat([encode(to_pixels(part.to(where))).float().cpu() for part in video.split(batch)])


# Films from words, beside what truth scores


def film_row(
    trained: tuple[TextToVideo, Figures] | None,
    lent: Lent,
    chain: Chain,
    cells: int,
    cases: Mapping[str, Sequence[Case]],
    sampling: Sampling,
    facets: Sequence[str],
    objective: Objective,
    cost: float,
) -> Row | None:
    """What a row says of what `train_row` gave: `film_figures`, the loss of `objective` on the cases "in", and its cost.

    `cells` as in `engine_of`; `cost` in multiply-accumulates. None when the training was stopped.
    """
    if trained is None:
        return None
    average, figures = trained
    loss = held_out_loss(average, objective, encoded(lent, cases["in"]), [case.text for case in cases["in"]])
    made, shown = film_figures(engine_of(lent, average, chain, cells), cases, lent, sampling, facets)
    return Row({**made, "loss": loss, "macs": cost, **figures}, shown)


def films(
    engine: Engine, cases: Sequence[Case], size: tuple[int, int], sampling: Sampling, batch: int = 32
) -> tuple[np.ndarray, float]:
    """A film for each case, as long as its truth: uint8 `(n, T, H, W, 3)`, and seconds of denoising for each."""
    requests = [Request(case.text, number) for number, case in enumerate(cases)]
    with progress("sampling", "steps") as advance:
        pixels, timings = engine.sample(requests, size, len(cases[0].truth), sampling, batch=batch, progress=advance)
    return Video(pixels, cases[0].fps).to_uint8(), timings["denoise"] / len(cases)


def facet_figures(clips: Sequence[np.ndarray], cases: Sequence[Case], facets: Sequence[str], split: str) -> Figures:
    """`FACET/SPLIT`: the share of uint8 clips `(T, H, W, 3)` that show what their caption names of each of `facets`.

    `all/SPLIT`: the share that shows all of it. Empty without cases.
    """
    right: dict[str, list[bool]] = defaultdict(list)
    for clip, case in zip(clips, cases, strict=True):
        film = np.repeat(clip, STILL_FRAMES, 0) if len(clip) == 1 else clip
        shown = follow(Reading(film, case.fps), case.fps, case.wanted)
        asked = {facet: value for facet, value in shown.items() if facet in facets}
        for facet, value in {**asked, "all": all(asked.values())}.items():
            right[facet].append(value)
    return {f"{facet}/{split}": float(np.mean(values)) for facet, values in right.items()}


LAWS_SHOWN = ("inertia", "gravity", "steady")


def law_figures(clips: Sequence[np.ndarray], cases: Sequence[Case]) -> Figures:
    """`law/LAW`: the share of uint8 clips `(T, H, W, 3)` of a law's kinds that keep it; empty for pictures.

    Few frames a second hide motion from the card: what truth scores stands in its row.
    """
    if len(cases[0].truth) == 1:
        return {}
    found = evaluate_clips(clips, [case.wanted for case in cases], cases[0].fps)
    return {f"law/{law}": found[f"law/{law}"] for law in LAWS_SHOWN if f"law/{law}" in found}


def truth_rows(
    lent: Lent, cases: Mapping[str, Sequence[Case]], others: Sequence[Case], facets: Sequence[str]
) -> dict[str, Callable[[Path], Row]]:
    """The rows that need no training: what truth itself and truth through the codec score; `cases` by split.

    The distances are those to `others`, as many other clips of the first split: what a model has that is as good as truth.
    """
    first = next(iter(cases))
    truth = {split: np.stack([case.truth for case in several]) for split, several in cases.items()}
    another = np.stack([case.truth for case in others])

    def row(clips: Mapping[str, np.ndarray]) -> Row:
        figures: Figures = {}
        for split, several in cases.items():
            figures |= facet_figures(list(clips[split]), several, facets, split)
        figures |= law_figures(list(clips[first]), cases[first])
        return Row(figures | distances(features(another), features(clips[first])), on_sheet(clips[first]))

    def coded(_: Path) -> Row:
        fps = cases[first][0].fps
        clips = {split: np.stack(list(through_codec(lent.codec, list(t), fps, batch=32))) for split, t in truth.items()}
        return row(clips)

    return {
        "truth": lambda _: row(truth),
        "truth through the codec": coded,
    }


def film_figures(
    engine: Engine,
    cases: Mapping[str, Sequence[Case]],
    lent: Lent,
    sampling: Sampling,
    facets: Sequence[str],
) -> tuple[Figures, np.ndarray]:
    """Facets of every split; of the first its distances from truth, laws and seconds a film; and what stands on the sheet."""
    figures: Figures = {}
    shown: np.ndarray | None = None
    for split, several in cases.items():
        made, seconds = films(engine, several, lent.size, sampling)
        figures |= facet_figures(list(made), several, facets, split)
        if shown is None:
            truth = np.stack([case.truth for case in several])
            figures |= {**distances(features(truth), features(made)), "seconds": seconds, **law_figures(list(made), several)}
            shown = on_sheet(made)
    assert shown is not None, "at least one split"
    return figures, shown


def on_sheet(clips: np.ndarray) -> np.ndarray:
    """What of `(n, T, H, W, 3)` stands in a row of the sheet, `(T, H, W, 3)`: pictures side by side, or the first film."""
    return clips[:SHOWN, 0] if clips.shape[1] == 1 else clips[0]


def encoded(lent: Lent, cases: Sequence[Case], batch: int = 32) -> Tensor:
    """The latents of true clips, `(n, C, T, h, w)`."""
    parts = []
    with torch.no_grad():
        for begin in range(0, len(cases), batch):
            video = Video.from_uint8(np.stack([case.truth for case in cases[begin : begin + batch]]), cases[0].fps)
            parts.append(lent.codec.encode(video.pixels.to(lent.device)).float())
    return torch.cat(parts)


# Episodes of which something is given


def episodes_of(lent: Lent, kinds: Sequence[str], n: int, first: int = 0) -> list[Episode]:
    """Test episodes of the run's films from test seed `first` on, the kinds in turn."""
    chosen = [kinds[number % len(kinds)] for number in range(n)]
    return [
        WORLDS[world_of(kind)].sample(TEST_SEEDS[first + number], *lent.size, lent.frames, lent.fps, kind=kind)
        for number, kind in enumerate(chosen)
    ]


def case_of(episode: Episode) -> Case:
    """An episode as a prompt and its truth."""
    scene = episode.tags["scene"]
    return Case(episode.short, scene, episode.tags["kind"], episode.tags["seed"], episode.video, episode.fps)


def completed(
    engine: Engine, episodes: Sequence[Episode], masks: Tensor, sampling: Sampling, batch: int = 16
) -> tuple[np.ndarray, float]:
    """What a network makes of what each mask `(n, T', h, w)` leaves known, uint8 `(n, T, H, W, 3)`; seconds a film."""
    made: list[np.ndarray] = []
    seconds = 0.0
    with progress("making", "films") as advance:
        for start in range(0, len(episodes), batch):
            part, mask = episodes[start : start + batch], masks[start : start + batch]
            truth = np.stack([episode.video for episode in part])
            clean = engine.encode(Video.from_uint8(truth, part[0].fps).pixels).cpu()  # (B, C, T', h, w)
            # What is to be made stays hidden from the engine, too.
            given = Given(clean * (1 - mask[:, None]), mask)
            requests = [Request(episode.short, start + place) for place, episode in enumerate(part)]
            pixels, timings = engine.sample(requests, truth.shape[2:4], truth.shape[1], sampling, batch=len(part), given=given)
            made.append(Video(pixels, part[0].fps).to_uint8())
            seconds += timings["denoise"] / len(episodes)
            advance(start + len(part), len(episodes))
    return np.concatenate(made), seconds


def scaled(config: TrainConfig, ratio: float) -> TrainConfig:
    """The same training in `ratio` times as many steps."""
    return replace(config, steps=max(1, round(config.steps * ratio)), warmup=round(config.warmup * ratio))


def device_of(config: TrainConfig) -> str:
    """Where the codec and the words must be: where this training is."""
    return str(choose_device(config.device))
