"""worlds-64-large: a denoiser of 25 million parameters, for an accelerator. Words, tasks and four sizes at once.

Paper: the Sora report (2024): one set of weights for words, pictures, films and sizes.
Command: tubelet train worlds-64-large
Cost: not measured; the one try ended before its training began (docs/log.md, 2026-11-26).
Score: none yet.

The codec is the one that worlds-64 trained on a CPU. The denoiser has 2.7 times that one's parameters, the text encoder is
twice as deep, and the clips are three times as many: sixteen cores render and encode 120,000 of them in 190 seconds. The blocks
are not compiled: many forms of masks and sizes make many graphs, and half an hour is over before they pay.
"""

from __future__ import annotations

from dataclasses import replace

from tubelet.models.spacetime import SpacetimeConfig
from tubelet.recipes import worlds_64_all
from tubelet.recipes.worlds import WorldsRecipe
from tubelet.text.own import OwnTextConfig
from tubelet.train.loop import TrainConfig
from tubelet.train.optim import OptimizerConfig


def recipe() -> WorldsRecipe:
    """The codec of `worlds-64`, everything else anew."""
    last = worlds_64_all.recipe()
    return replace(
        last,
        name="worlds-64-large",
        start=None,
        codec_from="worlds-64",
        clips=replace(last.clips, denoiser=120_000),
        denoiser=SpacetimeConfig(width=384, depth=10, heads=6, in_channels=8, patch=(1, 2, 2), text_width=256),
        text=OwnTextConfig(vocab_size=1024, width=256, depth=4, heads=4),
        sketch_frames=5,
        sketch=TrainConfig(
            steps=2400,
            batch=512,
            warmup=100,
            end=0.6,
            optimizer=OptimizerConfig(learning_rate=4e-3, learning_rate_adamw=2e-3),
            compile=False,
            checkpoint_minutes=3.0,
        ),
        denoise=TrainConfig(
            steps=5000,
            batch=256,
            warmup=50,
            optimizer=OptimizerConfig(learning_rate=2.4e-3, learning_rate_adamw=1.2e-3),
            compile=False,
            checkpoint_minutes=3.0,
        ),
        budget=69_632,
        workers=14,
    )
