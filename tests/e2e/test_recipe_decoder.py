"""The decoder's own training at toy size: latents stay what they were, films are drawn anew, all else is as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

from tubelet.generate.system import load


def test_the_decoder_alone_is_trained(tiny: Path, tmp_path: Path, tubelet: Callable, refused: Callable) -> None:
    words = ("train", "worlds-64-decoder", "--out", tmp_path / "run", "--set", f"start={tiny}", "--set", "clips=3")
    words += ("--set", "sizes=[[32,32],[48,32]]", "--set", "n=2", "--set", "frames=5")
    words += tuple(
        word for setting in ("steps=4", "batch=2", "warmup=0", "precision=fp32") for word in ("--set", f"train.{setting}")
    )
    assert tubelet(*words).code == 0
    before, after = load(tiny, device="cpu", dtype="float32"), load(tmp_path / "run" / "system", device="cpu", dtype="float32")
    film = torch.rand(1, 3, 5, 48, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = before.codec.encode(film)
    torch.testing.assert_close(after.codec.encode(film), latents, rtol=0, atol=0)
    assert not torch.equal(after.codec.decode(latents), before.codec.decode(latents))
    for name in ("denoiser", "text"):
        for key, value in getattr(before, name).state_dict().items():
            assert torch.equal(getattr(after, name).state_dict()[key], value), key
    assert (after.config.name, after.config.defaults) == (before.config.name, before.config.defaults)
    assert after.digest != before.digest
    assert after.config.training["decoder_steps"] == 4
    table = json.loads((tmp_path / "run" / "table.json").read_text())
    assert set(table) == {
        f"{size}/{measure}/{when}"
        for size in ("32x32", "48x32", "64x96")
        for measure in ("psnr", "psnr_foreground")
        for when in ("before", "after")
    }
    # The same command trains no further.
    assert tubelet(*words).code == 0
    assert load(tmp_path / "run" / "system", device="cpu").digest == after.digest

    other = ("train", "worlds-64-decoder", "--out", tmp_path / "no", "--set", f"start={tiny}")
    assert "clips at least train.batch" in refused(*other, "--set", "clips=3")
    assert "sizes must not be empty" in refused(*other, "--set", "sizes=[]")
    assert "height" in refused(*other, "--set", "sizes=[[33,32]]")
    assert "there is no system" in refused("train", "worlds-64-decoder", "--out", tmp_path / "no", "--set", "start=worlds-65")
    assert not (tmp_path / "no").exists()
