"""Bytes that strangers send and data sets that strangers made, drawn by coverage: only the foreseen errors may come (S3).

`python -m tests.soak --only fuzz` gives each target its share of time, in a process of its own, which is this module called as
a program. It needs atheris (`pip install 'tubelet[fuzz]'`); without it the targets can still be given any bytes.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.soak.figures import Figure, Settings, Skipped, exactly
from tests.soak.targets import TARGETS, Execute

try:
    import atheris
except ImportError:
    atheris = None

MOST_STARTS = 50
"""Of one target, whose process may die of a library's fault."""
LONGEST = 4096
"""Bytes that are drawn, but for clips."""


def fuzz(settings: Settings) -> Iterator[Figure]:
    """Every target for its share of the time; a target whose process dies is started again."""
    if atheris is None:
        raise Skipped("needs atheris: pip install 'tubelet[fuzz]'")
    whole = sum(share for _, share in TARGETS.values())
    for name, (_, share) in TARGETS.items():
        folder = settings.folder / name
        folder.mkdir()
        seconds, deaths, starts = 60 * settings.fuzz * share / whole, list[int](), 0
        begin = time.monotonic()
        while (left := seconds - (time.monotonic() - begin)) > 1 and starts < MOST_STARTS:
            words = [sys.executable, "-m", "tests.soak.fuzz", name, folder, left]
            root = Path(__file__).parents[2]
            done = subprocess.run([*map(str, words)], cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
            starts += 1
            if done.returncode != 0:
                deaths.append(done.returncode)
                (folder / f"death-{starts}.txt").write_bytes(done.stderr[-20_000:])
        said = [json.loads(path.read_text()) for path in sorted(folder.glob("report-*.json"))]
        outcomes: Counter[str] = sum((Counter(one["outcomes"]) for one in said), Counter())
        defects = {place: words for one in said for place, words in one["defects"].items()}
        common = ", ".join(f"{number} {word}" for word, number in outcomes.most_common(6))
        executed = sum(one["executions"] for one in said)
        yield Figure(f"{name}/executions", executed, f"in {time.monotonic() - begin:.0f} s: {common}")
        yield exactly(f"{name}/defects", len(defects), 0, "; ".join(f"{place} {words}" for place, words in defects.items()))
        broke = sum(number for word, number in outcomes.items() if word.startswith(("died", "escaped")))
        if name == "clips":
            yield Figure(f"{name}/broke", broke, "forks of the decoder that ended without an answer")
        yield exactly(f"{name}/deaths", len(deaths), 0, f"of the process: {deaths[:5]}" if deaths else "of the process")


def bent(data: bytes, longest: int, seed: int, kept: int = 0) -> bytes:
    """A file with some numbers or parts changed, behind `kept` bytes: what a clip's readers look at is mostly at the ends."""
    chance = random.Random(seed)
    bad = bytearray(data[kept:])
    for _ in range(chance.choice((1, 1, 2, 4))):
        reach = min(len(bad), chance.choice((64, 1024, len(bad) or 1)))
        at = chance.randrange(max(1, reach))
        at = at if chance.random() < 0.5 else max(0, len(bad) - 1 - at)
        width = chance.choice((1, 2, 4, 8))
        value = chance.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1, 255, 16, chance.getrandbits(64), 2**64 - 1))
        match chance.randrange(4):
            case 0 | 1:
                bad[at : at + width] = (value % 256**width).to_bytes(width)
            case 2:
                del bad[at : at + chance.choice((1, 8, 100, 2000))]
            case _:
                bad[at:at] = bad[at : at + chance.choice((8, 24, 200))]
    return (data[:kept] + bad)[:longest]


