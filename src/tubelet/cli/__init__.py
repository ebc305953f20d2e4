"""The command line. A verb is a class here or in `films`; it imports the rooms that it needs when it is called."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, NoReturn, TextIO

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, UseAppendAction, arg

from tubelet import __version__
from tubelet.cli.captions import Caption, Import, Recaption
from tubelet.cli.films import Connect, Edit, Extend, Generate, Inpaint, Outpaint, Storyboard
from tubelet.cli.serve import Keys, Provenance, Serve, Work
from tubelet.cli.terminal import DEFAULT_SYSTEM, PICTURES, check_output, expander, parse_size, print_json
from tubelet.core.errors import UserError
from tubelet.core.log import warn

GREATEST_SHEET = 2**27
"""Pixels of all clips of a contact sheet of worlds: 384 MiB."""


@dataclass(frozen=True)
class Train:
    """Train a recipe; the same command resumes it."""

    recipe: Annotated[Positional[str], arg(metavar="RECIPE")]
    """smoke, worlds-64, or another of docs/recipes.md."""
    out: Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint="(default: runs/RECIPE)")] = None
    """Where the run lives: clips, checkpoints, metrics, samples, and the system in the end."""
    set: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="KEY=VALUE", help_behavior_hint="(repeatable)")] = ()
    """Override one setting of the recipe, e.g. --set denoise.steps=100."""

    def __call__(self) -> None:
        from tubelet.recipes import run

        if not run(self.recipe, self.out or Path("runs") / self.recipe, self.set):
            raise KeyboardInterrupt


@dataclass(frozen=True)
class Evaluate:
    """Read caption following and physics from a system's films, beside floors, ceilings and violated controls."""

    system: Annotated[Positional[str], arg(metavar="NAME|FOLDER")] = DEFAULT_SYSTEM
    """A shipped system's name, or a folder that holds one."""
    n: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: 200)")] = None
    """Prompts per figure."""
    samples: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: 4)")] = None
    """Films per prompt."""
    human: Annotated[bool, arg(help_behavior_hint="")] = False
    """Evaluate the 30 human prompts instead."""
    expand: Annotated[bool, arg(help_behavior_hint="")] = True
    """Judge films of the prompts as they are, not of what `generate` makes of them first."""
    tasks: Annotated[bool, arg(help_behavior_hint="")] = False
    """Evaluate every task instead: pictures that move, extension, connection, loops, inpainting, edits, long films."""
    only: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="TASK", help_behavior_hint="(repeatable)")] = ()
    """With --tasks: this one alone, e.g. loop."""
    sizes: Annotated[bool, arg(help_behavior_hint="")] = False
    """Evaluate sizes and lengths beside the trained one instead."""
    splits: Annotated[bool, arg(help_behavior_hint="")] = False
    """Evaluate what training never shows instead: compositions, speeds and radii between and outside those of the training."""
    sheet: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Write a contact sheet of the first films (.png)."""
    json: Annotated[bool, arg(help_behavior_hint="")] = False
    """Print one flat object of name -> number."""

    def __call__(self) -> None:
        n, samples = 200 if self.n is None else self.n, 4 if self.samples is None else self.samples
        if n < 1 or samples < 1:
            raise UserError(f"--n and --samples must be at least 1, got {n} and {samples}; raise them")
        if self.sheet is not None:
            check_output(self.sheet, PICTURES)
        if self.human + self.tasks + self.sizes + self.splits > 1:
            raise UserError("--human, --tasks, --sizes and --splits are evaluations of their own; ask for one")
        if self.only and not self.tasks:
            raise UserError("--only chooses among tasks; add --tasks")
        self._refuse_unused()
        from tubelet.evaluate.report import evaluate_human, evaluate_system, table
        from tubelet.generate.system import load
        from tubelet.media.sheet import contact_sheet, save_sheet

        films: list[Any] = []
        texts: list[str] = []

        def show(film: Any, text: str) -> None:
            films.append(film)
            texts.append(text)

        system: Any = load(self.system)
        if system.config.training.get("recipe") == "footage":
            warn("these figures are of coloured shapes, which a system of one's own films has never seen")
        native: dict[str, Any] = {"size": system.config.size, "frames": system.config.frames}
        native["expander"] = expander(system) if self.expand else None
        if self.tasks or self.sizes:
            from tubelet.evaluate.tasks import TASKS, evaluate_sizes, evaluate_tasks

            chosen = self.only or tuple(TASKS)
            figures = evaluate_sizes(system, n) if self.sizes else evaluate_tasks(system, n, names=chosen, show=show)
        elif self.splits:
            from tubelet.evaluate.splits import evaluate_splits

            figures = evaluate_splits(system, n)
        elif self.human:
            figures = evaluate_human(system, samples=samples, show=show, **native)
        else:
            figures = evaluate_system(system, n=n, samples=samples, show=show, fps=system.config.fps, **native)
        if self.json:
            print_json(figures)
        else:
            print(table(figures))
        if self.sheet is not None:  # last: the figures are what took the time
            save_sheet(contact_sheet(films, texts), self.sheet)

    def _refuse_unused(self) -> None:
        """An option that the evaluation has no use for is no option."""
        given = {"--n": self.n, "--samples": self.samples, "--no-expand": None if self.expand else True, "--sheet": self.sheet}
        unused = {
            "--human": ("--n",) if self.human else (),
            "--tasks": ("--samples", "--no-expand") if self.tasks else (),
            "--sizes": ("--samples", "--no-expand", "--sheet") if self.sizes else (),
            "--splits": ("--samples", "--no-expand", "--sheet") if self.splits else (),
        }
        for evaluation, names in unused.items():
            for name in names:
                if given[name] is not None:
                    raise UserError(f"{evaluation} has no use for {name}; leave it out")


@dataclass(frozen=True)
class Worlds:
    """Show clips of a simulated world."""

    world: Annotated[Positional[str], arg(metavar="WORLD")] = "phys2d"
    """phys2d or persist2d."""
    n: int = 8
    """How many clips."""
    seed: int = 0
    """First seed; each clip takes the next."""
    size: Annotated[str, arg(metavar="HxW")] = "64x64"
    """Height x width in pixels."""
    frames: int = 17
    """Frames per clip."""
    fps: float = 8.0
    """Frames per second."""
    kind: Annotated[str | None, arg(metavar="KIND", help_behavior_hint="(default: drawn from the seed)")] = None
    """Only this kind of event; docs/worlds.md lists them."""
    split: Annotated[str, arg(metavar="SPLIT")] = "train"
    """Which compositions may appear; docs/worlds.md lists the splits."""
    sheet: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Write a contact sheet (.png)."""
    json: Annotated[bool, arg(help_behavior_hint="")] = False
    """Print captions, events and tags as JSON."""

    def __call__(self) -> None:
        from tubelet.worlds import WORLDS

        if self.world not in WORLDS:
            raise UserError(f"there is no world {self.world!r}; choose one of {', '.join(WORLDS)}")
        if self.n < 1:
            raise UserError(f"--n must be at least 1, got {self.n}; raise it")
        if self.sheet is not None:
            check_output(self.sheet, PICTURES)
        height, width = parse_size(self.size) or (64, 64)
        if self.sheet is not None and self.n * self.frames * height * width > GREATEST_SHEET:
            raise UserError(
                f"{self.n} clips of {self.frames} frames of {height}x{width} are too many for one sheet; "
                "ask for fewer or smaller ones, or leave --sheet out"
            )
        if self.seed + self.n > 2**32:
            raise UserError(f"seeds end at {2**32 - 1}, and the last of {self.n} clips would be beyond; lower --seed or --n")
        said: list[dict[str, Any]] = []
        videos: list[Any] = []
        texts: list[str] = []
        for seed in range(self.seed, self.seed + self.n):
            e = WORLDS[self.world].sample(seed, height, width, self.frames, self.fps, kind=self.kind, split=self.split)
            if self.json:
                said.append({"short": e.short, "dense": e.dense, "human": e.human, "events": e.events, "tags": e.tags})
            else:
                print(e.short)
            if self.sheet is not None:
                videos.append(e.video)
                texts.append(e.short)
        if self.json:
            print_json(said)
        if self.sheet is not None:
            from tubelet.media.sheet import contact_sheet, save_sheet

            save_sheet(contact_sheet(videos, texts), self.sheet)


