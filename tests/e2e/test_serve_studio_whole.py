"""The studio as people have it: `tubelet serve` with the shipped system, real films, and an end by SIGKILL in the middle."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image
from studio_stage import PLAYABLE, WORDS, Visit, bring, holds, needs_chromium, see, sent
from test_serve_whole import Server, alive, until

from tubelet.media.decode import decode_uint8, probe

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

FEW, MANY = "4", "500"
"""Steps of films that are to be there soon, and of one that is watched while it is made, and cut off in the middle.

The first preview comes after a second at the soonest, and an idle machine makes 80 steps in less.
"""
OTHER = "A small blue square slides to the right."
RECOVERY = 10.0
"""Seconds after which the page works again by itself, once the server does."""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[int], Server]]:
    """`start(port)`: a server on this test's folder; 0 is any free port."""
    servers: list[Server] = []

    def made(port: int) -> Server:
        servers.append(Server(Path("worlds-64"), tmp_path / "data", "--port", str(port)))
        return servers[-1]

    yield made
    for server in servers:
        server.process.kill()
        server.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that has two films, for all journeys in which it stays."""
    server = Server(Path("worlds-64"), tmp_path_factory.mktemp("server"))
    try:
        for seed, words in enumerate((WORDS, OTHER)):
            wish = {"prompt": words, "size": "64x64", "steps": int(FEW), "seed": seed}
            server.http.post("/v1/videos", json=wish).raise_for_status()
        until(lambda: {film["status"] for film in films(server)} == {"completed"})
        yield server
        assert server.end() == 0
    finally:
        server.process.kill()
        server.process.wait()


@pytest.fixture
def page(chromium: Browser, server: Server) -> Iterator[Page]:
    """The studio before that server, where films take few steps. What goes wrong in it fails the test."""
    guest = Visit.of(chromium, f"{server.http.base_url}/", accept_downloads=True)
    guest.hasty = True
    page = guest.open()
    page.get_by_role("link", name=OTHER).wait_for()
    page.get_by_text("More settings").click()
    page.get_by_label("Steps").fill(FEW)
    yield page
    guest.close()
    assert guest.problems == []


def films(server: Server, words: str | None = None) -> list[dict[str, Any]]:
    """The films there are, or those of these words, the oldest first."""
    found = server.http.get("/v1/videos", params={"order": "asc", "limit": 100}).json()["data"]
    return [film for film in found if words in (None, film["prompt"])]


def film_of(server: Server, words: str) -> dict[str, Any]:
    (film,) = films(server, words)
    return film


def content(server: Server, film: dict[str, Any], **variant: str) -> bytes:
    return server.http.get(f"/v1/videos/{film['id']}/content", params=variant).raise_for_status().content


def frames(data: bytes, folder: Path) -> np.ndarray:
    """The pixels of a film, (T, H, W, 3)."""
    path = folder / "film.mp4"
    path.write_bytes(data)
    return decode_uint8(path)[0].astype(np.int16)


def made(page: Page, words: str, button: str) -> None:
    """Write the words, press the button, and look at the film that comes of it."""
    page.get_by_label(re.compile("^What (happens|should)")).fill(words)
    page.get_by_role("button", name=button).click()
    sent(page)
    watched(page, words)


def watched(page: Page, words: str) -> None:
    """Open a film; it plays."""
    page.get_by_role("link", name=words).click()
    see(page, PLAYABLE)
    page.get_by_role("button", name="Close").click()
    page.get_by_role("dialog").wait_for(state="detached")


def chosen(page: Page, action: str) -> None:
    """Open the first film, and choose what is made of it."""
    page.get_by_role("link", name=WORDS).last.click()
    page.get_by_role("dialog").get_by_role("button", name=action, exact=True).click()


@needs_chromium
def test_real_films_are_made_and_one_outlives_a_killed_server(start: Callable[[int], Server], chromium: Browser) -> None:
    server = start(0)
    address = str(server.http.base_url)
    film, progress = "document.querySelector('dialog video')", "document.querySelector('#making progress').value"
    guest = Visit.of(chromium, f"{address}/")
    guest.hasty = True
    page = guest.open()
    page.get_by_label("What happens in your film?").fill(WORDS)
    page.get_by_text("The model will read:").wait_for()
    page.get_by_text("More settings").click()
    page.get_by_label("Steps").fill(FEW)
    page.get_by_role("button", name="Make film").click()
    page.get_by_role("link", name=WORDS).click()
    page.get_by_role("button", name="Play").click()
    see(page, f"{film}.currentTime > 0.3")
    length = page.evaluate(f"{film}.duration")
    assert 2 < length < 2.3

    for action, button, words in (("Extend", "Extend film", "it goes on"), ("Loop", "Make it loop", "and back again")):
        page.get_by_role("dialog").get_by_role("button", name=action).click()
        page.get_by_label("What happens?").fill(words)
        page.get_by_role("button", name=button).click()
        page.get_by_role("link", name=words).click()
        see(page, PLAYABLE)
        longer = page.evaluate(f"{film}.duration")
        assert longer > length + 1.5, "what it goes on from stands in it"
        length = longer
    page.get_by_role("button", name="Close").click()

    page.get_by_label("What happens in your film?").fill("made over a gap")
    page.get_by_label("Steps").fill(MANY)
    page.get_by_role("button", name="Make film").click()
    page.get_by_role("img", name="Preview of made over a gap").wait_for()
    see(page, f"0 < {progress} && {progress} < 100")
    guest.outage = True
    worker = server.events("worker started")[0]["pid"]
    server.process.kill()
    page.get_by_text("The server is away. Trying again.").wait_for()
    until(lambda: not alive(worker))
    server = start(urlsplit(address).port or 0)
    begin = time.monotonic()
    page.get_by_text("The server is away. Trying again.").wait_for(state="detached")
    assert time.monotonic() - begin < RECOVERY
    until(lambda: films(server)[-1]["status"] == "completed")
    page.get_by_role("link", name="made over a gap").click()
    see(page, PLAYABLE)
    made = server.http.get("/v1/videos", params={"order": "asc"}).json()["data"]
    assert [film["prompt"] for film in made] == [WORDS, "it goes on", "and back again", "made over a gap"]
    assert {film["status"] for film in made} == {"completed"}
    guest.close()
    assert guest.problems == []


@needs_chromium
def test_real_film_is_remixed_and_edited(server: Server, page: Page) -> None:
    for action, button, words in (("Remix", "Remix film", "now it is green"), ("Edit", "Edit film", "now it is yellow")):
        chosen(page, action)
        page.get_by_label("How much changes").fill("0.6")
        made(page, words, button)
    first = film_of(server, WORDS)
    remix, edit = film_of(server, "now it is green"), film_of(server, "now it is yellow")
    assert (remix["task"], remix["remixed_from_video_id"], edit["task"], edit["parent_id"]) == (
        "remix",
        first["id"],
        "edit",
        first["id"],
    )
    assert first["num_frames"] == remix["num_frames"] == edit["num_frames"]
    assert len({content(server, film) for film in (first, remix, edit)}) == 3


@needs_chromium
def test_two_real_films_are_connected_and_blended(server: Server, page: Page) -> None:
    for action, words in (("Connect", "from one to the other"), ("Blend", "both at once")):
        chosen(page, action)
        page.get_by_role("link", name=OTHER).click()
        made(page, words, f"{action} films")
    whole = sum(film_of(server, words)["num_frames"] for words in (WORDS, OTHER))
    connected, blended = film_of(server, "from one to the other"), film_of(server, "both at once")
    assert (connected["task"], blended["task"]) == ("connect", "blend")
    assert connected["num_frames"] > whole > blended["num_frames"], "both films and what lies between"


@needs_chromium
def test_real_storyboard_is_a_film_of_its_shots(server: Server, page: Page) -> None:
    page.get_by_role("button", name="Storyboard").click()
    for shot, words in ((1, "A red ball falls."), (2, "A green ring slides to the left.")):
        page.get_by_label(f"What happens in shot {shot}").fill(words)
    page.get_by_label("Shot 2 begins anew").check()
    page.get_by_role("button", name="Make film").click()
    sent(page)
    watched(page, "A red ball falls.")
    (board,) = (film for film in films(server) if film.get("shots"))
    assert [(shot["prompt"], shot["cut"]) for shot in board["shots"]] == [
        ("A red ball falls.", False),
        ("A green ring slides to the left.", True),
    ]
    assert board["num_frames"] / board["fps"] == pytest.approx(4, abs=0.3), "two shots of two seconds"


@needs_chromium
def test_settings_in_a_real_file_make_the_film_again(server: Server, page: Page, tmp_path: Path) -> None:
    (first, *_), (other, *_) = films(server, WORDS), films(server, OTHER)
    before = content(server, first)
    page.get_by_label("Steps").fill("")
    bring(page, "drop", "film.mp4", "video/mp4", before)
    page.get_by_role("button", name="Load its settings").click()
    holds(page.get_by_label("What happens in your film?"), WORDS)
    holds(page.get_by_label("Steps"), FEW)
    holds(page.get_by_label("Seed"), "")
    page.get_by_label("Seed").fill(str(first["seed"]))
    page.get_by_role("button", name="Make film").click()
    sent(page)
    until(lambda: [film["status"] for film in films(server, WORDS)] == ["completed"] * 2)
    again = films(server, WORDS)[1]
    for name in ("seed", "steps", "text", "size", "rendered_size", "num_frames", "model"):
        assert again[name] == first[name], name
    one, twin, stranger = (frames(content(server, film), tmp_path) for film in (first, again, other))
    assert one.shape == twin.shape
    # Each film has a mark of its own, which is seen by no eye.
    assert abs(one - twin).mean() < 3 < abs(one - stranger).mean()
    server.http.delete(f"/v1/videos/{again['id']}").raise_for_status()


@needs_chromium
def test_four_real_takes_are_four_films(server: Server, page: Page) -> None:
    words = "A purple ball rolls to the left."
    page.get_by_role("radiogroup", name="Takes").get_by_role("radio", name="4").click()
    page.get_by_label("What happens in your film?").fill(words)
    page.get_by_role("button", name="Make 4 films").click()
    see(page, f"[...document.querySelectorAll('.tile a')].filter((e) => e.ariaLabel.startsWith('{words}')).length === 4")
    takes = films(server, words)
    first = takes[0]["seed"]
    assert [take["seed"] for take in takes] == [first, first + 1, first + 2, first + 3]
    assert len({content(server, take) for take in takes}) == 4


@needs_chromium
def test_two_real_films_are_compared_in_step(page: Page) -> None:
    chosen(page, "Compare")
    page.get_by_role("link", name=OTHER).click()
    both = "[...document.querySelectorAll('dialog video')]"
    see(page, f"{both}.filter((v) => v.readyState === 4).length === 2")
    page.get_by_role("button", name="Play").click()
    assert page.evaluate(f"{both}.map((v) => v.paused)") == [False, False]
    see(page, f"(([a, b]) => a.currentTime > 0.5 && Math.abs(a.currentTime - b.currentTime) < 0.25)({both})")
    names = "[...document.querySelectorAll('dialog figcaption')].map((e) => e.textContent).join()"
    see(page, f"{names} === 'A, seed 0: {WORDS},B, seed 1: {OTHER}'")


@needs_chromium
def test_real_film_is_saved_in_three_kinds(server: Server, page: Page) -> None:
    film = film_of(server, OTHER)
    page.get_by_role("link", name=OTHER).click()
    for kind in ("mp4", "webp", "gif"):
        page.get_by_role("button", name="Download mp4 / webp / gif").click()
        with page.expect_download() as waited:
            page.get_by_role("menuitem", name=f"Download {kind}").click()
        assert waited.value.suggested_filename.endswith(f"-1.{kind}")
        path = Path(waited.value.path())
        if kind == "mp4":
            assert path.read_bytes() == content(server, film)
            assert probe(path).frames == film["num_frames"]
        else:
            picture: Any = Image.open(io.BytesIO(path.read_bytes()))
            assert (picture.format, picture.n_frames) == (kind.upper(), film["num_frames"])