def retold(data: bytes, seed: int) -> bytes | None:
    """The same with one value of its first JSON changed, away or there twice; None where there is no JSON in it."""
    chance, begin = random.Random(seed), data.find(b"{")
    try:
        value, end = json.JSONDecoder().raw_decode(data[begin:].decode("latin-1"))
    except (ValueError, RecursionError):
        return None
    places = list(_places(value)) if begin >= 0 else []
    if not places:
        return None
    holder, key = chance.choice(places)
    old = holder[key]
    odd = [
        None,
        True,
        -1,
        0,
        1,
        2**31,
        2**63,
        10**30,
        1e308,
        float("inf"),
        "",
        "..",
        "/",
        "a" * 300,
        [],
        {},
        [old],
        {"a": old},
        "\0",
        "\ud800",
    ]
    match chance.randrange(4):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, list):
            holder.append(old)
        case 2 if isinstance(old, str) and old:
            at = chance.randrange(len(old))
            holder[key] = (
                old[:at] + chance.choice(("", "../", "/", "9", "{", '"', "\n", chr(chance.randrange(0x3000)))) + old[at + 1 :]
            )
        case _:
            holder[key] = chance.choice(odd)
    return data[:begin] + json.dumps(value).encode() + data[begin + len(data[begin:].decode("latin-1")[:end]) :]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every value within one, by what holds it and its key there."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


class Report:
    """What came of the executions so far, as a file that is there however the process ends."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / f"report-{os.getpid()}.json"
        self.executions, self.outcomes, self.defects = 0, Counter[str](), dict[str, str]()
        self.written = 0.0

    def take(self, execute: Execute, data: bytes) -> None:
        """One execution. What nobody foresaw is noted, with the bytes that led there, and no end."""
        self.executions += 1
        try:
            self.outcomes[execute(data)] += 1
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001  a panic of Rust's is no Exception
            frames = traceback.extract_tb(error.__traceback__)
            ours = [frame for frame in frames if "/tubelet/" in frame.filename] or frames
            place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno} {type(error).__name__}"
            self.outcomes["defect"] += 1
            if place not in self.defects:
                self.defects[place] = str(error)[:300]
                (self.folder / f"defect-{len(self.defects)}-{os.getpid()}").write_bytes(data)
                self.write()
        if time.monotonic() - self.written > 2:
            self.write()

    def write(self) -> None:
        """The file, whole."""
        said = {"executions": self.executions, "outcomes": self.outcomes, "defects": self.defects}
        other = self.path.with_suffix(".part")
        other.write_text(json.dumps(said))
        other.replace(self.path)
        self.written = time.monotonic()


def main(name: str, folder: Path, seconds: float) -> None:
    """Fuzz one target for some seconds. Ends the process."""
    assert atheris is not None
    corpus, place = folder / "corpus", folder / f"place-{os.getpid()}"
    corpus.mkdir(exist_ok=True)
    place.mkdir()
    report = Report(folder)
    target, _ = TARGETS[name]
    instrumented = ["tubelet", "starlette.formparsers", "starlette.responses", "python_multipart"]
    with contextlib.ExitStack() as opened:
        with atheris.instrument_imports(include=instrumented, enable_loader_override=False):
            execute, seeds = opened.enter_context(target(place))
        for number, seed in enumerate(seeds):
            (corpus / f"seed-{number:03d}").write_bytes(seed)

        until = time.monotonic() + seconds

        def one(data: bytes) -> None:
            report.take(execute, data)
            if time.monotonic() > until:
                report.write()
                os._exit(0)

        def mutated(data: bytes, longest: int, seed: int) -> bytes:
            if name == "clips":  # forks are not seen: coverage would lead to what is no clip at all
                return bent(random.Random(seed).choice(seeds), longest, seed, kept=12)
            told = retold(data, seed) if seed % 3 == 1 else None
            changed = bent(data, longest, seed) if seed % 3 == 2 else told
            return atheris.Mutate(data, longest) if changed is None else changed[:longest]

        longest = max(LONGEST, 2 * max(map(len, seeds)))
        options = [f"-max_len={longest}", "-timeout=60", "-rss_limit_mb=4096", f"-artifact_prefix={folder}/", "-len_control=0"]
        atheris.Setup([sys.argv[0], *options, str(corpus)], one, custom_mutator=mutated)
        atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]))
