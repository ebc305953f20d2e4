"""Clients as people have them, unmodified, against a real server on a real socket: the official one, as installed, and curl."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

sys.path.append(str(Path(__file__).parents[1] / "unit" / "serve"))

from api_rig import Rig, clip, png, serving

from tubelet.serve.outbound import Outbound

KEY = "sk-whatever-a-client-is-set-up-with"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with serving(tmp_path_factory.mktemp("server"), live=True) as rig:
        yield rig


@pytest.fixture(scope="module")
def url(rig: Rig) -> str:
    return str(rig.client.base_url.join("/v1"))


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(api_key=KEY, base_url=url) as client:
        yield client


def test_a_film_is_made_and_downloaded(client: openai.OpenAI, tmp_path: Path) -> None:
    video = client.videos.create_and_poll(prompt="a red ball bounces", model="sora-2", seconds="8", size="1280x720")
    assert (video.status, video.progress, video.seconds, video.size, video.model) == (
        "completed",
        100,
        "8",
        "1280x720",
        "sora-2",
    )
    assert video.error is None
    assert video.prompt == "a red ball bounces"
    assert video.completed_at is not None
    assert video.model_extra is not None
    assert video.model_extra["fps"] == 8.0, "fields of our own pass through"
    content = client.videos.download_content(video.id)
    content.write_to_file(tmp_path / "film.mp4")
    assert (tmp_path / "film.mp4").read_bytes() == b"film of " + video.id.encode()
    with client.videos.with_streaming_response.download_content(video.id) as stream:
        assert b"".join(stream.iter_bytes()) == b"film of " + video.id.encode()
    assert client.videos.download_content(video.id, variant="thumbnail").read().startswith(b"thumbnail")
    assert client.videos.download_content(video.id, variant="spritesheet").read().startswith(b"spritesheet")
    assert client.videos.retrieve(video.id) == video


def test_a_failed_film_is_no_exception(client: openai.OpenAI) -> None:
    video = client.videos.create_and_poll(prompt="fail out_of_memory", seconds="4")
    assert video.status == "failed"
    assert video.error is not None
    assert (video.error.code, bool(video.error.message)) == ("out_of_memory", True)
    with pytest.raises(openai.NotFoundError) as caught:
        client.videos.download_content(video.id)
    assert caught.value.code == "video_failed"
    assert caught.value.request_id is not None


def test_pictures_come_along(client: openai.OpenAI, rig: Rig) -> None:
    video = client.videos.create(prompt="a ball", input_reference=("first.png", png(), "image/png"))
    (entry,) = rig.jobs.get(video.id, None).request["inputs"]  # type: ignore[union-attr]
    assert rig.store.path(entry["asset"]).read_bytes().startswith(b"\x89PNG")  # type: ignore[union-attr]
    data = "data:image/png;base64," + base64.b64encode(png()).decode()
    other = client.videos.create(prompt="a ball", extra_body={"input_reference": {"image_url": data}})
    assert rig.jobs.get(other.id, None).request["inputs"] == [entry]  # type: ignore[union-attr]


def test_remix_edit_extend_and_characters(client: openai.OpenAI) -> None:
    film = client.videos.create_and_poll(prompt="a ball", model="sora-2", seconds="4")
    remix = client.videos.remix(film.id, prompt="a blue ball")
    assert remix.remixed_from_video_id == film.id
    reference: dict[str, Any] = {"video": {"id": film.id}}
    edited = client.videos.edit(prompt="snow", video=openai.omit, extra_body=reference)  # type: ignore[arg-type]
    assert edited.model_extra is not None
    assert edited.model_extra["parent_id"] == film.id
    longer = client.videos.extend(prompt="on", seconds="8", video=openai.omit, extra_body=reference)  # type: ignore[arg-type]
    assert longer.seconds == "12"
    uploaded = client.videos.edit(prompt="snow", video=("clip.mp4", clip(), "video/mp4"))
    assert (uploaded.seconds, uploaded.size) == ("1", "64x48")
    assert client.videos.poll(uploaded.id).status == "completed"
    assert client.videos.extend(prompt="on", seconds="4", video=("clip.mp4", clip())).seconds == "5"
    mia = client.videos.create_character(name="Mia", video=("mia.mp4", clip(), "video/mp4"))
    assert mia.id is not None
    assert client.videos.get_character(mia.id).name == "Mia"
    seen = client.videos.create(prompt="Mia runs", extra_body={"characters": [{"id": mia.id}]})
    assert client.videos.poll(seen.id).status == "completed"


def test_lists_and_deletes(client: openai.OpenAI) -> None:
    made = [client.videos.create(prompt=f"film {number}").id for number in range(5)]
    walked = [video.id for video in client.videos.list(limit=2)]
    assert walked[:5] == made[::-1]
    assert len(walked) == len(set(walked))
    assert client.videos.list(limit=1, order="asc").data[0].id not in made
    gone = client.videos.delete(made[0])
    assert (gone.id, gone.deleted, gone.object) == (made[0], True, "video.deleted")
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(made[0])


def test_images_files_and_models(client: openai.OpenAI) -> None:
    images = client.images.generate(prompt="a ball", n=2, size="1024x1024", output_format="webp", model="sora-2")
    assert [base64.b64decode(image.b64_json or "")[:7] for image in images.data or []] == [b"picture"] * 2
    file = client.files.create(file=("a.png", png(), "image/png"), purpose="vision")
    assert client.files.retrieve(file.id).filename == "a.png"
    assert client.files.content(file.id).read().startswith(b"\x89PNG")
    assert file.id in [entry.id for entry in client.files.list()]
    video = client.videos.create(prompt="a ball", extra_body={"input_reference": {"file_id": file.id}})
    assert video.id
    assert client.files.delete(file.id).deleted is True
    assert "sora-2" in [model.id for model in client.models.list()]
    assert client.models.retrieve("tiny").owned_by == "tubelet"


def test_errors_are_understood(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.videos.create(prompt="a ball", seconds="forever")  # type: ignore[arg-type]
    assert (caught.value.code, caught.value.param, caught.value.type) == ("invalid_value", "seconds", "invalid_request_error")
    assert "seconds" in str(caught.value)
    with pytest.raises(openai.BadRequestError) as caught:
        client.videos.create(prompt="a ball", model="sora-9")
    assert caught.value.code == "model_not_found"
    key = {"Idempotency-Key": "the same"}
    client.videos.create(prompt="one", extra_headers=key)
    with pytest.raises(openai.ConflictError) as conflict:
        client.videos.create(prompt="two", extra_headers=key)
    assert conflict.value.code == "key_conflict"


def test_lost_answers_make_one_film(url: str, rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's own retries: the server has stored the film, but its answers arrive as errors or not at all."""
    before = sum(rig.jobs.counts()[state] for state in ("queued", "in_progress", "completed", "failed"))
    with openai.OpenAI(api_key=KEY, base_url=url) as client:
        send, tries = client._client.send, []

        def losing(request: Any, **more: Any) -> Any:
            answer = send(request, **more)
            if request.method == "POST" and len(tries) < 2:
                tries.append(request.headers.get("x-stainless-retry-count"))
                answer.read()
                answer.status_code = 500
            return answer

        monkeypatch.setattr(client._client, "send", losing)
        video = client.videos.create(prompt="only one of these", input_reference=("a.png", png(), "image/png"))
    assert tries == ["0", "1"]
    after = sum(rig.jobs.counts()[state] for state in ("queued", "in_progress", "completed", "failed"))
    assert after == before + 1
    assert rig.jobs.get(video.id, None) is not None


