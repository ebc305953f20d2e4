"""Prompt -> condition -> solve -> decode, for many prompts at once.

Every sample draws its noise from its own generator, so a batch of N is N single runs.
"""

from __future__ import annotations

import functools
import math
import numbers
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tubelet.codecs.base import Codec
from tubelet.core.errors import UserError, whole
from tubelet.core.types import Strides
from tubelet.diffusion.guidance import guided
from tubelet.diffusion.objectives import Prediction, denoiser
from tubelet.diffusion.paths import RECTIFIED_FLOW, Path, shift_of_tokens, uniform_sigmas
from tubelet.diffusion.solvers import SOLVERS, ddpm
from tubelet.nn.patch import patch_positions, token_grid
from tubelet.tasks.given import Given, conditioned, kept
from tubelet.tasks.loop import cyclic
from tubelet.text.base import TextEncoder

GREATEST_GUIDANCE = 30.0
GREATEST_PIXELS = 2**30  # T * H * W of one film: 12 GiB as floats
GREATEST_STEPS = 1000
GREATEST_SEED = 2**63 - 1

Progress = Callable[[int, int], None]
"""`(steps done, steps in all)`, called after every step of the solver. Raise `Cancelled` in it to stop."""
Watch = Callable[[Tensor], None]
"""Latents `(B, C, T, H, W)` that the solver takes the films to be, after every step: what a preview is made of."""
Levels = Callable[[int, float], Tensor]
"""`(steps, shift) -> (steps + 1,)` falling noise levels that a sample visits."""


class Cancelled(Exception):  # noqa: N818  not an error: someone asked for it
    """Raised by a progress callback that no longer wants the result; the engine lets it through."""


@dataclass(frozen=True)
class Sampling:
    """How a sample is drawn: solver steps, guidance scale (1 is none) inside an interval of sigma, solver, and timestep shift.

    `eta` and `eta_above` are for solvers that take them (`dpmpp_2m_sde`): how much noise is drawn anew, above which sigma.
    Raises UserError when a value is out of range.
    """

    steps: int = 16
    guidance: float = 2.0
    interval: tuple[float, float] = (0.0, 1.0)
    solver: str = "dpmpp_2m"
    shift: float = 1.0
    tokens: int = 0
    """The shift holds for clips of so many tokens and grows with the root of their count; 0: it is the same for all."""
    eta: float = 1.0
    eta_above: float = 0.0

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise UserError(f"there is no solver {self.solver!r}; choose one of {', '.join(SOLVERS)}")
        object.__setattr__(self, "steps", whole("steps", self.steps))
        if isinstance(self.guidance, bool) or not isinstance(self.guidance, numbers.Real):
            raise UserError(f"guidance must be a number, got {self.guidance!r}; correct it")
        object.__setattr__(self, "guidance", float(self.guidance))
        object.__setattr__(self, "tokens", whole("tokens", self.tokens))
        if self.tokens < 0:
            raise UserError(f"tokens must be at least 0, got {self.tokens}; 0 lets the shift be the same for all lengths")
        if not 1 <= self.steps <= GREATEST_STEPS:
            raise UserError(f"steps must be between 1 and {GREATEST_STEPS}, got {self.steps}; 16 is usual")
        if not 0 <= self.guidance <= GREATEST_GUIDANCE:
            raise UserError(f"guidance must be between 0 and {GREATEST_GUIDANCE:g}, got {self.guidance}; 1 is none, 2 is usual")
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise UserError(f"the guidance interval must lie in [0, 1], low before high, got {self.interval}; (0, 1) is always")
        if not (math.isfinite(self.shift) and self.shift > 0):
            raise UserError(f"shift must be positive, got {self.shift}; 1 is none")
        if not (math.isfinite(self.eta) and self.eta >= 0):
            raise UserError(f"eta must be at least 0, got {self.eta}; 0 draws no noise anew")
        if not 0 <= self.eta_above <= 1:
            raise UserError(f"eta_above must lie in [0, 1], got {self.eta_above}; 0 draws noise anew in every step")


