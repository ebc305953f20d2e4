"""Films become clips: cut between scenes, looked through, with the words beside them, the same after an interruption."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tubelet.core.errors import UserError
from tubelet.curate import footage as room
from tubelet.curate.footage import CLAIM, Look, Seen, captions_beside, films_of, footage, refused, stretches
from tubelet.data.shards import ShardDataset
from tubelet.media import encode
from tubelet.worlds import WORLDS

LOOK = Look(size=(32, 32), frames=5, fps=8.0)


def film(seed: int, frames: int = 12, kind: str = "slide") -> np.ndarray:
    return WORLDS["phys2d"].sample(seed, 64, 64, frames, 8.0, kind=kind).video


def table(seed: int, frames: int = 12) -> np.ndarray:
    return film(seed, frames, "billiard")


@pytest.fixture
def films(tmp_path: Path) -> Path:
    """Two scenes in one film; the same again under another name, encoded anew; a still, a black and a torn one; a note."""
    folder = tmp_path / "films"
    (folder / "more").mkdir(parents=True)
    two = np.concatenate([film(1, 11), 255 - table(2, 11)])
    encode.save(two, folder / "a two.mp4", 8.0)
    encode.save(two, folder / "more" / "again.webp", 8.0)
    encode.save(two, folder / "more" / "again.gif", 8.0)
    encode.save(table(3, 17), folder / "table.mp4", 8.0)
    encode.save(np.repeat(film(4, 1), 10, 0), folder / "still.mp4", 8.0)
    encode.save(np.zeros((10, 64, 64, 3), np.uint8), folder / "black.mp4", 8.0)
    whole = (folder / "table.mp4").read_bytes()
    (folder / "torn.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "notes.md").write_text("no film")
    (folder / "a two.txt").write_text("a ball slides\n\n  then  a table \n")
    (folder / "table.json").write_text(json.dumps({"captions": [{"text": "balls on a table", "kind": "short"}]}))
    return folder


def test_clips_lie_within_scenes_and_carry_their_words(films: Path, tmp_path: Path) -> None:
    found = footage([films], tmp_path / "data", LOOK)
    assert found.films == 6, "a webp is a picture to most, a note none at all"
    assert set(found.unread) == {"torn.mp4"}
    assert found.dropped["seen before"] >= 4, "the same film once more"
    assert found.dropped["still"] == 2
    assert found.dropped["blank"] == 2
    assert found.dropped["short"] >= 2, "a frame is left of each scene"
    data = ShardDataset(tmp_path / "data")
    assert len(data) == found.clips == 4 + 3
    records = [record for index in range(len(data)) if (record := data.read(index)) is not None]
    assert {tuple(record.tensors["video"].shape) for record in records} == {(5, 32, 32, 3)}
    two = [record for record in records if record.meta["film"] == "a two.mp4"]
    assert [record.meta["begin"] for record in two] == [0.0, 5 / 8, 11 / 8, 2.0], "the second scene begins with its first frame"
    assert [one["text"] for one in two[0].meta["captions"]] == ["a ball slides", "then a table"]
    assert {one["kind"] for one in two[0].meta["captions"]} == {"human"}
    other = next(record for record in records if record.meta["film"] == "table.mp4")
    assert other.meta["captions"] == [{"text": "balls on a table", "kind": "short", "source": "beside"}]
    for record in two:
        clip = record.tensors["video"].float()
        assert clip.diff(dim=0).abs().mean((1, 2, 3)).max() < 20, "no cut within a clip"


def test_an_interrupted_import_becomes_what_an_uninterrupted_one_is(
    films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    footage([films], tmp_path / "whole", LOOK)
    calls, look = 0, room.refused

    def stopped(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 7:
            raise KeyboardInterrupt
        return look(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(room, "refused", stopped)
        with pytest.raises(KeyboardInterrupt):
            footage([films], tmp_path / "stopped", LOOK)
    footage([films], tmp_path / "stopped", LOOK)
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "stopped" / path.name).read_bytes() == path.read_bytes(), path.name
    with pytest.raises(UserError, match="begun with other size"):
        footage([films], tmp_path / "whole", Look(size=(16, 16), frames=5))
    with pytest.raises(UserError, match="holds something else"):
        footage([films], films, LOOK)


def test_a_cut_is_seen_and_motion_is_none(tmp_path: Path) -> None:
    encode.save(np.concatenate([film(1, 6), 255 - film(2, 6)]), tmp_path / "cut.mp4", 8.0)
    assert [len(clip) for _, clip in stretches(tmp_path / "cut.mp4", Look(size=(64, 64), frames=20))] == [6, 6]
    noise = np.random.default_rng(0).integers(0, 256, (10, 64, 64, 3), dtype=np.uint8)
    encode.save(noise, tmp_path / "noise.mp4", 8.0)
    assert len(list(stretches(tmp_path / "noise.mp4", Look(size=(64, 64), frames=20)))) <= 2, "all of it changes all the time"


def test_what_was_seen_is_known_again_and_others_are_not() -> None:
    seen, noise = Seen(0.15), np.random.default_rng(0)
    clips = [film(seed, 5) for seed in range(20)] + [table(seed, 5) for seed in range(20)]
    assert sum(seen(clip) for clip in clips) == 1, "two of the slides are as good as one"
    assert len(seen) == 39
    grainy = [(clip + noise.normal(0, 2, clip.shape)).clip(0, 255).astype(np.uint8) for clip in clips]
    assert all(seen(clip) for clip in grainy)
    many = Seen(0.0)
    assert sum(not many(noise.integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)) for _ in range(600)) == 600, "it grows"


def test_reasons() -> None:
    gray = np.full((5, 32, 32, 3), 90, np.uint8)
    assert refused(gray[:3], LOOK) == "short"
    assert refused(gray, LOOK) == "blank"
    assert refused(np.repeat(film(1, 1), 5, 0), LOOK) == "still"
    assert refused(film(1, 5), LOOK) is None
    assert refused(film(1, 1), Look(frames=1)) is None, "a picture need not move"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", "{}"),
        ("a.json", '{"captions": "a ball"}'),
        ("a.json", '{"captions": [{"text": " "}]}'),
        ("a.json", "no json"),
        ("a.txt", b"\xff\xfe\x00"),
    ],
)
def test_malformed_words_are_named(tmp_path: Path, name: str, text: str | bytes) -> None:
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=name):
        captions_beside(tmp_path / "a.mp4")


def test_what_cannot_be_imported_is_one_sentence(films: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no file or folder"):
        films_of([tmp_path / "none"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="there is no film in"):
        films_of([tmp_path / "empty"])
    with pytest.raises(UserError, match="no clip was kept"):
        footage([films / "black.mp4", films / "still.mp4"], tmp_path / "dark", LOOK)
    assert not (tmp_path / "dark").exists()
    for wrong in ({"frames": 0}, {"fps": float("nan")}, {"size": (0, 64)}, {"fit": "bend"}):
        with pytest.raises(UserError):
            Look(**wrong)  # type: ignore[arg-type]


def test_a_folder_in_which_no_clip_was_kept_takes_other_films(films: Path, tmp_path: Path) -> None:
    (tmp_path / "env.sh").write_text("no film")
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="no clip was kept"):
        footage([tmp_path / "env.sh"], tmp_path / "mine", LOOK)
    assert not list((tmp_path / "mine").iterdir())
    good = next(path for path, _ in films_of([films]) if path.stem not in ("black", "still"))
    assert footage([good], tmp_path / "mine", LOOK).clips > 0
    with pytest.raises(UserError, match="begun with other films"):
        footage([tmp_path / "env.sh"], tmp_path / "mine", LOOK)
    assert footage([good], tmp_path / "mine", LOOK).clips > 0, "what was kept stays"


def test_captions_and_films_that_changed_meanwhile_are_not_left_unread(films: Path, tmp_path: Path) -> None:
    good = next(path for path, _ in films_of([films]) if path.stem not in ("black", "still"))
    film = tmp_path / f"mine{good.suffix}"
    film.write_bytes(good.read_bytes())
    footage([film], tmp_path / "data", LOOK)
    (tmp_path / "mine.txt").write_text("a red ball falls")
    with pytest.raises(UserError, match="begun with other captions"):
        footage([film], tmp_path / "data", LOOK)
    (tmp_path / "mine.txt").unlink()
    assert footage([film], tmp_path / "data", LOOK).clips > 0
    kept = json.loads((tmp_path / "data" / CLAIM).read_text())
    film.write_bytes(good.read_bytes() + b"more")
    with pytest.raises(UserError, match="begun with other contents of films"):
        footage([film], tmp_path / "data", LOOK)
    # A folder of a version that did not ask for either goes on.
    (tmp_path / "data" / CLAIM).write_text(
        json.dumps({name: value for name, value in kept.items() if name not in ("captions", "contents of films")})
    )
    assert footage([film], tmp_path / "data", LOOK).clips > 0
    (tmp_path / "data" / CLAIM).write_text("[]")
    with pytest.raises(UserError, match="does not say what"):
        footage([film], tmp_path / "data", LOOK)


def test_films_of_one_name_in_two_folders_are_told_apart(films: Path, tmp_path: Path) -> None:
    shutil.copytree(films, tmp_path / "other")
    names = [name for _, name in films_of([films, tmp_path / "other"])]
    assert len(set(names)) == len(names) == 12
