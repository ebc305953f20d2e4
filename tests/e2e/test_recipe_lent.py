"""What experiments are lent: the latents of a finished run, or of any system's codec, encoded once beside them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tubelet.core.errors import UserError
from tubelet.core.types import Video
from tubelet.data.shards import ShardDataset
from tubelet.generate.system import load
from tubelet.recipes import lent
from tubelet.recipes.lent import borrow, latents
from tubelet.worlds import WORLDS

KINDS = ("slide", "fall", "bounce", "parabola", "collision", "billiard")


def test_clips_of_a_finished_run_are_lent_by_kind_with_their_short_captions(whole: Path, tmp_path: Path) -> None:
    lent = borrow(str(whole), tmp_path / "one", "cpu")
    source = latents(lent, ("fall", "slide"), [0, 4])(0)
    assert len(source) == 6
    batch = source.draw(6)
    assert batch["latent"].shape == (6, 4, 2, 4, 4)
    assert sorted(batch["caption"]) == sorted(
        WORLDS["phys2d"].sample(n, 32, 32, 5, 8.0, kind=KINDS[n % len(KINDS)]).short for n in range(18) if n % len(KINDS) < 2
    )
    assert not any(p.requires_grad for p in lent.text.parameters())
    assert not list(tmp_path.iterdir()), "they lie in the run"


def test_clips_are_lent_with_every_second_frame_and_several_kinds_of_words(whole: Path, tmp_path: Path) -> None:
    lent = borrow(str(whole), tmp_path / "one", "cpu")
    kinds, words = ("fall", "slide"), {"short": 0.6, "human": 0.4}
    source = latents(lent, kinds, range(0, 5, 2), words, count=5, foreground=True)(0)
    assert len(source) == 5
    batch = source.draw(5)
    assert batch["latent"].shape == (5, 4, 3, 4, 4)
    assert batch["foreground"].shape == (5, 3, 4, 4)
    episodes = [WORLDS["phys2d"].sample(n, 32, 32, 5, 8.0, kind=KINDS[n % len(KINDS)]) for n in range(18)]
    for place, text in zip(batch["index"].tolist(), batch["caption"], strict=True):
        episode = [one for one in episodes if one.tags["kind"] in kinds][place]
        assert text in (episode.short, episode.human)
    with pytest.raises(UserError, match="has no clips of occlude"):
        latents(lent, ("occlude",), [0])


def test_clips_of_a_system_are_encoded_once_for_experiments_side_by_side(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lent, "CLIPS", 6)
    first = borrow(str(tiny), tmp_path / "one", "cpu")
    system = load(tiny, device="cpu", dtype="float32")
    assert first.folder == tmp_path / f"{system.name}-latents"
    dataset = ShardDataset(first.folder / "latents")
    assert len(dataset) == 6
    for place in range(6):
        record = dataset.read(place)
        assert record is not None
        (height, width), frames, fps = first.size, first.frames, first.fps
        episode = WORLDS["phys2d"].sample(record.meta["seed"], height, width, frames, fps)
        assert episode.short in [caption["text"] for caption in record.meta["captions"]]
        expected = system.codec.encode(Video.from_uint8(episode.video, fps).pixels)[0]
        torch.testing.assert_close(record.tensors["latent"].float(), expected, rtol=0.05, atol=0.05)
        assert record.tensors["foreground"].float().sum() > 0
    shard = next((first.folder / "latents").glob("*.tar"))
    before = shard.stat().st_mtime_ns
    again = borrow(str(tiny), tmp_path / "two", "cpu")
    assert again.folder == first.folder
    assert shard.stat().st_mtime_ns == before, "encoded once"

    monkeypatch.setattr(lent, "CLIPS", 7)
    with pytest.raises(UserError, match=r"holds the clips of another system; remove it, or use another --out"):
        borrow(str(tiny), tmp_path / "three", "cpu")


def test_paintings_and_meals_are_lent_beside_them_where_they_are_asked_for(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lent, "CLIPS", 12)
    monkeypatch.setattr(lent, "PAINTED", 6)
    without = borrow(str(tiny), tmp_path / "one", "cpu")
    assert without.also == ()
    with pytest.raises(UserError, match="has no clips of paint"):
        latents(without, ("paint",), [0])
    both = borrow(str(tiny), tmp_path / "two", "cpu", painted=True)
    assert both.folder == without.folder
    source = latents(both, ("slide", "fall", "bounce", "parabola", "paint", "eat"), [0, 1], count=4)(0)
    words = [one["text"] for several in source.captions or () for one in several]
    (height, width), frames, fps = both.size, both.frames, both.fps
    painted = [WORLDS["persist2d"].sample(lent.DENOISER_SEED + n, height, width, frames, fps).short for n in range(6)]
    assert len(words) == 8, "four of each world"
    assert words[4:] == painted[:4]
    assert not set(words[:4]) & set(painted)


def test_encoding_goes_on_where_it_was_stopped(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lent, "CLIPS", 40)  # two groups of at most 32
    whole = borrow(str(tiny), tmp_path / "whole" / "one", "cpu")
    system, encode = load(tiny, device="cpu", dtype="float32").codec, type(load(tiny, device="cpu").codec).encode
    calls = 0

    def stopped(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return encode(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(type(system), "encode", stopped)
        with pytest.raises(KeyboardInterrupt):
            borrow(str(tiny), tmp_path / "one", "cpu")
    found = borrow(str(tiny), tmp_path / "two", "cpu")
    kept, expected = ({r.key: r for r in _records(place.folder)} for place in (found, whole))
    assert kept.keys() == expected.keys()
    for key, record in kept.items():
        torch.testing.assert_close(
            record.tensors["latent"].float(), expected[key].tensors["latent"].float(), atol=1e-2, rtol=1e-2
        )


def test_what_is_neither_a_run_nor_a_system_lends_nothing(tmp_path: Path, refused: Callable) -> None:
    with pytest.raises(UserError, match="holds no finished run of worlds-64 and no system; set whole to either"):
        borrow(str(tmp_path), tmp_path / "one")
    with pytest.raises(UserError, match="there is no system 'worlds-65'; shipped are: worlds-64"):
        borrow("worlds-65", tmp_path / "one")
    assert "there is no system" in refused("train", "walt-long", "--out", tmp_path / "one", "--set", "whole=worlds-65")
    assert not list(tmp_path.iterdir())


def _records(folder: Path) -> list:
    dataset = ShardDataset(folder / "latents")
    return [record for record in map(dataset.read, range(len(dataset))) if record is not None]
