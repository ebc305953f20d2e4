"""The web studio in a real browser, before the real server."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
from studio_stage import (
    FPS,
    PATIENCE,
    PICTURED,
    PLAYABLE,
    SIDE,
    STEPS,
    WORDS,
    Media,
    Stage,
    Visit,
    Worker,
    bring,
    browser,
    config_of,
    film_in,
    holds,
    needs_chromium,
    see,
    sent,
    tab_to,
)

from tubelet.media import encode
from tubelet.serve.auth import issue
from tubelet.serve.config import SHIPPED
from tubelet.serve.jobs import Jobs
from tubelet.serve.store import Store
from tubelet.text.expand import Expansion

if TYPE_CHECKING:
    from playwright.sync_api import APIResponse, Browser, Route

REPOSITORY = Path(__file__).parents[2]
RECOVERY = 10.0
"""Seconds after which the page has mended itself, once the server answers again."""


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Media:
    return film_in(tmp_path_factory.mktemp("media"))


@pytest.fixture
def build(tmp_path: Path, media: Media) -> Iterator[Callable[..., Stage]]:
    """`build(*films, **settings)`: a running stage, on which some films are already there."""
    with contextlib.ExitStack() as opened:

        def made(*films: dict[str, Any], **settings: Any) -> Stage:
            jobs = Jobs.open(f"sqlite:///{tmp_path / 'tubelet.db'}")
            opened.callback(jobs.close)
            store = Store(tmp_path / "assets", reserve=0)
            stage = Stage(config_of(tmp_path, **settings), jobs, store, Worker(jobs, store, media), media)
            for film in films:
                stage.make(film)
            opened.callback(stage.kill)
            opened.callback(stage.stop)
            stage.start()
            stage.worker.start()
            opened.callback(stage.worker.join, 20)
            opened.callback(stage.worker.ended.set)
            return stage

        yield made


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as opened:
        yield opened


@pytest.fixture
def visit(chromium: Browser) -> Iterator[Callable[..., Visit]]:
    """`visit(stage, **context)`: a browser before the stage. What goes wrong in its pages fails the test."""
    visits: list[Visit] = []

    def made(stage: Stage, **settings: Any) -> Visit:
        visits.append(Visit.of(chromium, stage.url, **settings))
        return visits[-1]

    yield made
    for one in visits:
        one.close()
    assert [problem for one in visits for problem in one.problems] == []


@needs_chromium
def test_film_is_asked_for_watched_while_it_is_made_and_played(
    build: Callable[..., Stage], visit: Callable[..., Visit]
) -> None:
    stage = build()
    stage.worker.goes.clear()
    page = visit(stage, reduced_motion="no-preference").open()
    page.get_by_role("heading", name="Say it. Watch it move.").wait_for()
    page.get_by_role("button", name=WORDS).click()
    page.get_by_text("The model will read:").wait_for()
    page.get_by_role("button", name="Make film").click()
    making = page.get_by_role("region", name="In the making")
    making.get_by_role("img", name=f"Preview of {WORDS}").wait_for()
    see(page, f"document.querySelector('#making progress').value === {99 * 4 // STEPS}")
    making.get_by_text(re.compile(r"^\d+ %, (nearly done|about \d+ s left)$")).wait_for()
    stage.worker.goes.set()
    page.get_by_role("link", name=WORDS).click()
    see(page, "document.querySelector('dialog video')?.currentTime > 0.3")
    page.locator("[aria-live=polite]", has_text=f"Film finished: {WORDS}").wait_for(state="attached")
    making.wait_for(state="detached")
    (film,) = stage.films()
    assert film.request["prompt"] == WORDS
    assert film.request["expand"] is True


@needs_chromium
def test_film_that_has_no_preview_is_watched_without(build: Callable[..., Stage], visit: Callable[..., Visit]) -> None:
    stage = build()
    stage.worker.goes.clear()
    guest = visit(stage)
    guest.context.route(re.compile("variant=preview"), lambda route: route.fulfill(status=204))
    page = guest.open()
    page.get_by_label("What happens in your film?").fill("not to be seen yet")
    with page.expect_response(re.compile("variant=preview")) as waited:
        page.get_by_role("button", name="Make film").click()
    assert waited.value.status == 204
    see(page, f"document.querySelector('#making progress')?.value === {99 * 4 // STEPS}")
    page.wait_for_timeout(100)
    assert page.locator("#making img").count() == 0
    stage.worker.goes.set()
    page.get_by_role("link", name="not to be seen yet").wait_for()
    see(page, PICTURED)


@needs_chromium
def test_four_takes_have_four_seeds_and_words_may_be_changed_before(
    build: Callable[..., Stage], visit: Callable[..., Visit]
) -> None:
    stage = build()
    page = visit(stage).open()
    page.get_by_label("What happens in your film?").fill("a red ball bounces")
    page.get_by_role("button", name="Change it").click()
    page.get_by_label("The model will read").fill("A red ball, and nothing else.")
    page.get_by_role("radiogroup", name="Takes").get_by_role("radio", name="4").click()
    page.get_by_text("More settings").click()
    page.get_by_label("Seed").fill("40")
    page.get_by_label("Steps").fill("5")
    page.get_by_role("radio", name="Tall").click()
    page.get_by_role("radio", name="8 s", exact=True).click()
    page.get_by_role("button", name="Make 4 films").click()
    see(page, "document.querySelectorAll('.tile-inner:not(.failed)').length === 4")
    asked = [film.request for film in stage.films()]
    assert [request["seed"] for request in asked] == [40, 41, 42, 43]
    for request in asked:
        assert (request["prompt"], request["expand"], request["steps"]) == ("A red ball, and nothing else.", False, 5)
        assert request["size"][0] > request["size"][1]
        assert request["seconds"] == 8


@needs_chromium
def test_what_is_shown_as_filled_in_is_what_is_read(build: Callable[..., Stage], visit: Callable[..., Visit]) -> None:
    """By a chat model that never says the same twice: for each model it is asked once, and what it said is sent along."""

    class Bard:
        said = 0

        def expand(self, prompt: str) -> Expansion:
            self.said += 1
            return Expansion(prompt, f"{prompt}, take {self.said}", "bard")

    bard = Bard()
    stage = build(expander=bard)
    page = visit(stage).open()
    page.get_by_label("What happens in your film?").fill("a red ball bounces")
    page.get_by_text("a red ball bounces, take 1").wait_for()
    page.get_by_role("button", name="Make film").click()
    page.get_by_role("link", name="a red ball bounces").wait_for()
    page.get_by_label("What happens in your film?").fill("a blue ball bounces")
    page.get_by_text("a blue ball bounces, take 2").wait_for()
    page.get_by_label("What happens in your film?").fill("a red ball bounces")
    page.get_by_text("a red ball bounces, take 1").wait_for()
    page.get_by_role("button", name="Make film").click()
    see(page, "document.querySelectorAll('.tile-inner:not(.failed)').length === 2")
    page.get_by_label("What happens in your film?").fill("a green ball bounces")
    page.get_by_role("button", name="Make film").click()  # most likely before anything can be shown for it
    see(page, "document.querySelectorAll('.tile-inner:not(.failed)').length === 3")
    first, second, third = ((film.request["prompt"], film.request["text"]) for film in stage.films())
    assert first == second == ("a red ball bounces", "a red ball bounces, take 1")
    assert third in [("a green ball bounces", None), ("a green ball bounces", "a green ball bounces, take 3")]


@needs_chromium
def test_pictures_come_by_drop_and_by_paste(build: Callable[..., Stage], visit: Callable[..., Visit]) -> None:
    stage = build()
    page = visit(stage).open()
    bring(page, "drop", "first.png", "image/png", stage.media.picture)
    page.get_by_role("img", name="First picture: first.png").wait_for()
    bring(page, "paste", "last.png", "image/png", stage.media.picture)
    page.get_by_role("img", name="Last picture: last.png").wait_for()
    page.get_by_label("What happens in your film?").fill("a red ball falls")
    page.get_by_role("button", name="Make film").click()
    page.get_by_role("link", name="a red ball falls").wait_for()
    (film,) = stage.films()
    assert [entry["role"] for entry in film.request["inputs"]] == ["reference", "last"]


@needs_chromium
def test_storyboard_is_a_film_of_shots(build: Callable[..., Stage], visit: Callable[..., Visit]) -> None:
    stage = build()
    page = visit(stage).open()
    page.get_by_label("What happens in your film?").fill("A red ball falls.")
    page.get_by_role("button", name="Use my words only").click()
    page.get_by_role("button", name="Storyboard").click()
    page.get_by_role("button", name="Fill in details").click()
    page.get_by_text("Your words go to the model as they are.").wait_for(state="detached")
    page.get_by_label("What happens in shot 2").fill("A blue square slides.")
    page.get_by_role("button", name="Add a shot").click()
    page.get_by_label("What happens in shot 3").fill("A ring appears.")
    page.get_by_label("Seconds of shot 3").fill("4")
    page.get_by_role("button", name="Shot 3 earlier").click()
    assert page.get_by_label("Shot 1 begins anew").count() == 0, "there is nothing before it"
    page.get_by_label("Shot 2 begins anew").check()
    page.get_by_role("button", name="Make film").click()
    page.locator(".tile img").wait_for()
    (film,) = stage.films()
    shots = [(shot["prompt"], shot["seconds"], shot["cut"]) for shot in film.request["shots"]]
    assert shots == [("A red ball falls.", 2, False), ("A ring appears.", 4, True), ("A blue square slides.", 2, False)]
    page.get_by_role("button", name="Remove shot 1").click()
    page.get_by_role("button", name="Make film").click()
    see(page, "document.querySelectorAll('.tile img').length === 2")
    assert [shot["cut"] for shot in stage.films()[1].request["shots"]] == [False, False], "a shot that became the first one"
    page.get_by_role("link", name="A red ball falls.").click()
    page.get_by_role("button", name="Reuse").click()
    for shot, anew in ((2, True), (3, False)):
        page.get_by_role("checkbox", name=f"Shot {shot} begins anew", checked=anew).wait_for()


@needs_chromium
def test_clip_is_extended_looped_and_remixed_from_its_tile(build: Callable[..., Stage], visit: Callable[..., Visit]) -> None:
    stage = build({})
    page = visit(stage).open()
    first = page.locator(".tile").last
    for count, (action, button) in enumerate([("Extend", "Extend film"), ("Loop", "Make it loop"), ("Remix", "Remix film")], 2):
        first.hover()
        first.get_by_role("button", name=f"{action} {WORDS}").click()
        page.get_by_label(re.compile("^What (happens|should)")).fill(f"take {count}")
        page.get_by_role("button", name=button).click()
        sent(page)
        see(page, f"document.querySelectorAll('.tile-inner:not(.failed)').length === {count}")
    original, *made = stage.films()
    assert [film.parent for film in made] == [original.id] * 3
    assert [(film.request["task"], film.request["loop"]) for film in made] == [
        ("extend", False),
        ("extend", True),
        ("remix", False),
    ]
    assert made[2].request["strength"] == pytest.approx(0.7)
    page.get_by_role("link", name="take 3").click()
    family = page.get_by_role("dialog").get_by_role("list")
    family.get_by_role("link", name=WORDS).click()
    for words in (WORDS, "Extended: take 2", "Looped: take 3", "Remixed: take 4"):
        family.get_by_role("link", name=words).wait_for()
    assert family.get_by_role("link").count() == 4


@needs_chromium
def test_two_films_are_compared_connected_and_blended(build: Callable[..., Stage], visit: Callable[..., Visit]) -> None:
    stage = build({"prompt": "one"}, {"prompt": "two"})
    page = visit(stage).open()
    page.get_by_role("link", name="one").click()
    page.get_by_role("button", name="Compare").click()
    page.get_by_role("link", name="two").click()
    both = "[...document.querySelectorAll('dialog video')]"
    see(page, f"{both}.filter((v) => v.readyState === 4).length === 2")
    page.get_by_role("button", name="Play").click()
    see(page, f"(([a, b]) => a.currentTime > 0.5 && Math.abs(a.currentTime - b.currentTime) < 0.25)({both})")
    names = "[...document.querySelectorAll('dialog figcaption')].map((e) => e.textContent).join()"
    see(page, f"{names} === 'A, seed 3: one,B, seed 3: two'")
    page.get_by_role("button", name="Swap sides").click()
    see(page, f"{names} === 'A, seed 3: two,B, seed 3: one'")
    page.keyboard.press("Escape")
    page.get_by_role("dialog").wait_for(state="detached")
    for mode in ("connect", "blend"):
        page.get_by_role("link", name="one").click()
        page.get_by_role("button", name=mode.capitalize()).click()
        page.get_by_role("link", name="two").click()
        page.get_by_label("What happens?").fill(f"they {mode}")
        page.get_by_role("button", name=f"{mode.capitalize()} films").click()
        page.get_by_role("link", name=f"they {mode}").wait_for()
        sent(page)
    made = [film.request for film in stage.films()[2:]]
    assert [request["mode"] for request in made] == ["connect", "blend"]
    assert all([entry["role"] for entry in request["inputs"]] == ["video", "second"] for request in made)


@needs_chromium
def test_queue_is_moved_paused_and_stopped(build: Callable[..., Stage], visit: Callable[..., Visit]) -> None:
    stage = build()
    stage.worker.goes.clear()
    page = visit(stage).open()
    for words in ("first", "second", "third"):
        page.get_by_label("What happens in your film?").fill(words)
        page.get_by_role("button", name="Make film").click()
        page.locator(f"#making [data-film]:has-text('{words}')").wait_for()
    page.get_by_role("button", name="Stop first").wait_for()
    page.get_by_role("button", name="Earlier: third").click()
    see(page, "[...document.querySelectorAll('.queued .words')].map((e) => e.textContent).join() === 'third,second'")
    page.get_by_role("button", name="Pause queue").click()
    page.get_by_role("button", name="Resume queue").wait_for()
    page.get_by_role("button", name="Take out of the queue: second").click()
    page.get_by_role("button", name="Stop first").click()
    see(page, "document.querySelectorAll('.tile-inner.failed').length === 2")
    assert [film.state for film in stage.films()] == ["failed", "failed", "queued"]
    stage.worker.goes.set()
    page.get_by_role("button", name="Resume queue").click()
    page.get_by_role("link", name="third").wait_for()


@needs_chromium
def test_film_that_waits_is_not_told_to_be_done_before_one_that_runs(
    build: Callable[..., Stage], visit: Callable[..., Visit]
) -> None:
    stage = build()
    page = visit(stage).open()
    page.get_by_label("What happens in your film?").fill("quick")
    page.get_by_role("button", name="Make film").click()
    page.get_by_role("link", name="quick").wait_for()  # from now on the server knows how long a film takes
    stage.worker.goes.clear()
    page.get_by_role("radiogroup", name="Takes").get_by_role("radio", name="2").click()
    page.get_by_role("button", name="Make 2 films").click()
    see(page, f"document.querySelector('#making progress')?.value === {99 * 4 // STEPS}")
    page.locator(".queued [data-film]").wait_for()
    see(page, "document.querySelector('.queued .eta').textContent === ''")
    stage.worker.goes.set()
    page.locator("#making").wait_for(state="detached")


@needs_chromium
def test_reload_and_a_second_tab_show_the_same_films(build: Callable[..., Stage], visit: Callable[..., Visit]) -> None:
    stage = build()
    stage.worker.goes.clear()
    guest = visit(stage)
    page, other = guest.open(), guest.open()
    page.get_by_label("What happens in your film?").fill("a film that outlives its page")
    page.get_by_role("button", name="Make film").click()
    for tab in (page, other):
        see(tab, f"document.querySelector('#making progress')?.value === {99 * 4 // STEPS}")
    page.reload()
    page.get_by_role("img", name="Preview of a film that outlives its page").wait_for()
    holds(page.get_by_label("What happens in your film?"), "a film that outlives its page")
    stage.worker.goes.set()
    for tab in (page, other):
        tab.get_by_role("link", name="a film that outlives its page").wait_for()
        see(tab, PICTURED)
    other.get_by_role("link", name="a film that outlives its page").click()
    see(other, PLAYABLE)
    other.get_by_role("button", name="Delete film").click()
    other.get_by_role("button", name="Keep it").click()
    assert len(stage.films()) == 1
    other.get_by_role("button", name="Delete film").click()
    other.get_by_role("button", name="Delete", exact=True).click()
    for tab in (page, other):
        see(tab, "document.querySelectorAll('.tile').length === 0")
    assert stage.films() == []


@needs_chromium
def test_an_answer_from_before_a_deletion_brings_nothing_back(build: Callable[..., Stage], visit: Callable[..., Visit]) -> None:
    stage = build()
    stage.make({"prompt": "a film that goes"})
    guest = visit(stage)
    page = guest.open()
    page.get_by_role("link", name="a film that goes").wait_for()
    (film,) = stage.films()
    held: list[tuple[Route, APIResponse]] = []
    guest.context.route(re.compile(r"/v1/videos\?"), lambda route: held.append((route, route.fetch())))
    stage.make({"prompt": "a film that comes"})  # the page hears of it, and asks for the list
    while not held:
        page.wait_for_timeout(50)
    httpx.delete(f"{stage.url}v1/videos/{film.id}").raise_for_status()
    see(page, "document.querySelectorAll('.tile').length === 0")
    route, before = held.pop(0)
    assert film.id in before.text()
    route.fulfill(response=before)
    page.get_by_role("link", name="a film that comes").wait_for()
    assert page.locator(".tile").count() == 1
    guest.context.unroute_all()
    for route, later in held:
        route.fulfill(response=later)


@needs_chromium
@pytest.mark.parametrize("how", ["stopped", "killed", "offline"])
def test_page_mends_itself_when_the_server_was_away(build: Callable[..., Stage], visit: Callable[..., Visit], how: str) -> None:
    stage = build()
    stage.worker.goes.clear()
    guest = visit(stage)
    leave, come = {
        "stopped": (stage.stop, stage.start),
        "killed": (stage.kill, stage.start_apart),
        "offline": (lambda: guest.context.set_offline(True), lambda: guest.context.set_offline(False)),
    }[how]
    if how == "killed":
        stage.stop()
        stage.start_apart()
    page = guest.open()
    page.get_by_label("What happens in your film?").fill("made over a gap")
    page.get_by_role("button", name="Make film").click()
    page.get_by_role("img", name="Preview of made over a gap").wait_for()
    guest.outage = True
    leave()
    page.get_by_text("The server is away. Trying again.").wait_for()
    page.get_by_label("What happens in your film?").fill("asked for while away")
    page.get_by_role("button", name="Make film").click()
    page.get_by_role("button", name="Waiting for the server").wait_for()
    stage.worker.goes.set()
    come()
    if how == "killed":
        stage.answers()  # a process has to import first
    begin = time.monotonic()
    page.get_by_text("The server is away. Trying again.").wait_for(state="detached")
    page.get_by_role("link", name="made over a gap").wait_for()
    page.get_by_role("link", name="asked for while away").wait_for()
    assert time.monotonic() - begin < RECOVERY
    assert [film.request["prompt"] for film in stage.films()] == ["made over a gap", "asked for while away"]


@needs_chromium
def test_everything_from_words_to_file_by_keyboard(build: Callable[..., Stage], visit: Callable[..., Visit]) -> None:
    stage = build()
    page = visit(stage, accept_downloads=True).open()
    page.get_by_role("button", name="Shortcuts").wait_for()
    page.keyboard.press("?")
    page.get_by_role("dialog", name="Shortcuts").wait_for()
    page.keyboard.press("Escape")
    page.get_by_role("dialog").wait_for(state="detached")
    page.keyboard.press("/")
    page.keyboard.type("keys only")
    page.keyboard.press("Control+Enter")
    page.get_by_role("link", name="keys only").wait_for()
    tab_to(page, "e.closest('.tile a')")
    page.keyboard.press("Enter")
    page.get_by_role("dialog").wait_for()
    tab_to(page, "e.textContent.trim() === 'Download'")
    with page.expect_download() as waited:
        page.keyboard.press("Enter")
    assert re.fullmatch(r"keys-only-\d+\.mp4", waited.value.suggested_filename)
    assert Path(waited.value.path()).read_bytes() == stage.media.video
    page.keyboard.press("Escape")
    page.get_by_role("dialog").wait_for(state="detached")
    see(page, "document.activeElement.closest('.tile') !== null")
    page.keyboard.press("/")
    page.keyboard.press("Control+A")
    page.keyboard.type("keys again")
    page.keyboard.press("Control+Enter")
    page.get_by_role("link", name="keys again").wait_for()
    tab_to(page, "e.closest('.tile a')?.ariaLabel.startsWith('keys only')")
    page.keyboard.press("Enter")
    see(page, PLAYABLE)
    tab_to(page, "e.textContent.trim() === 'Compare'")
    page.keyboard.press("Enter")
    page.get_by_role("dialog").wait_for(state="detached")
    tab_to(page, "e.closest('.tile a')")
    page.keyboard.press("ArrowLeft")
    see(page, "document.activeElement.ariaLabel.startsWith('keys again')")
    page.keyboard.press("Enter")
    page.get_by_role("dialog", name="Compare two films").wait_for()
    both = "[...document.querySelectorAll('dialog video')]"
    see(page, f"{both}.filter((v) => v.readyState === 4).length === 2")
    tab_to(page, "e.ariaLabel === 'Play'")
    page.keyboard.press("Enter")
    assert page.evaluate(f"{both}.map((v) => v.paused)") == [False, False]
    see(page, f"(([a, b]) => a.currentTime > 0.5 && Math.abs(a.currentTime - b.currentTime) < 0.25)({both})")
    names = "[...document.querySelectorAll('dialog figcaption')].map((e) => e.textContent.split(': ')[1]).join()"
    see(page, f"{names} === 'keys only,keys again'")
    page.keyboard.press("Escape")
    page.get_by_role("dialog").wait_for(state="detached")
    tab_to(page, "e.closest('.tile a')")
    page.keyboard.press("e")
    page.get_by_role("button", name="Extend film").wait_for()


@needs_chromium
def test_settings_come_back_from_a_film_and_from_a_dropped_file(
    build: Callable[..., Stage], visit: Callable[..., Visit]
) -> None:
    stage = build({"prompt": "once more", "seed": 99, "steps": 11})
    page = visit(stage).open()
    page.get_by_role("link", name="once more").click()
    page.get_by_role("button", name="Reuse").click()
    prompt, steps, seed = (page.get_by_label(name) for name in ("What happens in your film?", "Steps", "Seed"))
    holds(prompt, "once more")
    page.get_by_text("More settings").click()
    holds(steps, "11")
    holds(seed, "")
    bring(page, "drop", "film.mp4", "video/mp4", stage.media.video)
    page.get_by_role("button", name="Load its settings").click()
    holds(prompt, WORDS)
    holds(steps, "12")
    holds(seed, "")
    bring(page, "drop", "film.mp4", "video/mp4", stage.media.video)
    page.get_by_role("radio", name="Edit").click()
    page.get_by_label("What should be different?").fill("now it is blue")
    page.get_by_role("button", name="Edit film").click()
    page.get_by_role("link", name="now it is blue").wait_for()
    assert stage.films()[-1].request["task"] == "edit"


@needs_chromium
def test_marks_of_a_film_are_checked(build: Callable[..., Stage], visit: Callable[..., Visit]) -> None:
    stage = build({})
    page = visit(stage).open()
    page.get_by_role("link", name=WORDS).click()
    page.get_by_text("Where it came from").click()
    page.get_by_role("button", name="Check the marks").click()
    page.get_by_text("Signed record (C2PA): none found").wait_for()


@needs_chromium
@pytest.mark.parametrize("keys", [False, True])
def test_root_certificate_is_saved(build: Callable[..., Stage], visit: Callable[..., Visit], keys: bool) -> None:
    stage = build(keys=keys)
    id, key = issue(stage.jobs, "studio")
    stage.jobs.create(
        {"task": "create", "prompt": WORDS, "system": "worlds-64", "size": [SIDE, SIDE]}, owner=id if keys else "local"
    )
    guest = visit(stage, accept_downloads=True)
    page = unlocked(guest, key) if keys else guest.open()
    page.get_by_role("link", name=WORDS).click()
    page.get_by_text("Where it came from").click()
    with page.expect_request(re.compile("root.pem")) as asked, page.expect_download() as waited:
        page.get_by_role("button", name="Root certificate").click()
    assert asked.value.headers.get("authorization") == (f"Bearer {key}" if keys else None)
    assert waited.value.suggested_filename == "tubelet-root.pem"
    assert Path(waited.value.path()).read_bytes().startswith(b"-----BEGIN CERTIFICATE-----")


def unlocked(guest: Visit, key: str) -> Any:
    """The page of a server that wants a key, with the key."""
    guest.outage = True  # the browser notes each 401 as a failed request
    page = guest.open()
    page.get_by_label("Key", exact=True).fill(key)
    page.get_by_role("button", name="Open the studio").click()
    return page


@needs_chromium
def test_key_is_asked_for_and_kept_in_memory_only(build: Callable[..., Stage], visit: Callable[..., Visit]) -> None:
    stage = build(keys=True)
    _, key = issue(stage.jobs, "studio", ("read", "create", "admin"))
    page = unlocked(visit(stage), key)
    page.get_by_label("What happens in your film?").fill("under a key")
    page.get_by_role("button", name="Make film").click()
    page.get_by_role("link", name="under a key").click()
    see(page, PLAYABLE)
    see(page, "document.querySelector('.tile img')?.src.startsWith('blob:')")
    kept = page.evaluate("JSON.stringify([localStorage, sessionStorage, document.cookie, location.href])")
    assert key not in kept
    page.reload()
    page.get_by_role("heading", name="This server needs a key").wait_for()


@needs_chromium
def test_keys_and_limits_are_seen_and_keys_made_and_revoked(build: Callable[..., Stage], visit: Callable[..., Visit]) -> None:
    stage = build(keys=True)
    _, key = issue(stage.jobs, "studio", ("read", "create", "admin"), rpm=1000, daily=120, stored=1)
    page = unlocked(visit(stage), key)
    page.get_by_label("What happens in your film?").fill("under a key")
    page.get_by_role("button", name="Make film").click()
    page.get_by_role("link", name="under a key").wait_for()
    page.get_by_role("button", name="Keys and limits").click()
    sheet = page.get_by_role("dialog", name="Keys and limits")
    sheet.get_by_text("This page uses the key “studio”").wait_for()
    row = sheet.locator("dl div", has_text="Film asked for today")
    assert re.fullmatch(r"[1-9][\d.]* of 120 s", row.locator("dd").inner_text())
    sheet.get_by_text("New key").click()
    sheet.get_by_label("Whose it is").fill("a friend")
    sheet.get_by_label("Films running at once").fill("1")
    sheet.get_by_role("button", name="Make key").click()
    secret = sheet.get_by_label("The key of “a friend”").input_value()
    sheet.locator("li", has_text="a friend").get_by_text("1 at once").wait_for()
    assert not [found for width in (360, 1440) for found in audited(page, width)]
    assert not serious(page)
    other = unlocked(visit(stage), secret)
    other.get_by_role("button", name="Keys and limits").click()
    other.get_by_text("This page uses the key “a friend”").wait_for()
    assert other.get_by_text("All keys").count() == 0
    sheet.get_by_role("button", name="Revoke a friend").click()
    assert len(stage.jobs.all("key", None)) == 2, "asked twice"
    sheet.get_by_role("button", name="Really revoke a friend").click()
    sheet.locator("li", has_text="a friend").wait_for(state="detached")
    other.reload()
    other.get_by_role("heading", name="This server needs a key").wait_for()


def audited(page: Any, width: int) -> list[str]:
    page.set_viewport_size({"width": width, "height": 800})
    see(page, f"innerWidth === {width}")
    page.evaluate("new Promise((done) => requestAnimationFrame(() => setTimeout(done, 80)))")
    return [f"{width}: {problem}" for problem in page.evaluate(AUDIT)]


FRAMES = """() => {
  window.drawn = [];
  const step = (now) => window.drawn.push(now) && requestAnimationFrame(step);
  requestAnimationFrame(step);
}"""
"""Note when each frame is drawn from now on."""
HEAP = 200
"""MiB that the page's objects may take."""


