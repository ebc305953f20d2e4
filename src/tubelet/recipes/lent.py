"""What a system lends to experiments: its codec, its frozen words, and clips of the worlds as its latents.

A finished run of worlds-64 has them all. Of any other system, the shipped one among them, clips are simulated and encoded anew,
once for all experiments whose folders lie side by side.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tubelet.codecs.base import Codec
from tubelet.core.errors import UserError
from tubelet.core.files import held, read_json, write_json
from tubelet.core.log import note, progress
from tubelet.data.shards import ShardDataset
from tubelet.data.stream import TensorSource, names_of
from tubelet.generate.folder import SYSTEM_FILE
from tubelet.generate.system import System, load
from tubelet.recipes.worlds import DENOISER_SEED, Job, encode
from tubelet.runtime.cpu import restore
from tubelet.train.lineage import FrozenText
from tubelet.worlds.constants import PHYS2D_KINDS
from tubelet.worlds.grammar import parse

CLIPS = 31_200
"""Clips of phys2d that are encoded: as many as a run of worlds-64 holds of them."""
PAINTED = 4_000
"""Clips of persist2d that are encoded where an experiment asks for them."""


@dataclass(frozen=True)
class Lent:
    """Where the clips lie, the codec that made their latents, the words, and the size of the films.

    `also`: where more of them lie.
    """

    folder: Path
    codec: Codec
    text: FrozenText
    size: tuple[int, int]
    frames: int
    fps: float
    also: tuple[Path, ...] = ()

    @property
    def device(self) -> torch.device:
        return next(self.codec.parameters()).device

    @property
    def cells(self) -> tuple[int, int, int]:
        """Latent (frames, rows, columns) of a film."""
        return self.codec.strides.latent_shape(self.frames, *self.size)


def borrow(whole: str, folder: Path, device: str = "auto", painted: bool = False) -> Lent:
    """The parts of a finished run of worlds-64, or of a system by name or folder, for the experiment in `folder`.

    A system's clips are encoded beside the experiment's folder, unless they lie there already: those of phys2d and, where
    `painted` ones are asked for, of persist2d. Raises UserError when `whole` is neither, and when what lies there is of another
    system.
    """
    run, also = Path(whole), ()
    if (run / "export.json").exists() and (run / "latents").exists():
        place, system = run, load(run / "system", device=device, dtype="float32")
    elif run.is_dir() and not (run / SYSTEM_FILE).exists():
        raise UserError(f"{run} holds no finished run of worlds-64 and no system; set whole to either, such as worlds-64")
    else:
        system = load(whole, device=device, dtype="float32")
        place = folder.parent / f"{system.name}-latents"
        encode_clips(system, place, CLIPS)
        if painted:
            also = (folder.parent / f"{system.name}-painted",)
            encode_clips(system, also[0], PAINTED, "persist2d")
    restore(system.text)  # it is read in training, too
    config = system.config
    return Lent(place, system.codec, FrozenText(system.text), config.size, config.frames, config.fps, also)


def encode_clips(system: System, place: Path, count: int, world: str = "phys2d") -> None:
    """`count` clips of a world as latents of a system in place/latents, or those of them that are missing.

    Raises UserError when the place holds those of another system.
    """
    config, stated = system.config, {"system": system.digest, "clips": count}
    with held(place):
        if (place / "clips.json").exists() and read_json(place / "clips.json") != stated:
            raise UserError(f"{place} holds the clips of another system; remove it, or use another --out")
        if (place / "encode.json").exists():
            return
        note(f"simulating and encoding {count} clips in {place}, once for all experiments beside it")
        write_json(place / "clips.json", stated)
        jobs = [Job(world, DENOISER_SEED + i, config.size, config.frames, config.fps) for i in range(count)]
        begun = time.perf_counter()
        encode(system.codec, jobs, place, workers=2)
        write_json(place / "encode.json", {"encode": round(time.perf_counter() - begun, 1)})


def check_kinds(kinds: Sequence[str], among: Sequence[str] = PHYS2D_KINDS) -> None:
    """Raises UserError unless these are kinds of clips among those that there may be: by default those with objects."""
    unknown = [kind for kind in kinds if kind not in among]
    if unknown or not kinds:
        raise UserError(f"kinds are some of {', '.join(among)}, got {list(kinds)}; choose among them")


def thinned(lent: Lent, every: int) -> tuple[range, dict[str, Any]]:
    """Every so many latent frames of a film, and what clips of these are: `size`, `frames` and `fps`.

    Raises UserError where a latent is more than a frame, so that none can be left out.
    """
    if every < 1 or (every > 1 and lent.codec.strides.t > 1):
        raise UserError(f"frames can be left out where a latent is one frame, got every={every}; set it to 1")
    seen = {"size": lent.size, "frames": len(range(0, lent.frames, every)), "fps": lent.fps / every}
    return range(0, lent.cells[0], every), seen


SHORT = {"short": 1.0}


def latents(
    lent: Lent,
    kinds: Sequence[str],
    frames: Sequence[int],
    proportions: Mapping[str, float] = SHORT,
    *,
    count: int | None = None,
    foreground: bool = False,
    folder: Path | None = None,
) -> Callable[[int], TensorSource]:
    """The clips of these kinds (the first `count` of each world), their latent `frames` alone: a source of them for each seed.

    `proportions` of the kinds of captions as in `data.stream`; `foreground`: its mask, too; `folder` holds the latents where
    they are not the run's own. Raises UserError when there are none.
    """
    places = [folder] if folder else [place / "latents" for place in (lent.folder, *lent.also)]
    datasets = [ShardDataset(place) for place in places]
    shape, whole = (lent.codec.channels, *lent.cells), sum(map(len, datasets))
    kept: dict[str, list[Tensor]] = {"latent": [], **({"foreground": []} if foreground else {})}
    captions: list[list[dict[str, str]]] = []
    held: Counter[str] = Counter()
    with progress("reading latents", "clips") as advance:
        for index, (dataset, place) in enumerate((one, place) for one in datasets for place in range(len(one))):
            advance(index + 1, whole)
            record = dataset.read(place)
            if record is None or record.tensors["latent"].shape != shape:
                continue
            said, world = record.meta["captions"], record.meta.get("world", "phys2d")
            if count is not None and held[world] >= count:
                continue
            if parse(next(one["text"] for one in said if one["kind"] == "short")).get("kind") in kinds:
                held[world] += 1
                for name, values in kept.items():
                    time = 1 if name == "latent" else 0
                    values.append(record.tensors[name].index_select(time, torch.tensor(list(frames))))
                captions.append([one for one in said if any(proportions.get(name) for name in names_of(one))])
    if not captions:
        raise UserError(f"{places[0]} has no clips of {', '.join(kinds)}; choose other kinds, or another whole")
    tensors = {name: torch.stack(values) for name, values in kept.items()}  # (n, C, T, h, w), (n, T, h, w)
    return lambda seed: TensorSource(tensors, captions, seed=seed, proportions=proportions)
