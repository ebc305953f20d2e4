"""worlds-64-sizes: the third part of the shipped system's training. Clips of four sizes, and oftener what is hard.

Paper: the Sora report (2024), "Sampling flexibility": one model trained on clips of their own sizes.
Command: tubelet train worlds-64-sizes
Cost: 100 minutes on two cores with fast bf16, much other work beside it, after worlds-64-tasks: encoding 10, films 90.
Score: all facets followed at 64 x 64 .92 (.92 before), 64 x 112 .90 (.05), 112 x 64 .67 (.00), 96 x 96 .78 (.00), twelve films
of one thing each; with several things the native size lost (docs/log.md, 2026-11-25), which worlds-64-all takes back.

One object on its own is learned by then, several are not: tables, collisions and paintings make up two thirds of the clips.
Half of the clips are square and small; a step sees clips of one size.
"""

from __future__ import annotations

from dataclasses import replace

from tubelet.diffusion.paths import SigmaSampling
from tubelet.recipes import worlds_64_tasks
from tubelet.recipes.worlds import Clips, WorldsRecipe

KINDS = {
    "billiard": 0.28,
    "collision": 0.19,
    "paint": 0.19,
    "slide": 0.05,
    "fall": 0.07,
    "bounce": 0.06,
    "parabola": 0.06,
    "occlude": 0.05,
    "eat": 0.05,
}


def recipe() -> WorldsRecipe:
    """Goes on from where `tubelet train worlds-64-tasks` leaves its system."""
    second = worlds_64_tasks.recipe()
    return replace(
        second,
        start="runs/worlds-64-tasks/system",
        clips=Clips(
            denoiser=36_000,
            kinds=KINDS,
            sizes=((64, 64), (64, 112), (64, 64), (112, 64), (64, 64), (96, 96)),
        ),
        masks=second.masks | {"box": 1.0},
        grouping="buckets",
        budget=8704,
        sigma=SigmaSampling(shift=3.0, tokens=272),
        denoise=replace(second.denoise, steps=3800),
    )
