"""worlds-64-all: the fourth part of the shipped system's training. All kinds, nearly alike, at four sizes.

Paper: the Sora report (2024), "Sampling flexibility" and "Prompting with images and videos": one set of weights for all of it.
Command: tubelet train worlds-64-all
Cost: 60 minutes on two cores with fast bf16, much other work beside it, after worlds-64-sizes: encoding 10, films 50.
Score: in distribution / held out, 100 prompts: colour .80 / .78, shape .79 / .82, size .81 / .79, direction .77 / .74, event
.77 / .67 by the solver of that day (docs/log.md, 2026-11-26); worlds-64-gpu, -decoder and -long follow.

worlds-64-sizes showed the kinds with several objects so often, and other sizes so often, that single objects at the native size
got worse. Here two clips in three have the native size, and no kind comes more than three times as often as another. Dense
captions, which `tubelet generate` makes of a prompt, say where each thing starts, and come oftener.
"""

from __future__ import annotations

from dataclasses import replace

from tubelet.generate.engine import Sampling
from tubelet.recipes import worlds_64_sizes
from tubelet.recipes.worlds import Clips, WorldsRecipe
from tubelet.train.optim import OptimizerConfig

KINDS = {
    "billiard": 0.2,
    "collision": 0.13,
    "paint": 0.15,
    "slide": 0.08,
    "fall": 0.1,
    "bounce": 0.09,
    "parabola": 0.1,
    "occlude": 0.07,
    "eat": 0.08,
}


def recipe() -> WorldsRecipe:
    """Goes on from where `tubelet train worlds-64-sizes` leaves its system."""
    third = worlds_64_sizes.recipe()
    square = ((64, 64), (64, 64))
    return replace(
        third,
        start="runs/worlds-64-sizes/system",
        clips=Clips(
            denoiser=45_000,
            kinds=KINDS,
            sizes=(*square, (64, 112), *square, (112, 64), *square, (96, 96)),
        ),
        sampling=Sampling(guidance=1.5, shift=2.0),
        captions={"short": 0.35, "human": 0.2, "dense": 0.45},
        masks=third.masks | {"unconditional": 10.0},
        denoise=replace(
            third.denoise,
            steps=2200,
            optimizer=OptimizerConfig(learning_rate=2e-3, learning_rate_adamw=1e-3),
        ),
    )
