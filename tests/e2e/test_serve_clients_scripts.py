"""Scripts that were written for Sora and are only told another address: a command line for one film, a file of many.

Both speak to the API below the client's own methods, as the skill for Sora does: bodies are JSON unless there is a file, and
answers are taken as they come.
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

sys.path.append(str(Path(__file__).parents[1] / "unit" / "serve"))

from api_rig import Rig, clip, png, serving

from tubelet.serve.config import SORA_NAMES

SECONDS = ("4", "8", "12", "16", "20")
SIZES = {
    "sora-2": ("1280x720", "720x1280"),
    "sora-2-pro": ("1280x720", "720x1280", "1024x1792", "1792x1024", "1920x1080", "1080x1920"),
}
"""What the skill lets people ask for."""
LINES = """Use case: a product shot
Primary request: a red ball bounces
Camera: "slow", from the left
Avoid: people"""
"""It asks in several lines."""
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with serving(tmp_path_factory.mktemp("server"), live=True) as rig:
        yield rig


@pytest.fixture(autouse=True)
def address(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> str:
    """All that a script is told: the environment of whoever runs it."""
    url = str(rig.client.base_url.join("/v1"))
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-x")
    return url


def sora(path: str, asked: dict[str, Any], **files: tuple[str, bytes]) -> dict[str, Any]:
    """One call of the command line: a client of its own, a body of JSON, or a form when a file goes with it."""
    with openai.OpenAI() as client:
        if not files:
            return client.post(path, body=asked, cast_to=dict)
        form = {"headers": {"Content-Type": "multipart/form-data"}}
        return client.post(path, body=asked, files=list(files.items()), options=form, cast_to=dict)  # type: ignore[arg-type]


def poll(id: str) -> Any:
    """The film when it has one of the two ends."""
    with openai.OpenAI() as client:
        return client.videos.poll(id)


def download(id: str, **variant: Any) -> bytes:
    with openai.OpenAI() as client:
        return client.videos.download_content(id, **variant).read()


def test_a_command_line_for_sora_is_only_told_another_address() -> None:
    wish = {"model": "sora-2", "prompt": LINES, "size": "1280x720", "seconds": "4"}
    made = sora("/videos", wish)
    assert {name: made[name] for name in wish} == wish
    assert (made["object"], made["status"], made["progress"]) == ("video", "queued", 0)
    film = poll(made["id"])
    assert (film.status, film.progress, film.prompt) == ("completed", 100, LINES)
    assert download(film.id) == b"film of " + film.id.encode()
    assert download(film.id, variant="thumbnail").startswith(b"thumbnail")
    assert download(film.id, variant="spritesheet").startswith(b"spritesheet")

    remix = sora(f"/videos/{film.id}/remix", {"prompt": LINES})
    assert remix["remixed_from_video_id"] == film.id
    edited = sora("/videos/edits", {"prompt": LINES, "video": {"id": film.id}})
    longer = sora("/videos/extensions", {"prompt": LINES, "video": {"id": film.id}, "seconds": "8"})
    assert (longer["seconds"], longer["size"]) == ("12", "1280x720")
    sent = sora("/videos/edits", {"prompt": LINES, "model": "sora-2-pro"}, video=("clip.mp4", clip()))
    assert (sent["model"], sent["seconds"]) == ("sora-2-pro", "1")
    with openai.OpenAI() as client:
        for made in (remix, edited, longer, sent):
            assert poll(made["id"]).status == "completed"
            assert download(made["id"]) == b"film of " + made["id"].encode()
        assert [video.id for video in client.videos.list(limit=2, order="desc").data] == [sent["id"], longer["id"]]
        for id in (film.id, remix["id"], longer["id"]):
            assert client.videos.delete(id).deleted
            with pytest.raises(openai.NotFoundError):
                client.videos.retrieve(id)


def test_a_command_line_sends_pictures_and_characters_in_every_form(rig: Rig) -> None:
    mia = sora("/videos/characters", {"name": "Mia"}, video=("mia.mp4", clip()))
    leo = sora("/videos/characters", {"name": "Leo"}, video=("leo.mp4", clip()))
    wish = {"prompt": "Mia and Leo", "characters": [{"id": mia["id"]}, {"id": leo["id"]}]}
    with openai.OpenAI() as client:
        file = client.files.create(file=("first.png", png()), purpose="vision")
    data = "data:image/png;base64," + base64.b64encode(png()).decode()
    made = [
        sora("/videos", wish, input_reference=("first.png", png())),
        sora("/videos", {**wish, "input_reference": {"file_id": file.id}}),
        sora("/videos", {**wish, "input_reference": {"image_url": data}}),
    ]
    for one in made:
        assert poll(one["id"]).status == "completed"
        job = rig.jobs.get(one["id"], None)
        assert job is not None
        assert [character["name"] for character in job.request["characters"]] == ["Mia", "Leo"], job.request
        assert len(job.request["inputs"]) == 1
    with pytest.raises(openai.BadRequestError) as caught:
        sora("/videos", {**wish, "characters": [{"id": mia["id"]}] * 3})
    assert caught.value.param == "characters"


def test_every_size_and_length_that_sora_had_is_made(rig: Rig) -> None:
    assert set(SIZES) == set(SORA_NAMES)
    for model, sizes in SIZES.items():
        for size in sizes:
            for seconds in SECONDS:
                wish = {"model": model, "size": size, "seconds": seconds}
                made = sora("/videos", {**wish, "prompt": "a red ball bounces"})
                assert {name: made[name] for name in wish} == wish
                done = rig.until(made["id"])
                assert {name: done[name] for name in wish} == wish


def test_a_film_is_extended_six_times_to_two_minutes() -> None:
    film, total = sora("/videos", {"prompt": "a red ball bounces", "seconds": "4"}), 4
    for seconds in ("16", "20", "20", "20", "20", "20"):
        assert poll(film["id"]).status == "completed"
        film = sora("/videos/extensions", {"prompt": "on", "seconds": seconds, "video": {"id": film["id"]}})
        total += int(seconds)
        assert film["seconds"] == str(total)
    assert (total, poll(film["id"]).seconds) == (120, "120")


async def run(lines: list[str], address: str) -> list[dict[str, Any]]:
    """What a runner of batches writes: for each line who asked, what was answered, and under which number.

    It knows nothing of films. Three lines are on their way at a time, and who asks again says so by its own name for the line.
    """
    room = asyncio.Semaphore(3)

    async def one(line: str) -> dict[str, Any]:
        asked = json.loads(line)
        headers = {"Authorization": "Bearer sk-x", "Idempotency-Key": asked["custom_id"]}
        async with room:
            url = address.removesuffix("/v1") + asked["url"]
            answer = await client.request(asked["method"], url, json=asked["body"], headers=headers)
        said = {"status_code": answer.status_code, "request_id": answer.headers["x-request-id"], "body": answer.json()}
        return {"custom_id": asked["custom_id"], "response": said, "error": None}

    async with httpx.AsyncClient(timeout=60) as client:
        return list(await asyncio.gather(*(one(line) for line in lines)))


def test_a_file_of_many_films_is_run_line_by_line(address: str, rig: Rig, tmp_path: Path) -> None:
    with openai.OpenAI() as client:
        first = client.files.create(file=("first.png", png()), purpose="vision")
    data = "data:image/png;base64," + base64.b64encode(png()).decode()
    bodies = [{"model": "sora-2", "prompt": f"ball {number}", "seconds": "4", "size": "1280x720"} for number in range(8)]
    bodies[3]["seconds"] = "forever"
    bodies[5]["model"] = "sora-9"
    more: dict[int, dict[str, Any]] = {1: {"file_id": first.id}, 2: {"image_url": data}}
    batch = tmp_path / "batch.jsonl"
    with batch.open("w") as file:
        for number, body in enumerate(bodies):
            whole = {**body, **({"input_reference": more[number]} if number in more else {})}
            line = {"custom_id": f"{tmp_path.name}-{number}", "method": "POST", "url": "/v1/videos", "body": whole}
            file.write(json.dumps(line) + "\n")
    lines = batch.read_text().splitlines()

    before = sum(rig.jobs.counts().values())
    told = asyncio.run(run(lines, address))
    assert [line["custom_id"] for line in told] == [json.loads(line)["custom_id"] for line in lines]
    answers = [line["response"] for line in told]
    assert [answer["status_code"] for answer in answers] == [200, 200, 200, 400, 200, 400, 200, 200]
    assert len({answer["request_id"] for answer in answers}) == len(lines), "each line can be asked about"
    assert answers[3]["body"]["error"]["param"] == "seconds", "what is wrong with one line is told there, and stops no other"
    assert answers[5]["body"]["error"]["code"] == "model_not_found"
    films = {number: answer["body"]["id"] for number, answer in enumerate(answers) if answer["status_code"] == 200}
    for number, id in films.items():
        done = rig.until(id)
        assert done["prompt"] == f"ball {number}"
        assert download(id) == b"film of " + id.encode()
        job = rig.jobs.get(id, None)
        assert job is not None
        assert len(job.request["inputs"]) == (number in more)

    again = [line["response"] for line in asyncio.run(run(lines, address))]
    assert {number: again[number]["body"]["id"] for number in films} == films
    assert sum(rig.jobs.counts().values()) == before + len(films), "a file that is run again makes no film twice"
