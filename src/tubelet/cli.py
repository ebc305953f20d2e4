"""The command line: `tubelet generate | train | evaluate | worlds | models`. Rooms are imported by the verb that needs them."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import tyro

from tubelet.core.errors import UserError


def _size(text: str | None) -> tuple[int, int] | None:
    """`64x112` (height x width) as a pair."""
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(p.isdigit() for p in parts):
        raise UserError(f"--size must look like 64x64 (height x width), got {text!r}; correct it")
    return int(parts[0]), int(parts[1])


def _check_output(path: Path, suffixes: tuple[str, ...]) -> None:
    """Refuse an output that could not be written before any work is done."""
    if path.suffix.lower() not in suffixes:
        raise UserError(f"{path} must end in one of {', '.join(suffixes)}; rename it")
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK) or path.is_dir():
        raise UserError(f"cannot write {path}; choose a place that you may write to")


@dataclass(frozen=True)
class Generate:
    """Words in, film out."""

    prompt: Annotated[str | None, tyro.conf.Positional] = None
    """What to show, e.g. "a red ball bounces"."""
    system: str = "worlds-64"
    """A shipped system's name or a folder that holds one."""
    size: str | None = None
    """Height x width in pixels, e.g. 64x64 (default: the system's native size)."""
    frames: int | None = None
    """How many frames (default: the system's native length)."""
    steps: int | None = None
    """Solver steps (default: the system's)."""
    guidance: float | None = None
    """Strength of classifier-free guidance; 1 is none (default: the system's)."""
    seed: int = 0
    """The same seed and settings give the same bytes on the same machine."""
    expand: bool = True
    """Rewrite the prompt into the kind of caption that the system was trained on, and show it."""
    like: Path | None = None
    """Make this file's film again from the prompt, seed and settings in its metadata."""
    out: Path = Path("out/clip.mp4")
    """Where to write: .mp4, .webp, .gif, or .png for a contact sheet."""
    sheet: Path | None = None
    """Also write a contact sheet (.png)."""
    json: bool = False
    """Print settings and timings as JSON."""

    def __call__(self) -> None:
        started = time.perf_counter()
        _check_output(self.out, (".mp4", ".webp", ".gif", ".png"))
        if self.sheet is not None:
            _check_output(self.sheet, (".png",))
        if self.like is None and not (self.prompt or "").strip():
            raise UserError('generate needs words, e.g. tubelet generate "a red ball bounces"; add them')
        if self.like is not None and self.prompt is not None:
            raise UserError("--like makes a file's film again from its own words; leave out either --like or the words")
        from tubelet.core.log import progress
        from tubelet.generate.clip import read_settings
        from tubelet.generate.system import load, regenerate

        if self.like is not None:
            settings = read_settings(self.like)
            system = load(settings.get("system", self.system), dtype=settings.get("dtype"))
        else:
            settings, system = {}, load(self.system)
        timings = {"start": time.perf_counter() - started}
        with progress("denoising") as advance:
            if self.like is not None:
                clip = regenerate(settings, system, progress=advance)
            else:
                clip = system.generate(
                    self.prompt or "",
                    size=_size(self.size),
                    frames=self.frames,
                    seed=self.seed,
                    steps=self.steps,
                    guidance=self.guidance,
                    expander=_expander() if self.expand else None,
                    progress=advance,
                )
        before = time.perf_counter()
        clip.save(self.out)
        if self.sheet is not None:
            clip.save(self.sheet)
        timings |= {**clip.timings, "write": time.perf_counter() - before, "total": time.perf_counter() - started}
        if self.json:
            _print_json({"out": str(self.out), "settings": clip.settings, "timings": timings})
            return
        if clip.settings["text"] != clip.settings["prompt"]:
            print(f"read as: {clip.settings['text']}")
        print(f"{self.out}  ({timings['total']:.1f} s)" + (f"  {self.sheet}" if self.sheet else ""))


@dataclass(frozen=True)
class Train:
    """Train a recipe; the same command resumes it."""

    recipe: Annotated[str, tyro.conf.Positional]
    """A recipe's name: see `tubelet train --help` of the docs, or docs/recipes.md."""
    out: Path | None = None
    """Folder for checkpoints, metrics and samples (default: runs/RECIPE)."""
    set: tuple[str, ...] = ()
    """Override settings of the recipe: key=value, e.g. --set denoiser.steps=100."""

    def __call__(self) -> None:
        from tubelet.recipes import run

        run(self.recipe, self.out or Path("runs") / self.recipe, self.set)


