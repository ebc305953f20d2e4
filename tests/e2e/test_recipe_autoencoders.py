"""The experiment on autoencoders in small: every row is trained against its adversary, stopped, resumed and measured."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tubelet.codecs.image_kl import ImageKL, ImageKLConfig
from tubelet.codecs.magvit2 import MAGVIT2, MAGVIT2Config
from tubelet.core.config import from_dict
from tubelet.core.files import read_json
from tubelet.core.weights import load_module
from tubelet.recipes import autoencoders
from tubelet.recipes.autoencoders import ROWS, Autoencoders, stretches, words_of
from tubelet.train import checkpoint
from tubelet.train.adversary import MAGVITContestObjective
from tubelet.worlds.constants import TRAIN_SEEDS


def settings(*several: str) -> list[str]:
    return [word for one in several for word in ("--set", one)]


def training(name: str) -> list[str]:
    return settings(*(f"{name}.{one}" for one in ("steps=3", "batch=2", "warmup=0", "precision=fp32", "progress=false")))


SMALL = [
    *settings("size=[32,32]", "frames=5", "seen=3", "clips=6", "n=4", "workers=1"),
    *settings("kl.width=8", "kl.groups=4", "kl.multipliers=[1,1]", "kl_loss.start=1", "patch_width=4", "patch_layers=1"),
    *settings("magvit.width=4", "magvit.groups=2", "magvit.channels=5", "magvit_loss.start=2"),
    *settings("clip_width=4", "clip_multipliers=[2,2]", "clip_groups=2"),
    *training("kl_train"),
    *training("magvit_train"),
]


def test_autoencoders_stopped_and_resumed(
    tmp_path: Path, tubelet: Callable, refused: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["train", "autoencoders", "--out", tmp_path, *SMALL]
    calls, loss = 0, MAGVITContestObjective.__call__

    def interrupted(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 8:  # after two rows of three steps and the inflated row's first step, of pictures: its films begin
            os.kill(os.getpid(), signal.SIGINT)
        return loss(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(MAGVITContestObjective, "__call__", interrupted)
        assert tubelet(*words).code == 130
    assert not (tmp_path / "table.md").exists()
    assert (tmp_path / "MAGVIT-v2--inflated" / "pictures" / "checkpoints").exists()
    assert tubelet(*words).code == 0

    table = json.loads((tmp_path / "table.json").read_text())
    assert list(table) == [*ROWS, "truth"]
    truth = table["truth"]
    assert truth["psnr"] == 100
    assert truth["perceptual"] == 0
    assert truth["caption/shape"] == 1
    for name in ROWS:
        row = table[name]
        assert row["psnr"] < 40
        assert row["perceptual"] > 0
        assert row["steps"] == 3
        assert row["train_seconds"] > 0
        assert row["macs"] > 0
        assert 0 <= row["law/steady"] <= 1
        assert ("used" in row) == name.startswith("MAGVIT")
        assert 0 < row.get("used", 1) <= 1
    for plain, judged in (("KL-f8", "KL-f8, adversary"), ("MAGVIT-v2", "MAGVIT-v2, adversary")):
        assert table[plain]["parameters"] == table[judged]["parameters"], "the discriminator is no part of the codec"
        assert table[plain]["psnr"] != table[judged]["psnr"], "it has spoken"
    assert (tmp_path / "table.md").read_text().count("\n") == 2 + len(table)
    assert (tmp_path / "sheet.png").exists()

    # The step goes on where the pictures' ended, and every codec is kept.
    kept = checkpoint.newest(tmp_path / "MAGVIT-v2--inflated" / "checkpoints")
    assert kept is not None
    assert kept.step == 2
    assert int(kept.tensors("model")["step"]) == 3
    codec = ImageKL(from_dict(ImageKLConfig, read_json(tmp_path / "KL-f8" / "codec.json")))
    load_module(tmp_path / "KL-f8" / "codec.safetensors", codec)
    assert codec.mean.abs().min() > 0, "measured on latents"
    tokenizer = MAGVIT2(from_dict(MAGVIT2Config, read_json(tmp_path / "MAGVIT-v2--inflated" / "codec.json")))
    load_module(tmp_path / "MAGVIT-v2--inflated" / "codec.safetensors", tokenizer)
    assert words_of(tokenizer, torch.zeros(9, 5, 32, 32, 3, dtype=torch.uint8)).shape == (9, 5, 4, 4)

    assert "begun with other settings of 'clips'" in refused(*words, *settings("clips=7"))
    words[3] = tmp_path / "other"
    assert "lower magvit_loss.start, or raise magvit_train.steps" in refused(*words, *settings("magvit_loss.start=3"))
    assert "begin at step 9 of 3; lower kl_loss.start" in refused(*words, *settings("kl_loss.start=9"))
    assert "do not divide into cells of 8" in refused(*words, *settings("size=[32,36]"))
    assert "sees 1 to 5 frames" in refused(*words, *settings("seen=6"))
    assert "frames must be 1 + a multiple of 2" in refused(*words, *settings("magvit.halve_time=[false,false,true]", "seen=4"))
    assert "no row 'VAE'" in refused(*words, *settings('rows=["VAE"]'))
    assert "kinds are some of" in refused(*words, *settings('kinds=["paint"]'))


def test_stretches_meet_at_their_ends() -> None:
    clips = torch.arange(2 * 9).view(2, 9, 1, 1, 1).expand(2, 9, 4, 4, 3)
    found = stretches(clips, 5)
    assert found.shape == (4, 5, 4, 4, 3)
    assert found[:, :, 0, 0, 0].tolist() == [[first + n for n in range(5)] for first in (0, 4, 9, 13)]
    assert stretches(clips, 9).shape == (2, 9, 4, 4, 3)
    pictures = stretches(clips, 1)
    assert pictures.shape == (18, 1, 4, 4, 3)
    assert pictures[:, 0, 0, 0, 0].tolist() == list(range(18))


def test_training_clips_are_of_training_seeds() -> None:
    assert autoencoders.TRAIN_SEED + Autoencoders().clips - 1 in TRAIN_SEEDS
