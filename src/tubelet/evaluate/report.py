"""One flat object of name -> number for a whole system: captions, laws and codec, each beside what truth and untruth score.

Names are `caption/FACET/SPLIT`, `kind/KIND/SPLIT` (every facet of a clip right), `law/LAW/SPLIT` and `codec/...`;
SPLIT is `in` (test seeds of the training distribution) or
`held_out` (compositions that training never shows). Beside each name stand

- `/floor`: the simulated truth itself, `/ceiling`: the truth after the system's codec;
- `/chance`: for a caption the truth judged by another prompt's words, for a law the truth's first frame held still;
- `/control` (laws): the highest pass rate among the clips of `tubelet.worlds.violate` that break this law, `/control/NAME`
each;
- `/evaluable`: the share that could be judged at all (what could not has failed), `/n`: prompts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tubelet.core.errors import UserError
from tubelet.core.types import Video
from tubelet.evaluate.caption import FACETS, follow
from tubelet.evaluate.fidelity import foreground_psnr, psnr
from tubelet.evaluate.laws import LAWS, Verdict, judge, rate
from tubelet.evaluate.reading import Reading, Scene
from tubelet.text.human_prompts import HUMAN_PROMPTS, HumanPrompt
from tubelet.worlds import WORLDS
from tubelet.worlds.constants import KINDS, TEST_SEEDS
from tubelet.worlds.grammar import parse
from tubelet.worlds.violate import VIOLATIONS, violate

SPLITS = {"in": "train", "held_out": "held_out"}
STYLES = ("short", "dense", "human")
CONTROLS = {law: VIOLATIONS[{"inertia_strict": "inertia", "energy": "momentum"}.get(law, law)] for law in LAWS}
"""Law -> name -> the violation that must not pass it."""
SHEET_ROWS = 12

Figures = dict[str, float]
Show = Callable[[np.ndarray, str], object]
"""Called with a film, uint8 `(T, H, W, 3)`, and what was asked for: what a contact sheet is made of."""


class FilmLike(Protocol):
    """What a system makes: `tubelet.generate.clip.Clip` or anything with a one-film video."""

    @property
    def video(self) -> Video: ...


class SystemLike(Protocol):
    """What is used of a system: prompts to films, and its codec."""

    @property
    def codec(self) -> Any: ...

    @property
    def generate_batch(self) -> Callable[..., Sequence[FilmLike]]: ...


@dataclass(frozen=True)
class Case:
    """One prompt, what it names, and the simulated clip it was written for."""

    text: str
    wanted: Scene
    kind: str
    seed: int
    truth: np.ndarray
    fps: float


def world_of(kind: str) -> str:
    """The world that has a kind of event. Raises UserError when none has."""
    for name, world in WORLDS.items():
        if kind in world.kinds:
            return name
    raise UserError(f"no world has the kind {kind!r}; choose one of {', '.join(KINDS)}")


def make_cases(
    kinds: Sequence[str],
    n: int,
    split: str = "in",
    style: str = "short",
    size: tuple[int, int] = (64, 64),
    frames: int = 17,
    fps: float = 8.0,
    seed: int = 0,
) -> list[Case]:
    """`n` prompts of test seeds, the kinds in turn. `split` "in" or "held_out"; `style` which caption is the prompt.

    What a short or dense caption names is its world's scene; a human caption leaves things out, so it is parsed.
    Raises UserError on an unknown split or style.
    """
    if split not in SPLITS:
        raise UserError(f"there is no split {split!r}; choose one of {', '.join(SPLITS)}")
    if style not in STYLES:
        raise UserError(f"there is no prompt style {style!r}; choose one of {', '.join(STYLES)}")
    cases = []
    for index in range(n):
        kind = kinds[index % len(kinds)]
        number = TEST_SEEDS[seed + index]
        world = WORLDS[world_of(kind)]
        clip = world.sample(number, *size, frames, fps, kind=kind, split=SPLITS[split])
        text = getattr(clip, style)
        wanted = parse(text) if style == "human" else clip.tags["scene"]
        cases.append(Case(text, wanted, kind, number, clip.video, clip.fps))
    return cases


def evaluate_clips(clips: Sequence[np.ndarray], wanted: Sequence[Scene], fps: float = 8.0) -> Figures:
    """Caption and law figures of uint8 clips `(T, H, W, 3)` and what their captions name, as one flat object.

    `caption/FACET` and `law/LAW` with `/n` clips that name the facet or are of the law's kinds, and `/evaluable` for laws.
    Raises UserError when the counts differ.
    """
    if len(clips) != len(wanted):
        raise UserError(f"{len(clips)} clips have {len(wanted)} captions; give one caption per clip")
    tally = Tally()
    for clip, scene in zip(clips, wanted, strict=True):
        tally.add(Reading(clip, fps), scene, tuple(LAWS))
    return tally.figures()


def law_card(clips: Sequence[np.ndarray], wanted: Sequence[Scene], fps: float = 8.0) -> dict[str, tuple[float, float, int]]:
    """Law -> (share that passed, share that could be judged, clips), for every law whose kinds occur in `wanted`."""
    figures = evaluate_clips(clips, wanted, fps)
    found = [law for law in LAWS if f"law/{law}" in figures]
    return {law: (figures[f"law/{law}"], figures[f"law/{law}/evaluable"], int(figures[f"law/{law}/n"])) for law in found}


class Tally:
    """Counts of judged clips, by facet, by kind and by law."""

    def __init__(self) -> None:
        self.kinds: dict[str, list[bool]] = defaultdict(list)
        self.facets: dict[str, list[bool]] = defaultdict(list)
        self.verdicts: dict[str, list[Verdict]] = defaultdict(list)

    def add(self, reading: Reading, wanted: Scene, laws: Sequence[str], caption: bool = True) -> None:
        """Judge one clip by those of `laws` that apply to its kind, and its caption."""
        if caption:
            right = follow(reading, reading.fps, wanted)
            for facet, value in right.items():
                self.facets[facet].append(value)
            if right and "kind" in wanted:
                self.kinds[str(wanted["kind"])].append(all(right.values()))
        for law in laws:
            if wanted.get("kind") in LAWS[law].kinds:
                self.verdicts[law].append(judge(law, reading, reading.fps, wanted))

    def figures(self) -> Figures:
        """Rates by name, with `/n` and `/evaluable`."""
        out: Figures = {}
        for facet in FACETS:
            if facet in self.facets:
                out[f"caption/{facet}"] = float(np.mean(self.facets[facet]))
                out[f"caption/{facet}/n"] = float(len(self.facets[facet]))
        for kind, values in self.kinds.items():
            out[f"kind/{kind}"], out[f"kind/{kind}/n"] = float(np.mean(values)), float(len(values))
        for law, verdicts in self.verdicts.items():
            out[f"law/{law}"], out[f"law/{law}/evaluable"] = rate(verdicts)
            out[f"law/{law}/n"] = float(len(verdicts))
        return out


def through_codec(codec: Any, clips: Sequence[np.ndarray], fps: float = 8.0, batch: int = 8) -> Iterator[np.ndarray]:
    """Each uint8 clip `(T, H, W, 3)` after encoding and decoding, in order."""
    device = next((p.device for p in codec.parameters()), torch.device("cpu"))
    with torch.no_grad():
        for start in range(0, len(clips), batch):
            video = Video.from_uint8(np.stack(clips[start : start + batch]), fps)
            yield from Video(codec.decode(codec.encode(video.pixels.to(device))).float(), fps).to_uint8()


def _pools(n: int) -> dict[str, tuple[tuple[str, ...], int, tuple[str, ...]]]:
    """Name -> (kinds, prompts, laws): laws of the same kinds share films, and a law of many kinds uses those of its parts."""
    pools: dict[str, tuple[tuple[str, ...], int, tuple[str, ...]]] = {"caption": (KINDS, n, ())}
    groups = list(dict.fromkeys(law.kinds for law in LAWS.values()))
    for kinds in groups:
        if set(kinds) <= {kind for other in groups if set(other) < set(kinds) for kind in other}:
            continue
        pools["+".join(kinds)] = (kinds, n, tuple(name for name, law in LAWS.items() if set(kinds) <= set(law.kinds)))
    return pools


def truth_figures(
    n: int = 200,
    splits: Sequence[str] = ("in", "held_out"),
    *,
    codec: Any = None,
    style: str = "short",
    size: tuple[int, int] = (64, 64),
    frames: int = 17,
    fps: float = 8.0,
    seed: int = 0,
    degrade: Callable[[np.ndarray, int], np.ndarray] | None = None,
    tick: Callable[[int], None] = lambda _: None,
) -> Figures:
    """What needs no generator: `/floor`, `/chance`, `/control` of every figure, and with a codec `/ceiling` and `codec/...`.

    `degrade (clip, index) -> clip` takes the codec's place when one wants to know what a given damage costs.
    """
    out: Figures = {}
    fidelity: dict[str, list[float]] = defaultdict(list)
    counts: Figures = {}
    for split in splits:
        tallies = {name: Tally() for name in ("floor", "ceiling", "chance")}
        for name, (kinds, count, laws) in _pools(n).items():
            cases = make_cases(kinds, count, split, style, size, frames, fps, seed)
            caption = name == "caption"
            others = np.random.RandomState(seed).randint(1, max(2, len(cases)), len(cases))
            for index, case in enumerate(cases):
                tallies["floor"].add(Reading(case.truth, fps), case.wanted, laws, caption)
                still = np.repeat(case.truth[:1], frames, 0)
                tallies["chance"].add(Reading(still, fps), case.wanted, laws, caption=False)
                if caption:
                    _by_other_words(tallies["chance"], case, cases[(index + int(others[index])) % len(cases)])
                tick(1)
            truths = [case.truth for case in cases]
            coded: Iterator[np.ndarray] | None = None
            if degrade is not None:
                coded = (degrade(clip, index) for index, clip in enumerate(truths))
            elif codec is not None:
                coded = through_codec(codec, truths, fps)
            for case, clip in zip(cases, coded or (), strict=False):
                tallies["ceiling"].add(Reading(clip, fps), case.wanted, laws, caption)
                if caption and split == "in":
                    fidelity["codec/psnr"].append(psnr(case.truth, clip))
                    fidelity["codec/psnr_foreground"].append(foreground_psnr(case.truth, clip))
                    middle = np.broadcast_to(np.median(case.truth, 0).astype(np.uint8), case.truth.shape)
                    fidelity["codec/psnr/chance"].append(psnr(case.truth, middle))
                    fidelity["codec/psnr_foreground/chance"].append(foreground_psnr(case.truth, middle))
                tick(1)
        for beside, tally in tallies.items():
            for key, value in tally.figures().items():
                root, _, last = key.rpartition("/")
                if last == "evaluable":
                    out[f"{root}/{split}/{beside}/evaluable"] = value
                elif last != "n":
                    out[f"{key}/{split}/{beside}"] = value
                elif (split, beside) == ("in", "ceiling"):
                    counts[root] = value
        out |= _controls(n, split, size, frames, fps, seed, tick)
    for key, values in fidelity.items():
        out[key] = float(np.mean(values))
        if not key.endswith("/chance"):
            out[f"{key}/n"] = float(len(values))
            # The truth against itself, and, since nothing stands between codec and film here, the figure itself.
            out[f"{key}/floor"], out[f"{key}/ceiling"] = 100.0, out[key]
    if fidelity:
        for key in [k for k in out if k.endswith("/in/ceiling")]:
            name = key.removesuffix("/in/ceiling")
            for beside in ("floor", "chance"):
                out[f"codec/{name}/{beside}"] = out[f"{name}/in/{beside}"]
            out[f"codec/{name}"] = out[f"codec/{name}/ceiling"] = out[key]
            out[f"codec/{name}/n"] = counts[name]
    return out


def _by_other_words(tally: Tally, case: Case, other: Case) -> None:
    """Judge a clip by the words of another prompt, facet by facet where both name it."""
    own = follow(case.truth, case.fps, case.wanted)
    # Colours decide which object is meant, so every facet but colour is asked of the clip's own colours.
    things, others = list(case.wanted.get("objects", [])), list(other.wanted.get("objects", []))
    borrowed = dict(other.wanted)
    if things and others:
        pairs = zip(things, others, strict=False)
        borrowed["objects"] = [{**o, **({"color": t["color"]} if "color" in t else {})} for t, o in pairs]
        blind = follow(case.truth, case.fps, other.wanted)
        tally.facets["colour"].append(blind.get("colour", False))
    elif "colour" in own:
        tally.facets["colour"].append(False)
    whole = follow(case.truth, case.fps, other.wanted)
    tally.kinds[case.kind].append(bool(whole) and all(whole.values()))
    guessed = follow(case.truth, case.fps, borrowed)
    for facet in ("shape", "size", "direction", "event"):
        if facet in own and facet in guessed:
            tally.facets[facet].append(guessed[facet])


def _controls(
    n: int, split: str, size: tuple[int, int], frames: int, fps: float, seed: int, tick: Callable[[int], None]
) -> Figures:
    out: Figures = {}
    for law, controls in CONTROLS.items():
        for name, violation in controls.items():
            source = {"inertia_strict": "inertia", "energy": "momentum"}.get(law, law)
            verdicts = []
            for index in range(n):
                kind = violation.kinds[index % len(violation.kinds)]
                number = TEST_SEEDS[seed + index]
                clip = violate(violation.world, source, name, number, *size, frames, fps, kind=kind, split=SPLITS[split])
                verdicts.append(judge(law, clip.video, fps, clip.tags["scene"]))
                tick(1)
            out[f"law/{law}/{split}/control/{name}"] = rate(verdicts)[0]
        out[f"law/{law}/{split}/control"] = max(out[f"law/{law}/{split}/control/{name}"] for name in controls)
    return out


def evaluate_system(
    system: SystemLike,
    n: int = 200,
    samples: int = 4,
    *,
    seed: int = 0,
    splits: Sequence[str] = ("in", "held_out"),
    style: str = "short",
    size: tuple[int, int] = (64, 64),
    frames: int = 17,
    fps: float = 8.0,
    batch: int = 16,
    show: Show | None = None,
    progress: bool = True,
    **settings: Any,
) -> Figures:
    """All figures of a system, mean of `samples` films for each of `n` prompts per figure; names as in this file's head.

    `seed` moves the block of test seeds; the films' own seeds are the samples' numbers. `style`: "short", "dense" or "human"
    captions. Further settings (steps, guidance, solver, expander) go to `system.generate_batch`. `show` is called with the
    first films. Raises UserError on n or samples below 1, an unknown split or style.
    """
    if n < 1 or samples < 1:
        raise UserError(f"n and samples must be at least 1, got {n} and {samples}; raise them")
    pools = _pools(n)
    judgements = n * (2 * len(pools) + sum(len(c) for c in CONTROLS.values()))
    out: Figures = {}
    shown = 0
    with progress_bar("Evaluating", len(splits) * (judgements + n * samples * len(pools)), progress) as tick:
        for split in splits:
            tally = Tally()
            for name, (kinds, count, laws) in pools.items():
                cases = make_cases(kinds, count, split, style, size, frames, fps, seed)
                jobs = [(case, sample) for sample in range(samples) for case in cases]
                for start in range(0, len(jobs), batch):
                    part = jobs[start : start + batch]
                    texts, seeds = [c.text for c, _ in part], [s for _, s in part]
                    films = system.generate_batch(texts, seeds, size=size, frames=frames, **settings)
                    for (case, _), film in zip(part, films, strict=True):
                        clip = film.video.to_uint8()[0]
                        tally.add(Reading(clip, film.video.fps), case.wanted, laws, name == "caption")
                        if show is not None and name == "caption" and shown < SHEET_ROWS:
                            show(clip, case.text)
                            shown += 1
                    tick(len(part))
            for key, value in tally.figures().items():
                root, _, last = key.rpartition("/")
                out[f"{root}/{split}/{last}" if last in ("n", "evaluable") else f"{key}/{split}"] = value / (
                    samples if last == "n" else 1
                )
        out |= truth_figures(
            n, splits, codec=system.codec, style=style, size=size, frames=frames, fps=fps, seed=seed, tick=tick
        )
    return dict(sorted(out.items()))


def scene_of(prompt: HumanPrompt) -> dict[str, Any]:
    """What a human prompt names, in the grammar's form."""
    scene: dict[str, Any] = {} if prompt.kind is None else {"kind": prompt.kind}
    named = [{k: v for k, v in (("color", o.color), ("shape", o.shape), ("size", o.size)) if v} for o in prompt.objects]
    if prompt.kind == "paint":
        scene["strokes"] = [{("stroke" if k == "shape" else k): v for k, v in o.items()} for o in named]
    elif prompt.kind == "eat":
        scene["food"] = named[0]["shape"]
    else:
        scene["objects"] = named
    if prompt.direction is not None:
        scene["direction"] = prompt.direction
    if prompt.times is not None:
        scene["count"] = prompt.times
    if prompt.moon:
        scene["moon"] = True
    return scene


