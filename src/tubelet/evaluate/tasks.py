"""Figures of every task beside what truth, doing nothing and violated controls score.

Names are `task/TASK/FIGURE`; beside each stand `/floor` (the simulated truth), `/ceiling` (truth through the codec, at seams
where a film was made), `/chance` (doing nothing: the known frame held, the hole filled with the backdrop) and, where there are
any, `/control` (a film that is wrong on purpose) and named baselines. Figures:

- `caption`: share of the facets named that are right (`tubelet.evaluate.caption.follow`), what cannot be tracked is wrong;
- `seam`: change from the last known frame to the first made one (the mean of two joins) over the mean change of the whole film;
  `within`: no join is larger than the largest change elsewhere; `/control` continues with another film; of a `connect` from one
  episode to another `/two`, which have no truth, and `jump/two`, the largest change on the way over that of a cut;
- `velocity`: mean error of the named object's velocity in made frames against exact state, short sides a second; `/constant`
  keeps the last exact velocity, `/copy` stands still; `found`: share of the frames in which truth shows the object whole and
  the film too;
- `caption/going_on/`, `caption/cut/` of a storyboard: its two segments where no picture says how the second begins, and it goes
  on from the first, or begins anew;
- `structure` of a film made large: overlap of what is coloured with the small film's; `/direct`: of one made large at once;
- `kept`: worst PSNR of what was known, in decibels (100 is the same pixels);
- `closing` of a loop: change at its join over the mean of the changes inside; `within`: whether that is within these, which
  of a film whose join is like any other change holds in 1 - 1 / frames; `place`: the share of them that it exceeds, of such a
  film one half; `/control` is a film that was not asked to be a loop;
- `first`, `last` of a blend: overlap of what is coloured in its first and last frames with that of the two films; `one`: share
  of the frames between that show one thing; `/fade` is a cross-fade, in which two shine through.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from tubelet.core.errors import UserError
from tubelet.core.types import Video
from tubelet.evaluate.caption import follow
from tubelet.evaluate.fidelity import psnr
from tubelet.evaluate.laws import LAWS
from tubelet.evaluate.reading import Reading
from tubelet.evaluate.report import Figures, Show, Tally, progress_bar, through_codec
from tubelet.generate.system import Rolling, Shot, System
from tubelet.media.resize import resize
from tubelet.tasks.region import around, box
from tubelet.worlds import WORLDS
from tubelet.worlds.base import Episode, foreground
from tubelet.worlds.constants import COLORS, TEST_SEEDS

MOVING = ("slide", "fall", "bounce", "parabola")
"""Kinds with one moving object."""
LAWFUL = ("occlude", "collision")
"""Kinds that have laws which those of one moving object have not."""
LOOKS = ("colour", "shape", "size")
"""Facets that every frame shows."""
STRENGTHS = (0.3, 0.5, 0.7, 0.9)
STILL = 0.05
"""Mean absolute change of a frame, of 255, below which nothing has moved."""
LONG = 10
"""Trained lengths of a long film."""
SIZES = ((64, 64), (64, 112), (112, 64), (96, 96), (64, 96))
LENGTHS = (1, 9, 17, 25, 33)

Add = Callable[[str, float], None]


class Bench:
    """A system and the test episodes that its tasks are tried on."""

    def __init__(self, system: System, seed: int = 0) -> None:
        self.system, self.seed = system, seed
        self.frames, self.size = system.config.frames, system.config.size

    def episode(
        self,
        number: int,
        kinds: Sequence[str] = MOVING,
        frames: int | None = None,
        size: tuple[int, int] | None = None,
        **more: Any,
    ) -> Episode:
        """The n-th episode of `kinds` in turn, from test seeds."""
        kind = kinds[number % len(kinds)]
        return WORLDS["phys2d"].sample(
            TEST_SEEDS[self.seed + number],
            *(size or self.size),
            frames or self.frames,
            self.system.config.fps,
            kind=kind,
            **more,
        )

    def video(self, frames: np.ndarray) -> Video:
        """uint8 `(T, H, W, 3)` as one film."""
        return Video.from_uint8(frames, self.system.config.fps)

    def film(self, shots: Sequence[Shot], size: tuple[int, int] | None = None, **more: Any) -> np.ndarray:
        """What the system makes, uint8 `(T, H, W, 3)`."""
        return self.system.film(shots, size or self.size, **more).video.to_uint8()[0]

    def caption(self, clip: np.ndarray, episode: Episode, facets: Sequence[str] = ()) -> float:
        """Share of the facets that a caption names which a film shows; of `facets` only, where there are any."""
        right = follow(Reading(clip, self.system.config.fps), self.system.config.fps, episode.tags["scene"])
        chosen = [value for facet, value in right.items() if not facets or facet in facets]
        return float(np.mean(chosen)) if chosen else 0.0

    def coded(self, clip: np.ndarray) -> np.ndarray:
        """A uint8 clip through the codec."""
        return next(through_codec(self.system.codec, [clip], self.system.config.fps))

    def captions(
        self, add: Add, clip: np.ndarray, episode: Episode, nothing: np.ndarray, truth: np.ndarray | None = None, **how: Any
    ) -> None:
        """The caption figure of a film, of its truth (the episode, or what stands for it), and of doing nothing."""
        truth = episode.video if truth is None else truth
        for beside, shown in (("", clip), ("/floor", truth), ("/ceiling", self.coded(truth)), ("/chance", nothing)):
            add(f"caption{beside}", self.caption(shown, episode, **how))

    def seams(
        self, add: Add, clip: np.ndarray, truth: np.ndarray, other: np.ndarray, joins: Sequence[int], made: slice
    ) -> None:
        """`seam` and `within` of a film whose frames `made` lie against known ones at `joins`, the first frames behind."""
        coded, swapped = truth.copy(), truth.copy()
        coded[made], swapped[made] = self.coded(truth)[made], other[made]
        for beside, shown in (("", clip), ("/floor", truth), ("/ceiling", coded), ("/control", swapped)):
            for figure, value in joined(shown, joins).items():
                add(f"{figure}{beside}", value)

    def motion(self, add: Add, clip: np.ndarray, episode: Episode, made: range, step: int) -> None:
        """`motion` of a film, and of truth through the codec."""
        motion(add, clip, episode, made, step)

        def ceiling(figure: str, value: float) -> None:
            if figure in ("velocity", "found"):
                add(f"{figure}/ceiling", value)

        motion(ceiling, self.coded(episode.video), episode, made, step)


def changes(clip: np.ndarray) -> np.ndarray:
    """Mean absolute change from each frame to the next, `(T - 1,)`."""
    return np.abs(np.diff(clip.astype(np.float32), axis=0)).mean((1, 2, 3))


def joined(clip: np.ndarray, joins: Sequence[int]) -> dict[str, float]:
    """`seam` and `within` of a clip at the frames `joins`. Where nothing moves, no join is larger than any change."""
    steps = changes(clip)
    at = [frame - 1 for frame in joins]
    mean, largest = float(steps.mean()), float(np.delete(steps, at).max(initial=0.0))
    return {
        "seam": float(steps[at].mean()) / mean if mean > STILL else 1.0,
        "within": float(steps[at].max() <= max(largest, STILL)),
    }


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union of two bool arrays; 1 of two that are empty."""
    union = int((one | other).sum())
    return float((one & other).sum()) / union if union else 1.0


