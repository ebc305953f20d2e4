"""New captions beside the old ones: nothing lost, bad records named, an interrupted run the same as another, byte for byte."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tubelet.core.errors import UserError
from tubelet.curate.captioners import View
from tubelet.curate.recaption import CLAIM, Outcome, add_captions, recaption
from tubelet.data.schema import Record
from tubelet.data.shards import ShardDataset, ShardWriter
from tubelet.data.stream import TensorSource
from tubelet.text.writing import STYLES

COUNT, BATCH, SHARD = 23, 4, 12_000
"""Some five records a shard, so that shards end inside of blocks."""


@dataclass
class Telling:
    """A captioner that tells a clip's grey, and how many clips it was shown together: what it says depends on the block."""

    source: str = "eyes"
    view: View = field(default_factory=lambda: View(2, 4.0, 8))
    batch: int = BATCH
    calls: list[int] = field(default_factory=list)
    stop: int = -1
    """The call that is interrupted."""

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"captioner": self.source}

    def write(self, clips: Sequence[np.ndarray], styles: Sequence[str] = STYLES) -> list[dict[str, str]]:
        assert all(clip.shape == (2, 8, 8, 3) for clip in clips)
        if len(self.calls) == self.stop:
            raise KeyboardInterrupt
        self.calls.append(len(clips))
        return [{style: f"{style} {clip[0, 0, 0, 0]} of {len(clips)}" for style in styles} for clip in clips]


def record(number: int) -> Record:
    video = torch.full((4, 8, 8, 3), number, dtype=torch.uint8)
    own = [{"text": f"clip № {number}", "kind": "short", "source": "web"}]
    return Record(f"clip-{number:03d}", {"video": video}, {"fps": 8.0, "captions": own, "seed": number})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "clips"
    with ShardWriter(folder, 9000) as writer:
        for number in range(COUNT):
            writer.add(record(number))
    return folder


