"""The verbs that make films. Each reads real files, makes one film, and writes it with the settings that made it inside."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from tubelet.cli.terminal import DEFAULT_SYSTEM, check_outputs, deliver, expander, parse_size
from tubelet.core.errors import UserError

if TYPE_CHECKING:
    from tubelet.core.types import Video
    from tubelet.generate.clip import Clip
    from tubelet.generate.system import System
    from tubelet.media.decode import Ground, MediaInfo

Make = Callable[..., "Clip"]
Words = Annotated[Positional[str], arg(metavar="WORDS")]
File = Annotated[Positional[Path], arg(metavar="FILE")]


@dataclass(frozen=True, kw_only=True)
class Making:
    """What every film can be asked for."""

    system: Annotated[str | None, arg(metavar="NAME|FOLDER", help_behavior_hint="(default: worlds-64)")] = None
    """A shipped system's name, or a folder that holds one."""
    size: Annotated[str | None, arg(metavar="HxW", help_behavior_hint="(default: the system's)")] = None
    """Height x width in pixels, e.g. 64x64."""
    frames: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: the system's)")] = None
    """How many frames are made."""
    steps: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: the system's)")] = None
    """Solver steps."""
    guidance: Annotated[float | None, arg(metavar="FLOAT", help_behavior_hint="(default: the system's)")] = None
    """Strength of classifier-free guidance; 1 is none."""
    seed: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: 0)")] = None
    """The same seed and settings give the same bytes on the same machine."""
    expand: Annotated[bool, arg(help_behavior_hint="")] = True
    """Give the words to the model as they are, not rewritten into the kind of caption that it was trained on."""
    fit: Annotated[str | None, arg(metavar="pad|crop|stretch", help_behavior_hint="(default: pad)")] = None
    """How a film or picture of another shape is brought to the size."""
    sheet: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Also write a contact sheet (.png)."""
    json: Annotated[bool, arg(help_behavior_hint="")] = False
    """Print settings and timings as JSON."""

    def check(self, out: Path, prompt: str | None) -> None:
        """Refuse before any work what cannot be."""
        from tubelet.media.resize import FITS

        check_outputs(out, self.sheet)
        if prompt is not None and not prompt.strip():
            raise UserError('words are needed that say what the film is to show; for example "a blue ball bounces"')
        if self.fit is not None and self.fit not in FITS:
            raise UserError(f"there is no fit {self.fit!r}; choose one of {', '.join(FITS)}")
        parse_size(self.size)

    def make(self, out: Path, prompt: str | None, task: Callable[[System, dict[str, Any]], Clip]) -> None:
        """Load the system, run `task(system, settings)` under a progress bar, write what it makes."""
        started = time.perf_counter()
        self.check(out, prompt)
        from tubelet.core.log import progress
        from tubelet.generate.system import load

        system = load(DEFAULT_SYSTEM if self.system is None else self.system)
        timings = {"start": time.perf_counter() - started}
        with progress("denoising") as advance:
            settings: dict[str, Any] = {
                "seed": self.seed or 0,
                "steps": self.steps,
                "guidance": self.guidance,
                "expander": expander(system) if self.expand else None,
                "progress": advance,
            }
            clip = task(system, settings)
        deliver(clip, out, self.sheet, self.json, timings, started)

    def pixels(self, system: System) -> tuple[int, int]:
        """Height and width of the film."""
        return parse_size(self.size) or system.config.size

    def length(self, system: System, source: Path | None = None) -> int:
        """Frames of the film, made from `source` where there is one. Raises UserError when such a film cannot be."""
        frames = system.config.frames if self.frames is None else self.frames
        if self.frames is None and source is not None:
            from tubelet.media.decode import probe

            # A shorter film is worked on as it is, as far as it fills whole latent frames.
            stride = system.engine.strides.t
            frames = min(frames, 1 + (_frames(probe(source), system) - 1) // stride * stride)
        system.engine.latent_shape(self.pixels(system), frames)
        return frames

    def read(self, system: System, path: Path, frames: int | None, start: float = 0.0, *, ground: Ground = "white") -> Video:
        """A film as the system sees it: its size, its rate; `frames` None reads to the end."""
        from tubelet.media.decode import decode

        return decode(
            path,
            start=start,
            frames=frames,
            fps=system.config.fps,
            size=self.pixels(system),
            fit=self.fit or "pad",  # type: ignore[arg-type]
            ground=ground,
        )

    def held(self, system: System, sources: Sequence[Path], made: int, remedy: str) -> list[int | None]:
        """How many frames of each source are read when all of it is: 1 of a still picture, None (to the end) of a film.

        Raises UserError, before any is decoded, when they and the frames that are made are too many for one film.
        """
        from tubelet.media.decode import probe

        self.check_made(system, made)
        infos = [probe(path) for path in sources]
        longest = max(range(len(infos)), key=lambda number: infos[number].seconds)
        self.check_room(system, sources[longest], made + sum(_frames(about, system) for about in infos), remedy)
        return [1 if about.still else None for about in infos]

    def check_room(self, system: System, source: Path, frames: int, remedy: str) -> None:
        """Raises UserError when a film of so many frames, most of them those of a source, is too large to be made."""
        from tubelet.generate.engine import GREATEST_PIXELS

        size = self.pixels(system)
        if frames * size[0] * size[1] > GREATEST_PIXELS:
            raise UserError(
                f"{source} is too long: a film of {frames} frames of {size[0]}x{size[1]} would be made of it; {remedy}"
            )

    def check_made(self, system: System, frames: int) -> None:
        """Raises UserError when the frames that are made are too many for one film, however few are read."""
        from tubelet.generate.engine import GREATEST_PIXELS

        size = self.pixels(system)
        if frames * size[0] * size[1] > GREATEST_PIXELS:
            raise UserError(f"{frames} frames of {size[0]}x{size[1]} are too many for one film; lower --frames or --size")

    def tell_unused(self, system: System, source: Path, frames: int) -> None:
        """One line where a film is longer than what was used of it and nobody asked how much that should be."""
        from tubelet.core.log import warn
        from tubelet.media.decode import probe

        whole = _frames(probe(source), system)
        if self.frames is None and whole > frames:
            warn(
                f"only the first {frames} of the {whole} frames of {source} were used "
                f"({frames / system.config.fps:.1f} seconds); ask for more with --frames"
            )


def _frames(about: MediaInfo, system: System) -> int:
    """Frames of a file at the system's rate."""
    return 1 if about.still else max(1, round(about.seconds * system.config.fps))