@contextlib.contextmanager
def dropping(url: str, answers: int) -> Iterator[tuple[str, list[httpx.Response]]]:
    """An address before a server's, and what is lost there: when the server has answered, the client's connection is closed
    without a byte of so many answers."""
    lost: list[httpx.Response] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            answer = httpx.post(url.removesuffix("/v1") + self.path, content=body, headers=dict(self.headers), timeout=60)
            if len(lost) < answers:
                lost.append(answer)
                self.close_connection = True
                return
            self.send_response(answer.status_code)
            self.send_header("content-type", answer.headers["content-type"])
            self.send_header("content-length", str(len(answer.content)))
            self.end_headers()
            self.wfile.write(answer.content)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1", lost
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("key", [{}, {"Idempotency-Key": "of the film whose answers are lost"}], ids=["", "key"])
def test_connections_that_break_before_the_answer_make_one_film(url: str, rig: Rig, key: dict[str, str]) -> None:
    """The client's own retries, with a key and without: the film is stored, and nobody has heard so."""
    before = sum(rig.jobs.counts()[state] for state in ("queued", "in_progress", "completed", "failed"))
    with dropping(url, 2) as (address, lost), openai.OpenAI(api_key=KEY, base_url=address) as client:
        picture = ("a.png", png(), "image/png")
        video = client.videos.create(prompt=f"lost twice {key}", input_reference=picture, extra_headers=key)
    assert [answer.status_code for answer in lost] == [200, 200]
    assert [answer.request.headers["x-stainless-retry-count"] for answer in lost] == ["0", "1"]
    assert {answer.json()["id"] for answer in lost} == {video.id}
    after = sum(rig.jobs.counts()[state] for state in ("queued", "in_progress", "completed", "failed"))
    assert after == before + 1


