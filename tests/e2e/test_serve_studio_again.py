"""The web studio in a real browser: films that are tried again, and settings that come back, from a film or a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from studio_stage import (
    FPS,
    PICTURED,
    WORDS,
    Stage,
    Visit,
    bring,
    holds,
    needs_chromium,
    see,
    sent,
)

from tubelet.media import encode
from tubelet.serve.config import SHIPPED

if TYPE_CHECKING:
    pass


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
