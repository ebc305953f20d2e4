"""footage: the road of worlds-64 on clips of one's own.

Paper: none; what worlds-64 does, with pixels that come from films.
Command: tubelet train footage --set data=FOLDER, after tubelet curate import FILMS --out FOLDER
Cost: with the defaults about that of worlds-64: 93 minutes on two idle cores with fast bf16.
Score: whatever the films allow. The sizes are those of the shipped system, which is small; ten thousand clips are few.

Size, length and rate are those of the clips. `--set start=worlds-64` goes on from the shipped system, whose codec has seen
nothing but coloured shapes: the films' own codec is usually better. Clips without captions need some first: `tubelet curate
recaption`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from tubelet.codecs.losses import to_pixels
from tubelet.core.errors import UserError
from tubelet.core.files import read_json, sha256, write_json
from tubelet.core.log import progress
from tubelet.data.schema import Record
from tubelet.data.shards import SEAL, ShardDataset, ShardWriter
from tubelet.recipes import worlds_64
from tubelet.recipes.worlds import WorldsRecipe
from tubelet.runtime.device import choose_device, fast_bf16

DATA_FILE = "data.json"
"""Which data set a run is of, from its first stage on."""


@dataclass(frozen=True, kw_only=True)
class Footage(WorldsRecipe):
    """A run on clips of one's own. `clips` says nothing here."""

    data: str = "data"
    """A data set of clips as pixels, all of one size, length and rate, with captions: what `tubelet curate import` leaves."""

    def run(self, folder: Path) -> Path:
        """All stages; returns the system's folder.

        Raises UserError without the data set, when its clips differ or lack captions that are asked for, and as `WorldsRecipe`.
        """
        given = worlds_64.recipe()
        for name in ("workers", "foreground", "clips"):  # of simulated clips
            if getattr(self, name) != getattr(given, name):
                raise UserError(f"{name} is of clips that are simulated, footage has its own; leave {name} out")
        if not (Path(self.data) / SEAL).is_file():
            raise UserError(
                f"{self.data} holds no finished data set; tubelet curate import FILMS --out {self.data} makes one, "
                "or name another with --set data=FOLDER"
            )
        dataset = ShardDataset(self.data)
        shapes = set(dataset.shapes("video"))
        if len(shapes) != 1:
            raise UserError(
                f"clips of {self.data} must have one size and length, got {sorted(shapes)[:3]}; import them with one"
            )
        frames, height, width, _ = shapes.pop()
        facts = [dataset.facts(index) for index in range(len(dataset))]
        rates = {float(one["fps"]) for one in facts}
        if len(rates) != 1:
            raise UserError(f"clips of {self.data} must have one rate, got {sorted(rates)[:3]}; import them with one")
        kinds = {name for name, share in self.captions.items() if share > 0}
        bare = sum(not any(one["kind"] in kinds for one in fact.get("captions", [])) for fact in facts)
        if bare:
            raise UserError(
                f"{bare} of {len(facts)} clips have no caption of kind {' or '.join(sorted(kinds))}; "
                "write captions beside the films, run tubelet curate recaption, or set captions"
            )
        clips = replace(
            self.clips, size=(height, width), frames=frames, codec_frames=frames, fps=rates.pop(), sizes=(), lengths=()
        )
        return WorldsRecipe.run(replace(self, clips=clips), folder)

    def _claim(self, folder: Path) -> None:
        """As every run does; a run is of one data set, wherever that lies."""
        WorldsRecipe._claim(self, folder)
        path = folder / DATA_FILE
        if path.exists() and read_json(path) != self._seal():
            raise UserError(
                f"{folder} holds a run on another data set than {self.data} is now; use another --out, or the data that it was "
                "begun with"
            )

    def _seal(self) -> dict[str, str]:
        return {"sha256": sha256(Path(self.data) / SEAL)}

    def seen(self, folder: Path) -> int:
        return len(ShardDataset(folder / "latents"))

    @property
    def expander(self) -> None:
        """Nobody knows rules of these films."""
        return None

    def _check_clips(self) -> None:
        """No world renders them, and `run` has looked for their captions."""

    def prompts(self, folder: Path) -> Sequence[str]:
        """Some of the captions."""
        dataset = ShardDataset(folder / "latents")
        texts = (one["text"] for index in range(len(dataset)) for one in dataset.facts(index)["captions"])
        return list(itertools.islice(dict.fromkeys(texts), 6))

    def render(self, folder: Path) -> None:
        """The clips are there."""
        write_json(folder / DATA_FILE, self._seal())
        if not (folder / "clips").exists():
            (folder / "clips").symlink_to(Path(self.data).resolve())

    def encode(self, folder: Path) -> None:
        """Clips as standardised latents, all places alike, for the denoiser."""
        write_json(folder / DATA_FILE, self._seal())  # where another run's codec is taken nothing was rendered
        codec, device = self.load_codec(folder), choose_device("auto")
        codec.to(device)
        dataset = ShardDataset(self.data)
        with ShardWriter(folder / "latents", shard_bytes=64 * 2**20) as writer, progress("encoding", "clips") as advance:
            for done, group in enumerate(_groups(dataset, 32), start=1):
                if any(record.key not in writer for record in group):
                    pixels = to_pixels(torch.stack([record.tensors["video"] for record in group]).to(device))
                    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=fast_bf16(device)):
                        latents = codec.encode(pixels).to(torch.bfloat16).cpu()  # (n, C, T', h, w)
                    for record, latent in zip(group, latents, strict=True):
                        if record.key not in writer:
                            alike = torch.zeros(latent.shape[1:], dtype=torch.uint8)  # (T', h, w)
                            writer.add(Record(record.key, {"latent": latent, "foreground": alike}, record.meta))
                advance(min(32 * done, len(dataset)), len(dataset))


def _groups(dataset: ShardDataset, size: int) -> Iterator[list[Record]]:
    for begin in range(0, len(dataset), size):
        group = [dataset.read(index) for index in range(begin, min(begin + size, len(dataset)))]
        yield [record for record in group if record is not None]


def recipe() -> Footage:
    """The sizes and lengths of worlds-64. A kind of caption that a clip lacks leaves its share to those that it has."""
    given = worlds_64.recipe()
    settings = {field.name: getattr(given, field.name) for field in fields(given)}
    return Footage(**{**settings, "name": "footage", "captions": {"human": 1.0, "short": 1.0, "dense": 1.0}})