def motion(add: Add, clip: np.ndarray, episode: Episode, made: range, step: int, constant: np.ndarray | None = None) -> None:
    """Velocity of the first object in made frames: adds this file's `velocity`, its baselines and `found`.

    `clip` is uint8 `(T, H, W, 3)` as the episode's; `step` is 1 where made frames follow what is known, -1 where they lead
    to it. `constant`: what stands for the velocity that is kept, `(2,)` in short sides a frame along `step`; by default that
    of the two known frames next to what is made.
    """
    reading = Reading(clip, episode.fps)
    track = reading.objects(episode.tags["scene"]["objects"][:1])[0]
    exact = np.stack([episode.state["x"][:, 0], episode.state["y"][:, 0]], 1)  # (T, 2)
    whole = episode.state["visible"][:, 0] > 0.99
    last = made[0] - 1 if step > 0 else made[-1] + 1
    # One known frame has no velocity.
    before = exact[last] - exact[last - step] if 0 <= last - step < len(exact) else np.zeros(2)
    if constant is not None:
        before = constant
    for frame in made:
        near = frame - step
        if not (whole[frame] and whole[near]):
            continue
        true = exact[frame] - exact[near]
        seen = track is not None and bool(track.valid[frame] and track.valid[near])
        add("found", float(seen))
        if not seen:
            continue
        assert track is not None, "seen"
        moved = np.array([track.x[frame] - track.x[near], track.y[frame] - track.y[near]])
        for name, guess in (("velocity", moved), ("velocity/constant", before), ("velocity/copy", 0 * before)):
            add(name, float(np.linalg.norm(guess - true)) * episode.fps)