CLIP, PICTURE = Path("out/clip.mp4"), Path("out/picture.png")


@dataclass(frozen=True)
class Generate(Making):
    """Words in, film out; pictures too, if some are to stand in it."""

    prompt: Annotated[Positional[str], arg(metavar="WORDS", help_behavior_hint="")] = ""
    """What to show, e.g. "a red ball bounces"."""
    first: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """A picture that the film begins with."""
    last: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """A picture that the film ends with."""
    loop: Annotated[bool, arg(help_behavior_hint="")] = False
    """A film without a first frame: its last leads to its first."""
    window: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: the system's own length)")] = None
    """Frames made at once; a longer film is made in windows of so many, each looking back on the one before."""
    refine_from: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Make a small film again at --size: it says where things are, the words and the model how they look."""
    strength: Annotated[float | None, arg(metavar="FLOAT", help_behavior_hint="(default: 0.6)")] = None
    """How much of the small film --refine-from makes anew, above 0 and up to 1."""
    like: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Make this file's film again, byte for byte, from the words, seed and settings in its metadata."""
    model: Annotated[Path | None, arg(metavar="PATH", help_behavior_hint="")] = None
    """Make one picture with a published checkpoint, Stable Diffusion 1 or DiT (WORDS: a class, by name or number)."""
    solver: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: the system's)")] = None
    """How the noise is taken away; docs/catalogue.md lists the solvers."""
    out: Annotated[
        Path | None, arg(metavar="FILE", help_behavior_hint="(default: out/clip.mp4, with --model out/picture.png)")
    ] = None
    """Where to write: .mp4, .webp, .gif, or .png for a contact sheet (one frame: the picture)."""

    def __call__(self) -> None:
        if self.model is not None:
            self._picture(self.model)
            return
        if self.like is not None:
            self._again(self.like)
            return
        if not self.prompt.strip():
            raise UserError('generate needs words that say what to show; for example tubelet generate "a red ball bounces"')
        if self.strength is not None and self.refine_from is None:
            raise UserError("--strength is for --refine-from; leave it out, or give the film to refine")
        pictures = self.first is not None or self.last is not None
        for name, asked in {
            "--first or --last": pictures,
            "--window": self.window is not None,
            "--refine-from": self.refine_from,
        }.items():
            if asked and self.loop:
                raise UserError(f"a loop has neither beginning nor end, so --loop does not go with {name}; leave one out")
        if self.refine_from is not None and (pictures or self.window is not None):
            raise UserError("--refine-from takes the whole film from its file; leave out --first, --last and --window")
        if self.fit is not None and not pictures and self.refine_from is None:
            raise UserError("--fit says how a film or picture is brought to the size; leave it out, or give one")
        if self.solver is not None and self.refine_from is not None:
            raise UserError("--solver does not go with --refine-from; leave it out")
        self.make(self._out(CLIP), self.prompt, self._made)

    def _made(self, system: System, settings: dict[str, Any]) -> Clip:
        from tubelet.generate.system import Rolling, Shot

        size = self.pixels(system)
        if self.refine_from is not None:
            film = self._small(system, self.refine_from)
            return system.edit(film, self.prompt, 0.6 if self.strength is None else self.strength, size=size, **settings)
        frames = self.length(system)
        named = {0: self.first, -1: self.last}
        pictures = {frame: self.read(system, path, 1) for frame, path in named.items() if path is not None}
        if not pictures and self.window is None:
            return system.generate(self.prompt, size, frames, loop=self.loop, solver=self.solver, **settings)
        if len(pictures) == 2 and frames == 1:
            raise UserError("a film of one frame cannot begin and end with a picture; ask for more frames")
        if self.window is not None and self.window < 1:
            raise UserError(f"--window must be at least 1, got {self.window}; ask for more")
        rolling = Rolling() if self.window is None else Rolling(window=system.engine.latent_shape(size, self.window)[1])
        return system.film([Shot(self.prompt, frames, pictures)], size, rolling=rolling, solver=self.solver, **settings)

    def _small(self, system: System, path: Path) -> Video:
        """The film to refine: of the shape that is asked for, on the system's grid, and about as large as it is."""
        from tubelet.media.decode import decode, probe

        remedy = "say with --frames how few are to be read"
        if self.frames is None:
            (whole,) = self.held(system, [path], 0, remedy)
        else:
            whole = self.frames
            self.check_room(system, path, whole, remedy)
        about, size, strides = probe(path), self.pixels(system), system.engine.strides
        system.engine.latent_shape(size, 1)
        parts = math.gcd(size[0] // strides.h, size[1] // strides.w)
        unit = size[0] // parts, size[1] // parts  # the smallest size of this shape
        times = round(math.sqrt(about.height * about.width / (unit[0] * unit[1])))
        times = min(max(times, 1), parts)
        film = decode(
            path,
            frames=whole,
            fps=system.config.fps,
            size=(unit[0] * times, unit[1] * times),
            fit=self.fit or "pad",  # type: ignore[arg-type]
        )
        system.engine.latent_shape(film.size, film.frames)
        return film

    def _out(self, default: Path) -> Path:
        return default if self.out is None else self.out

    def _picture(self, model: Path) -> None:
        """A picture by a published checkpoint."""
        started = time.perf_counter()
        out = self._out(PICTURE)
        self._refuse_beside_model()
        self.check(out, self.prompt)
        from tubelet.core.log import progress, warn
        from tubelet.generate.published import load_published

        published = load_published(model)
        if published.engine.text.truncated(self.prompt):
            warn("these are more words than the model reads; the last ones do not count")
        timings = {"start": time.perf_counter() - started}
        with progress("denoising") as advance:
            clip = published.generate(
                self.prompt, parse_size(self.size), self.seed or 0, self.steps, self.guidance, advance, solver=self.solver
            )
        deliver(clip, out, self.sheet, self.json, timings, started)

    def _refuse_beside_model(self) -> None:
        """A published checkpoint makes a picture from words, and nothing else."""
        given = {
            "--system": self.system,
            "--like": self.like,
            "--frames": self.frames,
            "--first": self.first,
            "--last": self.last,
            "--loop": self.loop or None,
            "--window": self.window,
            "--refine-from": self.refine_from,
            "--strength": self.strength,
            "--fit": self.fit,
        }
        for name, value in given.items():
            if value is not None:
                raise UserError(f"--model makes one picture from words, so it does not go with {name}; leave one of them out")

    def _again(self, path: Path) -> None:
        """The film of a file once more."""
        started = time.perf_counter()
        out = self._out(CLIP)
        check_outputs(out, self.sheet)
        self._refuse_beside_like()
        from tubelet.core.log import progress
        from tubelet.generate.clip import read_settings
        from tubelet.generate.system import load, regenerate

        settings = read_settings(path)
        name = _maker(settings, path, self.system)
        try:
            system = load(name, dtype=str(settings["dtype"]) if "dtype" in settings else None)
            timings = {"start": time.perf_counter() - started}
            with progress("denoising") as advance:
                clip = regenerate(settings, system, progress=advance)
        except UserError as error:
            raise UserError(f"{path} cannot be made again: {error}") from error
        deliver(clip, out, self.sheet, self.json, timings, started)

    def _refuse_beside_like(self) -> None:
        """What the file decides cannot be asked for again."""
        given = {
            "the words": self.prompt or None,
            "--size": self.size,
            "--frames": self.frames,
            "--steps": self.steps,
            "--guidance": self.guidance,
            "--solver": self.solver,
            "--seed": self.seed,
            "--first": self.first,
            "--last": self.last,
            "--refine-from": self.refine_from,
            "--strength": self.strength,
            "--loop": self.loop or None,
            "--window": self.window,
            "--fit": self.fit,
            "--no-expand": None if self.expand else True,
        }
        beside = [name for name, value in given.items() if value is not None]
        if beside:
            raise UserError(f"--like takes everything from the file; leave out {beside[0]}, or --like")


@dataclass(frozen=True)
class Edit(Making):
    """A film and words in, the film made again by the words out. It is read from its beginning, at the system's rate."""

    film: File
    """The film: anything that PyAV or Pillow reads."""
    prompt: Words
    """What the new film is to show."""
    strength: float = 0.6
    """Near 0 the film stays, at 1 only the words count."""
    into: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """A second film: the first turns into it."""
    out: Annotated[Path, arg(metavar="FILE")] = Path("out/edit.mp4")
    """Where to write: .mp4, .webp, .gif, or .png for a contact sheet (one frame: the picture)."""

    def __call__(self) -> None:
        self.make(self.out, self.prompt, self._made)

    def _made(self, system: System, settings: dict[str, Any]) -> Clip:
        frames = self.length(system, self.film)
        film = self.read(system, self.film, frames)
        into = None if self.into is None else self.read(system, self.into, frames)
        clip = system.edit(film, self.prompt, self.strength, into=into, **settings)
        for source in (self.film, self.into):
            if source is not None:
                self.tell_unused(system, source, frames)
        return clip


@dataclass(frozen=True)
class Extend(Making):
    """A film goes on, or begins earlier. What it holds stays as it is."""

    film: File
    """The film: anything that PyAV or Pillow reads."""
    prompt: Words
    """What the whole film shows."""
    frames: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: 8)")] = field(default=None, kw_only=True)
    """How many frames are made."""
    backward: Annotated[bool, arg(help_behavior_hint="")] = False
    """Make what was before the film, not what comes after it."""
    keep: Annotated[float | None, arg(metavar="SECONDS", help_behavior_hint="(default: all)")] = None
    """Read only the last seconds of the film (backward: the first); nothing else is decoded."""
    out: Annotated[Path, arg(metavar="FILE")] = Path("out/extend.mp4")
    """Where to write: .mp4, .webp, .gif, or .png for a contact sheet (one frame: the picture)."""

    def __call__(self) -> None:
        if self.keep is not None and not 0 < self.keep < float("inf"):
            raise UserError(f"--keep is a number of seconds above 0, got {self.keep}; correct it")
        self.make(self.out, self.prompt, self._made)

    def _made(self, system: System, settings: dict[str, Any]) -> Clip:
        from tubelet.generate.system import Shot

        shot = Shot(self.prompt, EXTENSION if self.frames is None else self.frames)
        film = self._kept(system, shot.frames)
        where = {"future": film} if self.backward else {"past": film}
        return system.film([shot], self.pixels(system), **where, **settings)

    def _kept(self, system: System, made: int) -> Video:
        from tubelet.media.decode import probe

        about = probe(self.film)
        if self.keep is None or about.still:
            (whole,) = self.held(system, [self.film], made, LAST_SECONDS)
            return self.read(system, self.film, whole)
        self.check_made(system, made)
        seconds = about.seconds
        frames = max(1, round(min(self.keep, seconds) * system.config.fps))
        self.check_room(system, self.film, frames + made, LAST_SECONDS)
        start = 0.0 if self.backward else max(0.0, seconds - frames / system.config.fps)
        return self.read(system, self.film, frames, start)