def checked_size(size: Any) -> tuple[int, int]:
    """(height, width) as Python's own numbers. Raises UserError when it is no pair of whole numbers."""
    if isinstance(size, str) or not isinstance(size, Sequence) or len(size) != 2:
        raise UserError(f"size is (height, width), got {size!r}; give two numbers")
    return whole("height", size[0]), whole("width", size[1])


def checked_prompt(prompt: Any) -> str:
    """A prompt that can be seen. Raises UserError when it is no text, or spaces and characters without a shape alone."""
    if not isinstance(prompt, str):
        raise UserError(f"a prompt is words, got {prompt!r}; give a string")
    if all(unicodedata.category(character)[0] in "CZ" for character in prompt):  # controls, joiners, separators
        raise UserError('the prompt is empty; say what to show, for example "a red ball bounces"')
    return prompt


@dataclass(frozen=True)
class Request:
    """One sample wanted: the text that the model reads, and the seed of its noise."""

    text: str
    seed: int

    def __post_init__(self) -> None:
        checked_prompt(self.text)
        object.__setattr__(self, "seed", whole("seed", self.seed))
        if not 0 <= self.seed <= GREATEST_SEED:
            raise UserError(f"a seed is a whole number from 0 to 2**63 - 1, got {self.seed}; choose another")


