from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import random
import shutil
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tubelet.core.errors import UserError
from tubelet.core.files import sha256
from tubelet.data import shards
from tubelet.data.schema import Record, validate
from tubelet.data.shards import SEAL, ShardDataset, ShardWriter, read_index
from tubelet.data.stream import Stream, TensorSource


def record(number: int) -> Record:
    generator = torch.Generator().manual_seed(number)
    return Record(
        f"clip-{number:05d}",
        {
            "latent": torch.randn(4, 3, 2, 2, generator=generator).to(torch.bfloat16),
            "foreground": torch.randint(0, 2, (3, 2, 2), generator=generator, dtype=torch.uint8),
        },
        {"fps": 8.0, "captions": [{"text": f"a ball, № {number}", "kind": "short", "source": "grammar"}], "seed": number},
    )


def write(folder: Path, count: int = 20, shard_bytes: int = 9000) -> Path:
    with ShardWriter(folder, shard_bytes) as writer:
        for number in range(count):
            writer.add(record(number))
    return folder


def write_until(folder: Path, stop: int) -> None:
    with ShardWriter(folder, 9000) as writer:
        for number in range(stop):
            writer.add(record(number))
        raise KeyboardInterrupt


def same(one: Record | None, other: Record) -> bool:
    return (
        one is not None
        and one.key == other.key
        and dict(one.meta) == dict(other.meta)
        and one.tensors.keys() == other.tensors.keys()
        and all(
            torch.equal(one.tensors[n], other.tensors[n]) and one.tensors[n].dtype == other.tensors[n].dtype
            for n in one.tensors
        )
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "whole")


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def test_records_come_back_in_any_order(whole: Path) -> None:
    data = ShardDataset(whole)
    assert len(data) == 20
    assert len({entry.shard for entry in data.entries}) > 2
    for number in random.Random(0).sample(range(20), 20):
        assert same(data.read(data.places[f"clip-{number:05d}"]), record(number))
    assert data.shapes("latent") == [(4, 3, 2, 2)] * 20
    assert data.facts(3)["captions"][0]["text"] == "a ball, № 3"
    assert data.check() == []


def test_no_leftovers_and_same_bytes(whole: Path, tmp_path: Path) -> None:
    assert contents(write(tmp_path / "again")) == contents(whole)
    assert all(name.startswith(("shard-", "index")) and not name.endswith(".entries.json") for name in contents(whole))