LAST_SECONDS = "say with --keep how few of its seconds are to be read"
EXTENSION = 8
"""Frames that an extension or a connection makes unless asked otherwise: half of what the shipped system sees at once, so that
it sees as much of what is known."""


@dataclass(frozen=True)
class Connect(Making):
    """One film leads to another. Both stay as they are."""

    before: File
    """The film that comes first."""
    after: File
    """The film that comes last."""
    prompt: Words
    """What the whole film shows."""
    frames: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: 8)")] = field(default=None, kw_only=True)
    """How many frames are made between them."""
    out: Annotated[Path, arg(metavar="FILE")] = Path("out/connect.mp4")
    """Where to write: .mp4, .webp, .gif, or .png for a contact sheet (one frame: the picture)."""

    def __call__(self) -> None:
        self.make(self.out, self.prompt, self._made)

    def _made(self, system: System, settings: dict[str, Any]) -> Clip:
        from tubelet.generate.system import Shot

        shot = Shot(self.prompt, EXTENSION if self.frames is None else self.frames)
        sources = (self.before, self.after)
        counts = self.held(system, sources, shot.frames, "cut it down to what is next to the other film")
        before, after = (self.read(system, path, count) for path, count in zip(sources, counts, strict=True))
        return system.film([shot], self.pixels(system), past=before, future=after, **settings)


