"""Pages of other origins in a real browser, and words of people where they do not belong: S6 and S8 of the promises."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import secrets
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import studio_stage
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from test_serve_whole import Server, until
from tests.soak import faulty
from tests.soak.figures import Figure, Settings, Skipped, at_most, exactly
from tests.soak.server import served

from tubelet.serve import auth
from tubelet.serve.jobs import Jobs

REBOUND = "evil.test"
"""A name that the browser takes for this machine."""
ATTEMPTS = """async ([at, film]) => {
    const form = () => { const f = new FormData(); f.append("prompt", "p"); f.append("model", "tiny"); return f; };
    const json = '{"prompt": "p", "model": "tiny"}';
    const asked = (path, how) => fetch(at + path, how).then((answer) =>
        answer.type === "opaque" || answer.status === 403 ? "" : "read " + answer.status);
    const loaded = (kind, path, field = "src") => new Promise((over) => {
        const thing = document.createElement(kind);
        thing.onload = thing.onloadeddata = () => over("read by " + kind);
        thing.onerror = () => over("");
        if (kind === "link") thing.rel = "stylesheet";
        thing[field] = at + path;
        document.body.append(thing);
    });
    const framed = (path) => new Promise((over) => {
        const frame = document.createElement("iframe");
        frame.onload = () => {
            let seen = null;
            try { seen = frame.contentWindow.document; } catch {}
            over(seen === null || seen.body.innerText.includes("_not_allowed") ? "" : "read by frame");
        };
        frame.src = at + path;
        document.body.append(frame);
    });
    const sent = (path) => new Promise((over) => {
        const frame = document.createElement("iframe");
        frame.name = "f" + Math.random();
        const form = document.createElement("form");
        Object.assign(form, { action: at + path, method: "post", enctype: "multipart/form-data", target: frame.name });
        form.innerHTML = '<input name="prompt" value="p"><input name="model" value="tiny">';
        document.body.append(frame, form);
        frame.onload = () => over("");
        form.submit();
    });
    const one = "/v1/videos/" + film;
    const ways = {
        "post a form": () => asked("/v1/videos", { method: "POST", body: form() }),
        "post a form blindly": () => asked("/v1/videos", { method: "POST", body: form(), mode: "no-cors" }),
        "post json as text": () => asked("/v1/videos", { method: "POST", body: json, mode: "no-cors" }),
        "post json": () => asked("/v1/videos", { method: "POST", body: json, headers: { "content-type": "application/json" } }),
        "post fields": () => asked("/v1/videos", { method: "POST", body: new URLSearchParams("prompt=p"), mode: "no-cors" }),
        "post with credentials": () =>
            asked("/v1/videos", { method: "POST", body: form(), mode: "no-cors", credentials: "include" }),
        "beacon": async () => { navigator.sendBeacon(at + "/v1/videos", form()); return ""; },
        "form": () => sent("/v1/videos"),
        "remix": () => asked(one + "/remix", { method: "POST", body: json, mode: "no-cors" }),
        "pause": () => asked("/v1/queue", { method: "POST", body: '{"paused": true}', mode: "no-cors" }),
        "cancel": () => asked(one + "/cancel", { method: "POST", mode: "no-cors" }),
        "delete": () => asked(one, { method: "DELETE" }),
        "list": () => asked("/v1/videos"),
        "list with credentials": () => asked("/v1/videos", { credentials: "include" }),
        "head": () => asked(one + "/content", { method: "HEAD" }),
        "request": () => new Promise((over) => {
            const request = new XMLHttpRequest();
            request.onload = () => over(request.status === 403 ? "" : "read by request");
            request.onerror = () => over("");
            request.open("GET", at + one);
            request.send();
        }),
        "events": () => new Promise((over) => {
            const stream = new EventSource(at + "/v1/videos/events");
            stream.onopen = () => { stream.close(); over("read by events"); };
            stream.onerror = () => { stream.close(); over(""); };
        }),
        "picture": () => loaded("img", one + "/content?variant=thumbnail"),
        "film": () => loaded("video", one + "/content"),
        "script": () => loaded("script", "/v1/videos"),
        "style": () => loaded("link", "/v1/videos", "href"),
        "frame of a film": () => framed(one),
        "frame of the studio": () => framed("/"),
        "figures": () => asked("/metrics"),
        "socket": () => new Promise((over) => {
            const socket = new WebSocket(at.replace("http", "ws") + "/v1/videos/events");
            socket.onopen = () => over("read by socket");
            socket.onerror = () => over("");
        }),
    };
    const said = {};
    for (const [name, way] of Object.entries(ways)) {
        const late = new Promise((over) => setTimeout(() => over("late"), 10000));
        said[name] = await Promise.race([way().catch(() => ""), late]);
    }
    return said;
}"""
"""What a page tries with a server; for each way what it got to read."""


def pages(settings: Settings) -> Iterator[Figure]:
    """Pages of other ports, other names, of no origin, and of a name that was bound to this machine, in a real browser (S6)."""
    if studio_stage.CHROMIUM is None:
        raise Skipped("needs chromium: apt-get install chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise Skipped("needs playwright: pip install playwright") from error
    with served(settings, "pages") as server, _elsewhere() as other, sync_playwright() as player:
        film = server.ask(seconds="1")
        until(lambda: server.video(film)["status"] == "completed")
        last = server.http.get("/healthz").headers["x-request-id"]
        until(lambda: any(line["request_id"] == last for line in server.events("request")))  # lines come behind their answers
        port, before = server.http.base_url.port, len(server.events("request"))
        flags = [*studio_stage.FLAGS, f"--host-resolver-rules=MAP {REBOUND} 127.0.0.1"]
        browser = player.chromium.launch(executable_path=studio_stage.CHROMIUM, args=flags)
        read, late, tried, drawn = list[str](), 0, 0, 0
        for name, place, frame in _places(other, port):
            for host in ("127.0.0.1", "localhost", REBOUND) if place.endswith(f":{other}/") else (REBOUND,):
                page = browser.new_page()
                page.goto(place)
                if frame:
                    page.set_content('<iframe sandbox="allow-scripts allow-forms" srcdoc="<body></body>"></iframe>')
                said = page.frames[-1].evaluate(ATTEMPTS, [f"http://{host}:{port}", film])
                tried += len(said)
                late += sum(what == "late" for what in said.values())
                read += [f"{name} to {host}: {way} {what}" for way, what in said.items() if what not in ("", "late")]
                drawn += sum(f":{port}/" in inner.url and inner != page.main_frame for inner in page.frames)
                page.close()
        yield from _refused(server, before, tried, late, read, film)
        yield exactly("drawn", drawn, 0, "frames that show something of the server")
        own = browser.new_page()
        own.goto(f"http://127.0.0.1:{port}/")
        works = own.evaluate("() => fetch('/v1/videos').then((answer) => answer.status)")
        browser.close()
        yield exactly("own", works, 200, "the studio's own page is answered")


def _places(other: int, port: int | None) -> list[tuple[str, str, bool]]:
    """Where pages come from: a name, an address, and whether a frame without an origin in it tries."""
    return [
        ("another port", f"http://127.0.0.1:{other}/", False),
        ("another name", f"http://localhost:{other}/", False),
        ("a rebound name", f"http://{REBOUND}:{other}/", False),
        ("no origin", f"http://127.0.0.1:{other}/", True),
        ("a rebound name of the server's own", f"http://{REBOUND}:{port}/", False),
    ]


def _refused(server: Server, before: int, tried: int, late: int, read: list[str], film: str) -> Iterator[Figure]:
    time.sleep(1)  # a beacon may come behind
    # Who comes by a link is shown the studio's page, and a frame of it is not drawn: that has no route, as refused ones.
    lines = [line for line in server.events("request")[before:] if line["route"] != "/readyz"]
    lines = [line for line in lines if (line["method"], line["route"], line["status"]) != ("GET", "none", 200)]
    answered = Counter(str(line["status"]) for line in lines)
    others = [f"{line['method']} {line['route']} {line['status']}" for line in lines if line["status"] != 403]
    films = server.http.get("/v1/videos").json()["data"]
    state = server.http.get("/v1/queue").json()
    yield Figure(
        "attempts", tried, f"{sum(answered.values())} requests came: {dict(answered)}, {late} had no answer to the page"
    )
    yield exactly(
        "answered", len(others), 0, f"of these otherwise than by 403: {others[:3]}" if others else "of these otherwise"
    )
    yield exactly(
        "read", len(read), 0, f"answers that a page could read: {read[:4]}" if read else "answers that a page could read"
    )
    yield exactly("changed", abs(len(films) - 1) + (films[0]["id"] != film) + state["paused"], 0, "films or queues changed")


@contextlib.contextmanager
def _elsewhere() -> Iterator[int]:
    """A site of somebody else on this machine, by its port: an empty page."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b"<!doctype html><title>evil</title><body></body>"
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    site = ThreadingHTTPServer(("0.0.0.0", 0), Handler)
    threading.Thread(target=site.serve_forever, daemon=True).start()
    try:
        yield site.server_port
    finally:
        site.shutdown()
        site.server_close()


