"""When films will be there, told by what earlier ones took and by the queue."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tubelet.serve.config import SystemFacts
from tubelet.serve.estimate import LINE, Pace, Timetable, work_of
from tubelet.serve.records import Job

NOW = 1_000_000.0
SYSTEM = SystemFacts("s", Path("s"), size=(64, 64), frames=17, fps=8.0, steps=16, guidance=2.0)
_numbers = itertools.count()


def job(state: Any = "queued", progress: int = 0, begun: float = 0.0, took: float = 0.0, **request: Any) -> Job:
    """One of 17 frames of 64 x 64 unless told otherwise; begun so many seconds ago."""
    timings = request.pop("timings", {})
    asked = {"system": "s", "task": "create", "seconds": 2.125, "size": [64, 64], "steps": None, **request}
    return Job(
        id=f"video_{next(_numbers)}", owner="local", state=state, progress=progress, request=asked,
        created_at=NOW,
        started_at=NOW - begun, completed_at=NOW - begun + took, expires_at=None, attempt=asked.pop("attempt", 1), error=None,
        outputs=(), result={"timings": timings}, parent=None, cancelled=False, position=asked.pop("position", None),
        request_id=None, traceparent=None,
    )  # fmt: skip


def done(denoise: float = 1.6, write: float = 0.2, rest: float = 0.2, **request: Any) -> Job:
    timings = {"text": rest, "denoise": denoise, "encode": write}
    return job("completed", 100, took=denoise + write + rest, timings=timings, **request)


def pace(*films: Job) -> Pace:
    known = Pace()
    for film in films or (done(),):
        known.learn(film, work_of(film, SYSTEM))
    return known


def table(queued: list[Job], running: list[Job] = [], workers: int = 1, paused: bool = False) -> Timetable:  # noqa: B006
    return Timetable({"s": pace()}, {"s": SYSTEM}, running, queued, {"s": workers}, paused, NOW)


def test_the_same_film_again_takes_as_long_on_an_idle_server() -> None:
    again = job()
    assert table([again]).left(again, NOW) == pytest.approx(2.0)
    assert table([]).left(again, NOW) == pytest.approx(2.0), "one that came after the table was made"


@pytest.mark.parametrize(
    ("wish", "seconds"),
    [
        ({"steps": 32}, 0.2 + 3.2 + 0.2),
        ({"seconds": 8.0}, 0.2 + 1.6 * 64 / 17 * 1.4 + 0.2 * 64 / 17),
        ({"size": [640, 640]}, 0.2 + 1.6 + 20.0),
        ({"size": [64, 128]}, 0.2 + 3.2 + 0.4),
        ({"task": "extend", "seconds": 2.125, "source": {"seconds": 2.125}}, 0.2 + 1.6 + 0.4),
        ({"task": "edit", "seconds": None, "source": {"seconds": 2.125}}, 2.0),
    ],
    ids=["steps", "longer", "larger", "wide", "extension", "edit"],
)
def test_other_films_are_told_by_their_steps_frames_and_pixels(wish: dict[str, Any], seconds: float) -> None:
    film = job(**wish)
    assert table([film]).left(film, NOW) == pytest.approx(seconds)


def test_what_does_not_grow_with_a_film_is_learnt_from_films_of_several_kinds() -> None:
    """The worker of a small system needs .3 s to write the smallest film, and a hundred times the pixels take nine."""
    kinds = [{"seconds": 1.0}, {"seconds": 4.0}, {"seconds": 4.0, "size": [640, 640]}, {"seconds": 8.0, "steps": 30}]

    def film(**wish: Any) -> Job:
        work = work_of(job(**wish), SYSTEM)
        return done(denoise=0.3 + work.making / 400, write=0.25 + 0.7 * work.writing, **wish)

    known = pace(*(film(**wish) for wish in kinds * 2))
    for wish in [*kinds, {"seconds": 2.0, "size": [320, 320]}, {"seconds": 12.0}]:
        made = film(**wish)
        took = sum(made.result["timings"].values())
        assert sum(known.takes(work_of(made, SYSTEM)) or ()) == pytest.approx(took, rel=0.05), wish


def test_those_before_it_count_and_workers_share_them() -> None:
    line = [job(), job(steps=32), job()]
    one, two = table(line), table(line, workers=2)
    assert [one.left(film, NOW) for film in line] == pytest.approx([2.0, 5.6, 7.6])
    assert [two.left(film, NOW + 0.5) for film in line] == pytest.approx([1.5, 3.1, 3.5])
    running = job("in_progress", progress=46, begun=1.0)
    assert table(line[:1], [running]).left(line[0], NOW) == pytest.approx(1.0 + 0.2 + 2.0), "half of the making, then writing"


def test_behind_a_long_line_the_mean_of_the_line_counts() -> None:
    line = [job() for _ in range(LINE)]
    last = job(position=10 * LINE)
    assert table(line).left(last, NOW) == pytest.approx(2.0 * 10 * LINE)


def test_the_time_between_two_films_of_a_queue_counts() -> None:
    film = job()
    known = Pace()
    for number in range(3):
        began = NOW + 2.3 * number
        made = replace(done(), created_at=NOW - 1, started_at=began, completed_at=began + 2.0)
        known.learn(made, work_of(made, SYSTEM))
    assert sum(known.takes(work_of(film, SYSTEM)) or ()) == pytest.approx(2.3)
    idle = pace(*(replace(done(), created_at=NOW - 0.5) for _ in range(3)))
    assert sum(idle.takes(work_of(film, SYSTEM)) or ()) == pytest.approx(2.0), "a worker that slept says nothing of a queue"


def test_a_paused_queue_and_an_unknown_system_tell_nothing() -> None:
    film, other = job(), job(system="t")
    assert table([film], paused=True).left(film, NOW) is None
    assert table([other]).left(other, NOW) is None
    assert Timetable({}, {"s": SYSTEM}, [], [film], {}, False, NOW).left(film, NOW) is None


def test_a_film_that_is_being_made_is_told_by_its_progress() -> None:
    large = {"size": [640, 640]}
    known = pace()

    def left(**how: Any) -> float | None:
        film = job("in_progress", **how)
        return known.left(film, work_of(film, SYSTEM), NOW)

    assert left(begun=0.5) == pytest.approx(1.5), "nothing is made yet: as long as films take"
    assert left(progress=46, begun=4.0) == pytest.approx(4.2), "slower than others"
    assert left(progress=46, begun=0.9, **large) == pytest.approx(0.9 + 20.0), "all of the writing is still to come"
    assert left(progress=92, begun=11.8, **large) == pytest.approx(10.0)
    assert left(progress=92, begun=500.0, **large) == 0.0
    film = job("in_progress", progress=46, begun=3.0)
    assert Pace().left(film, work_of(film, SYSTEM), NOW) == pytest.approx(3.0)


def test_a_slow_first_film_is_soon_forgotten_and_a_resumed_one_not_believed() -> None:
    film = job()
    slow, half = done(denoise=20.0, rest=9.0), done(denoise=0.1, attempt=2)
    assert sum(pace(slow, done()).takes(work_of(film, SYSTEM)) or ()) == pytest.approx(2.0, rel=0.1)
    assert sum(pace(half, done(), half, half).takes(work_of(film, SYSTEM)) or ()) == pytest.approx(2.0)
    assert pace(half).takes(work_of(film, SYSTEM)) is None
    known, work = pace(slow), work_of(film, SYSTEM)
    assert sum(known.takes(work) or ()) == pytest.approx(29.2)
    known.learn(done(), work)
    assert sum(known.takes(work) or ()) < 3, "what was told before it is not told again"