@dataclass(frozen=True)
class Models:
    """List the catalogue of models, or count one's parameters and multiply-accumulates."""

    name: Annotated[Positional[str], arg(metavar="MODEL", help_behavior_hint="(default: list all)")] = ""
    """A model of the catalogue, e.g. Spacetime-XS."""
    json: Annotated[bool, arg(help_behavior_hint="")] = False
    """Print JSON."""

    def __call__(self) -> None:
        from tubelet.catalogue import MODELS, count, find

        stated = {name: entry.stated(entry.config) for name, entry in MODELS.items()}
        if not self.name:
            rows: Any = {name: {"input": text} for name, text in stated.items()}
            lines = [f"{name:16} {text}" for name, text in stated.items()]
        else:
            entry = find(self.name)
            name = next(known for known, other in MODELS.items() if other is entry)
            rows = {"name": name, "input": stated[name], **count(name)}
            lines = [
                f"{name} on {stated[name]}",
                f"{rows['parameters']:,} parameters",
                f"{rows['macs']:,} multiply-accumulates",
            ]
        if self.json:
            print_json(rows)
        else:
            print("\n".join(lines))


VERBS: dict[str, type] = {
    "generate": Generate,
    "edit": Edit,
    "extend": Extend,
    "connect": Connect,
    "inpaint": Inpaint,
    "outpaint": Outpaint,
    "storyboard": Storyboard,
    "caption": Caption,
    "curate import": Import,
    "curate recaption": Recaption,
    "train": Train,
    "evaluate": Evaluate,
    "worlds": Worlds,
    "models": Models,
    "serve": Serve,
    "worker": Work,
    "keys": Keys,
    "provenance": Provenance,
}


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line. Exit code 0, 2 for a wrong input (one sentence on stderr), 130 when interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started this: nobody listens
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - until the end
    try:
        with contextlib.redirect_stdout(_Stdout(sys.stdout)):
            _run(arguments)
    except UserError as error:
        print(f"tubelet: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        training = arguments[:1] in (["train"], ["curate"])
        print("tubelet: stopped" + ("; the same command resumes it" if training else ""), file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(0)


def _run(arguments: list[str]) -> None:
    try:
        if arguments == ["--version"]:
            print(f"tubelet {__version__}")
        else:
            _parse(arguments)()
    finally:
        sys.stdout.flush()


class _Stdout:
    """stdout that tells its own failures, such as a full disk, from those of a program."""

    def __init__(self, inner: TextIO) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def write(self, text: str) -> int:
        with self._told():
            return self._inner.write(text)

    def flush(self) -> None:
        with self._told():
            self._inner.flush()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            # What is left in the buffer is written when Python ends: that must not fail a second time.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._inner.fileno())
            raise UserError(f"cannot write to stdout: {error.strerror or error}; make room, or send it elsewhere") from error


def _parse(arguments: list[str]) -> Any:
    """The verb with its settings. Raises UserError where tyro would draw a box."""
    works = [name for name in VERBS if arguments and name.startswith(f"{arguments[0]} ")]
    if " ".join(arguments[:2]) in works:
        arguments = [" ".join(arguments[:2]), *arguments[2:]]
    elif works and not {"-h", "--help"} & set(arguments):
        ways = " or ".join(f"tubelet {work} --help" for work in works)
        raise UserError(f"{arguments[0]} is followed by what to do; see {ways}")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.extras.subcommand_cli_from_dict(
                VERBS,
                prog="tubelet",
                description="The open Sora system: words in, film out. `tubelet --version` says which one this is.",
                args=arguments,
                config=(FlagCreatePairsOff,),
            )
    except SystemExit as stop:
        if stop.code != 2:
            raise
    verb = arguments[0] if arguments and arguments[0] in VERBS else ""
    complaint = _complaint(said.getvalue())
    if verb and (found := re.fullmatch(r"(--\S+) cannot be (.*)", complaint)):
        hints = {field.name: str(field.type) for field in fields(VERBS[verb])}
        hint = hints.get(found[1].lstrip("-").replace("-", "_"), "")
        wanted = "a whole number" if re.search(r"\bint\b", hint) else "a number" if "float" in hint else None
        complaint = f"{found[1]} must be {wanted}, got {found[2]}" if wanted else complaint
    if not verb and arguments and not arguments[0].startswith("-"):
        raise UserError(f"there is no verb {arguments[0]!r}; choose one of {', '.join(VERBS)}")
    if verb == "generate" and complaint.startswith("unrecognized") and "--" not in complaint:
        complaint += " (put the words in quotes)"
    raise UserError(f"{complaint}; see {' '.join(['tubelet', verb]).strip()} --help")


def _complaint(box: str) -> str:
    """What a box of tyro says: the part between its title and the next rule, in whichever characters it is drawn."""
    parts: list[list[str]] = [[]]
    for line in box.splitlines():
        if line.startswith("╭") or not line.strip(" │─-"):
            parts += [[]] if parts[-1] or line.startswith("╭") else []
        else:
            parts[-1].append(line.strip(" │"))
    parts = parts[1:] or parts
    text = " ".join(" ".join(parts[0]).split()).rstrip(".")
    if found := re.match(r"Error parsing (\S+): (invalid literal for int|could not convert).*?: (.*)", text):
        return f"{found[1]} must be a {'whole number' if 'int' in found[2] else 'number'}, got {found[3]}"
    if found := re.match(r"Error parsing (\S+):.* from \[(.*?)\]", text):
        return f"{found[1]} cannot be {found[2]}"
    if found := re.match(r"Missing from tubelet.*?: (\S+)", text):
        return f"{found[1]} is missing"
    if found := re.match(r"Missing value for argument '(\S+)'", text):
        return f"{found[1]} needs a value"
    return text[:1].lower() + text[1:]


if __name__ == "__main__":
    main()
