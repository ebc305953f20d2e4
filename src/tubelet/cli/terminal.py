"""What verbs share: reading sizes, checking outputs before any work is done, printing."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any

from tubelet.core.errors import UserError

DEFAULT_SYSTEM = "worlds-64"
FILMS, PICTURES = (".mp4", ".webp", ".gif", ".png"), (".png",)


def parse_size(text: str | None) -> tuple[int, int] | None:
    """`64x112` (height x width) as a pair."""
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]{1,6})[xX]([0-9]{1,6})", text)
    if found is None:
        raise UserError(f"--size must look like 64x64 (height x width), got {text!r}; correct it")
    return int(found[1]), int(found[2])


def check_output(path: Path, suffixes: tuple[str, ...]) -> None:
    """Refuse an output that could not be written before any work is done."""
    if path.name.lower() in suffixes:
        raise UserError(f"{path} has no name before its ending; call it film{path.name}, for example")
    if path.suffix.lower() not in suffixes:
        raise UserError(f"{path} must end in {' or '.join(suffixes)}; rename it")
    try:
        folder = path.parent
        while not folder.exists():
            folder = folder.parent
        if path.is_dir():
            raise IsADirectoryError
        # Only trying tells: permissions say nothing to root, of a file system that cannot be written, of a name too long.
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=folder)
    except OSError as error:
        raise UserError(f"cannot write {path}; choose a place that you may write to") from error
    os.close(handle)
    os.unlink(name)


def check_outputs(out: Path, sheet: Path | None) -> None:
    """Refuse a film or sheet that could not be written, or both in one place."""
    check_output(out, FILMS)
    if sheet is not None:
        check_output(sheet, PICTURES)
        if sheet.resolve() == out.resolve():
            raise UserError(f"--out and --sheet are both {out}; give one of them another name")


def deliver(clip: Any, out: Path, sheet: Path | None, as_json: bool, timings: dict[str, float], started: float) -> None:
    """Write a clip and say so."""
    before = time.perf_counter()
    clip.save(out)
    if sheet is not None:
        clip.save(sheet)
    timings = {
        **timings, **clip.timings, "write": time.perf_counter() - before, "total": time.perf_counter() - started
    }  # fmt: skip
    if as_json:
        print_json({"out": str(out), "settings": clip.settings, "timings": timings})
        return
    if clip.settings["text"] != clip.settings["prompt"]:
        print(f"read as: {clip.settings['text']}")
    print(f"{out}  ({timings['total']:.1f} s)" + (f"  {sheet}" if sheet else ""))


def chat_expander() -> Any:
    """A chat model where one is configured (TUBELET_CHAT_URL, TUBELET_CHAT_MODEL, TUBELET_CHAT_KEY), else None."""
    if url := os.environ.get("TUBELET_CHAT_URL"):
        from tubelet.text.expand import ChatExpander

        return ChatExpander(url, os.environ.get("TUBELET_CHAT_MODEL", ""), os.environ.get("TUBELET_CHAT_KEY"))
    return None


def expander(system: Any) -> Any:
    """What rewrites the prompts of a system: a chat model where one is configured, else its own rules, where it has some."""
    from tubelet.generate.system import expander_of

    return chat_expander() or expander_of(system.config)


def print_json(value: Any) -> None:
    print(json.dumps(plain(value), indent=1, allow_nan=False))


def plain(value: Any) -> Any:
    """JSON values of numpy's, of paths and of dataclasses; what is no number is null, which JSON can hold."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)
