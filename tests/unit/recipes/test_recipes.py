"""Recipes by name: every one is whole, overrides land where they say, wrong ones are refused."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tubelet import recipes
from tubelet.core.config import from_dict, to_dict
from tubelet.core.errors import UserError
from tubelet.core.files import write_json
from tubelet.core.types import Strides
from tubelet.generate.system import load
from tubelet.recipes import RECIPES, load_recipe, run
from tubelet.recipes.lineage import compare, macs_of
from tubelet.recipes.native_sizes import markdown, whole
from tubelet.recipes.worlds import (
    CODEC_SEED,
    DENOISER_SEED,
    Job,
    WorldsRecipe,
    _square,
    foreground_cells,
    in_turn,
    render_one,
)
from tubelet.runtime.cpu import accelerate
from tubelet.worlds import WORLDS
from tubelet.worlds.constants import TEST_SEEDS, TRAIN_SEEDS


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_a_header_and_survives_json(name: str) -> None:
    module = importlib.import_module(RECIPES[name])
    header = inspect.getdoc(module) or ""
    assert header.startswith(f"{name}: ")
    for line in ("Paper: ", "Command: tubelet train " + name, "Cost", "Score: "):
        assert line in header
    config = load_recipe(name)
    assert from_dict(type(config), to_dict(config)) == config
    assert callable(config.run)


def test_overrides_land_where_they_say() -> None:
    config = load_recipe("smoke", ["denoise.steps=7", "clips.size=[64,48]", "codec=transformer", "captions.short=1.0"])
    plain = load_recipe("smoke")
    assert config.denoise == replace(plain.denoise, steps=7)
    assert config.clips.size == (64, 48)
    assert config.codec == "transformer"
    assert config.captions["short"] == 1.0
    assert load_recipe("smoke") == plain, "an override leaves no trace"
    assert load_recipe("smoke", ["denoise.steps=7", "denoise.steps=8"]).denoise.steps == 8


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("steps", "key=value"),
        ("=3", "no setting ''"),
        ("denoise.=3", "denoise has no setting ''"),
        ("denoise.speed=3", "choose one of steps, batch"),
        ("denoise.steps.x=3", "plain value"),
        ("denoise.steps=2.5", "must be int"),
        ("denoise.steps=true", "must be int"),
        ("denoise.batch=0", "batch must be at least 1"),
        ("denoiser.heads=3", "heads need a width"),
        ("clips.size=[64]", "must have 2 values"),
        ("clips.size=64", "must be a list"),
        ("prediction=noise", "must be one of"),
        ("clips.fps=NaN", "Clips.fps must be a finite number"),
        ("clips.persist=NaN", "Clips.persist must be a finite number"),
        ("clips.persist=2", "persist is a share of the clips"),
        ("clips.codec=0", "codec counts clips and must be between 1"),
        ("clips.denoiser=-5", "denoiser counts clips and must be between 1"),
        ("clips.denoiser=1000000001", "denoiser counts clips"),
        ("foreground=NaN", "foreground must be a finite number"),
        ("sigma.mean=Infinity", "SigmaSampling.mean must be a finite number"),
        ("sigma.mean=1" + "0" * 400, "SigmaSampling.mean must be a finite number"),
        ('captions={"short":NaN}', "captions.short must be a finite number"),
        ("denoise.seed=99999999999999999999999", "a seed is a whole number"),
        ("codec_loss.l1=-1", "weights l1, l2, gradient, temporal"),
        ("codec_loss.noise=-1", "noise at least 0"),
    ],
)
def test_wrong_overrides_are_refused(override: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        load_recipe("smoke", [override])


@pytest.mark.parametrize("name", RECIPES)
def test_settings_that_a_run_puts_itself_are_refused(name: str) -> None:
    module = importlib.import_module(RECIPES[name])
    given = getattr(type(load_recipe(name)), "GIVEN", ())
    for key in given:
        with pytest.raises(UserError, match=f"{key} of recipe {name} follows from its other settings"):
            load_recipe(name, [f"{key}=1"])
    put = {  # what a run replaces in a network's sizes, by name, as its code says
        f"{call.args[0].attr}.{keyword.arg}"
        for call in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "replace"
        if isinstance(call.args[0], ast.Attribute) and call.args[0].attr in {"unet", "dit", "vdt", "denoiser", "prior", "codes"}
        for keyword in call.keywords
        if keyword.arg is not None
    }
    assert put <= set(given)


def test_unknown_recipes_are_refused() -> None:
    with pytest.raises(UserError, match="choose one of"):
        load_recipe("wrlds-64")


def test_run_says_whether_it_came_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fixed:
        def __init__(self, made: Path) -> None:
            self.made = made

        def run(self, _folder: Path) -> Path:
            return self.made

    for made, finished in ((tmp_path / "system", True), (tmp_path, False)):
        monkeypatch.setattr(recipes, "load_recipe", lambda *_, made=made: Fixed(made))
        assert run("smoke", tmp_path) is finished


@pytest.mark.parametrize("name", ["smoke", "worlds-64"])
def test_recipes_are_checked_and_stay_among_the_training_seeds(name: str) -> None:
    config: WorldsRecipe = load_recipe(name)
    config._check()
    codec = config._jobs(CODEC_SEED, config.clips.codec, 5, 2.0)
    denoiser = config._jobs(DENOISER_SEED, config.clips.denoiser, 17, 8.0)
    seeds = {job.seed for job in codec} | {job.seed for job in denoiser}
    assert len(seeds) == len(codec) + len(denoiser), "codec and denoiser see other clips"
    assert all(seed in TRAIN_SEEDS for seed in (min(seeds), max(seeds)))
    share = sum(job.world == "persist2d" for job in denoiser) / len(denoiser)
    assert share == pytest.approx(config.clips.persist, abs=0.03)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ('masks={"foo":1}', "foo"),
        ("image_share=3", "image_share is a share"),
        ("haze=2", "haze is a noise level"),
        ("text_drop=-1", "text_drop is a share"),
        ("sketch_frames=-1", "frames must be at least 0"),
        ("denoise.ema=0.9", "sigma_rel"),
        ("denoise.device=foo", "unknown device 'foo'"),
        ("codec_train.device=foo", "unknown device 'foo'"),
        ("clips.fps=0", "0.0 frames per second"),
        ("clips.codec_fps=-1", "-1.0 frames per second"),
        ("clips.size=[80000,80000]", "too large for one clip"),
        ("clips.frames=80001", "too large for one clip"),
        ('captions={"zzz":1}', "no kind 'zzz' of captions"),
        ('captions={"short@phys2d":1}', "leave none to clips of persist2d"),
        ("workers=-1", "workers must be at least 1"),
        ("budget=0", "a budget of 0 tokens"),
        ("foreground=-1", "foreground must be at least 0"),
    ],
)
def test_what_a_late_stage_would_refuse_is_refused_at_once(tmp_path: Path, override: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        run("worlds-64", tmp_path / "run", [override])
    assert not (tmp_path / "run").exists()


def test_a_codec_may_be_kept_while_all_else_begins_anew(tmp_path: Path) -> None:
    recipe = load_recipe("worlds-64-large")
    recipe._check()
    recipe.adopt_codec(tmp_path)
    codec = recipe.load_codec(tmp_path)
    shipped = load("worlds-64", device="cpu", dtype="float32").codec
    assert torch.equal(codec.mean, shipped.mean)
    for override, said in (("codec=transformer", "another codec"), ("start=worlds-64", "one of start and codec_from")):
        with pytest.raises(UserError, match=said):
            load_recipe("worlds-64-large", [override])._check()


SQUARE = {"worlds-64-sizes": 1 / 2, "worlds-64-all": 2 / 3, "worlds-64-gpu": 2 / 3, "worlds-64-long": 2 / 3}


@pytest.mark.parametrize(("name", "square"), SQUARE.items())
def test_hard_kinds_come_oftener_and_every_kind_in_every_size(name: str, square: float) -> None:
    recipe = load_recipe(name, ["start=worlds-64"])
    recipe._check()
    jobs = recipe._native_jobs()
    kinds, sizes = Counter(job.kind for job in jobs), Counter(job.size for job in jobs)
    for kind, share in recipe.clips.kinds.items():
        assert kinds[kind] / len(jobs) == pytest.approx(share, abs=0.005)
        own = Counter(job.size for job in jobs if job.kind == kind)
        assert all(own[size] / kinds[kind] == pytest.approx(sizes[size] / len(jobs), abs=0.01) for size in sizes)
    assert sizes[64, 64] == pytest.approx(square * len(jobs), abs=1)
    assert all(job.world == ("persist2d" if job.kind in ("paint", "eat") else "phys2d") for job in jobs)
    assert len({job.key for job in jobs}) == len(jobs)
    assert all(job.seed in TRAIN_SEEDS for job in (jobs[0], jobs[-1]))


def test_a_part_that_goes_on_takes_fresh_clips() -> None:
    before, after = (load_recipe(f"worlds-64-{name}")._native_jobs() for name in ("gpu", "long"))
    assert not {job.seed for job in before} & {job.seed for job in after}
    with pytest.raises(UserError, match="first is the place of a seed"):
        load_recipe("worlds-64-long", ["clips.first=-1"])
    with pytest.raises(UserError, match="denoiser counts clips and must be between 1 and 10"):
        load_recipe("worlds-64-long", ["clips.first=999999990"])


def test_names_take_turns_in_their_proportions() -> None:
    names = in_turn({"a": 2.0, "b": 1.0, "c": 0.0}, 9)
    assert Counter(names) == {"a": 6, "b": 3}
    assert "b" in names[:3], "each is spread evenly"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ('clips.kinds={"juggle":1}', "no kind 'juggle'"),
        ('clips.kinds={"fall":0}', "not all 0"),
        ("grouping=heaps", "grouping must be"),
    ],
)
def test_wrong_kinds_and_groupings_are_refused(override: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_recipe("worlds-64-sizes", [override])._check()


def test_a_pack_holds_the_largest_clip() -> None:
    packs = ["start=worlds-64", "grouping=packs", "denoise.compile=false"]
    load_recipe("worlds-64-sizes", [*packs, "budget=612"])._check()
    with pytest.raises(UserError, match="uniform is for buckets"):
        load_recipe("worlds-64-sizes", [*packs, "uniform=true"])._check()
    with pytest.raises(UserError, match="a budget of 611 tokens does not hold a clip of 612"):  # 17 frames of 96 x 96
        load_recipe("worlds-64-sizes", [*packs, "budget=611"])._check()


def test_a_folder_that_holds_no_work_is_claimed_anew(tmp_path: Path) -> None:
    recipe = load_recipe("smoke")
    other = replace(recipe, clips=replace(recipe.clips, fps=4.0))
    recipe._claim(tmp_path)
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / ".shard-00000.tar").write_bytes(b"unfinished")
    other._claim(tmp_path)
    (tmp_path / "clips" / "shard-00000.tar").write_bytes(b"whole")
    other._claim(tmp_path)
    with pytest.raises(UserError, match="other settings of 'clips'"):
        recipe._claim(tmp_path)


def test_a_run_of_a_version_that_knew_fewer_settings_goes_on(tmp_path: Path) -> None:
    recipe = load_recipe("smoke")
    recipe._claim(tmp_path)
    (tmp_path / "shard-00000.tar").write_bytes(b"whole")
    kept = json.loads((tmp_path / "recipe.json").read_text())
    assert kept["clips"].pop("square") is False
    write_json(tmp_path / "recipe.json", kept)
    recipe._claim(tmp_path)
    with pytest.raises(UserError, match="other settings of 'clips'"):
        replace(recipe, clips=replace(recipe.clips, square=True))._claim(tmp_path)

    experiment, folder = load_recipe("unet-or-dit"), tmp_path / "experiment"
    kept = to_dict(experiment)
    assert kept["sampling"].pop("eta") == 1.0
    folder.mkdir()
    write_json(folder / "settings.json", kept)
    stopped = {"a row": lambda _: None}
    assert compare(folder, experiment, stopped, [], ["a row"]) == folder
    with pytest.raises(UserError, match="other settings of 'sampling'"):
        compare(folder, replace(experiment, sampling=replace(experiment.sampling, eta=2.0)), stopped, [], [])


def test_both_arms_of_the_size_experiment_differ_in_the_crop_alone() -> None:
    experiment = load_recipe("native-sizes", ["start=worlds-64"])
    native, square = (experiment.recipe(arm) for arm in ("native", "square"))
    for arm in (native, square):
        arm._check()
    assert replace(square, name="native", clips=replace(square.clips, square=False)) == native
    jobs = native._native_jobs()
    assert jobs == square._native_jobs()
    for world in ("phys2d", "persist2d"):
        counts = Counter(job.size for job in jobs if job.world == world)
        assert set(counts) == set(native.clips.sizes)
        assert min(counts.values()) > 0.8 * max(counts.values()), "both worlds come in every size"


def test_shares_of_compute_differ_in_their_updates_alone(tmp_path: Path) -> None:
    scaling, whole = load_recipe("scaling"), load_recipe("worlds-64")
    few, system = replace(scaling, n=4), load("worlds-64", device="cpu", dtype="float32")
    known = few.loss(system, rounds=1)
    assert known == few.loss(system, rounds=1)
    for parameter in system.denoiser.parameters():
        parameter.data.zero_()
    assert known < 0.6 * few.loss(system, rounds=1), "what it has learned is in its loss"
    for factor in scaling.factors:
        part = scaling.recipe(factor)
        part._check()
        assert part.denoise.steps == whole.denoise.steps * factor // 32
        assert part.sketch is not None
        assert part.sketch.steps == whole.sketch.steps * factor // 32
        same = ("clips", "denoiser", "text", "causal_conv", "captions", "sigma")
        assert all(getattr(part, name) == getattr(whole, name) for name in same)
    with pytest.raises(UserError, match="run tubelet train worlds-64 first"):
        replace(scaling, whole=str(tmp_path)).run(tmp_path / "out")


def test_the_square_in_the_middle() -> None:
    tall = np.arange(2 * 6 * 4).reshape(2, 6, 4)
    assert np.array_equal(_square(tall), tall[:, 1:5])
    assert np.array_equal(_square(tall.transpose(0, 2, 1)), tall.transpose(0, 2, 1)[:, :, 1:5])


def test_a_size_is_measured_beside_the_truth() -> None:
    row = {f"64x64/{figure}{beside}": 0.5 for figure in ("caption", "whole") for beside in ("", "/floor")}
    lines = markdown({"native": row, "square": row}).splitlines()
    assert lines[0].startswith("| size | caption, native | caption, square | caption, truth | whole, native")
    assert lines[2] == "| 64x64 | 0.50 | 0.50 | 0.50 | 0.50 | 0.50 | 0.50 |"
    episode = WORLDS["phys2d"].sample(TEST_SEEDS[0], 64, 64, 17, 8.0, kind="fall")
    assert whole(episode.video, episode) == 1
    assert whole(np.concatenate([episode.video[:2], episode.video[:1].repeat(15, 0) * 0 + 200]), episode) == 0


def test_a_rendered_clip_has_its_captions_and_its_foreground() -> None:
    job, video, colour, captions = render_one(Job("phys2d", 3, (32, 48), 5, 8.0))
    assert (job.key, video.shape, video.dtype) == ("phys2d-0000000003", (5, 32, 48, 3), np.uint8)
    assert [caption["kind"] for caption in captions] == ["short", "dense", "human"]
    cells = foreground_cells(colour, Strides(4, 8, 8)).numpy()  # (2, 4, 6)
    assert (cells.shape, cells.dtype) == ((2, 4, 6), np.uint8)
    assert cells[0, 1, 2] == round(255 * colour[0, 8:16, 16:24].mean())
    assert cells[1, 2, 3] == pytest.approx(255 * colour[1:5, 16:24, 24:32].mean(), abs=1)
    full = foreground_cells(np.ones((1, 8, 8), np.uint8), Strides(1, 8, 8)).numpy()
    assert full.tolist() == [[[255]]]


def test_multiply_accumulates_of_an_accelerated_network_are_its_own() -> None:
    network = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 8)).eval()
    x = torch.zeros(3, 16)
    assert macs_of(network, x) == macs_of(accelerate(network), x) == 3 * (16 * 32 + 32 * 8)