class Canaries:
    """Words that nobody else writes, one for each place where a person's words can stand."""

    def __init__(self) -> None:
        self.words: dict[str, str] = {}

    def __call__(self, place: str) -> str:
        return self.words.setdefault(place, f"canary{secrets.token_hex(12)}")

    def within(self, data: bytes) -> set[str]:
        """The places whose words stand in some bytes: as they are, in UTF-16, in hex or in base64."""
        return {place for place, word in self.words.items() if any(form in data for form in _forms(word.encode()))}


def _forms(word: bytes) -> Iterable[bytes]:
    yield word
    yield word.decode().encode("utf-16-le")
    yield word.hex().encode()
    for shift in range(3):  # inside of a longer text
        yield base64.b64encode(bytes(shift) + word)[4 if shift else 0 : -4]


def canaries(settings: Settings) -> Iterator[Figure]:
    """Words in every place of every request, looked for in log and figures and, once all is deleted, in every file (S8)."""
    word, temporary = Canaries(), settings.folder / "temporary"
    temporary.mkdir()
    before = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = str(temporary)
    try:
        with served(settings, "canaries", "--keys", module=faulty.MODULE) as server:
            jobs = Jobs.open(f"sqlite:///{server.data / 'tubelet.db'}")
            _, secret = auth.issue(jobs, "soak", ["read", "create", "admin"], rpm=100_000, queued=1000)
            jobs.close()
            server.http.headers["authorization"] = f"Bearer {secret}"
            word.words["key"] = secret
            made = _asked(server, word)
            kept = _found(word, [server.data, temporary])
            figures = server.http.get("/metrics").text.encode()
            _deleted(server, made)
            figures += server.http.get("/metrics").text.encode()
            running = _found(word, [server.data, temporary])
        log = "".join(server.lines).encode()
    finally:
        os.environ.pop("TMPDIR")
        if before is not None:
            os.environ["TMPDIR"] = before
    after = _found(word, [server.data, temporary])
    yield Figure(
        "places", len(word.words), f"{len(made)} things made with them, of which {len(kept[0])} places stand in files before"
    )
    yield at_most("kept", -len(kept[0]), -1, "places found before, negated: the search can find")
    yield exactly("log", len(word.within(log)), 0, f"in {len(log)} bytes: {sorted(word.within(log))}")
    yield exactly("figures", len(word.within(figures)), 0, f"in {len(figures)} bytes")
    yield exactly("running", len(running[0]), 0, f"in {running[1]} bytes of {running[2]} files, at work: {sorted(running[0])}")
    yield exactly("stopped", len(after[0]), 0, f"in {after[1]} bytes of {after[2]} files, after the stop: {sorted(after[0])}")


