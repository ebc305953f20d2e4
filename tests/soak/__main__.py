"""`python -m tests.soak [--minutes 60] [--only kills leaks ...] [--out out/soak.json]`."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

from tests.soak import faults, fuzz, server, store, strangers, training
from tests.soak.figures import Figure, Settings, Skipped

from tubelet.core.files import write_json

TRIALS: dict[str, Callable[[Settings], Iterator[Figure]]] = {
    "kills": store.kills,
    "stops": store.stops,
    "lost": store.lost,
    "steps": store.steps,
    "updates": store.updates,
    "disk": store.disk,
    "overload": server.overload,
    "queue": server.queue,
    "media": server.media,
    "stalls": server.stalls,
    "cancels": server.cancels,
    "restarts": server.restarts,
    "estimates": server.estimates,
    "paging": server.paging,
    "faults": faults.faults,
    "renders": faults.renders,
    "hooks": faults.hooks,
    "pages": strangers.pages,
    "canaries": strangers.canaries,
    "resumes": training.resumes,
    "torn": training.torn,
    "records": training.records,
    "wild": training.wild,
    "fuzz": fuzz.fuzz,
    "leaks": server.leaks,
}


def main() -> int:
    """Run the trials, print the table, write the JSON. Returns 1 when a promise was not held."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak", description="The promises of serving and training, at length."
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=60.0,
        help="of the watch for leaks, and of fuzzing up to 30; rounds of kills are 8 a minute",
    )
    parser.add_argument("--only", nargs="+", choices=list(TRIALS), default=list(TRIALS), help="some of them")
    parser.add_argument("--out", type=Path, default=Path("out/soak.json"), help="where the figures are written")
    arguments = parser.parse_args()
    if not arguments.minutes > 0:
        parser.error("--minutes is a number above 0")
    report: dict[str, list[dict[str, object]]] = {}
    with tempfile.TemporaryDirectory(prefix="soak") as folder:
        rounds, fuzzed = min(500, max(100, int(8 * arguments.minutes))), min(Settings.fuzz, arguments.minutes)
        whole = Settings(Path(folder), arguments.minutes, rounds=rounds, fuzz=fuzzed)
        for name in arguments.only:
            place = Path(folder) / name
            place.mkdir()
            begin = time.monotonic()
            figures: list[Figure] = []
            for figure in tried(TRIALS[name], replace(whole, folder=place)):
                figures.append(figure)
                say(line(name, figure))
            figures.append(Figure("took", time.monotonic() - begin, "s"))
            report[name] = [asdict(figure) for figure in figures]
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            write_json(arguments.out, {"minutes": arguments.minutes, "trials": report})
    broken = [f"{name}/{figure['name']}" for name, figures in report.items() for figure in figures if figure["held"] is False]
    say(f"not held: {', '.join(broken)}" if broken else "all held")
    return int(bool(broken))


def tried(trial: Callable[[Settings], Iterator[Figure]], settings: Settings) -> Iterator[Figure]:
    """The figures of a trial. One that breaks off says so in its last figure."""
    try:
        yield from trial(settings)
    except Skipped as skipped:
        yield Figure("skipped", 0, str(skipped))
    except Exception as error:  # noqa: BLE001  the other trials go on
        traceback.print_exc()
        yield Figure("broke off", 1, f"{type(error).__name__}: {str(error)[-200:]}", "= 0", False)


def say(words: str) -> None:
    """A line on the terminal."""
    sys.stdout.write(f"{words}\n")
    sys.stdout.flush()


def line(trial: str, figure: Figure) -> str:
    """A figure as one line of text."""
    held = {None: "", True: "held", False: "NOT HELD"}[figure.held]
    return f"{trial + '/' + figure.name:32s} {figure.value:10.4g} {figure.goal:10s} {held:9s} {figure.unit}"


if __name__ == "__main__":
    sys.exit(main())
