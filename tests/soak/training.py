"""Training that is stopped, killed, fed damaged data and losses that are not finite: T1 to T4 of the promises."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from test_shards import record, same
from test_train_resume import STEPS, assert_same_run, call, make_source, objective, sets_in
from test_train_resume import settings as run_settings
from tests.soak.figures import Figure, Settings, exactly
from torch import Tensor, nn

from tubelet.core.errors import UserError
from tubelet.data.shards import SEAL, ShardDataset, ShardWriter, read_index
from tubelet.train import checkpoint
from tubelet.train.optim import OptimizerConfig

MIB = 2**20


def resumes(settings: Settings) -> Iterator[Figure]:
    """Runs of each kind of data, optimiser and precision that are stopped at random steps and gone on with (T1)."""
    folders = sets_in(settings.folder / "sets")
    chance, stops, other = random.Random(1), 0, list[str]()
    kinds = [(data, optimizer, "fp32") for data in ("memory", "stream", "buckets") for optimizer in ("muon", "adamw")]
    for data, optimizer, precision in [*kinds, ("memory", "muon", "bf16")]:
        config = run_settings(optimizer=OptimizerConfig(kind=optimizer, weight_decay=0.01), precision=precision)
        place = settings.folder / f"{data} {optimizer} {precision}"
        whole = call(place / "whole", make_source(data, folders), config)
        left = settings.resumes
        while left > 0:
            several = sorted(chance.sample(range(1, STEPS), min(left, chance.choice((1, 1, 2, 3)))))
            left, stops = left - len(several), stops + len(several)
            folder = place / "-".join(map(str, several))
            shutil.rmtree(folder, ignore_errors=True)  # the same stops as before
            for stop in several:
                call(folder, make_source(data, folders), config, stop)
            try:
                assert_same_run(whole, call(folder, make_source(data, folders), config), place / "whole", folder)
            except AssertionError as error:
                other.append(f"{data} {optimizer} {precision} {several}: {str(error)[:80]}")
    yield Figure("stops", stops, f"of {len(kinds) + 1} runs of {STEPS} steps")
    yield exactly("other", len(other), 0, f"runs of another end: {other[:3]}" if other else "runs of another end")


def torn(settings: Settings) -> Iterator[Figure]:
    """A process that writes one checkpoint after the other, and is killed (T2)."""
    folder, chance = settings.folder / "checkpoints", random.Random(2)
    folder.mkdir()
    told = settings.folder / "told"
    told.touch()
    middle = lost = wrong = 0
    for number in range(settings.torn):
        before = told.read_text().split()
        child = os.fork()
        if child == 0:
            try:
                torch.set_num_threads(
                    1
                )  # a forked process has none of the threads that its parent computes with, and would wait
                _write_checkpoints(folder, told, int(before[-1]) if before else 0)
            finally:
                os._exit(1)
        until = time.monotonic() + 60
        while len(told.read_text().split()) <= len(before):
            assert time.monotonic() < until, "nothing is written"
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, "it ended before it was killed"
        middle += any(path.name.startswith(".") for path in folder.iterdir())
        newest, last = checkpoint.newest(folder), int(told.read_text().split()[-1])
        if newest is None or newest.step < last:
            lost += 1
            continue
        wrong += newest.state() != {"step": newest.step} or not _is_of(newest)
        if number % 10 == 9:  # what lies there: torn ones are taken for none, too
            newest.path.joinpath("model.safetensors").write_bytes(b"torn")
            older = checkpoint.newest(folder)
            wrong += older is None or older.step >= newest.step or not _is_of(older)
    yield Figure("kills", settings.torn, f"of a process that writes checkpoints of {_size(folder) / MIB:.1f} MiB")
    yield Figure("middle", middle, "of them while one was being written or removed")
    yield exactly("lost", lost, 0, "checkpoints that were said to be written")
    yield exactly("wrong", wrong, 0, "torn ones taken, or whole ones not")


def _tensors(step: int) -> dict[str, Tensor]:
    return {"weight": torch.full((300, 1000), float(step)), "step": torch.tensor([step])}


def _write_checkpoints(folder: Path, told: Path, step: int) -> None:
    with told.open("a") as file:
        while True:
            step += 1
            checkpoint.save(folder, step, {"model": _tensors(step), "ema": _tensors(-step)}, {"step": step})
            file.write(f"{step}\n")
            file.flush()


def _is_of(found: checkpoint.Checkpoint) -> bool:
    """Whether all numbers are those of its step."""
    parts = {"model": found.step, "ema": -found.step}
    return all(torch.equal(found.tensors(p)[n], value) for p, step in parts.items() for n, value in _tensors(step).items())


def _size(folder: Path) -> int:
    found = checkpoint.newest(folder)
    return sum(path.stat().st_size for path in found.path.iterdir()) if found else 0


def records(settings: Settings) -> Iterator[Figure]:
    """A data set with half of its records changed, again and again; files cut, away or mixed up; a changed index (T3)."""
    whole, chance = settings.folder / "whole", random.Random(3)
    with ShardWriter(whole, 4 * MIB) as writer:
        for number in range(settings.records):
            writer.add(record(number))
    entries, sizes = read_index(whole)
    good = {name: (whole / name).read_bytes() for name in sizes}
    copy = settings.folder / "copy"
    shutil.copytree(whole, copy)
    damaged = missed = wrong = 0
    for _ in range(settings.damages):
        shards, bad = {name: bytearray(data) for name, data in good.items()}, set[int]()
        for place, entry in enumerate(entries):
            if chance.random() < 0.5:
                begin, size = chance.choice(((entry.offset, entry.size), (entry.meta_offset, entry.meta_size)))
                shards[entry.shard][begin + chance.randrange(size)] ^= 1 << chance.randrange(8)
                bad.add(place)
        for name, data in shards.items():
            (copy / name).write_bytes(data)
        data = ShardDataset(copy, policy="skip")
        for place in range(len(data)):
            read = data.read(place)
            missed += place in bad and read is not None
            wrong += place not in bad and not _right(read, place, settings.records)
        damaged += len(bad)
        missed += data.skipped != len(bad)
    yield Figure("records", settings.records, f"in {len(sizes)} shards of {sum(map(len, good.values())) / MIB:.1f} MiB")
    yield Figure("damaged", damaged, f"one bit of each, in {settings.damages} rounds")
    yield exactly("missed", missed, 0, "damaged ones that were read, or not counted")
    yield exactly("wrong", wrong, 0, "whole ones that were not read as they are")
    yield from _files(copy, good, entries, chance)
    yield from _seals(copy, good, whole, settings, chance)


def _right(read: Any, place: int, of: int) -> bool:
    """A whole record: each looked at, some compared with what was written."""
    return read is not None and (place % max(1, of // 500) != 0 or same(read, record(place)))


def _files(copy: Path, good: dict[str, bytes], entries: list[Any], chance: random.Random) -> Iterator[Figure]:
    """Shards that are not what they were: of each, exactly its own records are found bad."""
    tried, wrong = 0, list[str]()
    names = list(good)
    for name in names:
        data, other = good[name], good[names[(names.index(name) + 1) % len(names)]]
        ways: dict[str, bytes | None] = {
            "away": None, "empty": b"", "cut": data[: chance.randrange(len(data))], "longer": data + bytes(512),
            "another's": other, "zeros": bytes(len(data)), "noise": chance.randbytes(len(data)),
        }  # fmt: skip
        if other is data:  # there is only one
            del ways["another's"]
        for way, content in ways.items():
            (copy / name).unlink() if content is None else (copy / name).write_bytes(content)
            for each in names:
                if each != name:
                    (copy / each).write_bytes(good[each])
            found = ShardDataset(copy).check()
            tried += 1
            if len(found) != sum(entry.shard == name for entry in entries) or not all(name in said for said in found):
                wrong.append(f"{name} {way}")
        (copy / name).write_bytes(data)
    yield Figure("files", tried, "shards away, empty, cut, longer, another's, of zeros, of noise")
    yield exactly("files/wrong", len(wrong), 0, f"not found as they are: {wrong[:3]}" if wrong else "not found as they are")


def _seals(copy: Path, good: dict[str, bytes], whole: Path, settings: Settings, chance: random.Random) -> Iterator[Figure]:
    """The seal and the index, a bit of which is changed: refused, or a data set that is what it was."""
    for name, data in good.items():
        (copy / name).write_bytes(data)
    files = [copy / SEAL, next(copy.glob("index-*.parquet"))]
    right, sizes = read_index(whole)
    said, number = Counter[str](), 25 * settings.damages
    for turn in range(number):
        path = files[turn % 2]
        data = bytearray(path.read_bytes())
        place, bit = chance.randrange(len(data)), 1 << chance.randrange(8)
        data[place] ^= bit
        path.write_bytes(data)
        try:
            entries, told = read_index(copy)
            # A told size that no shard has is found when that shard is read.
            said["other" if entries != right or told.keys() != sizes.keys() else "as it was" if told == sizes else "size"] += 1
        except UserError:
            said["refused"] += 1
        data[place] ^= bit
        path.write_bytes(data)
    yield Figure("seals", number, f"seals and indices with one bit changed: {dict(said)}")
    yield exactly("seals/other", said["other"], 0, "read as another data set")


def wild(settings: Settings) -> Iterator[Figure]:
    """Losses and gradients that are not finite at random steps, and from a step on for good (T4)."""
    folders = sets_in(settings.folder / "sets")
    chance, left, runs, skipped, wrong = random.Random(4), settings.wild, 0, 0, list[str]()
    while left > 0:
        bad = {step: chance.choice(("nan", "inf", "slope")) for step in chance.sample(range(1, STEPS + 1), min(left, 5))}
        left, runs = left - len(bad), runs + 1
        result, finite = _run(settings.folder / str(runs), folders, bad)
        skipped += result.skipped
        if not (result.finished and finite and result.skipped == len(bad)):
            wrong.append(f"{bad}: skipped {result.skipped}, finite {finite}")
    yield Figure("steps", skipped, f"not finite, in {runs} runs of {STEPS} steps, each skipped and counted")
    yield exactly("wrong", len(wrong), 0, f"runs: {wrong[:2]}" if wrong else "runs that counted otherwise or kept one")
    stopped = 0
    for number in range(10):
        begin = chance.randrange(4, STEPS - 4)
        try:
            _run(settings.folder / f"lost {number}", folders, dict.fromkeys(range(begin, STEPS + 1), "nan"), patience=3)
        except UserError:
            found = checkpoint.newest(settings.folder / f"lost {number}" / "checkpoints")
            stopped += found is None or all(value.isfinite().all() for value in found.tensors("model").values())
    yield exactly("stopped", stopped, 10, "of 10 runs that stay not finite, each with a finite checkpoint or none")


def _run(folder: Path, folders: dict[str, Path], bad: dict[int, str], **more: Any) -> tuple[Any, bool]:
    calls = 0

    def spiky(model: nn.Module, batch: dict[str, Any], rng: torch.Generator) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        losses = objective(model, batch, rng)
        loss = losses["loss"]
        match bad.get(calls):
            case "nan" | "inf" as value:
                loss = loss * float(value)
            case "slope":  # of a root at 0: a finite loss with a gradient of NaN
                loss = loss + (next(model.parameters()) * 0).sum().sqrt()
        return {**losses, "loss": loss}

    result = call(folder, make_source("memory", folders), run_settings(accumulate=1, **more), objective=spiky)
    return result, all(value.isfinite().all() for value in [*result.model.parameters(), *result.ema.parameters()])
