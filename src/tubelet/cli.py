"""The command line: `tubelet generate | edit | train | evaluate | worlds | models`. A verb imports the rooms that it needs."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, UseAppendAction, arg

from tubelet import __version__
from tubelet.core.errors import UserError

DEFAULT_SYSTEM = "worlds-64"
FILMS, PICTURES = (".mp4", ".webp", ".gif", ".png"), (".png",)


@dataclass(frozen=True)
class Generate:
    """Words in, film out."""

    prompt: Annotated[Positional[str], arg(metavar="WORDS", help_behavior_hint="")] = ""
    """What to show, e.g. "a red ball bounces"."""
    system: Annotated[str | None, arg(metavar="NAME|FOLDER", help_behavior_hint="(default: worlds-64)")] = None
    """A shipped system's name, or a folder that holds one."""
    size: Annotated[str | None, arg(metavar="HxW", help_behavior_hint="(default: the system's)")] = None
    """Height x width in pixels, e.g. 64x64."""
    frames: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: the system's)")] = None
    """How many frames."""
    steps: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: the system's)")] = None
    """Solver steps."""
    guidance: Annotated[float | None, arg(metavar="FLOAT", help_behavior_hint="(default: the system's)")] = None
    """Strength of classifier-free guidance; 1 is none."""
    seed: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: 0)")] = None
    """The same seed and settings give the same bytes on the same machine."""
    loop: Annotated[bool, arg(help_behavior_hint="")] = False
    """A film without a first frame: its last leads to its first."""
    expand: Annotated[bool, arg(help_behavior_hint="")] = True
    """Give the words to the model as they are, not rewritten into the kind of caption that it was trained on."""
    like: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Make this file's film again, byte for byte, from the words, seed and settings in its metadata."""
    out: Annotated[Path, arg(metavar="FILE")] = Path("out/clip.mp4")
    """Where to write: .mp4, .webp, .gif, or .png for a contact sheet."""
    sheet: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Also write a contact sheet (.png)."""
    json: Annotated[bool, arg(help_behavior_hint="")] = False
    """Print settings and timings as JSON."""

    def __call__(self) -> None:
        started = time.perf_counter()
        _check_outputs(self.out, self.sheet)
        size = _size(self.size)
        if self.like is not None:
            self._refuse_beside_like()
        elif not self.prompt.strip():
            raise UserError('generate needs words that say what to show; for example tubelet generate "a red ball bounces"')
        from tubelet.core.log import progress
        from tubelet.generate.system import load, regenerate

        if self.like is not None:
            settings = _recorded(self.like)
            system = load(_maker(settings, self.like, self.system), dtype=str(settings.get("dtype")))
        else:
            settings, system = {}, load(DEFAULT_SYSTEM if self.system is None else self.system)
        timings = {"start": time.perf_counter() - started}
        with progress("denoising") as advance:
            if self.like is not None:
                clip = regenerate(settings, system, progress=advance)
            else:
                clip = system.generate(
                    self.prompt,
                    size=size,
                    frames=self.frames,
                    seed=self.seed or 0,
                    steps=self.steps,
                    guidance=self.guidance,
                    expander=_expander() if self.expand else None,
                    loop=self.loop,
                    progress=advance,
                )
        _deliver(clip, self.out, self.sheet, self.json, timings, started)

    def _refuse_beside_like(self) -> None:
        """What the file decides cannot be asked for again."""
        given = {
            "the words": self.prompt,
            "--size": self.size,
            "--frames": self.frames,
            "--steps": self.steps,
            "--guidance": self.guidance,
            "--seed": self.seed,
            "--loop": "" if self.loop else None,
            "--no-expand": None if self.expand else "",
        }
        beside = [name for name, value in given.items() if value is not None and (name != "the words" or value)]
        if beside:
            raise UserError(f"--like takes everything from the file; leave out {beside[0]}, or --like")


@dataclass(frozen=True)
class Edit:
    """A film and words in, the film made again by the words out."""

    film: Annotated[Positional[Path], arg(metavar="FILE")]
    """The film: anything that PyAV or Pillow reads."""
    prompt: Annotated[Positional[str], arg(metavar="WORDS")]
    """What the new film is to show."""
    strength: float = 0.6
    """Near 0 the film stays, at 1 only the words count."""
    into: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """A second film: the first turns into it."""
    fit: Annotated[str, arg(metavar="pad|crop|stretch")] = "pad"
    """How a film of another shape is brought to the size."""
    system: Annotated[str, arg(metavar="NAME|FOLDER")] = DEFAULT_SYSTEM
    """A shipped system's name, or a folder that holds one."""
    size: Annotated[str | None, arg(metavar="HxW", help_behavior_hint="(default: the system's)")] = None
    """Height x width in pixels, e.g. 64x64."""
    frames: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: the system's)")] = None
    """How many frames, taken at the system's rate from the beginning."""
    steps: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: the system's)")] = None
    """Solver steps."""
    guidance: Annotated[float | None, arg(metavar="FLOAT", help_behavior_hint="(default: the system's)")] = None
    """Strength of classifier-free guidance; 1 is none."""
    seed: int = 0
    """The same seed and settings give the same bytes on the same machine."""
    expand: Annotated[bool, arg(help_behavior_hint="")] = True
    """Give the words to the model as they are, not rewritten into the kind of caption that it was trained on."""
    out: Annotated[Path, arg(metavar="FILE")] = Path("out/edit.mp4")
    """Where to write: .mp4, .webp, .gif, or .png for a contact sheet."""
    sheet: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Also write a contact sheet (.png)."""
    json: Annotated[bool, arg(help_behavior_hint="")] = False
    """Print settings and timings as JSON."""

    def __call__(self) -> None:
        started = time.perf_counter()
        _check_outputs(self.out, self.sheet)
        if not self.prompt.strip():
            raise UserError('edit needs words that say what the new film is to show; for example "a blue ball bounces"')
        from tubelet.core.log import progress
        from tubelet.generate.system import load
        from tubelet.media.decode import decode
        from tubelet.media.resize import FITS

        if self.fit not in FITS:
            raise UserError(f"there is no fit {self.fit!r}; choose one of {', '.join(FITS)}")
        system = load(self.system)
        frames = system.config.frames if self.frames is None else self.frames
        how: dict[str, Any] = {
            "fps": system.config.fps, "frames": frames, "size": _size(self.size) or system.config.size, "fit": self.fit
        }  # fmt: skip
        system.engine.latent_shape(how["size"], frames)
        film = decode(self.film, **how)
        into = None if self.into is None else decode(self.into, **how)
        timings = {"start": time.perf_counter() - started}
        with progress("denoising") as advance:
            clip = system.edit(
                film,
                self.prompt,
                self.strength,
                self.seed,
                self.steps,
                self.guidance,
                into=into,
                expander=_expander() if self.expand else None,
                progress=advance,
            )
        _deliver(clip, self.out, self.sheet, self.json, timings, started)


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
    n: int = 200
    """Prompts per figure."""
    samples: int = 4
    """Films per prompt."""
    human: Annotated[bool, arg(help_behavior_hint="")] = False
    """Evaluate the 30 human prompts instead."""
    expand: Annotated[bool, arg(help_behavior_hint="")] = False
    """Expand the prompts first, as `generate` does."""
    sheet: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Write a contact sheet of the first films (.png)."""
    json: Annotated[bool, arg(help_behavior_hint="")] = False
    """Print one flat object of name -> number."""

    def __call__(self) -> None:
        if self.n < 1 or self.samples < 1:
            raise UserError(f"--n and --samples must be at least 1, got {self.n} and {self.samples}; raise them")
        if self.sheet is not None:
            _check_output(self.sheet, PICTURES)
        from tubelet.evaluate.report import evaluate_human, evaluate_system, table
        from tubelet.generate.system import load

        system: Any = load(self.system)
        native: dict[str, Any] = {"size": system.config.size, "frames": system.config.frames}
        native["expander"] = _expander() if self.expand else None
        if self.human:
            figures = evaluate_human(system, samples=self.samples, sheet=self.sheet, **native)
        else:
            fps = system.config.fps
            figures = evaluate_system(system, n=self.n, samples=self.samples, sheet=self.sheet, fps=fps, **native)
        if self.json:
            _print_json(figures)
        else:
            print(table(figures))


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
            _check_output(self.sheet, PICTURES)
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
    """List the catalogue of models, or count one's parameters and multiply-accumulates."""

    name: Annotated[Positional[str], arg(metavar="MODEL", help_behavior_hint="(default: list all)")] = ""
    """A model of the catalogue, e.g. Spacetime-XS."""
    json: Annotated[bool, arg(help_behavior_hint="")] = False
    """Print JSON."""

    def __call__(self) -> None:
        from tubelet.models import MODELS, count, find

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
            _print_json(rows)
        else:
            print("\n".join(lines))


