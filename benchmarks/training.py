"""A training step of the shipped recipe, as a share of the rate of a plain matrix product measured beside it."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch

from benchmarks.timing import Figure, Settings, attention, compare, macs, product
from tubelet.models.spacetime import Spacetime
from tubelet.nn.attention import fused
from tubelet.recipes.worlds_64 import recipe
from tubelet.runtime.cpu import attention_as_products
from tubelet.runtime.device import fast_bf16
from tubelet.text.own import OwnTextEncoder
from tubelet.train.ema import PowerAverage
from tubelet.train.optim import Optimizer
from tubelet.train.text_to_video import TextToVideo, TextToVideoObjective

PRODUCTS = 40
CAPTION = "A large red ball bounces once and rolls to the right."


def training(settings: Settings, compiled: bool | None = None) -> Iterator[Figure]:
    """Forward, backward, optimiser and average of one batch; its work is three forwards, as is usual."""
    run = recipe()
    config = run.denoise
    compiled = config.compile if compiled is None else compiled
    bf16 = fast_bf16()
    dtype = torch.bfloat16 if bf16 else torch.float32
    torch.manual_seed(0)
    model = TextToVideo(OwnTextEncoder(run.text), Spacetime(run.denoiser)).train()
    clips = run.clips
    frames, rows, columns = clips.frames, clips.size[0] // 8, clips.size[1] // 8
    batch = {
        "latent": torch.randn(config.batch, run.denoiser.in_channels, frames, rows, columns),
        "foreground": torch.zeros(config.batch, frames, rows, columns, dtype=torch.uint8),
        "caption": [CAPTION] * config.batch,
    }
    # Images are steps of a seventeenth of the work: the share is that of films.
    objective = TextToVideoObjective(
        prediction=run.prediction, sampling=run.sigma, text_drop=run.text_drop, image_share=0.0, foreground=run.foreground
    )
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad(), attention(fused):
        work = 3 * 2.0 * macs(lambda: objective(copy.deepcopy(model), batch, rng))
    if compiled:
        for blocks in (model.denoiser.blocks, model.text.blocks):
            for block in blocks:  # type: ignore[union-attr]
                block.compile()
    optimizer, average = Optimizer(model, config.optimizer, dtype), PowerAverage(model, config.ema)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = objective(model, batch, rng)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(optimizer.parameters, config.clip)
        optimizer.step(1e-3)
        average.update(model)
        optimizer.zero_grad()

    multiply, operations = product(dtype)

    def products() -> None:
        """Many in a row: a single one between two steps would be timed with cold caches and sleeping threads."""
        for _ in range(PRODUCTS):
            multiply()

    with attention(attention_as_products):
        seconds = compare({"step": step, "product": products}, settings)
    rate = PRODUCTS * operations / seconds["product"]
    how = f"batch {config.batch}, {'bf16' if bf16 else 'fp32'}, {'compiled' if compiled else 'not compiled'}"
    yield Figure("training/share", work / seconds["step"] / rate, "of the matrix rate", f"F.linear; {how}", ">= 0.6")
    yield Figure("training/matrix_rate", rate / 1e9, "GFLOP/s", "F.linear, 2560 x 384 x 1536")
    yield Figure("training/clips", config.batch / seconds["step"], "clips/s")