def evaluate_human(
    system: SystemLike,
    samples: int = 4,
    *,
    size: tuple[int, int] = (64, 64),
    frames: int = 17,
    show: Show | None = None,
    progress: bool = True,
    **settings: Any,
) -> Figures:
    """The thirty human prompts: `human/FACET` over the prompts that name it, `human/all` (every named facet right), each
    with `/n`.

    `show` is called with every prompt's first film. Settings go to `system.generate_batch`. Raises UserError on samples
    below 1.
    """
    if samples < 1:
        raise UserError(f"samples must be at least 1, got {samples}; raise it")
    facets: dict[str, list[bool]] = defaultdict(list)
    texts = [prompt.text for prompt in HUMAN_PROMPTS]
    with progress_bar("Human prompts", samples * len(texts), progress) as tick:
        for sample in range(samples):
            for start in range(0, len(texts), 10):
                part = HUMAN_PROMPTS[start : start + 10]
                films = system.generate_batch(
                    [p.text for p in part], [sample] * len(part), size=size, frames=frames, **settings
                )
                for prompt, film in zip(part, films, strict=True):
                    clip = film.video.to_uint8()[0]
                    right = follow(clip, film.video.fps, scene_of(prompt))
                    for facet, value in right.items():
                        facets[facet].append(value)
                    facets["all"].append(bool(right) and all(right.values()))
                    if show is not None and sample == 0:
                        show(clip, prompt.text)
                tick(len(part))
    out: Figures = {}
    for facet in (*FACETS, "all"):
        if facet in facets:
            out[f"human/{facet}"] = float(np.mean(facets[facet]))
            out[f"human/{facet}/n"] = len(facets[facet]) / samples
    return out


def table(figures: Mapping[str, float]) -> str:
    """The figures as a text table: a row for each name, and beside it what stands beside it in the flat object."""
    beside = ("floor", "ceiling", "chance", "control", "evaluable", "n")
    inner = {*beside}
    names = [k for k in figures if k.rpartition("/")[2] not in inner and not inner & set(k.split("/"))]
    roots = [k.rpartition("/")[0] for k in figures if k.endswith("/floor")]
    names = list(dict.fromkeys([*names, *roots]))
    width = max([len(name) for name in names], default=4)
    lines = [f"{'':{width}}  {'value':>9}" + "".join(f"{b:>11}" for b in beside)]

    def cell(key: str) -> str:
        value = figures.get(key)
        if value is None:
            return ""
        return f"{value:.0f}" if key.endswith("/n") else f"{value:.3f}" if abs(value) <= 1 else f"{value:.2f}"

    for name in names:
        lines.append(f"{name:{width}}  {cell(name):>9}" + "".join(f"{cell(f'{name}/{b}'):>11}" for b in beside))
    return "\n".join(lines)


@contextmanager
def progress_bar(title: str, total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    console = Console(stderr=True)
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (shown and console.is_terminal), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda steps: bar.advance(task, steps)