@needs_chromium
def test_five_thousand_films_are_a_page_of_a_few_tiles(
    build: Callable[..., Stage], visit: Callable[..., Visit], record_property: Callable[[str, object], None]
) -> None:
    stage = build()
    sizes = ["1280x720", "720x1280", "1024x1024"]
    same = {"object": "video", "status": "completed", "progress": 100, "created_at": 1, "seconds": "4", "task": "create"}
    films = [
        {**same, "id": f"video_{number:026d}", "model": "any", "size": sizes[number % 3], "prompt": f"film {number}"}
        for number in range(5000)
    ]

    def listed(route: Any) -> None:
        after = re.search(r"after=video_(\d+)", route.request.url)
        start = int(after[1]) + 1 if after else 0
        some = films[start : start + 100]
        route.fulfill(json={"object": "list", "data": some, "has_more": start + 100 < 5000, "last_id": some[-1]["id"]})

    guest = visit(stage)
    guest.context.route(re.compile(r"/v1/videos\?"), listed)
    picture = {"body": stage.media.thumbnail, "content_type": "image/webp"}
    guest.context.route(re.compile("/content"), lambda route: route.fulfill(**picture))
    page = guest.open()
    page.locator(".tile").first.wait_for()
    page.get_by_role("link", name="film 0,").focus()
    most = 0
    for _ in range(PATIENCE // 20):  # each leads to the last film known by then
        page.keyboard.press("End")
        most = max(most, page.locator(".tile").count())
        if page.get_by_role("link", name="film 4999,").count():
            break
        page.wait_for_timeout(20)
    assert page.get_by_role("link", name="film 4999,").count() == 1
    assert 0 < most < 120
    page.evaluate(FRAMES)
    for number in range(120):
        page.mouse.move(500 + 7 * number % 700, 400)  # over tiles, which are looked through then
        page.mouse.wheel(0, -150)
    times = np.diff(page.evaluate("window.drawn"))
    assert page.locator(".tile").count() < 120
    session = guest.context.new_cdp_session(page)
    session.send("HeapProfiler.collectGarbage")
    heap = session.send("Runtime.getHeapUsage")["usedSize"] / 2**20
    # How many frames there are is the machine's matter, too, and therefore only told.
    told = {"frames_per_second": round(1000 / float(np.median(times)), 1), "heap_mib": round(heap, 1)}
    for name, value in told.items():
        record_property(name, value)
    sys.stdout.write(f"while it is scrolled and looked through: {told}, {len(times)} frames\n")
    assert len(times) > 20
    assert heap < HEAP


AUDIT = """() => {
  const problems = [];
  const shown = (e) => e.checkVisibility({ checkVisibilityCSS: true }) && !e.closest("[aria-hidden=true]");
  const start = (e) => e.outerHTML.slice(0, 120);
  const top = [...document.querySelectorAll("dialog[open]")].pop() ?? document.body;
  const words = (e) => e.getAttribute("aria-label") ?? [...(e.labels ?? [])].map((label) => label.textContent).join(" ");
  const name = (e) => words(e).trim() || e.textContent.trim() || e.title || e.querySelector("img")?.alt;
  for (const e of top.querySelectorAll("a[href], button, input, textarea, select, summary, [role], progress, video")) {
    if (["presentation", "list", "status", "alert"].includes(e.getAttribute("role"))) continue;
    if (shown(e) && !name(e)) problems.push("no name: " + start(e));
  }
  for (const e of top.querySelectorAll("img")) if (!e.hasAttribute("alt")) problems.push("no alt: " + start(e));
  const ids = [...document.querySelectorAll("[id]")].map((e) => e.id);
  if (new Set(ids).size < ids.length) problems.push("an id twice: " + ids.sort());
  if (document.querySelectorAll("h1").length !== 1) problems.push("not one h1");

  const colour = (text) => {
    const [r, g, b, opaque = 1] = text.match(/[\\d.]+/g).map(Number);
    return text.startsWith("color(") ? [r, g, b, opaque] : [r / 255, g / 255, b / 255, opaque];
  };
  const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.05 + 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const walk = document.createTreeWalker(top, NodeFilter.SHOW_TEXT);
  for (let node = walk.nextNode(); node; node = walk.nextNode()) {
    const e = node.parentElement;
    if (!node.textContent.trim() || !shown(e)) continue;
    if (e.closest(":disabled, noscript, .visually-hidden, .tile, option")) continue;
    let ground = e;
    while (ground && colour(getComputedStyle(ground).backgroundColor)[3] < 0.8) ground = ground.parentElement;
    const style = getComputedStyle(e);
    const behind = getComputedStyle(ground ?? document.documentElement).backgroundColor;
    const [low, high] = [light(colour(style.color)), light(colour(behind))].sort((a, b) => a - b);
    const least = parseFloat(style.fontSize) >= 24 ? 3 : 4.5;
    if (high / low < least) problems.push(`contrast ${(high / low).toFixed(2)}: ${node.textContent.trim().slice(0, 40)}`);
  }
  for (const e of [document.documentElement, ...document.querySelectorAll("dialog[open]")]) {
    if (e.scrollWidth > e.clientWidth) problems.push(`${e.localName}: ${e.scrollWidth} px wide on ${e.clientWidth}`);
  }
  return problems;
}"""
"""What is wrong with the view in front: names, contrast, room."""


def walk(stage: Stage, page: Any, look: Callable[[str], None]) -> None:
    """Lead a page that has no films yet through every view; `look(name)` is called at each."""
    page.get_by_role("heading", name="Say it. Watch it move.").wait_for()
    look("empty")
    stage.worker.goes.clear()
    page.get_by_label("What happens in your film?").fill("a red ball with-a-very-long-word-" + "m" * 120)
    page.get_by_text("More settings").click()
    page.get_by_role("radio", name="3", exact=True).click()
    page.get_by_role("button", name="Make 3 films").click()
    page.get_by_role("img", name="Preview of").wait_for()
    look("making")
    page.get_by_role("button", name="Storyboard").click()
    look("storyboard")
    page.get_by_role("button", name="Storyboard").click()
    page.get_by_role("button", name="Take out of the queue").first.click()
    stage.worker.goes.set()
    page.locator(".tile-inner.failed").wait_for()
    page.locator("#making").wait_for(state="detached")
    see(page, PICTURED)
    look("gallery")
    page.locator(".tile-inner:not(.failed) a").first.focus()
    page.keyboard.press("l")
    page.get_by_role("button", name="Make it loop").wait_for()
    look("loop")
    page.get_by_role("radio", name="Blend").click()
    look("blend")
    page.get_by_role("button", name="Choose a film").click()
    look("choice")
    page.locator(".tile-inner:not(.failed) a").first.click()
    page.get_by_role("button", name="Put the second film away").wait_for()
    look("two films")
    page.locator(".tile-inner:not(.failed) a").first.click()
    see(page, PLAYABLE)
    assert page.evaluate("document.querySelector('dialog video').paused"), "motion was not asked for"
    page.get_by_text("Where it came from").click()
    look("film")
    page.get_by_role("button", name="Download mp4 / webp / gif").click()
    page.get_by_role("menuitem", name="Download gif").wait_for()
    look("menu")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Delete film").click()
    page.get_by_role("dialog", name="Delete this film?").wait_for()
    look("delete")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Compare").click()
    page.locator(".tile-inner:not(.failed) a").last.click()
    see(page, "[...document.querySelectorAll('dialog video')].filter((v) => v.readyState === 4).length === 2")
    look("comparison")
    page.get_by_role("button", name="Close").click()
    page.get_by_role("button", name="Shortcuts").click()
    page.get_by_role("dialog", name="Shortcuts").wait_for()
    look("shortcuts")


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_view_has_names_contrast_and_room(build: Callable[..., Stage], visit: Callable[..., Visit], scheme: str) -> None:
    stage = build()
    page = visit(stage, color_scheme=scheme).open()
    found: list[str] = []
    walk(
        stage,
        page,
        lambda view: found.extend(f"{view} {problem}" for width in (360, 768, 1440) for problem in audited(page, width)),
    )
    assert not found, "\n".join(found)


AXE = REPOSITORY / "studio" / "node_modules" / "axe-core" / "axe.min.js"


GRAVE = """async () => {
  const { violations } = await axe.run(document, { resultTypes: ["violations"] });
  const grave = violations.filter((rule) => ["serious", "critical"].includes(rule.impact));
  return grave.flatMap((rule) => rule.nodes.map((node) => `${rule.id} ${node.html.slice(0, 160)}`));
}"""
"""Told in words: all that axe returns is large, and a browser has held still for minutes over it."""


def serious(page: Any) -> list[str]:
    """What axe finds serious or critical in the view in front; nothing where there is no axe."""
    if not AXE.is_file():
        return []
    page.evaluate(AXE.read_text())
    page.evaluate("new Promise((done) => requestAnimationFrame(() => setTimeout(done, 80)))")
    return page.evaluate(GRAVE)


@needs_chromium
@pytest.mark.skipif(not AXE.is_file(), reason="there is no axe-core in studio/node_modules: npm ci in studio/")
@pytest.mark.parametrize(("scheme", "width"), [("light", 1440), ("dark", 360)])
def test_axe_finds_nothing_serious(build: Callable[..., Stage], visit: Callable[..., Visit], scheme: str, width: int) -> None:
    stage = build()
    page = visit(stage, color_scheme=scheme, viewport={"width": width, "height": 800}).open()
    found: list[str] = []
    walk(stage, page, lambda view: found.extend(f"{view}: {problem}" for problem in serious(page)))
    assert not found, "\n".join(found)


@needs_chromium
def test_colours_follow_the_switch_and_stay(build: Callable[..., Stage], visit: Callable[..., Visit]) -> None:
    page = visit(build(), color_scheme="light").open()
    ground = "getComputedStyle(document.documentElement).backgroundColor"
    light = page.evaluate(ground)
    page.get_by_role("button", name="Colours: as the system").click()
    page.get_by_role("button", name="Colours: light").click()
    page.get_by_role("button", name="Colours: dark").wait_for()
    see(page, f"{ground} !== {light!r}")
    dark = page.evaluate(ground)
    page.reload()
    page.get_by_role("button", name="Colours: dark").wait_for()
    see(page, f"{ground} === {dark!r}")
    turned = page.evaluate(f"(document.querySelector('[aria-label^=Colours]').click(), {ground})")
    assert turned == light, "where less motion is asked for, new colours are there at once"


@needs_chromium
def test_moving_over_a_film_looks_through_it(build: Callable[..., Stage], visit: Callable[..., Visit]) -> None:
    page = visit(build({})).open()
    see(page, PICTURED)
    box = page.locator(".tile").bounding_box()
    assert box is not None
    for part, frame in ((0.01, 0), (0.51, 8), (0.99, 15)):
        page.mouse.move(box["x"] + part * box["width"], box["y"] + box["height"] / 2)
        shift = "document.querySelector('.tile .strip img')?.style.transform.slice('translate('.length)"
        see(page, f"16 * parseFloat({shift}) === {-100 * frame}")
    page.mouse.move(0, 0)
    page.locator(".tile .strip").wait_for(state="detached")


@needs_chromium
def test_films_are_leafed_through_with_the_arrow_keys(build: Callable[..., Stage], visit: Callable[..., Visit]) -> None:
    page = visit(build({"prompt": "oldest"}, {"prompt": "middle"}, {"prompt": "newest"})).open()
    page.get_by_role("link", name="newest").click()
    page.get_by_role("dialog", name="newest").get_by_role("heading", name="newest").wait_for()
    see(page, PLAYABLE)
    for key, words in (("ArrowRight", "middle"), ("ArrowRight", "oldest"), ("ArrowRight", "oldest"), ("ArrowLeft", "middle")):
        page.keyboard.press(key)
        page.get_by_role("dialog", name=words).get_by_role("heading", name=words).wait_for()
        see(page, PLAYABLE)
    page.go_back()
    page.get_by_role("dialog", name="oldest").wait_for()
    page.get_by_role("button", name="Newer film").click()
    page.get_by_role("dialog", name="middle").wait_for()
    page.get_by_role("button", name="Close").click()
    page.get_by_role("dialog").wait_for(state="detached")


@needs_chromium
def test_film_that_was_stopped_is_tried_again_or_removed(build: Callable[..., Stage], visit: Callable[..., Visit]) -> None:
    stage = build()
    stage.worker.goes.clear()
    page = visit(stage).open()
    page.get_by_label("What happens in your film?").fill("on second thoughts")
    page.get_by_role("button", name="Make film").click()
    page.get_by_role("button", name="Stop on second thoughts").click()
    page.get_by_role("link", name="You stopped this film.").wait_for()
    page.get_by_label("What happens in your film?").fill("")
    stage.worker.goes.set()
    page.get_by_role("button", name="Try again: on second thoughts").click()
    holds(page.get_by_label("What happens in your film?"), "on second thoughts")
    page.get_by_role("button", name="Make film").click()
    see(page, PICTURED)
    page.get_by_role("button", name="Remove on second thoughts").click()
    page.get_by_role("button", name="Delete", exact=True).click()
    see(page, "document.querySelectorAll('.tile').length === 1")
    assert [film.state for film in stage.films()] == ["completed"]


KINDS = {
    "Extend": ("Extend film", "What happens?"),
    "Loop": ("Make it loop", "What happens?"),
    "Remix": ("Remix film", "What should be different?"),
    "Edit": ("Edit film", "What should be different?"),
    "Connect": ("Connect films", "What happens?"),
    "Blend": ("Blend films", "What happens?"),
}
"""What is done with a clip: the button that sends it, and what is asked for words."""


def send_and_stop(page: Any, words: str, button: str) -> None:
    """Ask for what the composer holds, and stop it."""
    page.get_by_role("button", name=button).click()
    page.get_by_role("button", name=f"Stop {words}").click()
    page.locator("#making").wait_for(state="detached")
    sent(page)


def twice(stage: Stage, words: str) -> None:
    """The last two films were asked for alike, seed and all."""
    first, second = stage.films()[-2:]
    assert first.request["prompt"] == words
    assert second.request == first.request
    assert second.parent == first.parent


@needs_chromium
def test_every_task_on_a_film_is_tried_again_as_it_was(build: Callable[..., Stage], visit: Callable[..., Visit]) -> None:
    stage = build({"prompt": "one"}, {"prompt": "two"})
    one, two = stage.films()
    stage.worker.goes.clear()
    guest = visit(stage)
    page = guest.open()
    for kind, (button, label) in KINDS.items():
        words = f"not {kind}"
        page.locator(f"[data-film={one.id}]").hover()
        page.get_by_role("button", name="Extend one").click()
        page.get_by_role("radio", name=kind).click()
        if kind in ("Connect", "Blend"):
            page.get_by_role("button", name="Choose a film").click()
            page.get_by_role("link", name="two").click()
        if kind in ("Extend", "Loop", "Connect"):
            page.get_by_role("radiogroup", name="Length to add").get_by_role("radio", name="8 s", exact=True).click()
        else:
            page.get_by_label("How much changes").fill("0.35")
        page.get_by_label(label).fill(words)
        send_and_stop(page, words, button)
        page.get_by_label("What happens in your film?").fill("something else")
        page.get_by_role("button", name=f"Try again: {words}").click()
        holds(page.get_by_label(label), words)
        send_and_stop(page, words, button)
        twice(stage, words)
        assert stage.films()[-1].parent == one.id
    connected, blended = (stage.films()[place].request for place in (-3, -1))
    assert (connected["seconds"], blended["strength"]) == (8, 0.35)
    assert [entry["asset"] for entry in connected["inputs"]] == [film.outputs[0].id for film in (one, two)]
    other = guest.open()  # a page that knows only what the server tells
    other.get_by_role("button", name="Try again: not Extend").first.click()
    send_and_stop(other, "not Extend", "Extend film")
    assert stage.films()[-1].request == next(film.request for film in stage.films() if film.request["prompt"] == "not Extend")
    other.get_by_role("button", name="Try again: not Connect").first.click()
    other.get_by_text("Which is the second?").wait_for()
    assert other.get_by_role("button", name="Connect films").is_disabled()


@needs_chromium
def test_uploads_are_sent_again_with_a_film_that_is_tried_again(
    build: Callable[..., Stage], visit: Callable[..., Visit]
) -> None:
    stage = build()
    stage.worker.goes.clear()
    page = visit(stage).open()

    def tried(words: str, button: str) -> None:
        send_and_stop(page, words, button)
        page.get_by_label("What happens in your film?").fill("")
        page.get_by_role("button", name=f"Try again: {words}").click()
        send_and_stop(page, words, button)
        twice(stage, words)

    bring(page, "drop", "first.png", "image/png", stage.media.picture)
    page.get_by_role("img", name="First picture: first.png").wait_for()
    bring(page, "drop", "last.png", "image/png", stage.media.picture)
    page.get_by_label("What happens in your film?").fill("between pictures")
    tried("between pictures", "Make film")
    assert [entry["role"] for entry in stage.films()[-1].request["inputs"]] == ["reference", "last"]
    page.get_by_role("button", name="Take out: First picture").click()
    page.get_by_role("button", name="Take out: Last picture").click()
    for kind, (button, label) in KINDS.items():  # the server takes a file for each
        bring(page, "drop", "film.mp4", "video/mp4", stage.media.video)
        page.get_by_role("radio", name=kind).click()
        if kind in ("Connect", "Blend"):
            bring(page, "drop", "second.mp4", "video/mp4", stage.media.video)
            page.get_by_role("group", name="Second film").get_by_text("second.mp4").wait_for()
        page.get_by_label(label).fill(f"mine, {kind}")
        if kind in ("Extend", "Blend"):
            tried(f"mine, {kind}", button)
        else:
            send_and_stop(page, f"mine, {kind}", button)
    asked = {film.request["prompt"].removeprefix("mine, "): film.request for film in stage.films()[2:]}
    assert [(request["task"], request["mode"]) for request in (asked[kind] for kind in KINDS)] == [
        ("extend", None),
        ("extend", None),
        ("edit", None),
        ("edit", None),
        ("create", "connect"),
        ("create", "blend"),
    ]
    page.reload()
    page.get_by_role("button", name="Try again: between pictures").first.click()
    page.get_by_role("alert").get_by_text("bring the first and the last picture again").wait_for()
    page.get_by_role("button", name="Try again: mine, Edit").click()
    page.get_by_role("alert").get_by_text("bring the clip again").wait_for()


@needs_chromium
def test_second_film_is_put_away_and_chosen_anew(build: Callable[..., Stage], visit: Callable[..., Visit]) -> None:
    stage = build({"prompt": "of the gallery"})
    page = visit(stage).open()
    bring(page, "drop", "mine.mp4", "video/mp4", stage.media.video)
    page.get_by_role("radio", name="Blend").click()
    second = page.get_by_role("group", name="Second film")
    second.get_by_label("Second film, file").set_input_files(
        {"name": "wrong.mp4", "mimeType": "video/mp4", "buffer": stage.media.video}
    )
    second.get_by_text("wrong.mp4").wait_for()
    second.get_by_role("button", name="Put the second film away").click()
    second.get_by_role("button", name="Choose a film").click()
    page.get_by_text("Choose the film to blend with “mine.mp4”").wait_for()
    page.get_by_role("link", name="of the gallery").click()
    second.get_by_text("of the gallery").wait_for()
    page.get_by_label("What happens?").fill("both")
    page.get_by_role("button", name="Blend films").click()
    page.get_by_role("link", name="both").wait_for()
    (film, made) = stage.films()
    assert made.request["inputs"][1]["asset"] == film.outputs[0].id


@needs_chromium
def test_reuse_keeps_words_model_strength_and_task(
    build: Callable[..., Stage], visit: Callable[..., Visit], tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    facts = json.loads((SHIPPED / "worlds-64" / "system.json").read_text())
    (tmp_path / "other" / "system.json").write_text(json.dumps(facts | {"name": "other"}))
    stage = build(systems=("worlds-64", tmp_path / "other"))
    base = stage.make({"prompt": "the base", "model": "worlds-64"})
    asked = {"prompt": "exactly these words", "expand": False, "steps": 9, "guidance": 1.5, "model": "other"}
    stage.make(asked | {"seconds": 4})
    changed = asked | {"prompt": "changed", "task": "remix", "strength": 0.25, "size": None}
    stage.make(changed | {"inputs": [], "source": {"seconds": 2.125, "size": [64, 64]}}, base)
    page = visit(stage).open()
    page.get_by_role("link", name="exactly these words").click()
    page.get_by_role("button", name="Reuse").click()
    page.get_by_text("Your words go to the model as they are.").wait_for()
    page.get_by_role("button", name="Make film").click()
    see(page, "document.querySelectorAll('.tile').length === 4")
    request = stage.films()[-1].request
    assert {name: request[name] for name in asked} == asked
    assert (request["seconds"], request["seed"] == 3) == (4, False)
    page.get_by_role("link", name="changed").click()
    page.get_by_role("button", name="Reuse").click()
    holds(page.get_by_label("What should be different?"), "changed")
    page.get_by_role("button", name="Remix film").click()
    see(page, "document.querySelectorAll('.tile').length === 5")
    made = stage.films()[-1]
    assert made.parent == base
    for name in ("prompt", "expand", "model", "strength", "task"):
        assert made.request[name] == changed[name], name


@needs_chromium
def test_reuse_tells_the_model_what_it_was_told(build: Callable[..., Stage], visit: Callable[..., Visit]) -> None:
    stage = build()
    stage.make({"prompt": "a red ball falls", "text": "A ball of another caption."})
    stage.make({"prompt": "told by hand", "text": "By hand.", "expand": False})
    page = visit(stage).open()
    words = page.get_by_label("What happens in your film?")
    words.fill("a red ball falls")
    page.get_by_text("The model will read:").wait_for()
    page.get_by_role("link", name="a red ball falls").click()
    page.get_by_role("button", name="Reuse").click()
    page.get_by_text("A ball of another caption.").wait_for()
    page.get_by_role("button", name="Make film").click()
    see(page, "document.querySelectorAll('.tile').length === 3")
    page.get_by_role("link", name="told by hand").click()
    page.get_by_role("button", name="Reuse").click()
    page.get_by_text("By hand.").wait_for()
    page.get_by_role("button", name="Make film").click()
    see(page, "document.querySelectorAll('.tile').length === 4")
    assert [film.request["text"] for film in stage.films()[-2:]] == ["A ball of another caption.", "By hand."]


@needs_chromium
def test_sizes_and_lengths_that_cannot_be_chosen_are_said(build: Callable[..., Stage], visit: Callable[..., Visit]) -> None:
    stage = build({"prompt": "an odd one", "size": [360, 640], "seconds": 6.5})
    page = visit(stage).open()
    page.get_by_role("link", name="an odd one").click()
    page.get_by_role("button", name="Reuse").click()
    size = page.get_by_text("640 × 360 is no size of this model: 1280 × 720 is taken.")
    length = page.get_by_text("6.5 s is no length of this model: 8 s is taken.")
    size.wait_for()
    length.wait_for()
    page.get_by_role("radio", name="Square").click()
    size.wait_for(state="detached")
    page.get_by_role("radio", name="4 s", exact=True).click()
    length.wait_for(state="detached")
    page.get_by_role("button", name="Make film").click()
    see(page, "document.querySelectorAll('.tile').length === 2")
    assert (stage.films()[-1].request["size"], stage.films()[-1].request["seconds"]) == ([64, 64], 4)


@needs_chromium
def test_all_settings_in_a_dropped_file_are_loaded(
    build: Callable[..., Stage], visit: Callable[..., Visit], tmp_path: Path
) -> None:
    page = visit(build()).open()

    def drop(**settings: Any) -> None:
        """Drop a film that carries settings as the server writes them, and load these."""
        path = tmp_path / "film.mp4"
        written = {"frames": 33, "fps": 8.0, "size": [64, 112], "system": "worlds-64", "text": "A long text.", **settings}
        said = {"prompt": settings["prompt"], "settings": json.dumps(written)}
        encode.save(np.zeros((2, 720, 1280, 3), np.uint8), path, FPS, said)
        bring(page, "drop", "film.mp4", "video/mp4", path.read_bytes())
        page.get_by_role("button", name="Load its settings").click()

    def chosen(*names: str) -> None:
        for name in names:
            page.get_by_role("radio", name=name, exact=True, checked=True).wait_for()

    drop(prompt="round and round", loop=True, steps=9)
    page.get_by_role("button", name="Loop", pressed=True).wait_for()
    chosen("Wide", "4 s")
    holds(page.get_by_label("Size in pixels"), "1280x720")
    assert page.locator(".unfit").count() == 0, "33 frames are the 4 s that the film was asked for with"
    drop(prompt="as it is", text="as it is")
    page.get_by_text("Your words go to the model as they are.").wait_for()
    page.get_by_role("button", name="Loop", pressed=False).wait_for()
    drop(prompt="bluer", task="edit", strength=0.35)
    chosen("Edit")
    holds(page.get_by_label("How much changes"), "0.35")
    holds(page.get_by_label("What should be different?"), "bluer")
    page.get_by_text("What the film was made from is not in its file.").wait_for()
    page.get_by_role("button", name="Put the clip away").click()
    drop(prompt="one | two", task="film", shots=[["one", "One.", 17], ["two", "Two.", 16], ["three", "3.", 17]], cuts=[2])
    holds(page.get_by_label("What happens in shot 2"), "two")
    for shot, anew in ((2, False), (3, True)):
        page.get_by_role("checkbox", name=f"Shot {shot} begins anew", checked=anew).wait_for()
    page.get_by_text("6.3 s in all").wait_for()


@needs_chromium
def test_film_is_saved_as_webp_and_gif_from_a_menu(build: Callable[..., Stage], visit: Callable[..., Visit]) -> None:
    stage = build({"prompt": "to be kept"}, {"prompt": "another"})
    guest = visit(stage, accept_downloads=True)
    held_back: list[Route] = []
    guest.context.route(re.compile("variant=webp"), lambda route: held_back.append(route))
    page = guest.open()
    page.get_by_role("link", name="to be kept").click()
    see(page, PLAYABLE)
    focused = "document.activeElement.textContent.trim()"
    opener = page.get_by_role("button", name="Download mp4 / webp / gif")
    for presses, kind in enumerate(("mp4", "webp", "gif")):
        tab_to(page, "e.title === 'Download mp4 / webp / gif'")
        page.keyboard.press("Enter")
        see(page, f"{focused}.startsWith('Download mp4')")
        for _ in range(presses):
            page.keyboard.press("ArrowDown")
        see(page, f"{focused}.startsWith('Download {kind}')")
        with page.expect_download() as waited:
            page.keyboard.press("Enter")
            if kind == "webp":
                page.get_by_role("button", name="Making the webp").wait_for()
                see(page, "document.activeElement.title.startsWith('Download mp4')")
                held_back.pop().fulfill(body=stage.media.thumbnail, content_type="image/webp")
        assert waited.value.suggested_filename == f"to-be-kept-3.{kind}"
        held = Path(waited.value.path()).read_bytes()
        assert {"mp4": held == stage.media.video, "webp": held[8:12] == b"WEBP", "gif": held[:3] == b"GIF"}[kind]
        page.get_by_role("menu").wait_for(state="detached")
    opener.press("ArrowUp")
    see(page, f"{focused}.startsWith('Download gif')")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    see(page, f"{focused}.startsWith('Download mp4')")
    page.keyboard.press("Escape")
    page.get_by_role("menu").wait_for(state="detached")
    page.get_by_role("dialog", name="to be kept").wait_for()
    refusal = {"error": {"code": "gif_not_available", "message": "This film has no gif."}}
    guest.context.route(re.compile("variant=gif"), lambda route: route.fulfill(status=404, json=refusal))
    guest.outage = True
    opener.click()
    page.get_by_role("menuitem", name="Download gif").click()
    page.get_by_role("alert").get_by_text("This film has no gif.").wait_for()


def test_journeys_that_the_page_about_the_studio_names_are_here() -> None:
    named = re.findall(r"`(test_\w+)`", (REPOSITORY / "docs" / "studio.md").read_text())
    here = "".join(path.read_text() for path in Path(__file__).parent.glob("test_serve_studio*.py"))
    assert len(named) >= 12
    assert [name for name in named if f"def {name}(" not in here] == []
