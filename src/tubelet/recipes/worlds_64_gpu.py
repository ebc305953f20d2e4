"""worlds-64-gpu: the fifth part of the shipped system's training, on an accelerator. As worlds-64-all, with more films.

Paper: the Sora report (2024), "Scaling transformers for video generation": the same network, more compute.
Command: tubelet train worlds-64-gpu
Cost: the shipped run took 336 s on one H200 with sixteen cores, 311 of them for films; here they first wait for their clips.
Score: in distribution / held out, 100 prompts: colour .87 / .81, shape .87 / .83, size .87 / .82, direction .82 / .78, event
.86 / .72, by the solver of that day (docs/log.md, 2026-11-26); worlds-64-decoder and -long follow.

Batches are eight times those of worlds-64-all, the rates of learning a quarter higher, the clips more. The shipped run saw the
first 8,000 of them alone for its first 460 updates, while the others were rendered, and its rates fell with the time; here all
clips are there from the first update, and the rates fall with the updates.
"""

from __future__ import annotations

from dataclasses import replace

from tubelet.recipes import worlds_64_all
from tubelet.recipes.worlds import WorldsRecipe
from tubelet.train.optim import OptimizerConfig


def recipe() -> WorldsRecipe:
    """Goes on from where `tubelet train worlds-64-all` leaves its system."""
    fourth = worlds_64_all.recipe()
    return replace(
        fourth,
        start="runs/worlds-64-all/system",
        clips=replace(fourth.clips, denoiser=60_000),
        budget=69_632,
        sampling=replace(fourth.sampling, guidance=2.0),
        workers=14,
        denoise=replace(
            fourth.denoise,
            steps=1955,
            batch=256,
            warmup=40,
            compile=False,
            optimizer=OptimizerConfig(learning_rate=2.5e-3, learning_rate_adamw=1.2e-3),
        ),
    )