@dataclass(frozen=True)
class Evaluate:
    """Read caption following and physics from a system's films, beside floors, ceilings and violated controls."""

    system: Annotated[str, tyro.conf.Positional] = "worlds-64"
    """A shipped system's name or a folder that holds one."""
    n: int = 200
    """Prompts per figure."""
    samples: int = 4
    """Films per prompt."""
    human: bool = False
    """Evaluate the 30 human prompts instead."""
    sheet: Path | None = None
    """Write a contact sheet of the first films (.png)."""
    json: bool = False
    """Print one flat object of name -> number."""

    def __call__(self) -> None:
        if self.n < 1 or self.samples < 1:
            raise UserError(f"--n and --samples must be at least 1, got {self.n} and {self.samples}; raise them")
        if self.sheet is not None:
            _check_output(self.sheet, (".png",))
        from tubelet.evaluate.report import evaluate_human, evaluate_system, table
        from tubelet.generate.system import load

        system = load(self.system)
        if self.human:
            figures = evaluate_human(system, samples=self.samples, sheet=self.sheet)
        else:
            figures = evaluate_system(system, n=self.n, samples=self.samples, sheet=self.sheet)
        _print_json(figures) if self.json else print(table(figures))


@dataclass(frozen=True)
class Worlds:
    """Show a simulated world."""

    world: Annotated[str, tyro.conf.Positional] = "phys2d"
    """phys2d or persist2d."""
    n: int = 8
    """How many clips."""
    seed: int = 0
    """First seed."""
    size: str = "64x64"
    """Height x width in pixels."""
    frames: int = 17
    """Frames per clip."""
    fps: float = 8.0
    """Frames per second."""
    kind: str | None = None
    """Only this kind of event."""
    split: str = "train"
    """train, held_out, or another split of docs/worlds.md."""
    sheet: Path | None = None
    """Write a contact sheet (.png)."""
    json: bool = False
    """Print captions, events and tags as JSON."""

    def __call__(self) -> None:
        from tubelet.worlds import WORLDS

        if self.world not in WORLDS:
            raise UserError(f"there is no world {self.world!r}; there are {', '.join(WORLDS)}")
        if self.n < 1:
            raise UserError(f"--n must be at least 1, got {self.n}; raise it")
        if self.sheet is not None:
            _check_output(self.sheet, (".png",))
        height, width = _size(self.size) or (64, 64)
        episodes = [
            WORLDS[self.world].sample(self.seed + i, height, width, self.frames, self.fps, kind=self.kind, split=self.split)
            for i in range(self.n)
        ]
        if self.sheet is not None:
            from tubelet.media.sheet import contact_sheet, save_sheet

            save_sheet(contact_sheet([e.video for e in episodes], [e.short for e in episodes]), self.sheet)
        if self.json:
            _print_json(
                [{"short": e.short, "dense": e.dense, "human": e.human, "events": e.events, "tags": e.tags} for e in episodes]
            )
        else:
            for episode in episodes:
                print(episode.short)


@dataclass(frozen=True)
class Models:
    """List the catalogue, or count one model's parameters and multiply-accumulates."""

    name: Annotated[str | None, tyro.conf.Positional] = None
    """A model of the catalogue."""
    json: bool = False
    """Print JSON."""

    def __call__(self) -> None:
        from tubelet.models import MODELS, count

        if self.name is None:
            rows: Any = {name: {"input": entry.input, "source": entry.source} for name, entry in MODELS.items()}
        elif self.name in MODELS:
            rows = {"name": self.name, **count(self.name)}
        else:
            raise UserError(f"there is no model {self.name!r}; there are {', '.join(MODELS)}")
        if self.json:
            _print_json(rows)
        elif self.name is None:
            print("\n".join(f"{name:24} {row['input']}" for name, row in rows.items()))
        else:
            print(f"{self.name} at {MODELS[self.name].input}")
            print(f"{rows['parameters']:,} parameters, {rows['macs']:,} multiply-accumulates")


def _expander() -> Any:
    """A chat model where one is configured (TUBELET_CHAT_URL, TUBELET_CHAT_MODEL, TUBELET_CHAT_KEY), else the worlds' rules."""
    from tubelet.text.expand import ChatExpander, RuleExpander
    from tubelet.worlds.expand import compose_dense, parse_scene

    if url := os.environ.get("TUBELET_CHAT_URL"):
        return ChatExpander(url, os.environ.get("TUBELET_CHAT_MODEL", ""), os.environ.get("TUBELET_CHAT_KEY"))
    return RuleExpander(parse_scene, compose_dense)


VERBS: dict[str, type] = {"generate": Generate, "train": Train, "evaluate": Evaluate, "worlds": Worlds, "models": Models}


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, default=_plain))


def _plain(value: Any) -> Any:
    """Numpy values and paths, as JSON can hold them."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return str(value)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line. Exit code 0, 2 for a wrong input (one sentence on stderr), 130 when interrupted."""
    try:
        verb = tyro.extras.subcommand_cli_from_dict(
            VERBS, prog="tubelet", description="The open Sora system: words in, film out.", args=arguments
        )
        verb()
    except UserError as error:
        print(f"tubelet: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("tubelet: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    sys.exit(0)


if __name__ == "__main__":
    main()