def test_the_async_client(url: str) -> None:
    async def session() -> None:
        async with openai.AsyncOpenAI(api_key=KEY, base_url=url) as client:
            film = await client.videos.create_and_poll(
                prompt="a red ball bounces", seconds="4", size="720x1280", model="sora-2"
            )
            assert film.status == "completed"
            content = await client.videos.download_content(film.id)
            assert content.read() == b"film of " + film.id.encode()
            remix = await client.videos.remix(film.id, prompt="blue")
            edit = await client.videos.edit(prompt="snow", video=("clip.mp4", clip(), "video/mp4"))
            longer = await client.videos.extend(prompt="on", seconds="4", video=("clip.mp4", clip(), "video/mp4"))
            for video in (remix, edit, longer):
                assert (await client.videos.poll(video.id)).status == "completed"
            seen = [video.id async for video in await client.videos.list(limit=2)]
            assert seen[:3] == [longer.id, edit.id, remix.id]
            assert (await client.videos.delete(film.id)).deleted
            images = await client.images.generate(prompt="a ball", model="sora-2")
            assert images.data
            file = await client.files.create(file=("a.png", png(), "image/png"), purpose="vision")
            assert (await client.files.delete(file.id)).deleted
            assert "tiny" in [model.id async for model in client.models.list()]
            many = await asyncio.gather(*(client.videos.create(prompt=f"film {n}") for n in range(20)))
            assert len({video.id for video in many}) == 20

    asyncio.run(session())


def test_a_crowd_is_answered_politely(tmp_path: Path) -> None:
    """150 at once where 30 have room: 30 films, the others are told when to come again, and polls are answered meanwhile."""

    async def session(rig: Rig) -> None:
        url = str(rig.client.base_url.join("/v1"))
        async with openai.AsyncOpenAI(api_key=KEY, base_url=url, max_retries=0) as client:
            first = await client.videos.create(prompt="the first")

            async def ask(number: int) -> openai.RateLimitError | None:
                try:
                    await client.videos.create(prompt=f"film {number}")
                except openai.RateLimitError as error:
                    return error
                return None

            crowd = asyncio.gather(*(ask(number) for number in range(149)))
            while not crowd.done():
                assert (await client.videos.retrieve(first.id)).status == "queued"
            refused = [error for error in await crowd if error is not None]
            assert len(refused) == 120
            assert {error.code for error in refused} == {"queue_full"}
            assert all(1 <= int(error.response.headers["retry-after"]) <= 60 for error in refused)

    with serving(tmp_path, working=False, live=True, cap=30) as rig:
        asyncio.run(session(rig))
        assert rig.jobs.counts()["queued"] == 30


