"""Data sets on disk: tar shards of safetensors and JSON members with a Parquet index.

A record is the two members `KEY.safetensors` and `KEY.json`, one after the other, so that webdataset and `tar` read the shards
as they are. The index says where each record lies and what its bytes hash to; `index.json`, written last, names and seals it.
A folder without it is unfinished, and running its writer again goes on after the last whole shard.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import mmap
import os
import re
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.torch import load, save

from tubelet.core.errors import UserError
from tubelet.core.files import read_json, sha256, whole_file, write_json
from tubelet.core.weights import UNREADABLE
from tubelet.data.schema import Record, validate

SEAL = "index.json"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """One record's line in the index. Offsets and sizes: bytes of the members' contents; sha256 is of both, tensors first."""

    key: str
    shard: str
    offset: int
    size: int
    meta_offset: int
    meta_size: int
    sha256: str
    tensors: str
    """JSON: name -> {"dtype", "shape"}."""
    meta: str
    """JSON: the facts that are worth having without opening a shard."""


_SCHEMA = pa.schema([(field.name, pa.int64() if field.type == "int" else pa.string()) for field in fields(Entry)])
_SHARD, _INDEX = re.compile(r"shard-[0-9]{5,9}\.tar"), re.compile(r"index-[0-9]{8,12}\.parquet")
"""Names as the writer gives them. A data set may come from anybody: none of its names may lead out of the folder."""
_NO_INDEX = (pa.ArrowException, OSError, TypeError, KeyError, ValueError, AttributeError, OverflowError, RecursionError)


class ShardWriter:
    """Write records in a fixed order; use as a context manager: a clean exit seals the data set, an error leaves it resumable.

    Going on after an interruption: `key in writer` says whether a record is already in a whole shard; give the others again, in
    the same order, and the folder becomes byte for byte what an uninterrupted writer makes.
    """

    def __init__(
        self, folder: str | Path, shard_bytes: int = 256 * 2**20, essentials: Sequence[str] = ("fps", "captions")
    ) -> None:
        if shard_bytes < 1:
            raise UserError(f"shard_bytes must be at least 1, got {shard_bytes}; 256 MiB is usual")
        self.folder, self.shard_bytes, self.essentials = Path(folder), shard_bytes, tuple(essentials)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write in {folder} ({error.strerror}); choose another folder") from error
        self.entries: list[Entry] = []
        self._whole_shards = 0
        self._recover()
        self.keys = {entry.key for entry in self.entries}
        self._file: IO[bytes] | None = None
        self._tar: tarfile.TarFile | None = None
        self._open: list[Entry] = []

    def __contains__(self, key: str) -> bool:
        return key in self.keys

    def __len__(self) -> int:
        return len(self.entries) + len(self._open)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._drop()

    def add(self, record: Record) -> None:
        """Append a record. Raises UserError when it is not valid, its key was used before, or the disk is full."""
        validate(record)
        if record.key in self.keys:
            raise UserError(f"record {record.key!r} is already in {self.folder}; give each record its own key")
        tensors = save({name: value.detach().cpu().contiguous() for name, value in record.tensors.items()})
        meta = json.dumps(dict(record.meta), ensure_ascii=False, allow_nan=False).encode("utf-8")
        try:
            offset = self._member(f"{record.key}.safetensors", tensors)
            meta_offset = self._member(f"{record.key}.json", meta)
        except OSError as error:
            self._drop()
            raise self._cannot(error) from error
        shapes = {
            name: {"dtype": str(t.dtype).removeprefix("torch."), "shape": list(t.shape)} for name, t in record.tensors.items()
        }
        facts = {name: record.meta[name] for name in self.essentials if name in record.meta}
        digest = hashlib.sha256(tensors + meta).hexdigest()
        self._open.append(
            Entry(
                record.key,
                self._name(),
                offset,
                len(tensors),
                meta_offset,
                len(meta),
                digest,
                json.dumps(shapes),
                json.dumps(facts, ensure_ascii=False),
            )
        )
        self.keys.add(record.key)
        assert self._file is not None
        if self._file.tell() >= self.shard_bytes:
            self._finish_shard()

    def close(self) -> None:
        """Finish the last shard, write the index, seal it."""
        if self._open:
            self._finish_shard()
        if not self.entries:
            raise UserError(f"no records were written to {self.folder}; add some before closing")
        columns = {name: [getattr(entry, name) for entry in self.entries] for name in Entry.__dataclass_fields__}
        # A name of its own for each length: until the seal is replaced, the index that it names stays.
        index = self.folder / f"index-{len(self.entries):08d}.parquet"
        with whole_file(index) as temporary:
            pq.write_table(pa.table(columns), temporary, compression="zstd")
        shards = {name: (self.folder / name).stat().st_size for name in sorted({entry.shard for entry in self.entries})}
        write_json(
            self.folder / SEAL,
            {"records": len(self.entries), "index": index.name, "index_sha256": sha256(index), "shards": shards},
        )
        for other in self.folder.glob("index-*.parquet"):
            if other != index:
                other.unlink()
        for name in shards:
            self._notes(name).unlink(missing_ok=True)

    def _name(self) -> str:
        return f"shard-{self._whole_shards:05d}.tar"

    def _notes(self, name: str) -> Path:
        """The entries of a whole shard, kept until the index is sealed."""
        return self.folder / f"{name}.entries.json"

    def _recover(self) -> None:
        """Take over what is whole: the sealed index, then shards with their notes; an unfinished shard is forgotten."""
        if (self.folder / SEAL).exists():
            self.entries, _ = read_index(self.folder)
            self._whole_shards = len({entry.shard for entry in self.entries})
        while self._notes(self._name()).exists() and (self.folder / self._name()).exists():
            notes = read_json(self._notes(self._name()))
            try:
                noted = _entries(pa.Table.from_pylist([asdict(Entry(**entry)) for entry in notes["entries"]], _SCHEMA))
                if notes["bytes"] != (self.folder / self._name()).stat().st_size or {e.shard for e in noted} != {self._name()}:
                    break
            except _NO_INDEX:
                break
            if not any(entry.shard == self._name() for entry in self.entries):
                self.entries += noted
            self._whole_shards += 1
        for path in self.folder.glob(".shard-*.tar"):
            path.unlink()

    def _member(self, name: str, data: bytes) -> int:
        """Append one tar member with nothing of the machine or the hour in it; returns where its contents start."""
        if self._tar is None:
            self._file = open(self.folder / f".{self._name()}", "wb")  # noqa: SIM115 - open over many calls
            self._tar = tarfile.TarFile(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)
        assert self._file is not None
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(data), 0o644
        start = self._file.tell() + tarfile.BLOCKSIZE
        self._tar.addfile(info, io.BytesIO(data))
        return start

    def _finish_shard(self) -> None:
        name = self._name()
        assert self._tar is not None
        assert self._file is not None
        try:
            self._tar.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            size = self._file.tell()
            self._file.close()
            os.replace(self.folder / f".{name}", self.folder / name)
        except OSError as error:
            self._drop()
            raise self._cannot(error) from error
        write_json(self._notes(name), {"bytes": size, "entries": [asdict(entry) for entry in self._open]})
        self.entries += self._open
        self._open, self._tar, self._file = [], None, None
        self._whole_shards += 1

    def _drop(self) -> None:
        """Forget the unfinished shard."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            (self.folder / f".{self._name()}").unlink(missing_ok=True)
        self.keys -= {entry.key for entry in self._open}
        self._open, self._tar, self._file = [], None, None

    def _cannot(self, error: OSError) -> UserError:
        return UserError(
            f"cannot write {self.folder / self._name()} ({error.strerror or error}); "
            "make room, then run again: whole shards are kept"
        )