@pytest.fixture(scope="module")
def whole(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("data") / "recaptioned"
    assert recaption(ShardDataset(clips), Telling(), folder, shard_bytes=SHARD) == Outcome(COUNT, ())
    return folder


def test_old_captions_stay_and_new_ones_stand_behind_them(clips: Path, whole: Path) -> None:
    old, new = ShardDataset(clips), ShardDataset(whole)
    assert len({entry.shard for entry in new.entries}) > 3
    for number in range(COUNT):
        before, after = old.read(number), new.read(number)
        assert before is not None
        assert after is not None
        assert after.key == before.key
        assert torch.equal(after.tensors["video"], before.tensors["video"])
        captions = after.meta["captions"]
        assert captions[:1] == before.meta["captions"]
        assert captions[1:] == [
            {"text": f"{kind} {number} of {4 if number < 20 else 3}", "kind": kind, "source": "eyes"} for kind in STYLES
        ]
        assert {**after.meta, "captions": None} == {**before.meta, "captions": None}
        assert new.facts(number)["captions"] == captions


def test_captions_by_kind_and_source_are_drawn_in_their_proportions(whole: Path) -> None:
    blend = {"dense@eyes": 0.95, "short@web": 0.05}
    source = TensorSource.load(ShardDataset(whole), ("video",), seed=0, proportions=blend)
    drawn = [text for _ in range(1500) for text in source.draw(4)["caption"]]
    assert sum(text.startswith("dense") for text in drawn) / len(drawn) == pytest.approx(0.95, abs=0.015)
    assert sum(text.startswith("clip") for text in drawn) / len(drawn) == pytest.approx(0.05, abs=0.015)
    assert source.state() == {"position": 6000, "length": COUNT, "seed": 0}, "a position, as without sources"


@pytest.mark.parametrize("stop", range(6))
@pytest.mark.parametrize("killed", [False, True])
def test_an_interrupted_run_ends_as_another(
    clips: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int, killed: bool
) -> None:
    with monkeypatch.context() as patch:
        if killed:  # nothing is tidied
            patch.setattr(ShardWriter, "__exit__", lambda *_: None)
        with pytest.raises(KeyboardInterrupt):
            recaption(ShardDataset(clips), Telling(stop=stop), tmp_path, shard_bytes=SHARD)
    with pytest.raises(UserError, match="no finished data set"):
        ShardDataset(tmp_path)
    again = Telling()
    assert recaption(ShardDataset(clips), again, tmp_path, shard_bytes=SHARD) == Outcome(COUNT, ())
    assert contents(tmp_path) == contents(whole)
    if stop == 5:
        assert len(again.calls) < 4, "whole shards are not captioned again"
    idle = Telling(stop=0)
    recaption(ShardDataset(clips), idle, tmp_path, shard_bytes=SHARD)
    assert contents(tmp_path) == contents(whole)


def test_bad_records_are_named_and_left_out_or_end_the_run(
    clips: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damaged = Path(shutil.copytree(clips, tmp_path / "damaged"))
    entry = ShardDataset(damaged).entries[5]
    bad = bytearray((damaged / entry.shard).read_bytes())
    bad[entry.offset + entry.size - 1] ^= 1
    (damaged / entry.shard).write_bytes(bad)
    with pytest.raises(UserError, match=r"record 'clip-005' in .* does not match its hash"):
        recaption(ShardDataset(damaged), Telling(), tmp_path / "fail", shard_bytes=SHARD)
    with caplog.at_level(logging.WARNING):
        done = recaption(ShardDataset(damaged, policy="skip"), Telling(), tmp_path / "skip", shard_bytes=SHARD)
    assert done == Outcome(COUNT - 1, ("clip-005",))
    assert "clip-005" in caplog.text
    keys = [one.key for one in ShardDataset(tmp_path / "skip").entries]
    assert keys == [f"clip-{n:03d}" for n in range(COUNT) if n != 5]
    # Interrupted and gone on, the same; and nothing is captioned again for the sake of what is lost.
    with pytest.raises(KeyboardInterrupt):
        recaption(ShardDataset(damaged, policy="skip"), Telling(stop=4), tmp_path / "again", shard_bytes=SHARD)
    for captioner in (Telling(), Telling(stop=0)):
        assert recaption(ShardDataset(damaged, policy="skip"), captioner, tmp_path / "again", shard_bytes=SHARD) == done
        assert contents(tmp_path / "again") == contents(tmp_path / "skip")


def test_a_folder_belongs_to_its_data_and_captioner(clips: Path, whole: Path, tmp_path: Path) -> None:
    before = contents(whole)
    for captioner, source, shard_bytes, says in (
        (Telling("ears"), "eyes", SHARD, "another captioner"),
        (Telling(), "mine", SHARD, "another source"),
        (Telling(batch=3), None, SHARD, "another batch"),
        (Telling(), None, 2 * SHARD, "another shard_bytes"),
    ):
        with pytest.raises(UserError, match=f"was begun with {says}"):
            recaption(ShardDataset(clips), captioner, whole, source=source, shard_bytes=shard_bytes)
    with ShardWriter(tmp_path / "other", 9000) as writer:
        writer.add(record(40))
    with pytest.raises(UserError, match="was begun with another data"):
        recaption(ShardDataset(tmp_path / "other"), Telling(), whole, shard_bytes=SHARD)
    assert contents(whole) == before
    for taken in (clips, tmp_path / "other"):
        with pytest.raises(UserError, match="holds something else already"):
            recaption(ShardDataset(clips), Telling(), taken)
    assert not (clips / CLAIM).exists()


def test_wrong_data_is_refused_before_any_work(clips: Path, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'clip-000' has a short caption by 'eyes' already; give the new ones another source"):
        recaption(ShardDataset(whole), Telling(), tmp_path / "out")
    with pytest.raises(UserError, match="has a short caption by 'web' already"):
        recaption(ShardDataset(clips), Telling(), tmp_path / "out", source="web")
    with pytest.raises(UserError, match="need the name of their source"):
        recaption(ShardDataset(clips), Telling(), tmp_path / "out", source=" ")
    with ShardWriter(tmp_path / "latents") as writer:
        writer.add(Record("one", {"latent": torch.zeros(2, 1, 1, 1)}, {}))
    with pytest.raises(UserError, match="'one' has no video to look at"):
        recaption(ShardDataset(tmp_path / "latents"), Telling(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_second_captioner_adds_to_the_first(whole: Path, tmp_path: Path) -> None:
    recaption(ShardDataset(whole), Telling("ears"), tmp_path / "both")
    first = ShardDataset(tmp_path / "both").read(0)
    assert first is not None
    assert [(one["kind"], one["source"]) for one in first.meta["captions"]] == [
        ("short", "web"), ("short", "eyes"), ("dense", "eyes"), ("short", "ears"), ("dense", "ears")
    ]  # fmt: skip


def test_records_without_captions_and_the_first_of_many(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "bare") as writer:
        for number in range(6):
            writer.add(Record(f"{number}", {"latent": torch.full((1, 1, 1, 1), float(number))}, {}))

    def write(records: Sequence[Record]) -> list[list[dict[str, str]]]:
        return [[{"text": record.key, "kind": "alt", "source": "me"}] for record in records]

    done = add_captions(ShardDataset(tmp_path / "bare"), tmp_path / "out", write, {}, batch=4, count=5)
    assert done == Outcome(5, ())
    texts = [ShardDataset(tmp_path / "out").facts(n)["captions"][0]["text"] for n in range(5)]
    assert texts == list("01234")