def test_webhook_endpoints_and_provenance(client: openai.OpenAI, rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    somewhere = Outbound(resolver=lambda _host, _port: ["93.184.215.14"])
    monkeypatch.setattr(rig.app.state.service, "outbound", somewhere)
    made = client.webhooks.create(name="mine", url="https://example.org/hook", event_types=["video.completed", "video.failed"])
    assert made.signing_secret.startswith("whsec_")
    assert client.webhooks.retrieve(made.id).url == "https://example.org/hook"
    assert client.webhooks.update(made.id, name="other").name == "other"
    assert client.webhooks.rotate_secret(made.id).signing_secret != made.signing_secret
    assert [endpoint.id for endpoint in client.webhooks.list()] == [made.id]
    assert client.webhooks.event_types.list().data == ["video.completed", "video.failed"]
    assert client.webhooks.delete(made.id).deleted is True
    check = client.content_provenance_checks.create(file=("a.png", png(), "image/png"))
    assert check.object == "content_provenance_check"
    assert [(result.type, result.outcome) for result in check.results] == [
        ("c2pa", "not_detected"),
        ("watermark", "not_detected"),
    ]


CURL = shutil.which("curl")


def curl(*words: str) -> bytes:
    assert CURL is not None
    done = subprocess.run([CURL, "--silent", "--show-error", "--max-time", "60", *words], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(CURL is None, reason="curl is not installed")
def test_the_published_curl_lines(url: str, rig: Rig, tmp_path: Path) -> None:
    key = ["-H", f"Authorization: Bearer {KEY}"]
    (tmp_path / "sample_720p.png").write_bytes(png(size=(128, 72)))
    picture = f"input_reference=@{tmp_path / 'sample_720p.png'};type=image/png"
    form = ["-H", "Content-Type: multipart/form-data", "-F", "model=sora-2", "-F", "size=1280x720", "-F", "seconds=8"]
    made = json.loads(curl("-X", "POST", f"{url}/videos", *key, *form, "-F", "prompt=She turns and smiles.", "-F", picture))
    assert (made["object"], made["seconds"], made["size"]) == ("video", "8", "1280x720")
    words = {"model": "sora-2", "prompt": "A calico cat playing a piano on stage", "size": "1280x720", "seconds": "4"}
    text = ["-H", "Content-Type: application/json", "-d", json.dumps(words)]
    assert json.loads(curl(f"{url}/videos", *key, *text))["status"] == "queued"
    rig.until(made["id"])
    assert json.loads(curl(f"{url}/videos/{made['id']}", *key))["progress"] == 100
    film = tmp_path / "video.mp4"
    curl("-L", f"{url}/videos/{made['id']}/content", *key, "--output", str(film))
    assert film.read_bytes() == b"film of " + made["id"].encode()
    curl("-L", f"{url}/videos/{made['id']}/content?variant=thumbnail", *key, "--output", str(film))
    assert film.read_bytes().startswith(b"thumbnail")
    blue = ["-H", "Content-Type: application/json", "-d", '{"prompt": "Shift the color palette to teal."}']
    remix = json.loads(curl("-X", "POST", f"{url}/videos/{made['id']}/remix", *key, *blue))
    assert remix["remixed_from_video_id"] == made["id"]
    on = json.dumps({"prompt": "on", "seconds": "8", "video": {"id": made["id"]}})
    longer = json.loads(curl("-X", "POST", f"{url}/videos/extensions", *key, "-H", "Content-Type: application/json", "-d", on))
    assert longer["seconds"] == "16"
    for video in (remix, longer):
        rig.until(video["id"])
        assert json.loads(curl(f"{url}/videos/{video['id']}", *key))["status"] == "completed"
        assert curl("-L", f"{url}/videos/{video['id']}/content", *key) == b"film of " + video["id"].encode()
    page = json.loads(curl(f"{url}/videos?limit=2&order=asc", *key))
    assert (len(page["data"]), page["has_more"]) == (2, True)
    for video in (made, remix, longer):
        assert json.loads(curl("-X", "DELETE", f"{url}/videos/{video['id']}", *key))["deleted"] is True
        part = curl("--range", "0-3", "--include", f"{url}/videos/{video['id']}/content", *key)
        assert b"404" in part.split(b"\r\n")[0]


PAGE = Path(__file__).parents[2] / "docs" / "serving.md"
ADDRESS = "http://127.0.0.1:8000"


def test_the_python_lines_of_our_page(url: str, tmp_path: Path) -> None:
    (lines,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert ADDRESS in lines
    words = [sys.executable, "-W", "ignore", "-c", lines.replace(ADDRESS, url.removesuffix("/v1"))]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ball.mp4").read_bytes().startswith(b"film of video_")


@pytest.mark.skipif(CURL is None, reason="curl is not installed")
def test_the_curl_lines_of_our_page(url: str, rig: Rig, tmp_path: Path) -> None:
    """As written but for the port, one after the other; each may use the id that the first one answers."""
    lines = re.findall(rf"^curl .*{ADDRESS}.*$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(lines) >= 3
    environment = {name: value for name, value in os.environ.items() if name != "ID"}
    for line in lines:
        words = ["sh", "-c", line.replace(ADDRESS, url.removesuffix("/v1"))]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, timeout=60, check=False)
        assert done.returncode == 0, (line, done.stderr)
        if done.stdout:
            said = json.loads(done.stdout)
            assert said["object"] == "video", (line, said)
            environment.setdefault("ID", said["id"])
            rig.until(said["id"])
    assert (tmp_path / "ball.mp4").read_bytes() == b"film of " + environment["ID"].encode()