@dataclass(frozen=True)
class Inpaint(Making):
    """Make a part of a film anew. What the mask or box leaves free stays as it is, pixel by pixel."""

    film: File
    """The film: anything that PyAV or Pillow reads."""
    prompt: Words
    """What the whole film shows."""
    mask: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """A picture or film of the film's size, white where it is to be made anew; black or transparent elsewhere."""
    box: Annotated[str | None, arg(metavar="TOP,LEFT,BOTTOM,RIGHT", help_behavior_hint="")] = None
    """A box to be made anew, in pixels of the film that is made."""
    during: Annotated[str | None, arg(metavar="BEGIN,END", help_behavior_hint="(default: all)")] = None
    """Frames of the box: from BEGIN on, before END."""
    out: Annotated[Path, arg(metavar="FILE")] = Path("out/inpaint.mp4")
    """Where to write: .mp4, .webp, .gif, or .png for a contact sheet (one frame: the picture)."""

    def __call__(self) -> None:
        if (self.mask is None) == (self.box is None):
            raise UserError("inpaint needs either --mask FILE or --box TOP,LEFT,BOTTOM,RIGHT; give one of them")
        if self.during is not None and self.box is None:
            raise UserError("--during says when a --box is made anew; give the box, or a mask that is a film")
        self.make(self.out, self.prompt, self._made)

    def _made(self, system: System, settings: dict[str, Any]) -> Clip:
        from tubelet.tasks.region import box

        frames = self.length(system, self.film)
        film = self.read(system, self.film, frames)
        if self.box is not None:
            top, left, bottom, right = _numbers("--box", self.box, 4)
            begin, end = (0, frames) if self.during is None else _numbers("--during", self.during, 2)
            mask = box((frames, *film.size), top, left, bottom, right, begin, end)
        else:
            assert self.mask is not None, "checked before"
            mask = self._read_mask(system, self.mask, frames)
        clip = system.inpaint(film, mask, self.prompt, **settings)
        self.tell_unused(system, self.film, frames)
        return clip

    def _read_mask(self, system: System, path: Path, frames: int) -> Any:
        """The mask `(T, H, W)` of 0 and 1, fitted as the film is; what is transparent is not marked.

        Raises UserError when it has another size than the film.
        """
        from tubelet.media.decode import probe

        film, mask = probe(self.film), probe(path)
        if (film.height, film.width) != (mask.height, mask.width):
            raise UserError(
                f"{path} is {mask.height}x{mask.width}, {self.film} is {film.height}x{film.width}; "
                "give a mask of the film's size"
            )
        still = mask.frames == 1
        seen = self.read(system, path, 1 if still else frames, ground="black").pixels[0].mean(0) > 0  # (1 or T, H, W)
        return seen.float().expand(frames, -1, -1)