def _kept(add: Add, clip: np.ndarray, truth: np.ndarray) -> None:
    add("kept", min(psnr(t, c) for t, c in zip(truth, clip, strict=True)))


def _text_to_image(bench: Bench, number: int, add: Add) -> np.ndarray:
    episode, facets = bench.episode(number), LOOKS
    film = bench.system.generate(episode.short, bench.size, 1, seed=number).video.to_uint8()[0]
    # A picture is judged as a film that stands still.
    shown, truth, other = (np.repeat(clip[:1], 4, 0) for clip in (film, episode.video, bench.episode(number + 1).video))
    bench.captions(add, shown, episode, other, np.repeat(truth[:1], bench.frames, 0), facets=facets)
    return film


def _image_to_video(bench: Bench, number: int, add: Add) -> np.ndarray:
    episode, other = bench.episode(number), bench.episode(number + 1)
    first = {0: bench.video(episode.video[:1])}
    film = bench.film([Shot(episode.short, bench.frames, first)], seed=number)
    bench.captions(add, film, episode, np.repeat(episode.video[:1], bench.frames, 0))
    bench.seams(add, film, episode.video, other.video, [1], slice(1, None))
    _kept(add, film[:1], episode.video[:1])
    return film


def _first_and_last(bench: Bench, number: int, add: Add) -> np.ndarray:
    episode, other = bench.episode(number), bench.episode(number + 1)
    ends = {0: bench.video(episode.video[:1]), -1: bench.video(episode.video[-1:])}
    film = bench.film([Shot(episode.short, bench.frames, ends)], seed=number)
    bench.captions(add, film, episode, np.repeat(episode.video[:1], bench.frames, 0))
    bench.seams(add, film, episode.video, other.video, [1, bench.frames - 1], slice(1, -1))
    bench.motion(add, film, episode, range(1, bench.frames - 1), 1)
    _kept(add, film[[0, -1]], episode.video[[0, -1]])
    return film


def _extend(bench: Bench, number: int, add: Add) -> np.ndarray:
    episode, other, known = bench.episode(number), bench.episode(number + 1), bench.frames // 2
    shot = Shot(episode.short, bench.frames - known)
    film = bench.film([shot], past=bench.video(episode.video[:known]), seed=number)
    nothing = np.concatenate([episode.video[:known], np.repeat(episode.video[known - 1 : known], bench.frames - known, 0)])
    bench.captions(add, film, episode, nothing)
    bench.seams(add, film, episode.video, other.video, [known], slice(known, None))
    bench.motion(add, film, episode, range(known, bench.frames), 1)
    _kept(add, film[:known], episode.video[:known])
    return film


def _extend_backward(bench: Bench, number: int, add: Add) -> np.ndarray:
    episode, other, made = bench.episode(number), bench.episode(number + 1), bench.frames - bench.frames // 2
    film = bench.film([Shot(episode.short, made)], future=bench.video(episode.video[made:]), seed=number)
    nothing = np.concatenate([np.repeat(episode.video[made : made + 1], made, 0), episode.video[made:]])
    bench.captions(add, film, episode, nothing)
    bench.seams(add, film, episode.video, other.video, [made], slice(0, made))
    bench.motion(add, film, episode, range(made), -1)
    _kept(add, film[made:], episode.video[made:])
    return film


def _connect(bench: Bench, number: int, add: Add) -> np.ndarray:
    episode, other, third = bench.episode(number), bench.episode(number + 1), bench.frames // 3
    begin, end = third, bench.frames - third
    film = bench.film(
        [Shot(episode.short, end - begin)],
        past=bench.video(episode.video[:begin]),
        future=bench.video(episode.video[end:]),
        seed=number,
    )
    nothing = episode.video.copy()
    nothing[begin:end] = episode.video[begin - 1]
    bench.captions(add, film, episode, nothing)
    bench.seams(add, film, episode.video, other.video, [begin, end], slice(begin, end))
    bench.motion(add, film, episode, range(begin, end), 1)
    _kept(add, np.delete(film, np.s_[begin:end], 0), np.delete(episode.video, np.s_[begin:end], 0))
    # From one film to another there is no truth, but a cut.
    ends: dict[str, Any] = {"past": bench.video(episode.video[:begin]), "future": bench.video(other.video[end:])}
    two = bench.film([Shot(other.short, end - begin)], **ends, seed=number)
    for figure, value in joined(two, [begin, end]).items():
        add(f"{figure}/two", value)
    cut = np.abs(episode.video[begin - 1].astype(np.float32) - other.video[end]).mean()
    add("jump/two", float(changes(two)[begin - 1 : end].max() / max(cut, STILL)))
    return film


