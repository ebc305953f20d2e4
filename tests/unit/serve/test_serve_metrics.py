"""The page of figures: what stands on it, in which form, and that it does not grow with what passes through."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from api_rig import Rig, serving, until

from tubelet.serve import app, auth, service
from tubelet.serve.metrics import MAX_SERIES, Figure, Metrics, Stock

DOCS = Path(__file__).parents[3] / "docs" / "serving.md"
LINE = re.compile(r'(# (HELP|TYPE) \w+ .+|\w+(\{\w+="[^"\n]*"(,\w+="[^"\n]*")*\})? -?[0-9.e+]+)')


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with serving(tmp_path) as rig:
        yield rig


def page(rig: Rig) -> str:
    answer = rig.client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return answer.text


def series(text: str) -> list[str]:
    """Each series of a page, without its value."""
    return [line.rpartition(" ")[0] for line in text.splitlines() if not line.startswith("#")]


def test_metrics(rig: Rig) -> None:
    rig.film()
    rig.until(rig.client.post("/v1/videos", json={"prompt": "fail out_of_memory"}).json()["id"], "failed")
    rig.client.post("/v1/videos", json={})
    rig.client.post("/v1/images/generations", json={"prompt": "p"})
    failed = 'tubelet_jobs_finished_total{status="failed",code="out_of_memory"} 1'
    text = until(lambda: page(rig), lambda text: failed in text and 'finished_total{status="completed",code=""} 2' in text)
    assert 'tubelet_http_requests_total{method="POST",route="/v1/videos",status="200"} 2' in text
    assert 'tubelet_rejected_total{reason="missing_required_parameter"} 1' in text
    assert "tubelet_workers_up 1" in text
    assert "tubelet_database_up 1" in text
    assert 'tubelet_jobs{state="completed"} 2' in text
    assert "tubelet_attempts_total 3" in text
    assert "tubelet_queue_wait_seconds_count 3" in text, "of those that failed, too"
    assert 'tubelet_render_seconds_bucket{stage="denoise",le="0.5"} 2' in text
    assert 'tubelet_render_seconds_count{stage="all"} 2' in text
    stored = sum(path.stat().st_size for path in rig.store.folder.iterdir())
    assert f"tubelet_storage_bytes {stored}" in text
    assert all(LINE.fullmatch(entry) for entry in text.splitlines()), [e for e in text.splitlines() if not LINE.fullmatch(e)]


def test_a_wait_is_counted_once_however_often_work_begins(rig: Rig) -> None:
    rig.worker.held.set()
    id = rig.client.post("/v1/videos", json={"prompt": "p"}).json()["id"]
    rig.until(id, "in_progress")
    text = until(lambda: page(rig), lambda text: "tubelet_queue_wait_seconds_count 1" in text)
    assert 'finished_total{status="completed",code=""} 0' in text, "told while it runs"
    facts = {"type": "video.in_progress", "attempt": 2, "at": 9.0, "created_at": 1.0}
    rig.app.state.service.metrics.told(facts)
    assert "tubelet_queue_wait_seconds_count 1" in page(rig)
    rig.worker.held.clear()


def test_what_is_stored_is_weighed_now_and_then(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "tubelet_storage_bytes 0\n" in page(rig)
    rig.store.put(b"x" * 1000, "input", "image/png")
    assert "tubelet_storage_bytes 0\n" in page(rig)
    monkeypatch.setattr(service, "WEIGHED", 0.0)
    assert "tubelet_storage_bytes 1000\n" in page(rig)


def test_the_memory_of_the_living_is_told(rig: Rig) -> None:
    for name, memory in (("one", 3_000_000), ("two", 5_000_000)):
        rig.jobs.hello(name, {"memory": memory})
    assert "tubelet_worker_memory_bytes 5000000\n" in page(rig)
    assert "tubelet_workers_up 3\n" in page(rig), "two, and one of an older version that does not tell"


def test_series_stay_as_many_however_many_jobs_there_are(tmp_path: Path) -> None:
    canary = "canary-0f3a"
    with serving(tmp_path, keys=True, cap=100_000) as rig:
        _, secret = auth.issue(rig.jobs, "admin", ("read", "create", "admin"), rpm=100_000, queued=100_000)
        rig.client.headers["authorization"] = f"Bearer {secret}"

        def pass_through(number: int) -> dict[str, str]:
            """A film that is made, one that fails, and what is not there."""
            film = rig.film(prompt=f"{canary} {number}", seed=number, seconds=str((4, 8, 12)[number % 3]))
            rig.client.post("/v1/videos", json={"prompt": f"fail render_failed {canary} {number}"})
            rig.client.get(f"/v1/videos/video_{number:026d}")
            rig.client.get(f"/{canary}-{number}")
            rig.client.post("/v1/videos", json={f"{canary}{number}": number})
            return film

        films = [pass_through(0)]
        before = until(lambda: page(rig), lambda text: 'code="render_failed"} 1\n' in text and 'code=""} 1\n' in text)
        before = page(rig)  # with the line of its own request
        films += [pass_through(number) for number in range(1, 40)]
        room = rig.app.state.service
        job = rig.jobs.get(films[-1]["id"], None)
        assert job is not None
        for number in range(10_000):
            id = f"video_{number:026d}"
            facts = {"id": id, "created_at": number, "at": number + 1.0, "state": "completed", "error": None, "attempt": 1}
            room.metrics.told({**facts, "type": "video.in_progress"})
            room.metrics.told({**facts, "type": "video.completed"})
            app._time(room, replace(job, id=id, owner=f"key_{number}", parent=f"video_{number}", request_id=f"req_{number}"))
        after = until(lambda: page(rig), lambda text: 'code="render_failed"} 40\n' in text and 'code=""} 10040\n' in text)
        assert series(after) == series(before)
        assert 'tubelet_render_seconds_count{stage="denoise"} 10040\n' in after
        for private in (canary, secret, job.owner, "fake", *(film["id"] for film in films)):
            assert private not in after


def test_series_are_bounded() -> None:
    figure = Figure("f", "h", labels=("code",))
    for number in range(MAX_SERIES + 50):
        figure.add(f"code {number}")
    assert len(figure.values) <= MAX_SERIES + 1
    assert figure.values[("other",)] == 50


def test_what_may_happen_stands_there_before_it_does() -> None:
    """A counter that comes to be with its first count has not grown, says Prometheus."""
    figures = Metrics()
    text = figures.page()
    for line in (
        'tubelet_rejected_total{reason="storage_full"} 0',
        'tubelet_jobs_finished_total{status="failed",code="worker_crashed"} 0',
        'tubelet_webhook_deliveries_total{result="given_up"} 0',
        "tubelet_retries_deduped_total 0",
        'tubelet_render_seconds_bucket{stage="sign",le="0.5"} 0',
        'tubelet_render_seconds_bucket{stage="sign",le="+Inf"} 0',
        "tubelet_queue_wait_seconds_sum 0",
    ):
        assert f"{line}\n" in text
    figures.waited.observe(seconds=3.0)
    assert "tubelet_queue_wait_seconds_sum 3\n" in figures.page()
    assert 'tubelet_queue_wait_seconds_bucket{le="2"} 0\n' in figures.page()
    assert 'tubelet_queue_wait_seconds_bucket{le="5"} 1\n' in figures.page()


def test_without_its_database_a_server_tells_what_it_knows_itself() -> None:
    figures = Metrics()
    counted = {"attempts": 7, "leases_lost": 1, "steps": 100, "signed": 3, "out_of_memory": 2}
    stock = Stock({"queued": 4, "in_progress": 1}, 30.0, counted, workers=2, memory=10, stored=20)  # type: ignore[arg-type]
    figures.measure(stock, free=99, listeners=1)
    assert "tubelet_leases_lost_total 1\n" in figures.page()
    assert 'tubelet_jobs{state="queued"} 4\n' in figures.page()
    figures.measure(None, free=98, listeners=1)
    text = figures.page()
    assert "tubelet_database_up 0\n" in text
    assert "tubelet_storage_free_bytes 98\n" in text
    for name in ("jobs", "oldest_queued_seconds", "workers_up", "attempts_total", "steps_total", "storage_bytes"):
        assert not re.search(rf"^tubelet_{name}\b[{{ ]", text, re.M), "what was so is not told as if it still were"
    figures.measure(stock, free=98, listeners=1)
    assert "tubelet_workers_up 2\n" in figures.page()


def test_the_page_of_the_docs_names_every_figure_with_its_labels() -> None:
    table = DOCS.read_text(encoding="utf-8").partition("| figure | labels | |")[2].partition("\n\n")[0]
    said = {}
    for row in table.strip().splitlines()[1:]:
        names, labels, _ = row.strip("| ").split("|", 2)
        said |= {name: tuple(re.findall(r"`(\w+)`", labels)) for name in re.findall(r"`(\w+)`", names)}
    assert said == {figure.name: figure.labels for figure in Metrics().figures()}
