"""Figures of what training never shows, beside the same kinds of what it does.

After How Far is Video Generation from World Model (Kang et al. 2024): a held-out value between those of the training is one
thing, one outside of them another, a composition of known parts a third. Splits are those of the worlds: colours with shapes,
sizes with kinds, a hole and a shell of speeds and radii, kinds composed.

Names are `split/SPLIT/FIGURE`; FIGURE is `caption`, share of the facets that are right of a film made from words, and of an
extension of the episode's first half `velocity`, `found` and their baselines as `evaluate.tasks` has them. Beside each stands
`/trained`, the same figure of the same kinds from the training's own compositions, and beside captions `/floor`, truth, and
`/ceiling`, truth through the codec. Composed kinds have no such twin.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch

from tubelet.core.errors import UserError
from tubelet.evaluate.report import Figures, progress_bar, through_codec
from tubelet.evaluate.tasks import Bench, motion
from tubelet.generate.system import Shot, System
from tubelet.worlds.constants import COMPOSED_KINDS
from tubelet.worlds.plans import kinds_of

HELD_OUT = ("held_out_pair", "held_out_size", "hole", "shell", "compose")
TABLE = ("billiard",)
"""Kinds in which many things move: whose velocity is meant is not said."""


def evaluate_splits(system: System, n: int = 24, *, seed: int = 0, progress: bool = True) -> Figures:
    """Figures of `n` test episodes of each held-out split, and as many of its twin. Raises UserError on n below 1."""
    if n < 1:
        raise UserError(f"n must be at least 1, got {n}; raise it")
    bench, values = Bench(system, seed), defaultdict(list)
    pools = [(name, split, kinds) for name in HELD_OUT for split, kinds in _pools(name)]
    with progress_bar("Trying splits", n * len(pools), progress) as tick, torch.inference_mode():
        for name, split, kinds in pools:
            twin = "/trained" if split == "train" else ""

            def add(figure: str, value: float, name: str = name, twin: str = twin) -> None:
                values[f"split/{name}/{figure}{twin}"].append(value)

            for number in range(n):
                episode, known = bench.episode(number, kinds, split=split), bench.frames // 2
                add("caption", bench.caption(bench.film([Shot(episode.short, bench.frames)], seed=number), episode))
                coded = next(through_codec(system.codec, [episode.video], episode.fps))
                add("caption/floor", bench.caption(episode.video, episode))
                add("caption/ceiling", bench.caption(coded, episode))
                shot, past = Shot(episode.short, bench.frames - known), bench.video(episode.video[:known])
                motion(add, bench.film([shot], past=past, seed=number), episode, range(known, bench.frames), 1)
                tick(1)
    return {key: float(np.mean(found)) for key, found in values.items()} | {f"split/{name}/n": float(n) for name in HELD_OUT}


def _pools(name: str) -> list[tuple[str, tuple[str, ...]]]:
    """(split, kinds) of a held-out split and, where its kinds are also trained on, of its twin."""
    kinds = tuple(kind for kind in kinds_of(name) if kind not in TABLE)
    return [(name, kinds), *([("train", kinds)] if not set(kinds) & set(COMPOSED_KINDS) else [])]