def _loop(bench: Bench, number: int, add: Add) -> np.ndarray:
    episode = bench.episode(number, ("billiard",))
    looped, plain = (
        bench.system.generate(episode.short, bench.size, bench.frames, seed=number, loop=loop).video.to_uint8()[0]
        for loop in (True, False)
    )
    for name, film in (("", looped), ("/control", plain)):
        thrice = np.concatenate([film, film, film])
        steps = changes(thrice)
        joins = [bench.frames - 1, 2 * bench.frames - 1]
        inner = np.delete(steps, joins)
        add(f"closing{name}", float(steps[joins].max() / max(float(inner.mean()), STILL)))
        add(f"within{name}", float(steps[joins].max() <= inner.max()))
        add(f"place{name}", float((inner < steps[joins].max()).mean() + (inner == steps[joins].max()).mean() / 2))
    add("colour", bench.caption(looped, episode, ("colour",)))
    add("colour/floor", bench.caption(episode.video, episode, ("colour",)))
    return looped


def _inpaint(bench: Bench, number: int, add: Add) -> np.ndarray:
    episode, (height, width) = bench.episode(number), bench.size
    mask = box((bench.frames, height, width), 0, width // 2, height, width)
    film = bench.system.inpaint(bench.video(episode.video), mask, episode.short, seed=number).video.to_uint8()[0]
    nothing = episode.video.copy()
    nothing[:, :, width // 2 :] = np.median(episode.video[:, :, width // 2 :], axis=(0, 2), keepdims=True)
    bench.captions(add, film, episode, nothing)
    _kept(add, film[:, :, : width // 2], episode.video[:, :, : width // 2])
    return film


def _outpaint(bench: Bench, number: int, add: Add) -> np.ndarray:
    wide = (bench.size[0], bench.size[1] + bench.size[1] // 2)
    episode, side = bench.episode(number, size=wide), bench.size[1] // 4
    canvas, mask = around(bench.video(episode.video[:, :, side:-side]).pixels, wide)
    film = bench.system.inpaint(Video(canvas, episode.fps), mask, episode.short, seed=number).video.to_uint8()[0]
    bench.captions(add, film, episode, Video(canvas, episode.fps).to_uint8()[0])
    _kept(add, film[:, :, side:-side], episode.video[:, :, side:-side])
    return film


def _edit(bench: Bench, number: int, add: Add) -> np.ndarray:
    episode = bench.episode(number)
    colour = episode.tags["scene"]["objects"][0]["color"]
    other = COLORS[(COLORS.index(colour) + 1 + number % (len(COLORS) - 1)) % len(COLORS)]
    text = episode.short.replace(colour, other)
    scene = {**episode.tags["scene"], "objects": [{**episode.tags["scene"]["objects"][0], "color": other}]}
    shown, before = episode.video, foreground(episode.video).astype(bool)
    for strength in (0.0, *STRENGTHS, 1.0):
        film = episode.video  # at 0 as it is, which must not be what the words say
        if strength:
            film = bench.system.edit(bench.video(episode.video), text, strength, seed=number).video.to_uint8()[0]
        right = follow(Reading(film, episode.fps), episode.fps, scene)
        add(f"caption/{strength}", float(np.mean(list(right.values()))))
        add(f"structure/{strength}", overlap(before, foreground(film).astype(bool)))
        if strength == STRENGTHS[-1]:
            shown = film
    return shown


def _blend(bench: Bench, number: int, add: Add) -> np.ndarray:
    """A film turns into another whose sentence is given."""
    one, two = bench.episode(number), bench.episode(number + len(MOVING) + 1)
    share = np.linspace(0, 1, bench.frames)[:, None, None, None]
    fade = ((1 - share) * one.video + share * two.video).round().astype(np.uint8)
    films = {"fade": fade}
    for strength in (*STRENGTHS, 1.0):
        film = bench.system.edit(bench.video(one.video), two.short, strength, seed=number, into=bench.video(two.video))
        films[str(strength)] = film.video.to_uint8()[0]
    part = max(1, bench.frames // 4)
    for name, film in films.items():
        colour = foreground(film).astype(bool)
        add(f"first/{name}", overlap(colour[:part], foreground(one.video[:part]).astype(bool)))
        add(f"last/{name}", overlap(colour[-part:], foreground(two.video[-part:]).astype(bool)))
        add(f"caption/{name}", bench.caption(film[-part:], two, LOOKS))
        tracks = Reading(film[part:-part], one.fps).tracks.values()
        seen = np.sum([track.present for track in tracks], axis=0) if tracks else np.zeros(1)
        single = np.all([track.single | ~track.present for track in tracks], axis=0) if tracks else np.zeros(1, bool)
        add(f"one/{name}", float(((seen == 1) & single).mean()))
    return films[str(STRENGTHS[1])]


def _long(bench: Bench, number: int, add: Add, rolling: Rolling | None = None) -> np.ndarray:
    frames = LONG * bench.frames
    episode = bench.episode(number, ("billiard", "bounce"), frames=frames)
    film = bench.film([Shot(episode.short, frames)], seed=number, rolling=rolling)
    for suffix, clip in (("", film), ("/floor", episode.video)):
        for window in range(LONG):
            part = Reading(clip[window * bench.frames : (window + 1) * bench.frames], episode.fps)
            wanted = [o["color"] for o in episode.tags["scene"]["objects"]]
            tracks = [part.tracks.get(colour) for colour in wanted]
            add(f"caption/{window}{suffix}", bench.caption(part.clip, episode, LOOKS))
            one = np.mean([0.0 if t is None else float(t.single.mean()) for t in tracks])
            add(f"one_of_each/{window}{suffix}", float(one))
            stray = sum(t.present.mean() > 0.2 for name, t in part.tracks.items() if name not in wanted)
            add(f"stray/{window}{suffix}", float(stray))
    return film[::LONG]


def _storyboard(bench: Bench, number: int, add: Add) -> np.ndarray:
    parts = [bench.episode(2 * number), bench.episode(2 * number + 1)]
    pictures: list[dict[int, Video]] = [{}, {0: bench.video(parts[1].video[:1])}]
    film = bench.film(
        [Shot(part.short, bench.frames, picture) for part, picture in zip(parts, pictures, strict=True)], seed=number
    )
    for place, (part, other) in enumerate(zip(parts, parts[::-1], strict=True)):
        segment = film[place * bench.frames : (place + 1) * bench.frames]
        bench.captions(add, segment, part, other.video)
    for how, cut in (("going_on", False), ("cut", True)):
        whole = bench.film([Shot(part.short, bench.frames, cut=cut) for part in parts], seed=number)
        for place, (name, part) in enumerate(zip(("first", "second"), parts, strict=True)):
            add(f"caption/{how}/{name}", bench.caption(whole[place * bench.frames : (place + 1) * bench.frames], part))
    return film[::2]


def _refine(bench: Bench, number: int, add: Add) -> np.ndarray:
    large = (bench.size[0] * 3 // 2, bench.size[1] * 3 // 2)
    episode = bench.episode(number, size=large)
    small = bench.system.generate(episode.short, bench.size, bench.frames, seed=number)
    film = bench.system.edit(small.video, episode.short, 0.6, seed=number, size=large).video.to_uint8()[0]
    direct = bench.system.generate(episode.short, large, bench.frames, seed=number).video.to_uint8()[0]
    bench.captions(add, film, episode, bench.episode(number + 1, size=large).video)
    add("caption/small", bench.caption(small.video.to_uint8()[0], episode))
    add("caption/direct", bench.caption(direct, episode))
    enlarged = Video(resize(small.video.pixels, large), episode.fps).to_uint8()[0]
    layout = foreground(enlarged).astype(bool)
    add("structure", overlap(layout, foreground(film).astype(bool)))
    add("structure/direct", overlap(layout, foreground(direct).astype(bool)))
    return film


TASKS: dict[str, Callable[[Bench, int, Add], np.ndarray]] = {
    "text_to_image": _text_to_image,
    "image_to_video": _image_to_video,
    "first_and_last": _first_and_last,
    "extend": _extend,
    "extend_backward": _extend_backward,
    "connect": _connect,
    "loop": _loop,
    "inpaint": _inpaint,
    "outpaint": _outpaint,
    "edit": _edit,
    "blend": _blend,
    "storyboard": _storyboard,
    "refine": _refine,
    "long": _long,
}
"""A new task is a function and a line here."""


def evaluate_tasks(
    system: System,
    n: int = 24,
    *,
    names: Sequence[str] = tuple(TASKS),
    seed: int = 0,
    show: Show | None = None,
    progress: bool = True,
) -> Figures:
    """Figures of `n` test episodes for each of `names`, names as in this file's head; `long` is tried on a third of them.

    `show` is called with the first film of each task. Raises UserError on n below 1 or an unknown task.
    """
    if n < 1:
        raise UserError(f"n must be at least 1, got {n}; raise it")
    unknown = [name for name in names if name not in TASKS]
    if unknown:
        raise UserError(f"there is no task {unknown[0]!r}; choose among {', '.join(TASKS)}")
    values: dict[str, list[float]] = defaultdict(list)
    bench = Bench(system, seed)
    counts = {name: max(1, n // 3) if name == "long" else n for name in names}
    with progress_bar("Trying tasks", sum(counts.values()), progress) as tick, torch.inference_mode():
        for name in names:

            def add(figure: str, value: float, name: str = name) -> None:
                values[f"task/{name}/{figure}"].append(value)

            for number in range(counts[name]):
                film = TASKS[name](bench, number, add)
                if show is not None and number == 0:
                    show(film, name.replace("_", " "))
                tick(1)
    out: Figures = {}
    for key, found in values.items():
        out[key] = float(np.min(found) if key.endswith("/kept") else np.mean(found))
    return out | {f"task/{name}/n": float(count) for name, count in counts.items()}


def evaluate_sizes(system: System, n: int = 24, *, seed: int = 0, progress: bool = True) -> Figures:
    """Caption following and law card at sizes and lengths beside the trained one.

    `size/HxW/caption` and `length/T/caption` of `n` episodes with one moving object, `size/HxW/law/LAW` and `length/T/law/LAW`
    of these and of `n` in which things meet or hide; beside each `/floor` (truth), `/ceiling` (truth through the codec), and
    for laws `/n` and `/evaluable`. One frame is judged as `text_to_image` is, and obeys nothing. Raises UserError on n below 1.
    """
    if n < 1:
        raise UserError(f"n must be at least 1, got {n}; raise it")
    bench = Bench(system, seed)
    native = (bench.size, bench.frames)
    forms = [(f"size/{h}x{w}", (h, w), native[1]) for h, w in SIZES] + [(f"length/{t}", native[0], t) for t in LENGTHS]
    out: Figures = {}
    works = sum(n if frames == 1 else 2 * n for _, _, frames in forms)
    with progress_bar("Trying sizes", works, progress) as tick, torch.inference_mode():
        for name, size, frames in forms:
            captions: dict[str, list[float]] = defaultdict(list)
            laws = {beside: Tally() for beside in ("", "/floor", "/ceiling")}
            facets, times = (LOOKS, 4) if frames == 1 else ((), 1)
            for kinds in (MOVING,) if frames == 1 else (MOVING, LAWFUL):
                for number in range(n):
                    episode = bench.episode(number, kinds, frames=frames, size=size)
                    film = system.generate(episode.short, size, frames, seed=number).video.to_uint8()[0]
                    coded = next(through_codec(system.codec, [episode.video], episode.fps))
                    for beside, clip in (("", film), ("/floor", episode.video), ("/ceiling", coded)):
                        if kinds is MOVING:
                            captions[beside].append(bench.caption(np.repeat(clip, times, 0), episode, facets))
                        if frames > 1:
                            laws[beside].add(Reading(clip, episode.fps), episode.tags["scene"], tuple(LAWS), caption=False)
                    tick(1)
            out |= {f"{name}/caption{beside}": float(np.mean(found)) for beside, found in captions.items()}
            for beside, tally in laws.items():
                for key, value in tally.figures().items():
                    if key.endswith("/evaluable"):
                        out[f"{name}/{key.removesuffix('/evaluable')}{beside}/evaluable"] = value
                    elif not key.endswith("/n"):
                        out[f"{name}/{key}{beside}"] = value
                    elif not beside:
                        out[f"{name}/{key}"] = value
    return out