VERBS: dict[str, type] = {
    "generate": Generate,
    "edit": Edit,
    "train": Train,
    "evaluate": Evaluate,
    "worlds": Worlds,
    "models": Models,
}


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line. Exit code 0, 2 for a wrong input (one sentence on stderr), 130 when interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if arguments == ["--version"]:
            print(f"tubelet {__version__}")
        else:
            _parse(arguments)()
        sys.stdout.flush()
    except UserError as error:
        print(f"tubelet: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        training = arguments[:1] == ["train"]
        print("tubelet: stopped" + ("; the same command resumes it" if training else ""), file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(0)


def _parse(arguments: list[str]) -> Any:
    """The verb with its settings. Raises UserError where tyro would draw a box."""
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
    if found := re.match(r"Error parsing (\S+):.* from \[(.*?)\]", text):
        return f"{found[1]} cannot be {found[2]}"
    if found := re.match(r"Missing from tubelet.*?: (\S+)", text):
        return f"{found[1]} is missing"
    if found := re.match(r"Missing value for argument '(\S+)'", text):
        return f"{found[1]} needs a value"
    return text[:1].lower() + text[1:]


def _size(text: str | None) -> tuple[int, int] | None:
    """`64x112` (height x width) as a pair."""
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]{1,6})[xX]([0-9]{1,6})", text)
    if found is None:
        raise UserError(f"--size must look like 64x64 (height x width), got {text!r}; correct it")
    return int(found[1]), int(found[2])


