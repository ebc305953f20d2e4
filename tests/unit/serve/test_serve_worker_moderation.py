"""Frames are shown to a moderation endpoint before anybody sees a film, and what becomes of it."""

from __future__ import annotations

import base64
import io
import math
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from render_rig import ask
from worker_rig import PATIENCE, Gate, Place, running, with_network

from tubelet.core.errors import UserError
from tubelet.generate.system import System
from tubelet.media import encode
from tubelet.media.decode import decode_uint8
from tubelet.serve import moderation
from tubelet.serve import worker as room
from tubelet.serve.config import Moderation
from tubelet.serve.records import Job
from tubelet.serve.worker import check_eyes


class Eyes:
    """A moderation endpoint that keeps what it was shown; `answers` one after the other, the last for good."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *answers: bool | Exception) -> None:
        self.shown: list[np.ndarray] = []
        self.answers = list(answers)
        monkeypatch.setattr(moderation, "flagged", self)
        monkeypatch.setattr(room, "EYES_PAUSE", 0.01)

    def __call__(self, endpoint: Moderation, shown: list[dict[str, Any]]) -> bool:
        (one,) = shown
        jpeg = base64.b64decode(one["image_url"]["url"].removeprefix("data:image/jpeg;base64,"))
        self.shown.append(np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


WATCHED = Moderation("http://127.0.0.1:9/v1", frames=3)
SHUT = moderation.Unanswered("ConnectionRefusedError")


def film_of(place: Place, job: Job) -> np.ndarray:
    path = place.store.path(place.job(job).outputs[0].id)
    assert path is not None
    return decode_uint8(path)[0]


def test_frames_are_looked_at_before_anybody_sees_the_film(
    place: Place, system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tubelet.serve.render.PREVIEW_PAUSE", 0.0)
    monkeypatch.setattr("tubelet.serve.render.PREVIEW_SHARE", math.inf)
    eyes = Eyes(monkeypatch, False)
    gate = Gate(system.denoiser, 1)
    job = place.ask(size=[48, 96], seconds=1, watched=True)
    with running(place.worker(with_network(system, gate), moderation=WATCHED).turn):
        assert gate.reached.wait(PATIENCE)
        time.sleep(0.2)  # ten heartbeats
        gate.open.set()
    assert place.job(job).state == "completed"
    assert not any(facts["type"] == "video.preview" for _, _, facts in place.jobs.events())
    film = film_of(place, job)
    assert 3 <= len(eyes.shown) <= 5
    for seen in eyes.shown:
        assert seen.shape == film.shape[1:], "as it is published"
        assert np.abs(film.astype(int) - seen).mean((1, 2, 3)).min() < 8


def test_what_a_film_was_made_from_is_looked_at_too(place: Place, system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    eyes = Eyes(monkeypatch, False)
    gray, loud = np.full((16, 32, 64, 3), 128, np.uint8), np.full((1, 32, 64, 3), (255, 0, 255), np.uint8)
    path = place.folder / "source.mp4"
    encode.save(np.concatenate([loud, gray]), path, 8.0)
    asset = place.store.put(path, "input", "video/mp4")
    request = ask("extend", seconds=0.5) | {
        "inputs": [{"role": "video", "asset": asset.id, "media": "video/mp4"}],
        "system": "tiny",
    }
    job = place.jobs.create(request)[0]
    assert place.worker(system, moderation=WATCHED).turn()
    assert place.job(job).state == "completed", place.job(job).error
    assert any(np.abs(seen.astype(int) - loud[0]).mean() < 25 for seen in eyes.shown), "the first frame is always seen"


def test_a_flagged_frame_fails_the_film_and_nothing_of_it_stays(
    place: Place, system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    eyes = Eyes(monkeypatch, False, True)
    job = place.ask()
    assert place.worker(system, moderation=WATCHED).turn()
    found = place.job(job)
    assert (found.state, found.error) == ("failed", {"code": "moderation_blocked", "message": moderation.REJECTED})
    assert len(eyes.shown) == 2
    assert found.outputs == ()
    assert place.journals == []
    assert list((place.folder / "assets").iterdir()) == []


def test_eyes_that_are_shut_are_asked_again_and_then_it_is_the_operators_choice(
    place: Place, system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    def code(job: Job) -> str | None:
        error = place.job(job).error
        return None if error is None else error["code"]

    eyes = Eyes(monkeypatch, SHUT, SHUT, False)
    once, never, final, lenient = (place.ask() for _ in range(4))
    worker = place.worker(system, moderation=WATCHED)
    assert worker.turn()
    assert place.job(once).state == "completed"
    assert len(eyes.shown) >= 5, "two questions went unheard"
    Eyes(monkeypatch, SHUT)
    monkeypatch.setattr(room, "EYES_PATIENCE", 0.05)
    assert worker.turn()
    assert code(never) == "moderation_unavailable"
    monkeypatch.setattr(room, "EYES_PATIENCE", 1e9)
    eyes = Eyes(monkeypatch, moderation.Unanswered("status 400", final=True))
    assert worker.turn()
    assert (code(final), len(eyes.shown)) == ("moderation_unavailable", 1)
    eyes = Eyes(monkeypatch, SHUT, False)
    assert place.worker(system, moderation=replace(WATCHED, lenient=True)).turn()
    assert place.job(lenient).state == "completed"
    assert len(eyes.shown) >= 3, "the others are looked at all the same"


def test_a_worker_without_eyes_makes_nothing_that_is_to_be_seen_first(place: Place, system: System) -> None:
    job = place.ask(watched=True)
    assert place.worker(system).turn()
    error = place.job(job).error
    assert error is not None
    assert error["code"] == "moderation_unavailable"


def test_an_endpoint_that_takes_no_pictures_is_named_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    Eyes(monkeypatch, moderation.Unanswered("status 400", final=True))
    with pytest.raises(UserError, match="takes no pictures"):
        check_eyes(WATCHED)
    Eyes(monkeypatch, SHUT)
    check_eyes(WATCHED)
    check_eyes(None)