def _found(word: Canaries, folders: list[Path]) -> tuple[set[str], int, int]:
    """The places whose words stand in files, or in their names; the bytes and files that were looked through."""
    found, size, number = set[str](), 0, 0
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                with contextlib.suppress(FileNotFoundError):
                    data = path.read_bytes()
                    found, size, number = found | word.within(data + path.name.encode()), size + len(data), number + 1
    return found, size, number


def _picture(word: Canaries, place: str) -> bytes:
    """A picture with words in its text and in its camera's facts."""
    said, exif, out = PngInfo(), Image.Exif(), io.BytesIO()
    said.add_text("Comment", word(f"{place} text"))
    exif[0x010E] = word(f"{place} camera")
    Image.new("RGB", (64, 48), (200, 30, 30)).save(out, "PNG", pnginfo=said, exif=exif)
    return out.getvalue()


def _asked(server: Server, word: Canaries) -> list[str]:
    """Everything that can be asked for, with a word in each place; the paths of what was made."""
    http, made = server.http, list[str]()

    def film(path: str, **sent: Any) -> str:
        answer = http.post(path, **sent)
        assert answer.status_code == 200, answer.text
        made.append(f"/v1/videos/{answer.json()['id']}")
        return answer.json()["id"]

    plain = {"model": "tiny", "size": "64x48", "seconds": "1"}
    odd = {"user-agent": word("user-agent"), "traceparent": word("traceparent"), "x-other": word("header")}
    first = film("/v1/videos", json={"prompt": word("prompt"), **plain}, headers=odd)
    film("/v1/videos", json={"prompt": word("keyed prompt"), **plain}, headers={"idempotency-key": word("idempotency-key")})
    film("/v1/videos", json={"prompt": word("prompt with text"), "text": word("text"), **plain})
    shots = [{"prompt": word(f"shot {number}"), "seconds": 1} for number in range(2)]
    film("/v1/videos", json={"prompt": word("prompt of shots"), "model": "tiny", "size": "64x48", "shots": shots})
    files = {"input_reference": (f"{word('file name')}.png", _picture(word, "reference"))}
    film("/v1/videos", data={"prompt": word("form prompt"), **plain}, files=files)
    url = f"data:image/png;base64,{base64.b64encode(_picture(word, 'data url')).decode()}"
    film("/v1/videos", json={"prompt": word("url prompt"), "input_reference": {"image_url": url}, **plain})
    until(lambda: server.video(first)["status"] == "completed")
    film(f"/v1/videos/{first}/remix", json={"prompt": word("remix")})
    film("/v1/videos/edits", json={"prompt": word("edit"), "video": {"id": first}})
    film("/v1/videos/extensions", json={"prompt": word("extension"), "seconds": "1", "video": {"id": first}})
    clip = http.get(f"/v1/videos/{first}/content").content
    files = {"video": (f"{word('clip name')}.mp4", clip)}
    answer = http.post("/v1/videos/characters", data={"name": word("character")}, files=files)
    assert answer.status_code == 200, answer.text
    made.append(f"/v1/videos/characters/{answer.json()['id']}")
    answer = http.post(
        "/v1/files", data={"purpose": "vision"}, files={"file": (f"{word('upload')}.png", _picture(word, "upload"))}
    )
    assert answer.status_code == 200, answer.text
    made.append(f"/v1/files/{answer.json()['id']}")
    hook = {"name": word("hook"), "url": f"http://127.0.0.1:9/{word('hook url')}", "event_types": ["video.failed"]}
    answer = http.post("/v1/webhook_endpoints", json=hook)
    assert answer.status_code == 200, answer.text
    word.words["hook secret"] = answer.json()["signing_secret"]
    made.append(f"/v1/webhook_endpoints/{answer.json()['id']}")
    http.post("/v1/expansions", json={"prompt": word("expansion"), "model": "tiny"}).raise_for_status()
    _refusals(server, word)
    for path in made:
        if path.startswith("/v1/videos/video_"):
            until(lambda path=path: http.get(path).json()["status"] in ("completed", "failed"))
            for variant in ("video", "thumbnail", "gif"):
                http.get(f"{path}/content", params={"variant": variant})
    return made


