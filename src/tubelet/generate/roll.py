"""A timeline filled window by window: what makes extensions, connections, storyboards and films of any length."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tubelet.generate.engine import GREATEST_SEED, Engine, Progress, Request, Sampling
from tubelet.tasks.timeline import Timeline, Window


def window_seed(seed: int, number: int) -> int:
    """The seed of a film's n-th window; the first has the film's own, so that a short film is the one made at once."""
    return (seed + number * 0x9E3779B97F4A7C15) % (GREATEST_SEED + 1)


def roll(
    engine: Engine,
    texts: Sequence[str],
    seed: int,
    timeline: Timeline,
    windows: Sequence[Window],
    sampling: Sampling,
    *,
    haze: float = 0.0,
    progress: Progress | None = None,
    timings: dict[str, float] | None = None,
) -> Tensor:
    """All latents `(1, C, T, H, W)` of a timeline, made in the order of `windows`; each reads the text of its span.

    `haze`: the noise level at which a window that looks back on frames of an earlier one is shown all that it knows: it would
    else take their small errors for truth and enlarge them. Raises UserError as `Engine.denoise`.
    """
    clean, known = timeline.clean.clone(), list(timeline.known)
    total = sampling.steps * len(windows)
    for number, window in enumerate(windows):
        frames = list(window.frames)
        fresh = [place for place, frame in enumerate(frames) if not known[frame]]
        looks_at_own = any(known[frame] and not timeline.known[frame] for frame in frames)
        given = Timeline(clean, tuple(known)).given(frames, haze if looks_at_own else 0.0, window.times)

        def stepped(done: int, _steps: int, before: int = number * sampling.steps) -> None:
            if progress is not None:
                progress(before + done, total)

        _, C, T, H, W = given.clean.shape
        request = Request(texts[window.span], window_seed(seed, number))
        latents = engine.denoise([request], (C, T, H, W), sampling, given=given, progress=stepped, timings=timings)
        for place in fresh:
            clean[:, :, frames[place]] = latents[:, :, place]
            known[frames[place]] = True
    return clean
