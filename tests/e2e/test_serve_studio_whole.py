"""The studio as people have it: `tubelet serve` with the shipped system, real films, and an end by SIGKILL in the middle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from studio_stage import PLAYABLE, WORDS, Visit, browser, needs_chromium, see
from test_serve_whole import Server, alive, until

FEW, MANY = "4", "500"
"""Steps of films that are to be there soon, and of one that is watched while it is made, and cut off in the middle.

The first preview comes after a second at the soonest, and an idle machine makes 80 steps in less.
"""


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


@needs_chromium
def test_real_films_are_made_and_one_outlives_a_killed_server(start: Callable[[int], Server]) -> None:
    server = start(0)
    address = str(server.http.base_url)
    film, progress = "document.querySelector('dialog video')", "document.querySelector('#making progress').value"
    with browser() as chromium:
        guest = Visit.of(chromium, f"{address}/")
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
        page.get_by_text("The server is away. Trying again.").wait_for(state="detached")
        page.get_by_role("link", name="made over a gap").click()
        see(page, PLAYABLE)
        made = server.http.get("/v1/videos", params={"order": "asc"}).json()["data"]
        assert [film["prompt"] for film in made] == [WORDS, "it goes on", "and back again", "made over a gap"]
        assert {film["status"] for film in made} == {"completed"}
        guest.close()
    assert guest.problems == []