def _refusals(server: Server, word: Canaries) -> None:
    """What is refused is not told of either."""
    http = server.http
    http.post("/v1/videos", content=f'{{"prompt": "{word("torn json")}'.encode(), headers={"content-type": "application/json"})
    http.post("/v1/videos", json={"prompt": "p", word("unknown field"): 1})
    http.post("/v1/videos", json={"prompt": "p", "model": word("model")})
    http.post("/v1/videos", json={"prompt": "p", "size": word("size")})
    http.post(
        "/v1/videos", files={"prompt": (None, "p"), "input_reference": (word("bad file name"), word("bad file").encode())}
    )
    http.get(f"/v1/{word('path')}", params={"q": word("query")})
    http.get(f"/v1/videos/{word('id')}", headers={"authorization": f"Bearer {word('wrong key')}", "cookie": word("cookie")})
    http.get("/v1/videos", headers={"origin": f"https://{word('origin')}.example", "referer": word("referer")})
    http.get("/v1/videos", headers={"host": f"{word('host')}.example"})


def _deleted(server: Server, made: list[str]) -> None:
    for path in made:
        answer = server.http.delete(path)
        assert answer.status_code == 200, (path, answer.text)
    left = json.dumps(server.http.get("/v1/videos").json()["data"])
    assert left == "[]", left