def read_index(folder: str | Path) -> tuple[list[Entry], dict[str, int]]:
    """A sealed data set's entries, and each shard's size in bytes. Raises UserError when the index is missing or changed."""
    folder = Path(folder)
    try:
        sealed = (folder / SEAL).exists()
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror or error}; give a folder that you may read") from error
    if not sealed:
        raise UserError(f"{folder} holds no finished data set ({SEAL} is missing); run its writer to the end")
    seal = read_json(folder / SEAL)
    try:
        index = folder / seal["index"]
        if not _INDEX.fullmatch(seal["index"]) or sha256(index) != seal["index_sha256"]:
            raise OSError("another name, or other bytes")
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"the index of {folder} is missing or does not match its hash; restore it from its source") from error
    try:
        entries = _entries(pq.read_table(index))
        shards = {str(name): int(size) for name, size in seal["shards"].items()}
    except _NO_INDEX as error:
        raise UserError(f"{index} is not an index of this version ({error}); write the data set again") from error
    fits = shards.keys() == {entry.shard for entry in entries} and seal.get("records") == len(entries)
    if not fits or min(shards.values(), default=1) < 1:
        raise UserError(f"{folder / SEAL} does not fit its index; restore it from its source")
    return entries, shards


def _entries(table: pa.Table) -> list[Entry]:
    """The rows of an index. Raises one of `_NO_INDEX` when they are none."""
    if table.schema != _SCHEMA or any(column.null_count for column in table.columns):
        raise ValueError("other columns")
    entries = [Entry(**row) for row in table.to_pylist()]
    for name in {entry.shard for entry in entries}:
        if not _SHARD.fullmatch(name):
            raise ValueError(f"a shard called {name!r}")
    return entries


