"""Makes the pictures of the studio again: `.venv/bin/python docs/gallery/studio.py`. Takes some minutes, and needs chromium.

A server of its own makes real films with the shipped system; a browser looks at them in three widths, light and dark.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from PIL import Image
from playwright.sync_api import Page, sync_playwright

HERE = Path(__file__).parent / "studio"
WIDE, TALL, SQUARE = "1280x720", "720x1280", "64x64"
FILMS = (
    ("A mouth takes two bites out of a cookie from the left.", SQUARE),
    ("A large pink ring passes steadily to the right behind a gray wall.", WIDE),
    ("A medium orange triangle drops and bounces three times.", TALL),
    ("A brush paints a yellow circle, then a horizontal green line from left to right.", SQUARE),
    ("A medium purple ball slides steadily to the right and hits a resting medium yellow ball.", WIDE),
    ("A large yellow ball is thrown up to the left.", SQUARE),
    ("A large blue ball drops and bounces twice.", TALL),
    ("A medium red square slides steadily to the right along the floor.", WIDE),
    ("A small green square slides to the left.", SQUARE),
    ("A large teal ball drops and bounces twice.", WIDE),
)
"""Words and size of each film, the oldest first; all seeds are 0."""
MAKING = ("A large yellow ring drops and bounces twice.", "A small pink ball slides to the right.")
"""What is made, and what waits, while the pictures are taken."""
WINDOWS = {1440: 900, 768: 1024, 360: 780}
SCHEMES = ("light", "dark")
GREATEST = 200_000  # bytes of one picture


@contextlib.contextmanager
def served(data: Path) -> Iterator[httpx.Client]:
    """A running server, as a client of it."""
    words = ["serve", "--system", "worlds-64", "--data", str(data), "--port", "0"]
    with subprocess.Popen([sys.executable, "-m", "tubelet", *words], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield httpx.Client(base_url=process.stdout.readline().split(" at ")[1].split(",")[0], timeout=60)
        finally:
            process.terminate()


def ask(server: httpx.Client, prompt: str, size: str, **more: Any) -> str:
    """Ask for a film; its id."""
    answer = server.post("/v1/videos", json={"prompt": prompt, "size": size, "seed": 0, "model": "worlds-64", **more})
    return answer.raise_for_status().json()["id"]


def wait(server: httpx.Client, id: str) -> None:
    """Wait for a film. Raises RuntimeError when it fails."""
    while (video := server.get(f"/v1/videos/{id}").json())["status"] != "completed":
        if video["status"] == "failed":
            raise RuntimeError(video["error"]["message"])
        time.sleep(0.5)


def take(page: Page, name: str) -> None:
    """Take a picture of each width, light and dark. `name` stands before these in the file's name."""
    for width, height in WINDOWS.items():
        page.set_viewport_size({"width": width, "height": height})
        for scheme in SCHEMES:
            page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
            page.wait_for_timeout(1500)
            path = HERE / f"{name}-{width}-{scheme}.webp"
            Image.open(io.BytesIO(page.screenshot())).save(path, quality=85)
            if path.stat().st_size > GREATEST:
                raise RuntimeError(f"{path} has more than {GREATEST} bytes")


def main() -> None:
    """All of them."""
    HERE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as data, served(Path(data)) as server, sync_playwright() as player:
        for prompt, size in FILMS:
            wait(server, ask(server, prompt, size))
        browser = player.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        page.goto(str(server.base_url))
        page.get_by_label("What happens in your film?").fill(MAKING[0])
        page.get_by_role("radio", name="Wide").click()
        page.get_by_text("The model will read:").wait_for()
        waiting = [ask(server, prompt, WIDE, steps=250) for prompt in MAKING]
        while page.locator("#making img").count() == 0 or server.get(f"/v1/videos/{waiting[0]}").json()["progress"] < 20:
            page.wait_for_timeout(500)
        take(page, "home")
        for id in waiting:
            server.post(f"/v1/videos/{id}/cancel")
            server.delete(f"/v1/videos/{id}")
        page.get_by_role("link", name=FILMS[-1][0]).click()
        page.get_by_role("dialog").get_by_role("button", name="Play").wait_for()
        take(page, "film")
        browser.close()


if __name__ == "__main__":
    main()
