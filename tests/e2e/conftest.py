"""A tiny random system on disk, the command line called in this process, and a browser before a server."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from studio_stage import Media, Stage, Visit, Worker, browser, config_of, film_in
from tiny_system import save_tiny

from tubelet.cli import main
from tubelet.core.files import write_json
from tubelet.core.types import Video
from tubelet.data.schema import Record
from tubelet.data.shards import ShardWriter
from tubelet.generate.system import load
from tubelet.serve.jobs import Jobs
from tubelet.serve.store import Store
from tubelet.worlds import WORLDS, foreground

if TYPE_CHECKING:
    from playwright.sync_api import Browser


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


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Media:
    return film_in(tmp_path_factory.mktemp("media"))


@pytest.fixture
def build(tmp_path: Path, media: Media) -> Iterator[Callable[..., Stage]]:
    """`build(*films, **settings)`: a running stage, on which some films are already there."""
    with contextlib.ExitStack() as opened:

        def made(*films: dict[str, Any], **settings: Any) -> Stage:
            jobs = Jobs.open(f"sqlite:///{tmp_path / 'tubelet.db'}")
            opened.callback(jobs.close)
            store = Store(tmp_path / "assets", reserve=0)
            stage = Stage(config_of(tmp_path, **settings), jobs, store, Worker(jobs, store, media), media)
            for film in films:
                stage.make(film)
            opened.callback(stage.kill)
            opened.callback(stage.stop)
            stage.start()
            stage.worker.start()
            opened.callback(stage.worker.join, 20)
            opened.callback(stage.worker.ended.set)
            return stage

        yield made


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as opened:
        yield opened


@pytest.fixture
def visit(chromium: Browser) -> Iterator[Callable[..., Visit]]:
    """`visit(stage, **context)`: a browser before the stage. What goes wrong in its pages fails the test."""
    visits: list[Visit] = []

    def made(stage: Stage, **settings: Any) -> Visit:
        visits.append(Visit.of(chromium, stage.url, **settings))
        return visits[-1]

    yield made
    for one in visits:
        one.close()
    assert [problem for one in visits for problem in one.problems] == []
