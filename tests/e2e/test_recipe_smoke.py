"""The whole road in small: render, train the codec, encode, train the denoiser, export, load, generate; stopped and resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tubelet.cli import main
from tubelet.core.files import sha256
from tubelet.data.shards import ShardDataset
from tubelet.data.stream import TensorSource
from tubelet.evaluate.fidelity import psnr
from tubelet.evaluate.report import through_codec
from tubelet.generate.system import load
from tubelet.recipes import load_recipe
from tubelet.recipes.worlds import WorldsRecipe
from tubelet.train.loop import load_average
from tubelet.train.text_to_video import TextToVideoObjective
from tubelet.worlds import WORLDS
from tubelet.worlds.constants import TEST_SEEDS

SMALL = [
    f"--set={setting}"
    for setting in (
        "workers=1",
        "clips.codec=24",
        "clips.codec_frames=3",
        "clips.denoiser=24",
        "clips.frames=5",
        "codec_train.steps=4",
        "codec_train.batch=4",
        "codec_train.precision=fp32",
        "codec_train.progress=false",
        "denoise.steps=8",
        "denoise.batch=4",
        "denoise.precision=fp32",
        "denoise.checkpoint_every=2",
        "denoise.progress=false",
        "denoiser.width=32",
        "denoiser.depth=1",
        "denoiser.patch=[1,2,2]",
        "sampling.steps=2",
    )
]
"""smoke, on 24 clips of 5 frames and for a few steps. fp32: what auto chooses is timed and may differ between runs."""


def train(folder: Path, *more: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["train", "smoke", "--out", str(folder), *SMALL, *more])
    assert isinstance(stop.value.code, int)
    return stop.value.code


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("runs") / "smoke"
    assert train(folder) == 0
    return folder


@pytest.fixture
def before_denoiser(road: Path, tmp_path: Path) -> Path:
    """A copy of the run as it was when the denoiser's training began."""
    folder = tmp_path / "smoke"
    shutil.copytree(road, folder, ignore=shutil.ignore_patterns("denoiser", "system", "samples", "decoder*"))
    names = [path.name for path in folder.glob("*.json")]
    for name in names:
        if name not in ("recipe.json", "render.json", "train_codec.json", "encode.json"):
            (folder / name).unlink()
    return folder


def test_the_road_leads_to_a_system_that_makes_films(road: Path, tubelet: Callable) -> None:
    clips, latents = ShardDataset(road / "clips"), ShardDataset(road / "latents")
    assert (len(clips), len(latents)) == (24, 24)
    first = clips.read(0)
    assert first is not None
    assert first.tensors["video"].shape == (3, 32, 32, 3)
    assert {caption["kind"] for caption in first.meta["captions"]} == {"short", "dense", "human"}
    first = latents.read(0)
    assert first is not None
    assert (first.tensors["latent"].shape, first.tensors["latent"].dtype) == ((8, 5, 4, 4), torch.bfloat16)
    assert first.tensors["foreground"].shape == (5, 4, 4)
    for stage in ("codec", "denoiser"):
        lines = [json.loads(line) for line in (road / stage / "metrics.jsonl").read_text().splitlines()]
        assert lines[-1]["step"] == {"codec": 4, "denoiser": 8}[stage]
    assert (road / "samples" / "000008.png").exists()

    system = load(road / "system")
    assert (system.name, system.config.size, system.config.frames) == ("smoke", (32, 32), 5)
    assert system.config.training["steps"] == 8
    film = system.generate("a red ball bounces").video.pixels  # (1, 3, T, H, W)
    assert film.shape == (1, 3, 5, 32, 32)
    assert film.isfinite().all()
    out = road / "a.mp4"
    assert tubelet("generate", "a red ball", "--system", road / "system", "--out", out).code == 0
    out.unlink()


