"""The verbs that write captions: of one film, and of a whole data set."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from tubelet.cli.terminal import parse_size, print_json
from tubelet.core.errors import UserError

if TYPE_CHECKING:
    from tubelet.curate.captioners import Captioner

CHAT = "chat:"
CHAT_SHARD_BYTES = 2 * 2**20
"""What a chat model has said is asked again after an interruption where its shard was not whole: small shards lose little."""

Who = Annotated[str, arg(metavar="FOLDER|chat:MODEL")]


def captioner(text: str) -> Captioner:
    """A trained captioner's folder, or `chat:MODEL` behind the endpoint of TUBELET_CHAT_URL and TUBELET_CHAT_KEY."""
    from tubelet.curate.captioners import ChatCaptioner, load_captioner
    from tubelet.text.expand import ChatModel

    if not text.startswith(CHAT):
        return load_captioner(text)
    url = os.environ.get("TUBELET_CHAT_URL")
    if not url:
        raise UserError(f"{text} needs an endpoint; set TUBELET_CHAT_URL, e.g. to http://127.0.0.1:8080/v1")
    return ChatCaptioner(ChatModel(url, text.removeprefix(CHAT), os.environ.get("TUBELET_CHAT_KEY")))


@dataclass(frozen=True)
class Caption:
    """Say what a film or picture shows, in one sentence and in detail."""

    film: Annotated[Positional[Path], arg(metavar="FILE")]
    """Anything that PyAV or Pillow reads."""
    captioner: Who
    """The folder of a trained captioner, or a chat model that sees pictures, behind TUBELET_CHAT_URL."""
    json: Annotated[bool, arg(help_behavior_hint="")] = False
    """Print the captions and what they were read from as JSON."""

    def __call__(self) -> None:
        from tubelet.curate.captioners import read

        writer = captioner(self.captioner)
        clip, seconds = read(self.film, writer.view)
        texts = writer.write([clip])[0]
        if self.json:
            print_json({"source": writer.source, "frames": len(clip), "seconds": round(seconds, 3), "captions": texts})
        else:
            print("\n".join(texts.values()))


@dataclass(frozen=True)
class Import:
    """Make a data set of clips from films and the captions beside them, for `tubelet train footage`; resumable."""

    sources: Annotated[Positional[tuple[Path, ...]], arg(metavar="FILM|FOLDER")]
    """Films and folders of films. Beside film.mp4 stands film.txt, a caption a line, or film.json, as docs/recipes.md shows."""
    out: Annotated[Path, arg(metavar="FOLDER")]
    """Where the data set is written."""
    size: Annotated[str, arg(metavar="HxW")] = "64x64"
    """Height and width of the clips."""
    frames: int = 17
    """Frames of a clip; longer scenes become several."""
    fps: float = 8.0
    """Frames a second."""
    fit: Annotated[str, arg(metavar="crop|pad|stretch")] = "crop"
    """How films are brought to the size."""
    json: Annotated[bool, arg(help_behavior_hint="")] = False
    """Print what was found as JSON."""

    def __call__(self) -> None:
        from tubelet.curate.footage import Look, footage

        size = parse_size(self.size)
        assert size is not None, "there is a default"
        look = Look(size=size, frames=self.frames, fps=self.fps, fit=self.fit)  # type: ignore[arg-type]
        found = footage(self.sources, self.out, look)
        if self.json:
            print_json({"out": self.out, **vars(found)})
        else:
            parts = [", ".join(f"{count} {reason}" for reason, count in found.dropped.items() if count)]
            parts.append(f"{len(found.unread)} could not be read to their end" if found.unread else "")
            left = "; ".join(part for part in parts if part)
            print(f"{self.out}  {found.clips} clips of {found.films} films" + (f" (left out: {left})" if left else ""))


@dataclass(frozen=True)
class Recaption:
    """Copy a data set of clips with captions by a captioner beside those that it has; the same command goes on."""

    shards: Annotated[Positional[Path], arg(metavar="SHARDS")]
    """The folder of the data set, with clips as pixels."""
    captioner: Who
    """The folder of a trained captioner, or a chat model that sees pictures, behind TUBELET_CHAT_URL."""
    out: Annotated[Path, arg(metavar="FOLDER")]
    """Where the new data set is written."""
    source: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: the captioner's)")] = None
    """What the new captions are called: draws then ask for them as short@NAME and dense@NAME."""
    bad: Annotated[str, arg(metavar="fail|skip")] = "fail"
    """What a record does that cannot be read: end the run, or be named and left out."""
    json: Annotated[bool, arg(help_behavior_hint="")] = False
    """Print what was written as JSON."""

    def __call__(self) -> None:
        from tubelet.curate.recaption import SHARD_BYTES, recaption
        from tubelet.data.shards import ShardDataset

        dataset = ShardDataset(self.shards, policy=self.bad)  # type: ignore[arg-type]
        writer = captioner(self.captioner)
        shard_bytes = CHAT_SHARD_BYTES if self.captioner.startswith(CHAT) else SHARD_BYTES
        done = recaption(dataset, writer, self.out, source=self.source, shard_bytes=shard_bytes)
        name = writer.source if self.source is None else self.source
        if self.json:
            print_json({"out": self.out, "source": name, "records": done.records, "skipped": done.skipped})
        else:
            left = f", {len(done.skipped)} could not be read" if done.skipped else ""
            print(f"{self.out}  {done.records} records with short and dense captions by {name}{left}")