def _check_output(path: Path, suffixes: tuple[str, ...]) -> None:
    """Refuse an output that could not be written before any work is done."""
    if path.suffix.lower() not in suffixes:
        raise UserError(f"{path} must end in {' or '.join(suffixes)}; rename it")
    try:
        folder = path.parent
        while not folder.exists():
            folder = folder.parent
        good = folder.is_dir() and os.access(folder, os.W_OK | os.X_OK) and not path.is_dir()
    except OSError:  # a name that is too long, for one
        good = False
    if not good:
        raise UserError(f"cannot write {path}; choose a place that you may write to")


def _deliver(clip: Any, out: Path, sheet: Path | None, as_json: bool, timings: dict[str, float], started: float) -> None:
    """Write a clip and say so."""
    before = time.perf_counter()
    clip.save(out)
    if sheet is not None:
        clip.save(sheet)
    timings = {
        **timings, **clip.timings, "write": time.perf_counter() - before, "total": time.perf_counter() - started
    }  # fmt: skip
    if as_json:
        _print_json({"out": str(out), "settings": clip.settings, "timings": timings})
        return
    if clip.settings["text"] != clip.settings["prompt"]:
        print(f"read as: {clip.settings['text']}")
    print(f"{out}  ({timings['total']:.1f} s)" + (f"  {sheet}" if sheet else ""))


def _check_outputs(out: Path, sheet: Path | None) -> None:
    """Refuse a film or sheet that could not be written, or both in one place."""
    _check_output(out, FILMS)
    if sheet is not None:
        _check_output(sheet, PICTURES)
        if sheet.resolve() == out.resolve():
            raise UserError(f"--out and --sheet are both {out}; give one of them another name")


def _recorded(path: Path) -> dict[str, Any]:
    from tubelet.generate.clip import read_settings

    return read_settings(path)


def _maker(settings: dict[str, Any], path: Path, given: str | None) -> str:
    """The system to load for a file: the one given, else the one that it names."""
    from tubelet.generate.system import find

    if given is not None:
        return given
    name = str(settings.get("system", ""))
    try:
        find(name)
    except UserError as error:
        raise UserError(f"{path} was made by {name!r}, which is not a shipped system; give its folder with --system") from error
    return name


def _expander() -> Any:
    """A chat model where one is configured (TUBELET_CHAT_URL, TUBELET_CHAT_MODEL, TUBELET_CHAT_KEY), else the worlds' rules."""
    from tubelet.text.expand import ChatExpander, RuleExpander
    from tubelet.worlds.expand import compose_dense, parse_scene

    if url := os.environ.get("TUBELET_CHAT_URL"):
        return ChatExpander(url, os.environ.get("TUBELET_CHAT_MODEL", ""), os.environ.get("TUBELET_CHAT_KEY"))
    return RuleExpander(parse_scene, compose_dense)


def _print_json(value: Any) -> None:
    print(json.dumps(_plain(value), indent=1, allow_nan=False))


def _plain(value: Any) -> Any:
    """JSON values of numpy's, of paths and of dataclasses; what is no number is null, which JSON can hold."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)


if __name__ == "__main__":
    main()