def test_webdataset_reads_the_shards(whole: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    from safetensors.torch import load

    paths = [str(path) for path in sorted(whole.glob("*.tar"))]
    found = list(webdataset.WebDataset(paths, shardshuffle=False))
    assert [item["__key__"] for item in found] == [f"clip-{n:05d}" for n in range(20)]
    for number, item in enumerate(found):
        assert same(Record(item["__key__"], load(item["safetensors"]), json.loads(item["json"])), record(number))


@pytest.mark.parametrize("stop", [0, 1, 7, 19])
def test_an_interrupted_writer_goes_on(whole: Path, tmp_path: Path, stop: int) -> None:
    folder = tmp_path / "data"
    with pytest.raises(KeyboardInterrupt):
        write_until(folder, stop)
    with pytest.raises(UserError, match="no finished data set"):
        ShardDataset(folder)
    with ShardWriter(folder, 9000) as writer:
        kept = len(writer)
        assert kept == len([1 for n in range(20) if f"clip-{n:05d}" in writer]) <= stop
        assert stop < 19 or kept > 10
        for number in range(20):
            if f"clip-{number:05d}" not in writer:
                writer.add(record(number))
    assert contents(folder) == contents(whole)


@pytest.mark.parametrize("operation", ["replace", "fsync"])
def test_a_writer_killed_at_any_file_operation_goes_on(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    class Killed(BaseException):
        pass

    real, points = getattr(shards.os, operation), 0
    for at in range(1, 100):
        folder, calls = tmp_path / str(at), 0

        def dying(*args: object) -> object:
            nonlocal calls
            calls += 1
            if calls == at:  # noqa: B023
                raise Killed
            return real(*args)

        monkeypatch.setattr(shards.os, operation, dying)
        try:
            writer = ShardWriter(folder, 9000)  # not as a context: nothing is tidied after a kill
            for number in range(20):
                writer.add(record(number))
            writer.close()
            break
        except Killed:
            points += 1
        finally:
            monkeypatch.setattr(shards.os, operation, real)
        with ShardWriter(folder, 9000) as writer:
            for number in range(20):
                if f"clip-{number:05d}" not in writer:
                    writer.add(record(number))
        assert contents(folder) == contents(whole)
    assert points >= 5


def test_a_finished_set_can_grow(copy: Path) -> None:
    with ShardWriter(copy, 9000) as writer:
        assert len(writer) == 20
        writer.add(record(20))
    data = ShardDataset(copy)
    assert [entry.key for entry in data.entries] == [f"clip-{n:05d}" for n in range(21)]
    assert same(data.read(20), record(20))
    assert same(data.read(0), record(0))
    assert len(list(copy.glob("index-*.parquet"))) == 1


def test_a_full_disk_keeps_whole_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "data"
    real, calls = shards.os.fsync, 0

    def full(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 4:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(shards.os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        write(folder)
    monkeypatch.undo()
    with ShardWriter(folder, 9000) as writer:
        assert 0 < len(writer) < 20
        for number in range(20):
            if f"clip-{number:05d}" not in writer:
                writer.add(record(number))
    assert ShardDataset(folder).check() == []


def test_every_kind_of_damage_is_found_and_named(copy: Path) -> None:
    shard = copy / "shard-00001.tar"
    entries = [entry for entry in read_index(copy)[0] if entry.shard == shard.name]
    good = shard.read_bytes()
    for where in (entries[1].offset, entries[1].offset + entries[1].size - 1, entries[1].meta_offset + 3):
        bad = bytearray(good)
        bad[where] ^= 1
        shard.write_bytes(bad)
        data = ShardDataset(copy)
        assert same(data.read(data.places[entries[0].key]), record(int(entries[0].key[-5:])))
        with pytest.raises(UserError, match=rf"{entries[1].key}.*shard-00001\.tar does not match its hash"):
            data.read(data.places[entries[1].key])
        assert len(data.check()) == 1
    shard.write_bytes(good[:-1000])
    with pytest.raises(UserError, match=r"shard-00001\.tar has \d+ bytes instead of"):
        ShardDataset(copy).read(data.places[entries[0].key])
    shard.unlink()
    with pytest.raises(UserError, match=r"shard-00001\.tar cannot be read"):
        ShardDataset(copy).read(data.places[entries[0].key])


def test_random_flips_are_never_silent(copy: Path) -> None:
    """Whatever byte of whatever file changes: an error, or records that are still right (tar headers are not read)."""
    draw = random.Random(1)
    files = sorted(copy.iterdir())
    found = 0
    for _ in range(150):
        path = draw.choice(files)
        good = path.read_bytes()
        bad = bytearray(good)
        bad[draw.randrange(len(bad))] ^= 1 << draw.randrange(8)
        path.write_bytes(bad)
        try:
            data = ShardDataset(copy)
            assert all(same(data.read(n), record(n)) for n in range(20))
        except UserError:
            found += 1
        path.write_bytes(good)
    assert found > 30


def test_skip_counts_logs_and_draws_another(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    (copy / "shard-00001.tar").unlink()
    data = ShardDataset(copy, policy="skip")
    lost = {entry.key for entry in data.entries if entry.shard == "shard-00001.tar"}
    with caplog.at_level(logging.WARNING):
        keys = [key for _ in range(5) for key in Stream(data, seed=1).draw(20)["key"]]
    assert len(keys) == 100
    assert not lost & set(keys)
    assert data.skipped == len(lost) == len([r for r in caplog.records if "shard-00001.tar" in r.getMessage()])
    source = TensorSource.load(data, ["latent"])
    assert len(source) == 20 - len(lost)
    for path in copy.glob("*.tar"):
        path.unlink()
    with pytest.raises(UserError, match="no record"):
        Stream(ShardDataset(copy, policy="skip"), seed=1).draw(2)


def test_a_folder_that_may_not_be_read_is_named(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(path: Path) -> bool:  # root may read everything
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", forbidden)
    with pytest.raises(UserError, match=f"cannot read {copy}: Permission denied"):
        ShardDataset(copy)


def test_a_broken_index_or_seal_is_refused(copy: Path) -> None:
    index = next(copy.glob("index-*.parquet"))
    good = index.read_bytes()
    index.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(UserError, match="does not match its hash"):
        ShardDataset(copy)
    index.unlink()
    with pytest.raises(UserError, match="missing"):
        ShardDataset(copy)
    (copy / "index.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        ShardDataset(copy)
    (copy / "index.json").unlink()
    with pytest.raises(UserError, match="run its writer"):
        ShardDataset(copy)


# What strangers made.

TOUCHES = (
    "open",
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "os.mkfifo",
)


class Watch:
    """Notes which files this process opens, makes, moves and removes outside of a folder."""

    def __init__(self) -> None:
        self.inside: Path | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._heard)

    def _heard(self, event: str, facts: tuple[Any, ...]) -> None:
        if self.inside is not None and event in TOUCHES and isinstance(facts[0], (str, bytes, os.PathLike)):
            path = Path(os.path.abspath(os.fsdecode(facts[0])))
            if not path.is_relative_to(self.inside) and path.suffix not in (".py", ".pyc", ".so"):
                self.seen.append(f"{event} {path}")


WATCH = Watch()


def used(folder: Path) -> str:
    """A data set is read, looked over, checked and gone on with; how that began."""
    WATCH.inside, WATCH.seen, word = folder.resolve(), [], "read"
    try:
        try:
            data = ShardDataset(folder, policy="skip")
        except UserError as error:
            word = str(error)
        else:
            for number in range(len(data)):
                data.read(number)
            for look in (data.check, lambda: data.shapes("latent"), lambda: data.facts(0)):
                try:
                    look()
                except UserError:
                    word = "not readable"
        try:
            with ShardWriter(folder, 9000) as writer:
                writer.add(record(99))
        except UserError:
            pass
    finally:
        WATCH.inside = None
    assert WATCH.seen == []
    return word


def sealed(folder: Path, entries: list[dict[str, Any]], shards: dict[str, Any], **more: Any) -> None:
    """Write any index, and a seal that fits it."""
    index = next(folder.glob("index-*.parquet"))
    pq.write_table(pa.Table.from_pylist(entries), index)
    facts = {"records": len(entries), "index": index.name, "index_sha256": sha256(index), "shards": shards}
    (folder / SEAL).write_text(json.dumps({**facts, **more}))


NAMES = [
    "../victim",
    "../../victim",
    "/etc/passwd",
    "shard-00000.tar/../../victim",
    "..",
    "",
    "x/y",
    "shard-00000.tar\0",
    "C:\\x",
]


@pytest.mark.parametrize("name", [*NAMES, "OUTSIDE"])
@pytest.mark.parametrize("where", ["shard", "index", "notes"])
def test_names_in_a_data_set_lead_nowhere(copy: Path, name: str, where: str) -> None:
    victim = copy.parent / "victim"
    others = [victim, copy.parent / "victim.entries.json"]
    for path in others:
        path.write_text("mine")
    name = str(victim) if name == "OUTSIDE" else name
    entries, sizes = read_index(copy)
    rows = [vars(entry) for entry in entries]
    if where == "shard":
        sealed(copy, [{**row, "shard": name} for row in rows], {name: 4})
    elif where == "index":
        sealed(copy, rows, sizes, index=name)
    else:
        for path in copy.glob("index*"):
            path.unlink()
        for shard in sizes:
            noted = [{**row, "shard": name} for row in rows if row["shard"] == shard]
            (copy / f"{shard}.entries.json").write_text(json.dumps({"bytes": sizes[shard], "entries": noted}))
    assert used(copy) != "read"
    assert [path.read_text() for path in others] == ["mine", "mine"]


def hostile_members(folder: Path) -> list[tarfile.TarInfo]:
    """Members that would do harm where they were unpacked: by name, by link, as a device."""
    made = []
    for number, name in enumerate([*NAMES[:4], str(folder.parent / "victim"), "inner/../../victim"]):
        for kind in (
            tarfile.REGTYPE,
            tarfile.SYMTYPE,
            tarfile.LNKTYPE,
            tarfile.CHRTYPE,
            tarfile.BLKTYPE,
            tarfile.FIFOTYPE,
            tarfile.DIRTYPE,
        ):
            member = tarfile.TarInfo(name if kind != tarfile.SYMTYPE else f"link-{number}")
            member.type, member.linkname, member.mode = kind, name, 0o4777
            member.devmajor, member.devminor = 1, 3
            made.append(member)
            if kind == tarfile.SYMTYPE:  # and something written through it
                made.append(tarfile.TarInfo(f"link-{number}/victim"))
    return made


def test_members_of_a_shard_are_not_unpacked(copy: Path) -> None:
    """Hostile members before, between and behind the records: these are read as they are, and nothing is made of the others."""
    victim = copy.parent / "victim"
    victim.write_text("mine")
    entries, sizes = read_index(copy)
    rows, number = [], 0
    for shard in sizes:
        with tarfile.open(copy / shard) as old:
            members = [(member, old.extractfile(member).read()) for member in old.getmembers()]  # type: ignore[union-attr]
        places = {}
        with tarfile.open(copy / shard, "w", format=tarfile.GNU_FORMAT) as new:
            for member, data in members:
                for bad in hostile_members(copy):
                    new.addfile(bad)
                    number += 1
                places[member.name] = new.fileobj.tell() + tarfile.BLOCKSIZE  # type: ignore[union-attr]
                new.addfile(member, io.BytesIO(data))
        for entry in (entry for entry in entries if entry.shard == shard):
            here = {"offset": places[f"{entry.key}.safetensors"], "meta_offset": places[f"{entry.key}.json"]}
            rows.append(vars(replace(entry, **here)))
    assert number > 1000
    sealed(copy, rows, {shard: (copy / shard).stat().st_size for shard in sizes})
    before = sorted(path.name for path in copy.parent.iterdir())
    assert used(copy) == "read"
    data = ShardDataset(copy)
    assert all(same(data.read(n), record(n)) for n in range(20))
    assert (victim.read_text(), sorted(path.name for path in copy.parent.iterdir())) == ("mine", before)
    assert not [path for path in copy.iterdir() if path.is_symlink() or not path.is_file()]


@pytest.mark.parametrize(
    "change",
    [
        {"offset": "1"}, {"key": 3}, {"sha256": None}, {"offset": 1.5}, {"more": 1}, {"shard": None},
        {"tensors": "{"}, {"tensors": "[]"}, {"tensors": '{"latent": 1}'}, {"tensors": '{"latent": {"shape": ["x"]}}'},
        {"tensors": '{"latent": {"shape": [1e999]}}'}, {"meta": "[" * 100_000}, {"meta": "3"},
    ],
)  # fmt: skip
def test_an_index_that_says_odd_things_is_refused(copy: Path, change: dict[str, Any]) -> None:
    entries, sizes = read_index(copy)
    sealed(copy, [{**vars(entry), **change} for entry in entries], sizes)
    assert used(copy) != "read"


def test_tensors_of_a_shape_that_torch_does_not_know_are_a_bad_record(copy: Path) -> None:
    head = b'{"latent":{"dtype":"F32","shape":[0,9223372036854775808],"data_offsets":[0,0]}}'
    entries, sizes = read_index(copy)
    shard, data = copy / entries[0].shard, len(head).to_bytes(8, "little") + head
    bad = bytearray(shard.read_bytes())
    bad[entries[0].offset : entries[0].offset + len(data)] = data
    meta = bytes(bad[entries[0].meta_offset :][: entries[0].meta_size])
    shard.write_bytes(bad)
    entry = replace(entries[0], size=len(data), sha256=hashlib.sha256(data + meta).hexdigest())
    sealed(copy, [vars(entry), *(vars(other) for other in entries[1:])], sizes)
    with pytest.raises(UserError, match=r"clip-00000.*is not readable"):
        ShardDataset(copy).read(0)
    skipping = ShardDataset(copy, policy="skip")
    assert skipping.read(0) is None
    assert skipping.skipped == 1


@pytest.mark.parametrize("size", [0, -1, float("inf"), None, "x", [1], {}])
def test_a_seal_that_says_odd_sizes_is_refused(copy: Path, size: Any) -> None:
    entries, sizes = read_index(copy)
    name = entries[0].shard
    (copy / name).write_bytes(b"")
    sealed(copy, [vars(entry) for entry in entries], {**sizes, name: size})
    assert used(copy) != "read"


@pytest.mark.parametrize("data", [b"", b"PAR1", b"PAR1" + bytes(40) + b"PAR1", b"PAR1" + b"\xff" * 60 + b"\x10\0\0\0PAR1"])
def test_an_index_that_is_no_parquet_is_refused(copy: Path, data: bytes) -> None:
    index = next(copy.glob("index-*.parquet"))
    index.write_bytes(data)
    (copy / SEAL).write_text(json.dumps({**json.loads((copy / SEAL).read_text()), "index_sha256": sha256(index)}))
    assert "not an index" in used(copy)


@pytest.mark.parametrize("notes", ["[]", "{}", '{"bytes": 1, "entries": 3}', '{"bytes": 1, "entries": [{"key": "a"}]}'])
def test_notes_of_a_shard_that_are_none_are_not_believed(copy: Path, whole: Path, notes: str) -> None:
    for path in copy.glob("index*"):
        path.unlink()
    (copy / "shard-00000.tar.entries.json").write_text(notes)
    with ShardWriter(copy, 9000) as writer:
        assert len(writer) == 0
        for number in range(20):
            writer.add(record(number))
    assert contents(copy) == contents(whole)


def test_verification_can_be_chosen(copy: Path) -> None:
    data = ShardDataset(copy, verify="never")
    entry = data.entries[0]
    path = copy / entry.shard
    bad = bytearray(path.read_bytes())
    bad[entry.offset + entry.size - 1] ^= 1
    path.write_bytes(bad)
    assert data.read(0) is not None
    with pytest.raises(UserError, match="hash"):
        ShardDataset(copy, verify="always").read(0)
    with pytest.raises(UserError, match="verify must be"):
        ShardDataset(copy, verify="sometimes")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="policy"):
        ShardDataset(copy, policy="ignore")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": "a.b"}, "key"),
        ({"key": "../up"}, "key"),
        ({"key": ""}, "key"),
        ({"key": "k" * 81}, "key"),
        ({"tensors": {}}, "no tensors"),
        ({"tensors": {"x": [1]}}, "list"),
        ({"tensors": {"x": torch.zeros(0)}}, "empty"),
        ({"tensors": {"x": torch.tensor([float("nan")])}}, "finite"),
        ({"tensors": {"video": torch.zeros(2, 4, 4, 3)}}, "video"),
        ({"tensors": {"video": torch.zeros(2, 3, 4, 4, dtype=torch.uint8)}}, "video"),
        ({"tensors": {"latent": torch.zeros(2, 3, 4)}}, "latent"),
        ({"tensors": {"foreground": torch.zeros(2, 3, 4)}}, "foreground"),
        ({"meta": {"x": {1, 2}}}, "JSON"),
        ({"meta": {"x": float("nan")}}, "JSON"),
        ({"meta": {"captions": []}}, "captions"),
        ({"meta": {"captions": "a ball"}}, "captions"),
        ({"meta": {"captions": [{"text": "a ball"}]}}, "captions"),
        ({"meta": {"fps": 0}}, "fps"),
        ({"meta": {"fps": "8"}}, "fps"),
        ({"meta": {"fps": True}}, "fps"),
    ],
)
def test_wrong_records_are_refused(change: dict, message: str) -> None:
    good = {"key": "a", "tensors": {"x": torch.ones(1)}, "meta": {}}
    validate(Record(**good))
    with pytest.raises(UserError, match=message):
        validate(Record(**(good | change)))


def test_wrong_writing_is_refused(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "data")
    with pytest.raises(UserError, match="no records"):
        writer.close()
    writer.add(record(0))
    with pytest.raises(UserError, match="already"):
        writer.add(record(0))
    with pytest.raises(UserError, match="shard_bytes"):
        ShardWriter(tmp_path / "data", 0)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        ShardWriter(tmp_path / "file")
