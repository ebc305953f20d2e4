"""A tiny random system on disk, and the command line called in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tiny_system import save_tiny

from tubelet.cli import main
from tubelet.core.files import write_json
from tubelet.core.types import Video
from tubelet.data.schema import Record
from tubelet.data.shards import ShardWriter
from tubelet.generate.system import load
from tubelet.worlds import WORLDS, foreground


class Said(NamedTuple):
    """How a command ended: exit code, stdout, stderr."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("systems") / "tiny")


@pytest.fixture(scope="session")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a finished run of worlds-64 leaves, of a random codec on clips of 5 frames of 32 x 32 pixels, six kinds in turn."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    folder.mkdir()
    (folder / "system").symlink_to(tiny)
    codec = load(tiny, device="cpu", dtype="float32").codec
    kinds = ("slide", "fall", "bounce", "parabola", "collision", "billiard")
    with ShardWriter(folder / "latents") as writer:
        for number in range(18):
            episode = WORLDS["phys2d"].sample(number, 32, 32, 5, 8.0, kind=kinds[number % len(kinds)])
            latent = codec.encode(Video.from_uint8(episode.video, 8.0).pixels)[0].to(torch.bfloat16)
            colour = torch.from_numpy(foreground(episode.video)[:, ::8, ::8].copy())
            captions = [{"text": getattr(episode, kind), "kind": kind} for kind in ("dense", "short", "human")]
            record = Record(f"phys2d-{number}", {"latent": latent, "foreground": colour}, {"captions": captions, "fps": 8.0})
            writer.add(record)
    write_json(folder / "export.json", {"export": 0.0})
    return folder


@pytest.fixture
def tubelet(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """`tubelet(*words)`: the command line in this process."""

    def call(*words: object) -> Said:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert isinstance(stop.value.code, int)
        return Said(stop.value.code, out, err)

    return call


@pytest.fixture
def refused(tubelet: Callable[..., Said]) -> Callable[..., str]:
    """`refused(*words)`: the one sentence with which a wrong input ends; fails when it does not end so."""

    def call(*words: object) -> str:
        code, out, err = tubelet(*words)
        assert (code, out) == (2, ""), (code, out, err)
        assert err.startswith("tubelet: ")
        assert err.count("\n") == 1, f"one sentence, got {err}"
        assert "Traceback" not in err
        return err

    return call