def fallen(run: Path) -> float:
    """The loss of the last six updates as a share of that of the first six."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    losses = [row["loss"] for row in rows if "loss" in row]
    return sum(losses[-6:]) / sum(losses[:6])


def rate(stage: str, value: float) -> list[str]:
    return [f"--set={stage}.optimizer.{name}={value}" for name in ("learning_rate", "learning_rate_adamw")]


def test_a_codec_in_training_loses_less_and_less(road: Path, tmp_path: Path) -> None:
    """Without learning the share is 1.05."""
    folder = tmp_path / "smoke"
    shutil.copytree(road / "clips", folder / "clips")
    shutil.copy(road / "render.json", folder)
    how = [f"--set=codec_train.{setting}" for setting in ("steps=30", "warmup=2", "log_every=1")]
    assert train(folder, *how, *rate("codec_train", 3e-3), "--set=denoise.steps=1") == 0
    assert fallen(folder / "codec") < 0.6


def test_a_denoiser_in_training_errs_less_and_hears_the_words(before_denoiser: Path) -> None:
    """Without learning the first share is 1 and so is the second; with other clips' captions the second is.

    Every clip is drawn in every update: what is learned is learned by heart.
    """
    folder, batch = before_denoiser, 24
    how = [f"--set=denoise.{setting}" for setting in ("steps=60", f"batch={batch}", "log_every=1", "checkpoint_every=0")]
    how += [*rate("denoise", 1e-2), '--set=captions={"short":1}', "--set=text_drop=0", "--set=image_share=0"]
    assert train(folder, *how) == 0
    assert fallen(folder / "denoiser") < 0.7

    recipe = load_recipe("smoke", [word.removeprefix("--set=") for word in (*SMALL, *how)])
    source = TensorSource.load(ShardDataset(folder / "latents"), ("latent", "foreground"), proportions={"short": 1.0})
    model = recipe.build_model(folder, source)
    load_average(folder / "denoiser", model)
    clips, objective = source.draw(batch), replace(recipe._films(), split=0.0)

    def loss(captions: list[str]) -> float:
        rng = torch.Generator().manual_seed(0)
        with torch.no_grad():
            return sum(float(objective(model.eval(), {**clips, "caption": captions}, rng)["loss"]) for _ in range(8))

    own = clips["caption"]
    assert loss(own) < 0.8 * loss([*own[1:], own[0]])


def test_as_written_it_trains_and_samples(tmp_path: Path) -> None:
    """`tubelet train smoke`, nothing left out. Beside its figures: those of a grey film and of a denoiser that says nothing."""
    folder = tmp_path / "smoke"
    with pytest.raises(SystemExit) as stop:
        main(["train", "smoke", "--out", str(folder)])
    assert stop.value.code == 0
    lines = [json.loads(line) for line in (folder / "denoiser" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert lines[-1]["step"] == 200
    assert np.mean(losses[-3:]) < 0.8 < 1.5 < losses[0], "header: from 1.75 to .64"

    system = load(folder / "system", device="cpu")
    truth = np.stack([WORLDS["phys2d"].sample(seed, 32, 32, 9, 8.0).video for seed in TEST_SEEDS[:8]])
    coded = list(through_codec(system.codec, list(truth), 8.0))
    grey = np.broadcast_to(np.median(truth, (1, 2, 3), keepdims=True).astype(np.uint8), truth.shape)
    codec, floor = (np.mean([psnr(a, b) for a, b in zip(truth, made, strict=True)]) for made in (coded, grey))
    assert codec > 21 > 18 > floor, (codec, floor)

    films = [system.generate("a red ball falls", seed=seed).video.to_uint8()[0] for seed in (0, 1)]
    assert films[0].shape == (9, 32, 32, 3)
    assert not np.array_equal(*films)
    assert np.array_equal(films[0], system.generate("a red ball falls", seed=0).video.to_uint8()[0])
    assert all(film.std() > 5 for film in films), "pictures of something"


def test_finished_stages_are_skipped(road: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = [path.stem for path in road.glob("*.json") if hasattr(WorldsRecipe, path.stem)]
    assert {"render", "train_codec", "encode", "train_denoiser", "export"} <= set(stages)
    for stage in stages:
        monkeypatch.setattr(WorldsRecipe, stage, _forbidden(stage))
    before = {path: path.stat().st_mtime_ns for path in road.rglob("*") if path.is_file()}
    assert train(road) == 0
    assert before == {path: path.stat().st_mtime_ns for path in road.rglob("*") if path.is_file()}


def _forbidden(stage: str) -> Callable[..., None]:
    def run_again(*_: object) -> None:
        raise AssertionError(f"{stage} ran again")

    run_again.__name__ = stage  # a finished stage is known by its name
    return run_again


def test_a_run_goes_on_from_a_system(road: Path, tmp_path: Path, refused: Callable) -> None:
    folder, start = tmp_path / "more", f"--set=start={road / 'system'}"
    assert (
        train(folder, start, "--set=denoise.optimizer.learning_rate=1e-9", "--set=denoise.optimizer.learning_rate_adamw=1e-9")
        == 0
    )
    assert not (folder / "clips").exists(), "its codec is kept"
    old, new = load(road / "system", dtype="float32"), load(folder / "system", dtype="float32")
    for ours, theirs in zip((new.codec, new.denoiser, new.text), (old.codec, old.denoiser, old.text), strict=True):
        for name, value in ours.state_dict().items():
            torch.testing.assert_close(value, theirs.state_dict()[name], atol=1e-5, rtol=0)
    said = refused("train", "smoke", "--out", tmp_path / "other", *SMALL, start, "--set", "denoiser.depth=2")
    assert "has another denoiser than the recipe" in said


def test_a_sketch_comes_first_where_a_recipe_asks_for_it(road: Path, before_denoiser: Path) -> None:
    recipe = load_recipe("smoke", [word.removeprefix("--set=") for word in SMALL])
    changed = replace(recipe, sketch=replace(recipe.denoise, steps=3), sketch_frames=2, masks={"prefix": 1.0}, haze=0.1)
    changed.run(before_denoiser)
    lines = [json.loads(line) for line in (before_denoiser / "sketch" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 3
    assert hashes(before_denoiser / "system") != hashes(road / "system")


def test_clips_of_any_size_are_trained_on_in_buckets(road: Path, tmp_path: Path) -> None:
    more = (f"--set=start={road / 'system'}", "--set=grouping=buckets", "--set=budget=64", "--set=denoise.batch=8")
    assert train(tmp_path, *more, "--set=clips.sizes=[[32,32],[32,48]]", '--set=clips.kinds={"billiard":3,"eat":1}') == 0
    latents = ShardDataset(tmp_path / "latents")
    assert {shape[2:] for shape in latents.shapes("latent")} == {(4, 4), (4, 6)}
    worlds = [latents.read(index).meta["world"] for index in range(len(latents))]
    assert worlds.count("persist2d") == len(latents) // 4
    assert load(tmp_path / "system").config.size == (32, 32)


def test_clips_of_any_size_are_trained_on_in_packs(road: Path, tmp_path: Path, refused: Callable) -> None:
    more = (f"--set=start={road / 'system'}", "--set=budget=64", "--set=clips.lengths=[1,5]", "--set=denoise.batch=2")
    sizes = {
        "native": ([(32, 32), (32, 48), (48, 32)], ("--set=clips.sizes=[[32,32],[32,48],[48,32]]",)),
        "square": ([(32, 32)], ("--set=clips.sizes=[[32,48],[48,32]]", "--set=clips.square=true")),
    }
    for name, (wanted, words) in sizes.items():
        assert train(tmp_path / name, *more, *words) == 0
        latents = ShardDataset(tmp_path / name / "latents")
        assert len(latents) == 24
        forms = {shape[1:] for shape in latents.shapes("latent")}
        assert forms == {(frames, h // 8, w // 8) for h, w in wanted for frames in (1, 5)}
        assert load(tmp_path / name / "system").config.size == (32, 32)
    said = refused("train", "smoke", "--out", tmp_path / "no", *SMALL, *more, "--set", "clips.sizes=[[32,40]]")
    assert "width must be a positive multiple of 16" in said
    said = refused("train", "smoke", "--out", tmp_path / "no", *SMALL, *more, "--set", "denoise.compile=true")
    assert "set denoise.compile=false" in said


def test_a_folder_belongs_to_its_settings(road: Path, refused: Callable) -> None:
    said = refused("train", "smoke", "--out", road, *SMALL, "--set", "clips.frames=9")
    assert "holds a run with other settings of 'clips'" in said


def test_stopped_and_killed_it_resumes_bit_for_bit(
    road: Path, before_denoiser: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = before_denoiser
    calls = 0
    loss = TextToVideoObjective.__call__

    def interrupted(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(TextToVideoObjective, "__call__", interrupted)
        assert train(folder) == 130
    assert "the same command resumes it" in capsys.readouterr().err
    assert max(path.name for path in (folder / "denoiser" / "checkpoints").iterdir()) == "step-00000003"
    assert not (folder / "train_denoiser.json").exists()

    # kill -9 after the checkpoint of step 6 is whole, before the step that follows it is.
    code = (
        "import os, signal, sys, torch\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        "from tubelet.cli import main\n"
        "from tubelet.train import checkpoint, loop\n"
        "save = checkpoint.save\n"
        "def once(folder, step, *rest):\n"
        "    save(folder, step, *rest)\n"
        "    if step == 6: os.kill(os.getpid(), signal.SIGKILL)\n"
        "loop.checkpoint.save = once\n"
        "main(sys.argv[1:])\n"
    )
    words = [sys.executable, "-c", code, "train", "smoke", "--out", str(folder), *SMALL]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert (folder / "denoiser" / "checkpoints" / "step-00000006").is_dir()
    assert not (folder / "system").exists()

    assert train(folder) == 0
    assert hashes(folder / "system") == hashes(road / "system")


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("clips.size=[30,32]", "height must be a positive multiple of 8, got 30"),
        ("clips.size=[40,32]", "height must be a positive multiple of 16, got 40"),
        ("clips.frames=0", "frames must be"),
        ("clips.codec_frames=0", "frames must be"),
        ("denoiser.in_channels=4", "must be the codec's 8, got 4"),
        ("denoiser.text_width=64", "must be the text encoder's 128, got 64"),
        ("captions.short=-1", "proportions"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_any_work(
    refused: Callable, tmp_path: Path, setting: str, says: str
) -> None:
    assert says in refused("train", "smoke", "--out", tmp_path / "run", *SMALL, "--set", setting)
    assert not (tmp_path / "run").exists()