@dataclass(frozen=True)
class Engine:
    """The three networks and what the denoiser's output means (`prediction`), together able to sample.

    `patch` is the denoiser's (frames, rows, columns) of latent cells per token: with the codec's strides it decides
    which sizes are possible. `watch` sees the films become. `path` is what the denoiser was trained on, `levels` are those of
    its noise levels that are visited. A denoiser with a method `begin` gives the network of each solver run anew: one that is
    told its last estimate keeps it there. One whose `takes_given` is true knows a single noise level per sample: it is called
    with `given`, what is known of the films, in place of a level of 0 for known cells.
    """

    codec: Codec
    denoiser: nn.Module
    text: TextEncoder
    prediction: Prediction = "skip"
    patch: tuple[int, int, int] = (1, 1, 1)
    watch: Watch | None = None
    path: Path = RECTIFIED_FLOW
    levels: Levels = uniform_sigmas
    guided_channels: int | None = None
    strides: Strides = field(init=False)

    def __post_init__(self) -> None:
        codec, (t, h, w) = self.codec.strides, self.patch
        object.__setattr__(self, "strides", Strides(codec.t * t, codec.h * h, codec.w * w))

    def latent_shape(self, size: tuple[int, int], frames: int) -> tuple[int, int, int, int]:
        """Latent `(C, T, H, W)` of a film. Raises UserError when size or frames do not divide into the model's patches."""
        frames, size = whole("frames", frames), checked_size(size)
        self.strides.latent_shape(frames, *size)
        if frames * size[0] * size[1] > GREATEST_PIXELS:
            raise UserError(f"{frames} frames of {size[0]}x{size[1]} are too large for one film; make it shorter or smaller")
        return (self.codec.channels, *self.codec.strides.latent_shape(frames, *size))

    def sample(
        self,
        requests: Sequence[Request],
        size: tuple[int, int],
        frames: int,
        sampling: Sampling,
        *,
        batch: int = 8,
        given: Given | None = None,
        loop: bool = False,
        progress: Progress | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """Films `(B, 3, T, H, W)` in [-1, 1], float32 on the CPU, one per request; and seconds spent on text, denoise, decode.

        `given`: what is known of each film, as any of `tubelet.tasks` says it, of one film or of as many as there are
        requests. `loop`: the film has no first frame, its last leads to its first.

        At most `batch` samples go through the networks together. Raises UserError when the size does not fit, when nothing
        is asked for, or when the latents stop being finite.
        """
        if not requests:
            raise UserError("nothing to generate; give at least one prompt")
        if batch < 1:
            raise UserError(f"batch must be at least 1, got {batch}; lower it only to save memory")
        shape = self.latent_shape(size, frames)
        films: list[Tensor] = []
        timings = {"text": 0.0, "denoise": 0.0, "decode": 0.0}
        chunks = [requests[begin : begin + batch] for begin in range(0, len(requests), batch)]
        total = sampling.steps * len(chunks)
        if given is not None and (len(given.clean) not in (1, len(requests)) or given.clean.shape[1:] != shape):
            raise UserError(
                f"{len(requests)} films of latents {shape} are asked for, but given is {tuple(given.clean.shape)}; make it fit"
            )
        for number, chunk in enumerate(chunks):

            def stepped(done: int, _steps: int, before: int = number * sampling.steps) -> None:
                if progress is not None:
                    progress(before + done, total)

            known = None if given is None else given.part(number * batch, len(chunk))
            latents = self.denoise(chunk, shape, sampling, given=known, loop=loop, progress=stepped, timings=timings)
            films.append(self.decode(latents, timings))
        return torch.cat(films), timings

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """Standardised latents `(B, C, T', h, w)`, float32, of films `(B, 3, T, H, W)` in [-1, 1]. Raises UserError when their
        size or memory does not fit."""
        self.latent_shape((pixels.shape[3], pixels.shape[4]), pixels.shape[2])
        with _enough_memory(len(pixels), (pixels.shape[2], pixels.shape[3], pixels.shape[4])):
            return self.codec.encode(pixels.to(next(self.denoiser.parameters()).device)).float()

    @torch.inference_mode()
    def denoise(
        self,
        requests: Sequence[Request],
        shape: tuple[int, int, int, int],
        sampling: Sampling,
        *,
        given: Given | None = None,
        loop: bool = False,
        progress: Progress | None = None,
        timings: dict[str, float] | None = None,
    ) -> Tensor:
        """Latents `(B, C, T, H, W)` of `shape (C, T, H, W)`, all requests together; the seconds are added to `timings`.

        Raises UserError when they do not fit into memory or stop being finite, and for a loop of tokens of several frames.
        """
        timings = {"text": 0.0, "denoise": 0.0} if timings is None else timings
        if loop and self.strides.t > 1:
            # The first latent frame, or token, is of one frame, the others are of several: a turned film is no film.
            raise UserError(
                f"a loop is turned frame by frame, and this system knows {self.strides.t} frames only together; "
                "make the film without a loop, or use a system whose temporal stride and patch are 1"
            )
        with _enough_memory(len(requests), self.codec.strides.pixel_shape(*shape[1:])):
            return self._denoise(requests, shape, sampling, given, loop, progress, timings)

    @torch.inference_mode()
    def decode(self, latents: Tensor, timings: dict[str, float] | None = None) -> Tensor:
        """Films `(B, 3, T, H, W)` in [-1, 1], float32 on the CPU, of latents. Raises UserError when they are not finite."""
        timings = {"decode": 0.0} if timings is None else timings
        clock = time.perf_counter()
        with _enough_memory(len(latents), self.codec.strides.pixel_shape(*latents.shape[2:])):
            pixels = self.codec.decode(latents).float().clamp(-1, 1).cpu()  # (B, 3, T, H, W)
        if not bool(pixels.isfinite().all()):
            raise UserError("the codec's pixels are not finite; check its weights")
        _lap(timings, "decode", clock, latents.device)
        return pixels

    def _denoise(
        self,
        requests: Sequence[Request],
        shape: tuple[int, int, int, int],
        sampling: Sampling,
        given: Given | None,
        loop: bool,
        progress: Progress | None,
        timings: dict[str, float],
    ) -> Tensor:
        clock = time.perf_counter()
        device = next(self.denoiser.parameters()).device
        condition = self.text.encode([request.text for request in requests])
        null = self.text.null(len(requests))
        clock = _lap(timings, "text", clock, device)

        generators = [torch.Generator("cpu").manual_seed(request.seed) for request in requests]
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)  # (B, C, T, H, W)
        network: Any = self.denoiser.begin() if hasattr(self.denoiser, "begin") else self.denoiser  # type: ignore[operator]
        solver = SOLVERS[sampling.solver]
        solve = functools.partial(solver.solve, **{name: getattr(sampling, name) for name in solver.options})
        if sampling.solver == "ddpm" and getattr(self.denoiser, "learned_variances", False):
            # Under guidance the samples come first as the condition has them.
            solve = functools.partial(ddpm, variance=lambda said=network: said.variances()[: len(requests)])
        if given is not None and given.times is not None:
            network = functools.partial(network, positions=self._places(shape, given.times).to(device))
        beside = bool(getattr(self.denoiser, "takes_given", False))
        if given is not None:
            given = given.to(device)
            if beside:
                network = functools.partial(network, given=given)
        x_hat = denoiser(network, self.prediction, self.path)
        denoise = guided(x_hat, condition, null, sampling.guidance, sampling.interval, self.guided_channels)
        tokens = math.prod(token_grid((shape[1], shape[2], shape[3]), self.patch))
        sigmas = self.levels(sampling.steps, shift_of_tokens(sampling.shift, tokens, sampling.tokens))
        if loop:
            denoise = cyclic(denoise, shape[1], [torch.Generator("cpu").manual_seed(request.seed) for request in requests])
        if given is not None:
            if self.path is not RECTIFIED_FLOW and (given.haze or given.strength < 1):  # both are noise along it
                raise UserError(
                    "this model was trained on another path than known cells are noised along; leave haze and strength out"
                )
            if given.times is not None and loop:
                raise UserError("known cells have places of their own here, which a loop turns; leave loop or the places out")
            if beside and loop:  # the film is turned, what is known of it is not
                raise UserError("this model cannot make a loop of a film of which something is known; leave one of them out")
            denoise = kept(denoise, given) if beside else conditioned(denoise, given, noise)
            sigmas = sigmas * given.strength

        def stepped(done: int, steps: int, x_hat: Tensor) -> None:
            if progress is not None:
                progress(done, steps)
            if self.watch is not None:
                self.watch(x_hat)

        latents = solve(
            denoise,
            noise if given is None else given.start(noise),
            sigmas,
            path=self.path,
            generator=generators,
            callback=stepped,
        )  # (B, C, T, H, W)
        if not bool(latents.isfinite().all()):
            raise UserError(
                f"the model's values stopped being finite (solver {sampling.solver}, {sampling.steps} steps, "
                f"guidance {sampling.guidance:g}); lower the guidance, or check the weights"
            )
        _lap(timings, "denoise", clock, device)
        return latents

    def _places(self, shape: tuple[int, int, int, int], times: Sequence[int]) -> Tensor:
        """Places of tokens `(L, 3)` when latent frames are at `times`. Raises UserError when a token spans several frames."""
        if self.patch[0] != 1:
            raise UserError("frames with times of their own need a denoiser whose tokens span one frame; use another system")
        grid = token_grid((shape[1], shape[2], shape[3]), self.patch)
        places = patch_positions(grid, self.patch)  # (L, 3)
        places[:, 0] = torch.tensor(times, dtype=places.dtype).repeat_interleave(grid[1] * grid[2])
        return places


@contextmanager
def _enough_memory(films: int, shape: tuple[int, int, int]) -> Iterator[None]:
    """A failed allocation as a sentence; `shape` is (frames, height, width)."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # On the CPU torch has no kind of its own for a failed allocation.
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate" not in str(error):
            raise
        raise UserError(
            f"{films} x {shape[0]} frames of {shape[1]}x{shape[2]} do not fit into memory; "
            "ask for fewer frames, a smaller size or a smaller batch"
        ) from error


def _lap(timings: dict[str, float], name: str, begin: float, device: torch.device) -> float:
    if device.type == "cuda":
        # Queued work would otherwise be charged to the next stage.
        torch.cuda.synchronize(device)
    now = time.perf_counter()
    timings[name] += now - begin
    return now
