"""Clips of one's own, from films in a folder to a system that makes films."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tubelet.data.shards import ShardDataset
from tubelet.generate.system import load
from tubelet.media import encode
from tubelet.worlds import WORLDS

KINDS = ("slide", "bounce", "billiard", "collision")
SETTINGS = (
    "codec_train.steps=2", "codec_train.batch=2", "codec_train.warmup=0", "codec_train.precision=fp32", "sketch=null",
    "decoder_train=null", "denoise.steps=2", "denoise.batch=2", "denoise.warmup=0", "denoise.precision=fp32",
    "denoise.compile=false", "denoise.progress=false", "codec_train.progress=false", "denoiser.width=32", "denoiser.depth=1",
    "denoiser.heads=2", "denoiser.text_width=32", "text.width=32", "text.heads=2", "text.depth=1", "causal_conv.fine_width=16",
    "causal_conv.coarse_width=16", "sampling.steps=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("films")
    for number, kind in enumerate(KINDS * 2):
        episode = WORLDS["phys2d"].sample(number, 64, 64, 17, 8.0, kind=kind)
        encode.save(episode.video, folder / f"{number}.mp4", 8.0)
        if number % 2:
            (folder / f"{number}.txt").write_text(f"{episode.short}\n{episode.human}\n")
        else:  # as a captioner leaves them
            said = [{"text": getattr(episode, kind), "kind": kind} for kind in ("short", "dense")]
            (folder / f"{number}.json").write_text(json.dumps({"captions": said}))
    return folder


def test_films_become_a_system(films: Path, tmp_path: Path, tubelet: Callable, refused: Callable) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    said = tubelet("curate", "import", films, "--out", data, "--size", "32x32", "--frames", "5", "--json")
    assert said.code == 0, said.err
    found = json.loads(said.out)
    assert found["films"] == 8
    assert found["clips"] == len(ShardDataset(data)) > 10
    words = ["train", "footage", "--out", run, f"--set=data={data}", *[f"--set={setting}" for setting in SETTINGS]]
    said = tubelet(*words)
    assert said.code == 0, said.err
    system = load(run / "system", device="cpu", dtype="float32")
    assert (system.config.size, system.config.frames, system.config.fps) == ((32, 32), 5, 8.0)
    assert system.config.expander is None
    assert len(ShardDataset(run / "latents")) == found["clips"]
    assert (run / "samples" / "000002.png").exists()
    made = tubelet("generate", "a red ball bounces", "--system", run / "system", "--out", tmp_path / "a.gif", "--json")
    assert made.code == 0, made.err
    assert json.loads(made.out)["settings"]["text"] == "a red ball bounces", "nobody's rules"
    assert tubelet(*words).code == 0, "nothing is done again"
    facts = json.loads((run / "system" / "system.json").read_text())
    assert facts["training"]["clips"] == found["clips"]
    assert f"{run / 'system'} does, so name that" in refused("generate", "a ball", "--system", run, "--out", tmp_path / "b.gif")
    shorter = tubelet("evaluate", run / "system", "--human", "--samples", 1, "--json")
    assert "which a system of one's own films has never seen" in shorter.err
    moved = tmp_path / "moved"
    data.rename(moved)
    assert tubelet(*words, f"--set=data={moved}").code == 0, "the same clips elsewhere"
    fewer = shutil.copytree(films, tmp_path / "fewer", ignore=shutil.ignore_patterns("0.*"))
    assert tubelet("curate", "import", fewer, "--out", data, "--size", "32x32", "--frames", "5").code == 0
    assert "holds a run on another data set than" in refused(*words)


def test_what_does_not_fit_is_one_sentence(films: Path, tmp_path: Path, tubelet: Callable, refused: Callable) -> None:
    words = ["train", "footage", "--out", tmp_path / "run"]
    assert "data" in refused(*words, f"--set=data={tmp_path / 'none'}")
    for setting in ("workers=1", "foreground=2", "clips.denoiser=5"):
        assert "is of clips that are simulated" in refused(*words, f"--set={setting}")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "a.mp4").write_bytes((films / "0.mp4").read_bytes())
    assert tubelet("curate", "import", bare, "--out", tmp_path / "wordless", "--size", "32x32", "--frames", "5").code == 0
    assert "have no caption of kind dense or human or short" in refused(*words, f"--set=data={tmp_path / 'wordless'}")
    assert "fit must be crop, pad or stretch" in refused("curate", "import", bare, "--out", tmp_path / "x", "--fit", "bend")
    assert "there is no file or folder" in refused("curate", "import", tmp_path / "none", "--out", tmp_path / "x")
    assert not (tmp_path / "run").exists()