@dataclass(frozen=True)
class Outpaint(Making):
    """More of the picture around a film: it stays in the middle of --size, what surrounds it is made."""

    film: File
    """The film: anything that PyAV or Pillow reads. One larger than --size is first made as small as to lie in it whole."""
    prompt: Words
    """What the whole film shows."""
    out: Annotated[Path, arg(metavar="FILE")] = Path("out/outpaint.mp4")
    """Where to write: .mp4, .webp, .gif, or .png for a contact sheet (one frame: the picture)."""

    def __call__(self) -> None:
        if self.size is None:
            raise UserError("outpaint needs the --size of the whole picture, larger than the film; for example --size 64x96")
        if self.fit in ("crop", "stretch"):
            raise UserError(
                f"outpaint keeps the whole film and its shape, so --fit {self.fit} does not go with it; leave it out"
            )
        self.make(self.out, self.prompt, self._made)

    def _made(self, system: System, settings: dict[str, Any]) -> Clip:
        from tubelet.core.types import Video
        from tubelet.media.decode import decode, probe
        from tubelet.tasks.region import around

        frames, size = self.length(system, self.film), self.pixels(system)
        about = probe(self.film)
        share = min(1.0, size[0] / about.height, size[1] / about.width)
        inner = max(1, round(share * about.height)), max(1, round(share * about.width))
        if inner == size:
            raise UserError(
                f"{size[0]}x{size[1]} leaves nothing around {self.film}, which is {about.height}x{about.width}; "
                "ask for a larger --size, or one of another shape"
            )
        film = decode(self.film, frames=frames, fps=system.config.fps, size=inner, fit="stretch")
        canvas, mask = around(film.pixels, size)
        clip = system.inpaint(Video(canvas, film.fps), mask, self.prompt, **settings)
        self.tell_unused(system, self.film, frames)
        return clip