class ShardDataset:
    """Random access to a data set's records through memory maps.

    policy: what a missing or truncated shard or a changed byte does: "fail" raises a UserError that names it, "skip" logs it,
    counts it in `skipped` and reads as None. verify: hash each record on its "first" read, "always" or "never".
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        policy: Literal["fail", "skip"] = "fail",
        verify: Literal["first", "always", "never"] = "first",
    ) -> None:
        if policy not in ("fail", "skip"):
            raise UserError(f"the policy for bad records must be fail or skip, got {policy!r}; choose one of them")
        if verify not in ("first", "always", "never"):
            raise UserError(f"verify must be first, always or never, got {verify!r}; choose one of them")
        self.folder, self.policy, self.verify = Path(folder), policy, verify
        self.entries, self._sizes = read_index(folder)
        self.places = {entry.key: place for place, entry in enumerate(self.entries)}
        self.bad: dict[int, str] = {}
        self._verified = np.zeros(len(self.entries), dtype=bool)
        self._maps: dict[str, mmap.mmap] = {}

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def skipped(self) -> int:
        """How many different records were found bad so far."""
        return len(self.bad)

    def read(self, index: int) -> Record | None:
        """The record at a place. Under "skip" None for a bad one; under "fail" a UserError that names shard and record."""
        if index in self.bad and self.policy == "skip":
            return None
        try:
            return self._read(index)
        except UserError as error:
            if self.policy == "fail":
                raise
            self.bad[index] = str(error)
            log.warning("skipped: %s (%d so far)", error, len(self.bad))
            return None

    def shapes(self, name: str) -> list[tuple[int, ...]]:
        """The shape of a named tensor in every record, from the index alone: what buckets are made of."""
        shapes = []
        for entry in self.entries:
            tensors = self._said(entry, entry.tensors)
            if name not in tensors:
                raise UserError(f"record {entry.key!r} has no tensor {name!r}; it has {', '.join(tensors)}")
            try:
                shapes.append(tuple(int(side) for side in tensors[name]["shape"]))
            except _NO_INDEX as error:
                raise self._unreadable(entry) from error
        return shapes

    def facts(self, index: int) -> Mapping[str, Any]:
        """The index's share of a record's meta, without opening a shard."""
        entry = self.entries[index]
        return self._said(entry, entry.meta)

    def _said(self, entry: Entry, text: str) -> dict[str, Any]:
        """JSON of the index."""
        try:
            said = json.loads(text)
        except _NO_INDEX as error:
            raise self._unreadable(entry) from error
        if not isinstance(said, dict):
            raise self._unreadable(entry)
        return said

    def _unreadable(self, entry: Entry) -> UserError:
        return UserError(f"what the index of {self.folder} says of record {entry.key!r} is not readable; restore the index")

    def check(self) -> list[str]:
        """Hash every record; one sentence for each bad one, which names it."""
        found = []
        for index in range(len(self)):
            self._verified[index] = False
            try:
                self._read(index)
            except UserError as error:
                found.append(str(error))
        return found

    def _read(self, index: int) -> Record:
        entry = self.entries[index]
        whole = self._map(entry)
        tensors = whole[entry.offset : entry.offset + entry.size]
        meta = whole[entry.meta_offset : entry.meta_offset + entry.meta_size]
        where = f"record {entry.key!r} in {self.folder / entry.shard}"
        if self.verify == "always" or (self.verify == "first" and not self._verified[index]):
            if hashlib.sha256(tensors + meta).hexdigest() != entry.sha256:
                raise UserError(f"{where} does not match its hash; restore the shard from its source")
            self._verified[index] = True
        try:
            return Record(entry.key, load(tensors), json.loads(meta))
        except (*UNREADABLE, RecursionError) as error:
            raise UserError(f"{where} is not readable ({error}); restore the shard from its source") from error

    def _map(self, entry: Entry) -> mmap.mmap:
        if entry.shard not in self._maps:
            path = self.folder / entry.shard
            try:
                size = path.stat().st_size
                if size != self._sizes[entry.shard]:
                    raise UserError(
                        f"{path} has {size} bytes instead of {self._sizes[entry.shard]} (record {entry.key!r}); "
                        "restore the shard from its source"
                    )
                with open(path, "rb") as file:
                    self._maps[entry.shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except OSError as error:
                raise UserError(
                    f"{path} cannot be read ({error.strerror}; record {entry.key!r}); restore the shard from its source"
                ) from error
        return self._maps[entry.shard]
