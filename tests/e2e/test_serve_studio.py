"""The web studio in a real browser, before the real server: films from words to the disk, the queue, tabs, outages, keys."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from studio_stage import (
    PICTURED,
    PLAYABLE,
    STEPS,
    WORDS,
    Stage,
    Visit,
    bring,
    holds,
    needs_chromium,
    see,
    sent,
    tab_to,
)

from tubelet.text.expand import Expansion

if TYPE_CHECKING:
    from playwright.sync_api import APIResponse, Route


REPOSITORY = Path(__file__).parents[2]
RECOVERY = 10.0
"""Seconds after which the page has mended itself, once the server answers again."""


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

    def ask(words: str) -> None:
        page.keyboard.press("/")
        page.keyboard.press("Control+A")
        page.keyboard.type(words)
        page.keyboard.press("Control+Enter")
        page.get_by_role("link", name=words).wait_for()

    page.get_by_role("button", name="Shortcuts").wait_for()
    page.keyboard.press("?")
    page.get_by_role("dialog", name="Shortcuts").wait_for()
    page.keyboard.press("Escape")
    page.get_by_role("dialog").wait_for(state="detached")
    ask("keys only")
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
    ask("keys again")
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


def test_journeys_that_the_page_about_the_studio_names_are_here() -> None:
    named = re.findall(r"`(test_\w+)`", (REPOSITORY / "docs" / "studio.md").read_text())
    here = "".join(path.read_text() for path in Path(__file__).parent.glob("test_serve_studio*.py"))
    assert len(named) >= 12
    assert [name for name in named if f"def {name}(" not in here] == []