@dataclass(frozen=True)
class Storyboard(Making):
    """Several prompts on a time line. The board is a JSON list of shots, {"words": "...", "frames": 17, "first": "pic.png"}.

    A shot goes on from the one before; one with `"cut": true` or a `first` picture begins anew; `last` is the picture that it
    ends with.
    """

    board: File
    """The board. Pictures are found beside it."""
    out: Annotated[Path, arg(metavar="FILE")] = Path("out/storyboard.mp4")
    """Where to write: .mp4, .webp, .gif, or .png for a contact sheet (one frame: the picture)."""

    def __call__(self) -> None:
        if self.frames is not None:
            raise UserError("the shots of a storyboard say how long they are; leave out --frames")
        self.make(self.out, None, self._made)

    def _made(self, system: System, settings: dict[str, Any]) -> Clip:
        from tubelet.core.files import read_json
        from tubelet.generate.system import Shot

        board = read_json(self.board)
        if not isinstance(board, list) or not board or not all(isinstance(shot, dict) for shot in board):
            raise UserError(f'{self.board} must be a list of shots like {{"words": "a red ball falls"}}; correct it')
        shots = []
        for number, shot in enumerate(board, 1):
            unknown = sorted(set(shot) - {"words", "frames", "first", "last", "cut"})
            if unknown or not isinstance(shot.get("words"), str):
                what = f"has no setting {unknown[0]!r}" if unknown else "needs its words"
                raise UserError(f"shot {number} of {self.board} {what}; a shot has words, frames, first, last and cut")
            if not isinstance(shot.get("cut", False), bool):
                raise UserError(f"cut of shot {number} of {self.board} must be true or false, got {shot['cut']!r}; correct it")
            frames = shot.get("frames", system.config.frames)
            named = {0: shot.get("first"), -1: shot.get("last")}
            pictures = {
                frame: self.read(system, self.board.parent / str(name), 1) for frame, name in named.items() if name is not None
            }
            shots.append(Shot(shot["words"], frames, pictures, shot.get("cut", False)))
        return system.film(shots, self.pixels(system), **settings)


def _numbers(name: str, text: str, count: int) -> list[int]:
    """`1,2,3,4` as numbers. Raises UserError when it is not `count` of them."""
    parts = text.split(",")
    if len(parts) != count or not all(part.strip().isdecimal() for part in parts):
        raise UserError(f"{name} must be {count} whole numbers with commas between them, got {text!r}; correct it")
    return [int(part) for part in parts]


def _maker(settings: dict[str, Any], path: Path, given: str | None) -> str:
    """The system to load for a file: the one given, else the one that it names."""
    from tubelet.generate.folder import find

    if "model" in settings:
        raise UserError(f"{path} is a picture made with --model {settings['model']!r}; give its words, seed and steps anew")
    if given is not None:
        return given
    name = str(settings.get("system", ""))
    try:
        find(name)
    except UserError as error:
        raise UserError(f"{path} was made by {name!r}, which is not a shipped system; give its folder with --system") from error
    return name
