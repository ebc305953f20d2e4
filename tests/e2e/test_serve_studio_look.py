"""The web studio in a real browser: what a person sees of it, at every width and in both schemes; marks, keys and downloads."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from studio_stage import (
    PATIENCE,
    PICTURED,
    PLAYABLE,
    SIDE,
    WORDS,
    Stage,
    Visit,
    needs_chromium,
    see,
    tab_to,
)

from tubelet.serve.auth import issue

if TYPE_CHECKING:
    from playwright.sync_api import Route


REPOSITORY = Path(__file__).parents[2]


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
    until = time.monotonic() + PATIENCE / 1000
    while time.monotonic() < until:  # each leads to the last film known by then
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
