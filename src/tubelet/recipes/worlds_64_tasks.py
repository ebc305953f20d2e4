"""worlds-64-tasks: the second part of the shipped system's training. The same films, a part of them with some cells known.

Paper: the Sora report (2024), "Prompting with images and videos"; the masks of VDT (Lu et al. 2023, section 3.3).
Command: tubelet train worlds-64-tasks
Cost: 95 minutes on two cores with fast bf16, short tests beside it, after worlds-64.
Score: in distribution / held out, 100 prompts: colour .79 / .79, shape .79 / .82, size .79 / .81, direction .73 / .73, event
.73 / .77 by the solver of that day (docs/log.md, 2026-11-25); worlds-64-sizes, -all, -gpu, -decoder and -long
follow.
"""

from __future__ import annotations

from dataclasses import replace

from tubelet.generate.engine import Sampling
from tubelet.recipes import worlds_64
from tubelet.recipes.worlds import WorldsRecipe
from tubelet.train.optim import OptimizerConfig

MASKS = {
    "unconditional": 6.0,
    "first": 1.0,
    "last": 0.4,
    "both": 0.6,
    "prefix": 1.0,
    "suffix": 0.5,
    "ends": 0.5,
    "box": 0.5,
    "one_frame": 0.3,
    "some_frames": 0.2,
}
"""More than half of the films are made from words alone: that is what is hardest, and what most people ask for."""


def recipe() -> WorldsRecipe:
    """Goes on from where `tubelet train worlds-64` leaves its system."""
    first = worlds_64.recipe()
    return replace(
        first,
        start="runs/worlds-64/system",
        sketch=None,
        decoder_train=None,
        masks=MASKS,
        haze=0.2,
        sampling=Sampling(guidance=2.5, shift=2.0),
        denoise=replace(
            first.denoise,
            steps=4500,
            batch=32,
            warmup=60,
            optimizer=OptimizerConfig(learning_rate=3e-3, learning_rate_adamw=1.3e-3),
            sample_every=500,
        ),
    )
