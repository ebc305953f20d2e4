"""Endless, exactly resumable draws from a data set.

Two integers say where a run is: the seed and the number of items drawn so far by all ranks together. The order of epoch e is a
permutation made from (seed, e) alone, and a draw's caption from (seed, e, index) alone; so neither the number of workers or
ranks nor a restart changes what is drawn. Rank r of w takes items r::w of each global batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tubelet.core.errors import UserError
from tubelet.data.batching import collate, plan_batches
from tubelet.data.schema import Record
from tubelet.nn.packing import fill_packs

State = dict[str, Any]
"""JSON values that say where a source stands."""

Batch = dict[str, Any]
"""Tensors by name, stacked `(B, ...)`, and lists of B plain values (`caption`, `key`)."""


class Source(Protocol):
    """What the training loop draws from. A draw's random numbers come from the source's seed alone: it may run in a thread."""

    def draw(self, count: int) -> Batch:
        """The next global batch of `count` items (this rank's share of it)."""
        ...

    def state(self) -> State: ...

    def restore(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True, slots=True)
class Draw:
    """One item: which pass over the data, which place in the data set."""

    epoch: int
    index: int


def mix(*numbers: int | np.ndarray) -> np.ndarray:
    """64-bit hashes of integers, broadcast; the same on every machine and in every version (splitmix64, Steele et al. 2014)."""
    hashed: np.ndarray = np.uint64(0)  # type: ignore[assignment]
    with np.errstate(over="ignore"):
        for number in numbers:
            hashed = (hashed ^ np.asarray(number).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            hashed = (hashed ^ (hashed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            hashed = (hashed ^ (hashed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            hashed = hashed ^ (hashed >> np.uint64(31))
    return hashed


def uniform(*numbers: int | np.ndarray) -> np.ndarray:
    """`mix` as float64 in [0, 1)."""
    return (mix(*numbers) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    """The order of one epoch, int64 `(length,)`, from (seed, epoch) alone."""
    return np.argsort(mix(seed, epoch, np.arange(length, dtype=np.int64)), kind="stable")


class Cursor:
    """A place in the endless sequence of seeded permutations of `length` items."""

    def __init__(self, length: int, seed: int, rank: int = 0, world: int = 1) -> None:
        if length < 1:
            raise UserError("the data set is empty; write some records first")
        assert 0 <= rank < world, f"rank {rank} of {world}"
        self.length, self.seed, self.rank, self.world = length, seed, rank, world
        self.position = 0
        self._order: tuple[int, np.ndarray] | None = None

    def take(self, count: int) -> list[Draw]:
        """Move on by a global batch of `count` items; returns this rank's of them. A batch may straddle two epochs."""
        if count < self.world:
            raise UserError(f"a batch of {count} cannot be shared by {self.world} ranks; make it at least {self.world}")
        places = range(self.position + self.rank, self.position + count, self.world)
        self.position += count
        return [Draw(place // self.length, int(self._epoch(place // self.length)[place % self.length])) for place in places]

    def _epoch(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, permutation(self.length, self.seed, epoch)
        return self._order[1]

    def state(self) -> State:
        return {"position": self.position, "length": self.length, "seed": self.seed}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Raises UserError when the state belongs to other data or another seed."""
        check_same(state, {"length": self.length, "seed": self.seed})
        self.position = int(state["position"])


def check_same(state: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raises UserError when a stored data position was taken with other settings."""
    for name, value in expected.items():
        if state.get(name) != value:
            raise UserError(
                f"the checkpoint's data position was taken with {name} {state.get(name)}, now it is {value}; "
                "resume with the same data, or start in a new folder"
            )


def names_of(caption: Mapping[str, Any]) -> tuple[str, str]:
    """What a caption goes by in proportions: its kind, and its kind by its source, as in `dense@coca`."""
    return caption["kind"], f"{caption['kind']}@{caption.get('source')}"


class CaptionChoice:
    """Picks one of a record's captions by proportions of their kinds, e.g. `{"short": 0.3, "dense": 0.5, "human": 0.2}`.

    `KIND@SOURCE` means those of one source alone: `{"dense@coca": 0.95, "human": 0.05}` blends a captioner's captions with
    original ones. A kind that a record lacks gives its share to the others; kinds without a proportion are never picked. The
    choice depends on (seed, epoch, index) alone. `first`: the kind that is taken wherever a record has it.
    """

    def __init__(self, proportions: Mapping[str, float], seed: int, first: str | None = None) -> None:
        if not proportions or any(value < 0.0 for value in proportions.values()) or sum(proportions.values()) <= 0.0:
            raise UserError(f"caption proportions must be at least 0 and not all 0, got {dict(proportions)}; correct them")
        self.proportions, self.seed, self.first = dict(proportions), seed, first

    def of_batch(self, position: int) -> CaptionChoice:
        """One kind for the whole batch that begins at `position`: captions of one length waste no padding."""
        kinds = list(self.proportions)
        bounds = np.cumsum([self.proportions[kind] for kind in kinds])
        place = int(np.searchsorted(bounds, float(uniform(self.seed, position, 4)) * bounds[-1], side="right"))
        return CaptionChoice(self.proportions, self.seed, kinds[min(place, len(kinds) - 1)])

    def pick(self, captions: Sequence[Mapping[str, Any]], draw: Draw) -> int:
        """The place of the picked caption. Raises UserError when no caption is of a wanted kind."""
        named = [names_of(caption) for caption in captions]
        kinds = [kind for kind, share in self.proportions.items() if share > 0.0 and any(kind in names for names in named)]
        if self.first in kinds:
            kinds = [self.first]
        if not kinds:
            raise UserError(
                f"record {draw.index} has no caption of the kinds {', '.join(self.proportions)}; "
                "caption it or change the proportions"
            )
        bounds = np.cumsum([self.proportions[kind] for kind in kinds])
        at = float(uniform(self.seed, draw.epoch, draw.index, 1)) * bounds[-1]
        kind = kinds[min(int(np.searchsorted(bounds, at, side="right")), len(kinds) - 1)]
        places = [place for place, names in enumerate(named) if kind in names]
        return places[int(mix(self.seed, draw.epoch, draw.index, 2) % np.uint64(len(places)))]


class Dataset(Protocol):
    """Records by place. `None` stands for a record that cannot be read and that the data set's policy skips."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Record | None: ...


class TensorSource:
    """A whole training set in memory: one tensor `(n, ...)` a name, batches gathered by index and nothing else.

    captions: per item, `[{"text", "kind", ...}, ...]`; a batch then has `caption` (list of str) and `caption_index` (B,), the
    place in the item's list; all captions of a batch are of one kind, drawn per batch, so that short ones are not padded to
    the length of long ones. A batch always has `index` (B,), the places in the set. Tensors may lie on any device.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        captions: Sequence[Sequence[Mapping[str, Any]]] | None = None,
        *,
        seed: int = 0,
        proportions: Mapping[str, float] | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.tensors, self.captions = dict(tensors), captions
        lengths = {name: len(value) for name, value in self.tensors.items()}
        if captions is not None:
            lengths["captions"] = len(captions)
        if len(set(lengths.values())) != 1:
            raise UserError(f"every tensor and the captions must have one length, got {lengths}; correct the data")
        self.cursor = Cursor(next(iter(lengths.values())), seed, rank, world)
        self.choice = CaptionChoice(proportions or {"short": 1.0, "dense": 1.0, "human": 1.0}, seed)

    @classmethod
    def load(
        cls, dataset: Dataset, names: Sequence[str], *, seed: int = 0, proportions: Mapping[str, float] | None = None
    ) -> TensorSource:
        """Read the named tensors and the captions of a whole data set of equal shapes into memory, once."""
        records = (record for index in range(len(dataset)) if (record := dataset.read(index)) is not None)
        tensors: dict[str, Tensor] = {}
        captions: list[Any] = []
        for record in records:
            for name in names:
                if name not in record.tensors:
                    raise UserError(f"record {record.key!r} has no tensor {name!r}; it has {', '.join(record.tensors)}")
                value = record.tensors[name]
                if name not in tensors:
                    tensors[name] = torch.empty(len(dataset), *value.shape, dtype=value.dtype)  # (n, ...)
                if value.shape != tensors[name].shape[1:] or value.dtype != tensors[name].dtype:
                    raise UserError(f"record {record.key!r} has {name!r} of another shape or dtype; use a BucketStream for it")
                tensors[name][len(captions)] = value
            captions.append(record.meta.get("captions"))
        if not captions:
            raise UserError("no record of the data set can be read; restore the shards from their source")
        tensors = {name: value[: len(captions)] for name, value in tensors.items()}
        return cls(tensors, None if None in captions else captions, seed=seed, proportions=proportions)

    def __len__(self) -> int:
        return self.cursor.length

    def draw(self, count: int) -> Batch:
        choice = self.choice.of_batch(self.cursor.position)
        draws = self.cursor.take(count)
        index = torch.tensor([draw.index for draw in draws], dtype=torch.long)  # (B,)
        batch: Batch = {name: value.index_select(0, index.to(value.device)) for name, value in self.tensors.items()}
        batch["index"] = index
        if self.captions is not None:
            places = [choice.pick(self.captions[draw.index], draw) for draw in draws]
            batch["caption"] = [str(self.captions[d.index][p]["text"]) for d, p in zip(draws, places, strict=True)]
            batch["caption_index"] = torch.tensor(places, dtype=torch.long)  # (B,)
        return batch

    def state(self) -> State:
        return self.cursor.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        self.cursor.restore(state)


class Turns:
    """Several sources, a batch of each in turn: what differs in shape cannot share a batch."""

    def __init__(self, sources: Sequence[Source]) -> None:
        if not sources:
            raise UserError("there is no source to draw from; give at least one")
        self.sources, self.position = list(sources), 0

    def draw(self, count: int) -> Batch:
        self.position += 1
        return self.sources[(self.position - 1) % len(self.sources)].draw(count)

    def state(self) -> State:
        return {"position": self.position, "sources": [source.state() for source in self.sources]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Raises UserError when the state belongs to other sources."""
        check_same({"sources": len(state["sources"])}, {"sources": len(self.sources)})
        for source, own in zip(self.sources, state["sources"], strict=True):
            source.restore(own)
        self.position = int(state["position"])


class Stream:
    """Batches of whole records of equal shape. A skipped record is replaced by the next readable one of the data set."""

    def __init__(
        self, dataset: Dataset, seed: int = 0, *, proportions: Mapping[str, float] | None = None, rank: int = 0, world: int = 1
    ) -> None:
        self.dataset = dataset
        self.cursor = Cursor(len(dataset), seed, rank, world)
        self.choice = CaptionChoice(proportions or {"short": 1.0, "dense": 1.0, "human": 1.0}, seed)

    def draw(self, count: int) -> Batch:
        return gather(self.dataset, self.cursor.take(count), self.choice)

    def state(self) -> State:
        return self.cursor.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        self.cursor.restore(state)


class Ahead:
    """A source whose next batch is drawn in a thread while the last one is used: an accelerator need not wait for it.

    What it draws and where it says it stands are the source's own, batch for batch.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self._thread = ThreadPoolExecutor(1, "ahead")
        self._state: State | None = None
        self._next: tuple[int, Future[tuple[Batch, State]]] | None = None

    def close(self) -> None:
        """Put the source back to where the batches that were handed out end, and let the thread go."""
        self.restore(self.state())
        self._thread.shutdown()

    def draw(self, count: int) -> Batch:
        if self._next is not None and self._next[0] != count:
            self.restore(self.state())
        waiting = self._next[1] if self._next is not None else self._thread.submit(self._take, count)
        batch, self._state = waiting.result()
        self._next = count, self._thread.submit(self._take, count)
        return batch

    def _take(self, count: int) -> tuple[Batch, State]:
        return self.source.draw(count), self.source.state()

    def state(self) -> State:
        return self.source.state() if self._state is None else self._state

    def restore(self, state: Mapping[str, Any]) -> None:
        if self._next is not None:
            wait([self._next[1]])  # a draw under way would move the source on after it was put back
        self._next = self._state = None
        self.source.restore(state)


class BucketStream:
    """Batches of equal shapes from data of mixed shapes; `shapes[i]` is item i's bucket key, `tokens(shape)` its cost.

    A batch of one shape holds at most `count` items (of `draw`) and at most `budget` tokens, always at least one item. What an
    epoch leaves over comes as smaller batches, or with `whole` filled up with other items of its shape, so that a shape has one
    form (what is compiled, is compiled once); an epoch's batches are shuffled. Resumes at a batch, so `count` and `budget` are
    part of the state. All captions of a batch are of one kind, drawn per batch. A skipped record is replaced by the next
    readable one of its shape; where none of a shape can be read, its batches are left out.
    """

    def __init__(
        self,
        dataset: Dataset,
        shapes: Sequence[tuple[int, ...]],
        seed: int = 0,
        *,
        budget: int | None = None,
        tokens_per_cell: float = 1.0,
        proportions: Mapping[str, float] | None = None,
        rank: int = 0,
        world: int = 1,
        whole: bool = False,
    ) -> None:
        if len(shapes) != len(dataset) or not shapes:
            raise UserError(f"{len(shapes)} shapes were given for {len(dataset)} records; give one each")
        self.whole = whole
        self.dataset, self.shapes, self.seed = dataset, [tuple(shape) for shape in shapes], seed
        self.budget, self.tokens_per_cell, self.rank, self.world = budget, tokens_per_cell, rank, world
        self.choice = CaptionChoice(proportions or {"short": 1.0, "dense": 1.0, "human": 1.0}, seed)
        self.epoch, self.batch, self.count = 0, 0, 0
        self._plan: tuple[tuple[int, int], list[list[int]]] | None = None
        self._unreadable: set[tuple[int, ...]] = set()

    def plan(self, epoch: int, count: int) -> list[list[int]]:
        """The global batches of an epoch, from (seed, epoch, count, budget, ranks, shapes) alone."""
        if self._plan is None or self._plan[0] != (epoch, count):
            order = permutation(len(self.shapes), self.seed, epoch)
            batches = plan_batches(
                self.shapes, order.tolist(), count, self.budget, self.tokens_per_cell, self.world, self.whole
            )
            shuffled = np.argsort(mix(self.seed, epoch, np.arange(len(batches), dtype=np.int64), 3), kind="stable")
            self._plan = (epoch, count), [batches[place] for place in shuffled]
        return self._plan[1]

    def draw(self, count: int) -> Batch:
        if self.batch and count != self.count:
            raise UserError(f"the batch size changed from {self.count} to {count} inside an epoch; keep it")
        self.count = count
        # All ranks read the same data, and so leave out the same shapes.
        while not self._unreadable.issuperset(self.shapes):
            batches = self.plan(self.epoch, count)
            draws = [Draw(self.epoch, index) for index in batches[self.batch][self.rank :: self.world]]
            shape = self.shapes[draws[0].index]
            choice = self.choice.of_batch(self.epoch * len(batches) + self.batch)
            self.batch += 1
            if self.batch == len(batches):
                self.epoch, self.batch = self.epoch + 1, 0
            if shape in self._unreadable:
                continue
            records, places = _read(self.dataset, draws, choice, lambda index, other: self.shapes[index] == self.shapes[other])
            if records:
                return _batch(records, places)
            self._unreadable.add(shape)
        raise UserError(UNREADABLE)

    def state(self) -> State:
        return {
            "epoch": self.epoch, "batch": self.batch, "count": self.count,
            "length": len(self.shapes), **self._planned_with(),
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        # Positions of before these were kept have none.
        older = {"whole": False, "world": self.world, "tokens_per_cell": self.tokens_per_cell}
        check_same({**older, **state}, {"length": len(self.shapes), **self._planned_with()})
        self.epoch, self.batch, self.count = int(state["epoch"]), int(state["batch"]), int(state["count"])

    def _planned_with(self) -> State:
        """Everything but the shapes that the batches of an epoch follow from, the number of ranks among it: each has a share of
        every batch."""
        return {
            "seed": self.seed, "budget": self.budget, "whole": self.whole, "world": self.world,
            "tokens_per_cell": self.tokens_per_cell,
        }  # fmt: skip


class PackStream:
    """Packs of samples of any shapes under a token budget: nothing is cropped, resized or padded.

    `tokens[i]` is the cost of item i. A draw of `count` is a global batch of `count` packs, of which this rank has a share: its
    tensors are lists (one per sample) in place of stacks, neighbours of equal cost stand together, which packed attention
    computes in one call. `padding` says what share of the budget the current epoch leaves empty. A skipped record is replaced
    by the next readable one that costs no more, or left out; packs of which nothing can be read hold one that can.
    """

    def __init__(
        self,
        dataset: Dataset,
        tokens: Sequence[int],
        budget: int,
        seed: int = 0,
        *,
        proportions: Mapping[str, float] | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if len(tokens) != len(dataset) or not tokens:
            raise UserError(f"{len(tokens)} token counts were given for {len(dataset)} records; give one each")
        if max(tokens) > budget or min(tokens) < 1:
            raise UserError(f"a pack of {budget} tokens cannot hold a sample of {max(tokens)}; raise the budget")
        self.dataset, self.tokens, self.budget, self.seed = dataset, list(tokens), budget, seed
        self.rank, self.world = rank, world
        self.choice = CaptionChoice(proportions or {"short": 1.0, "dense": 1.0, "human": 1.0}, seed)
        self.epoch, self.pack = 0, 0
        self._plan: tuple[int, list[list[int]]] | None = None

    def plan(self, epoch: int) -> list[list[int]]:
        """The packs of an epoch, from (seed, epoch, budget, tokens) alone; every item appears once."""
        if self._plan is None or self._plan[0] != epoch:
            packs = fill_packs(self.tokens, permutation(len(self.tokens), self.seed, epoch).tolist(), self.budget)
            shuffled = np.argsort(mix(self.seed, epoch, np.arange(len(packs), dtype=np.int64), 3), kind="stable")
            self._plan = epoch, [packs[place] for place in shuffled]
        return self._plan[1]

    @property
    def padding(self) -> float:
        """Share of the token budget that this epoch's packs leave empty, in [0, 1)."""
        packs = self.plan(self.epoch)
        return 1.0 - sum(self.tokens) / (self.budget * len(packs))

    def draw(self, count: int) -> Batch:
        if count < self.world:
            raise UserError(f"a batch of {count} packs cannot be shared by {self.world} ranks; make it at least {self.world}")
        draws: list[Draw] = []
        for place in range(count):
            packs = self.plan(self.epoch)
            if place % self.world == self.rank:
                draws += [Draw(self.epoch, index) for index in packs[self.pack]]
            self.pack += 1
            if self.pack == len(packs):
                self.epoch, self.pack = self.epoch + 1, 0
        draws.sort(key=lambda draw: -self.tokens[draw.index])
        records, places = _read(self.dataset, draws, self.choice, lambda index, other: self.tokens[other] <= self.tokens[index])
        if not records:
            records, places = _read(self.dataset, draws[:1], self.choice)  # any sample fits into an empty pack
        batch: Batch = {name: [record.tensors[name] for record in records] for name in records[0].tensors}
        batch["key"] = [record.key for record in records]
        if places is not None:
            batch["caption"] = [record.meta["captions"][place]["text"] for record, place in zip(records, places, strict=True)]
            batch["caption_index"] = torch.tensor(places, dtype=torch.long)  # (S,)
        return batch

    def state(self) -> State:
        return {"epoch": self.epoch, "pack": self.pack, "length": len(self.tokens), "seed": self.seed, "budget": self.budget}

    def restore(self, state: Mapping[str, Any]) -> None:
        check_same(state, {"length": len(self.tokens), "seed": self.seed, "budget": self.budget})
        self.epoch, self.pack = int(state["epoch"]), int(state["pack"])


UNREADABLE = "no record of the data set can be read; restore the shards from their source"


def gather(dataset: Dataset, draws: Sequence[Draw], choice: CaptionChoice) -> Batch:
    """Read, choose captions, stack."""
    return _batch(*_read(dataset, draws, choice))


def _batch(records: Sequence[Record], places: Sequence[int] | None) -> Batch:
    """Records stacked, with those of their captions that were chosen."""
    batch = collate(records)
    if places is not None:
        batch["caption"] = [record.meta["captions"][place]["text"] for record, place in zip(records, places, strict=True)]
        batch["caption_index"] = torch.tensor(places, dtype=torch.long)  # (B,)
    return batch


def _read(
    dataset: Dataset, draws: Sequence[Draw], choice: CaptionChoice, fits: Callable[[int, int], bool] | None = None
) -> tuple[list[Record], list[int] | None]:
    """The drawn records, an unreadable one replaced by the next, and which caption of each; None where some have none.

    `fits(index, other)`: may `other` stand for `index`? One for which nothing can stand is left out. Without `fits` anything
    can, and a data set without a readable record raises UserError.
    """
    found: list[tuple[Record, Draw]] = []
    for draw in draws:
        record = dataset.read(draw.index)
        for step in range(1, len(dataset)):
            if record is not None:
                break
            other = (draw.index + step) % len(dataset)
            record = dataset.read(other) if fits is None or fits(draw.index, other) else None
        if record is not None:
            found.append((record, draw))
        elif fits is None:
            raise UserError(UNREADABLE)
    records = [record for record, _ in found]
    if not all("captions" in record.meta for record in records):
        return records, None
    return records, [choice.pick(record.meta["captions"], draw) for record, draw in found]
