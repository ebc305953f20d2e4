"""Write captions of a data set anew, beside those that it has (DALL-E 3, Betker et al. 2023, section 2).

The result is a data set of its own: the same records in the same order, each with its old captions first and the new ones,
with their `source`, behind them. How often either is drawn is decided at each draw (`data.stream.CaptionChoice`), not here.

A run that was interrupted goes on after its last whole shard, and the folder becomes byte for byte what an uninterrupted run
makes: clips are captioned in groups that only their places decide, so a captioner sees the same ones together both times.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tubelet.core.errors import UserError
from tubelet.core.files import read_json, write_json
from tubelet.core.log import progress
from tubelet.curate.captioners import Captioner, fitted
from tubelet.data.schema import Record
from tubelet.data.shards import SEAL, ShardDataset, ShardWriter
from tubelet.text.writing import STYLES

CLAIM = "recaption.json"
"""What the captions of a folder were made from and by whom, written first."""
SHARD_BYTES = 64 * 2**20

Caption = dict[str, str]
"""`text`, `kind`, `source`."""
Look = Callable[[Record], np.ndarray]
"""A record as pixels, uint8 `(T, H, W, 3)`."""


@dataclass(frozen=True)
class Outcome:
    """A finished run: records that were written, and the keys of those that could not be read."""

    records: int
    skipped: tuple[str, ...]


def recaption(
    dataset: ShardDataset,
    captioner: Captioner,
    folder: str | Path,
    *,
    source: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Outcome:
    """Caption every record of clips into the data set `folder`, short and dense; the same call goes on after an interruption.

    `source` names the captions, by default as the captioner does. Bad records follow the data set's policy.
    Raises UserError when a record has no `video`, when one has a caption of that kind and source already, when the folder holds
    something else, and when the captioner or the disk fails.
    """
    name = captioner.source if source is None else source
    if not name.strip():
        raise UserError("captions need the name of their source; give one")
    for index, entry in enumerate(dataset.entries):
        if "video" not in json.loads(entry.tensors):
            raise UserError(f"record {entry.key!r} has no video to look at; recaption clips as pixels, then encode them")
        _check_new(entry.key, dataset.facts(index).get("captions", []), [_caption("", style, name) for style in STYLES])

    def write(records: Sequence[Record]) -> list[list[Caption]]:
        return captions_of(captioner, records, lambda record: record.tensors["video"].numpy(), name)

    settings = {**captioner.identity, "source": name}
    return add_captions(dataset, folder, write, settings, batch=captioner.batch, shard_bytes=shard_bytes)


def captions_of(
    captioner: Captioner, records: Sequence[Record], look: Look, source: str, styles: Sequence[str] = STYLES
) -> list[list[Caption]]:
    """What a captioner says of records that `look` turns into pixels: for each its captions, named `source`."""
    clips = [fitted(look(record), record.meta.get("fps"), captioner.view) for record in records]
    texts = captioner.write(clips, styles)
    return [[_caption(several[style], style, source) for style in styles] for several in texts]


def add_captions(
    dataset: ShardDataset,
    folder: str | Path,
    write: Callable[[Sequence[Record]], Sequence[Sequence[Caption]]],
    settings: Mapping[str, Any],
    *,
    batch: int = 32,
    shard_bytes: int = SHARD_BYTES,
    count: int | None = None,
) -> Outcome:
    """Copy a data set (its first `count` records) into `folder` with the captions that `write(records)` gives each of them.

    `write` gets records whose places lie in one block of `batch`, always whole blocks. `settings` are JSON values that decide
    what it gives: a folder that was begun with others is refused. Raises UserError as `recaption`.
    """
    folder = Path(folder)
    data = read_json(dataset.folder / SEAL)["index_sha256"]
    _claim(folder, {**settings, "data": data, "count": count, "batch": batch, "shard_bytes": shard_bytes})
    keys = [entry.key for entry in dataset.entries[:count]]
    with ShardWriter(folder, shard_bytes) as writer, progress("captioning", "clips") as advance:
        for first in range(0, len(keys), batch):
            places = range(first, min(first + batch, len(keys)))
            if any(keys[place] not in writer for place in places):
                records = [record for place in places if (record := dataset.read(place)) is not None]
                if any(record.key not in writer for record in records):
                    for record, captions in zip(records, write(records), strict=True):
                        if record.key not in writer:
                            writer.add(_with(record, captions))
            advance(places.stop, len(keys))
        return Outcome(len(writer), tuple(key for key in keys if key not in writer))


def _caption(text: str, kind: str, source: str) -> Caption:
    return {"text": text, "kind": kind, "source": source}


def _with(record: Record, captions: Sequence[Caption]) -> Record:
    own = list(record.meta.get("captions", []))
    _check_new(record.key, own, captions)
    return Record(record.key, record.tensors, {**record.meta, "captions": [*own, *captions]})


def _check_new(key: str, own: Sequence[Mapping[str, Any]], captions: Sequence[Caption]) -> None:
    """Two captions of one kind and source could not be told from each other."""
    taken = {(one["kind"], one.get("source")) for one in own}
    for one in captions:
        if (one["kind"], one["source"]) in taken:
            raise UserError(
                f"record {key!r} has a {one['kind']} caption by {one['source']!r} already; give the new ones another source"
            )


def _claim(folder: Path, settings: Mapping[str, Any]) -> None:
    path = folder / CLAIM
    if not path.exists():
        # A hidden name is what a kill in the middle of the first write leaves.
        if folder.exists() and not (folder.is_dir() and all(path.name.startswith(".") for path in folder.iterdir())):
            raise UserError(f"{folder} holds something else already; choose a folder that is new or empty")
        write_json(path, settings)
    begun = read_json(path)
    changed = [name for name in settings if not isinstance(begun, dict) or begun.get(name) != settings[name]]
    if changed:
        raise UserError(f"{folder} was begun with another {changed[0]}; use another folder, or what it was begun with")
