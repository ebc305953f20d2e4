"""Published picture models: a DiT or a Stable Diffusion 1 checkpoint, sampled by the engine as films of one frame.

Scalable Diffusion Models with Transformers (Peebles & Xie 2023) names a class, High-Resolution Image Synthesis with Latent
Diffusion Models (Rombach et al. 2022) reads a text. Both predict on a discrete chain, which to the engine is one more path:
its solvers, guidance and seeds are those of a system's films.

    DiT                                               Stable Diffusion 1
    model_index.json, with id2label or without        model_index.json
    transformer/  vae/  scheduler/                    unet/  vae/  text_encoder/  tokenizer/  scheduler/

or one safetensors file with the names that DiT's authors publish, beside a folder `vae`. Only JSON and safetensors are read,
nothing is fetched, and a safety checker that lies in a folder is not run. Guidance covers all latent channels of a folder, as
diffusers has it, and the first three of four of the authors' file, as its published scores do. The solver ddpm reads the
variances that a network has learned.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from tubelet import __version__
from tubelet.codecs.image_kl import ImageKL, read_diffusers
from tubelet.core.config import to_dict
from tubelet.core.errors import UserError
from tubelet.core.types import Condition, Video
from tubelet.diffusion.paths import VariancePreserving, VPLinear
from tubelet.generate.clip import Clip
from tubelet.generate.engine import Engine, Progress, Request, Sampling
from tubelet.generate.folder import DTYPES
from tubelet.generate.foreign import CONVERT, PICKLES, part_of, told_by, weights_of
from tubelet.generate.layouts import (
    WEIGHTS,
    Chain,
    names_of_classes,
    read_chain,
    read_dit,
    read_dit_file,
    read_text,
    read_unet,
)
from tubelet.generate.system import default_dtype
from tubelet.models.dit import DiT
from tubelet.models.unet import UNet
from tubelet.runtime.cpu import accelerate, use_fast_attention
from tubelet.runtime.device import choose_device
from tubelet.text.base import TextEncoder

INDEX_FILE = "model_index.json"
DIT, STABLE = "DiTPipeline", "StableDiffusionPipeline"
# The parts of each kind and what model_index.json may call them; a scheduler is judged by its own settings.
PARTS: dict[str, dict[str, tuple[str, ...]]] = {
    DIT: {"transformer": ("DiTTransformer2DModel", "Transformer2DModel"), "vae": ("AutoencoderKL",), "scheduler": ()},
    STABLE: {
        "unet": ("UNet2DConditionModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": ("CLIPTextModel",),
        "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
        "scheduler": (),
    },
}
# Guidance as the released samplers have it; the solver and its steps are ours (Lu et al. 2022, 2211.01095, section 7).
DEFAULTS = {
    DIT: Sampling(steps=25, guidance=4.0, solver="dpmpp_2m"),
    STABLE: Sampling(steps=25, guidance=7.5, solver="dpmpp_2m"),
}
PICTURE_FPS = 1.0  # of a film of one frame


class ClassNames(TextEncoder):
    """A prompt that is the name or the number of a class. A class is one token of one channel, its number; the empty prompt is
    the null class, which comes after all others."""

    trainable = False
    config = None

    def __init__(self, classes: int, names: Mapping[int, Sequence[str]]) -> None:
        super().__init__()
        self.classes, self.names = classes, dict(names)
        self.numbers: Tensor
        self.register_buffer("numbers", torch.arange(classes + 1, dtype=torch.float32)[:, None])  # (classes + 1, 1)
        self._of: dict[str, list[int]] = {}
        for number, several in self.names.items():
            for name in several:
                self._of.setdefault(name.casefold(), []).append(number)

    @property
    def width(self) -> int:
        return 1

    def truncated(self, prompt: str) -> bool:
        return False

    def number(self, prompt: str) -> int:
        """The class of a prompt. Raises UserError when there is none, or several of that name."""
        said = prompt.strip()
        if said.isdecimal():
            if int(said) >= self.classes:
                raise UserError(f"there is no class {said}; classes are numbered 0 to {self.classes - 1}")
            return int(said)
        found = self._of.get(said.casefold(), [])
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(f"classes {' and '.join(map(str, found))} are both called {said!r}; give the number of one")
        if not self._of:
            raise UserError(
                f"this checkpoint does not name its classes, so {said!r} is none; give a number from 0 to {self.classes - 1}"
            )
        near = difflib.get_close_matches(said.casefold(), self._of, n=3)
        names = ", ".join(repr(name) for name in near or list(self._of)[:3])
        raise UserError(f"there is no class {said!r}; try {names}, or a number from 0 to {self.classes - 1}")

    def meaning(self, prompt: str) -> str:
        """The first name of a prompt's class, or its number when it has none. Raises UserError as `number`."""
        number = self.number(prompt)
        return next(iter(self.names.get(number, ())), str(number))

    def _encode(self, prompts: list[str]) -> Condition:
        rows = [self.number(prompt) if prompt else self.classes for prompt in prompts]
        states = self.numbers[rows][:, None]  # (B, 1, 1)
        return Condition(states, torch.ones_like(states[..., 0], dtype=torch.bool))


class OnePicture(nn.Module):
    """A network of pictures and step numbers as the engine's network of films and noise levels."""

    def __init__(self, network: DiT | UNet, path: VariancePreserving) -> None:
        super().__init__()
        self.network, self.path = network, path

    @property
    def learned_variances(self) -> bool:
        """Whether the network answers variances, too."""
        return self.network.config.learn_sigma

    def begin(self) -> Asked:
        """The network of one run of a solver."""
        return Asked(self)

    def forward(self, z: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """`z (B, C, 1, H, W)`, noise levels `sigma (B,)` to what the network predicts, `(B, C, 1, H, W)`."""
        return self.answer(z, sigma, condition)[:, : z.shape[1]]

    def answer(self, z: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """All that the network says: what `forward` returns and, where it has learned them, variances, `(B, 2 C, 1, H, W)`."""
        assert z.shape[2] == 1, "a picture is a film of one frame"
        if sigma.ndim != 1:
            raise UserError("this model makes pictures from words alone, nothing of them can be given; use a system")
        t = self.path.told_step(sigma)  # (B,)
        x = z[:, :, 0]  # (B, C, H, W)
        if isinstance(self.network, DiT) and not self.network.config.text_width:
            out = self.network(x, t, condition.states[:, 0, 0].long())
        else:
            out = self.network(x, t, condition)
        return out[:, :, None]  # (B, C or 2 C, 1, H, W)


class Asked:
    """A `OnePicture` that keeps what it said last of variances."""

    def __init__(self, network: OnePicture) -> None:
        self.network = network
        self.last: Tensor | None = None

    def __call__(self, z: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        said = self.network.answer(z, sigma, condition)
        said, self.last = said[:, : z.shape[1]], said[:, z.shape[1] :]
        return said

    def variances(self) -> Tensor:
        """Where each value's variance lies between its bounds, as `solvers.ddpm` reads it, `(B, C, 1, H, W)`."""
        assert self.last is not None, "asked after an answer"
        return self.last


@dataclass(frozen=True)
class Published:
    """Words to pictures: a published checkpoint, ready to generate.

    `name` is its folder's or file's, `kind` the pipeline that it was written for, `size` its native (height, width).
    """

    name: str
    kind: str
    engine: Engine
    size: tuple[int, int]
    dtype: torch.dtype = torch.float32

    @property
    def defaults(self) -> Sampling:
        return DEFAULTS[self.kind]

    def generate(
        self,
        prompt: str,
        size: tuple[int, int] | None = None,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        progress: Progress | None = None,
        *,
        solver: str | None = None,
    ) -> Clip:
        """One picture, as a clip of one frame, of a text or (DiT) of a class, by its name or number.

        What is left out comes from `defaults`; `size` is (height, width). Raises UserError for an empty prompt, an unknown
        class, and for sizes, steps, guidance or a solver that cannot be.
        """
        return self.generate_batch(
            [prompt], [seed], size=size, steps=steps, guidance=guidance, solver=solver, progress=progress
        )[0]

    def generate_batch(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        size: tuple[int, int] | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        solver: str | None = None,
        batch: int = 8,
        progress: Progress | None = None,
    ) -> list[Clip]:
        """A picture for each pair of prompt and seed, as `generate` would make it up to float rounding.

        `batch` samples run together; the clips' timings are the whole call's, divided evenly. Raises UserError as `generate`.
        """
        if len(prompts) != len(seeds):
            raise UserError(f"{len(prompts)} prompts have {len(seeds)} seeds; give one seed per prompt")
        chosen = {"steps": steps, "guidance": guidance, "solver": solver}
        sampling = replace(self.defaults, **{name: value for name, value in chosen.items() if value is not None})
        size = self.size if size is None else size
        requests = [Request(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        text = self.engine.text
        meanings = [text.meaning(prompt) if isinstance(text, ClassNames) else prompt for prompt in prompts]
        pixels, timings = self.engine.sample(requests, size, 1, sampling, batch=batch, progress=progress)  # (B, 3, 1, H, W)
        shares = {name: seconds / len(requests) for name, seconds in timings.items()}
        common = {
            "size": list(size),
            "frames": 1,
            "fps": PICTURE_FPS,
            **to_dict(sampling),
            "model": self.name,
            "kind": self.kind,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": next(self.engine.denoiser.parameters()).device.type,
            "version": __version__,
        }
        return [
            Clip(
                Video(picture[None], PICTURE_FPS),
                {"prompt": request.text, "text": meaning, "seed": request.seed, **common},
                shares,
            )
            for picture, request, meaning in zip(pixels, requests, meanings, strict=True)
        ]


def load_published(path: str | Path, device: str = "auto", dtype: str | None = None) -> Published:
    """A published checkpoint, ready to generate: a folder as diffusers writes it, or one file of a published DiT.

    `dtype` "float32" or "bfloat16" is the precision of the denoiser, by default bfloat16 where the device computes in it; codec
    and text run once a picture, in float32. Raises UserError for a folder that lacks a part, a truncated file, a pickle, and
    for every setting that the networks here cannot follow.
    """
    path = Path(path)
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"there is no dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    place = choose_device(device)
    if place.type == "mps":
        place = torch.device("cpu")  # a chain's table is float64, which mps does not have
    precision = DTYPES[dtype] if dtype is not None else default_dtype(place)
    if place.type == "cpu" and precision == torch.bfloat16:
        use_fast_attention()
    if path.is_file():
        published = _from_file(path, place, precision)
    elif path.is_dir():
        published = _from_folder(path, place, precision)
    else:
        raise UserError(f"there is no model {path}; give the folder of a checkpoint, or a file of safetensors")
    if place.type == "cpu":
        for network in (published.engine.codec, published.engine.denoiser, published.engine.text):
            accelerate(network)
    return published


def _from_folder(folder: Path, device: torch.device, dtype: torch.dtype) -> Published:
    index = folder / INDEX_FILE
    if not index.is_file():
        raise UserError(f"{folder} holds no {INDEX_FILE}; give the folder of a checkpoint that diffusers wrote, or convert it")
    told = told_by(index, PARTS)
    kind = told["_class_name"]
    for part, classes in PARTS[kind].items():
        named = told.get(part)
        if not isinstance(named, list) or len(named) != 2 or not isinstance(named[1], str):
            raise UserError(f"{index} names no {part}, which a {kind} has; copy the whole checkpoint")
        if classes and named[1] not in classes:
            raise UserError(
                f"{index} has a {named[1]} as its {part}; only {classes[0]} can be read, give a checkpoint with one"
            )
    places = {part: part_of(folder, part) for part in PARTS[kind]}
    chain = read_chain(places["scheduler"])
    codec = _codec(places["vae"], device)
    stride = codec.strides.h
    if kind == DIT:
        network, side = read_dit(places["transformer"], device, dtype)
        text: TextEncoder = ClassNames(network.config.classes, names_of_classes(index, told, network.config.classes))
        return _published(folder, kind, codec, network, text.to(device).eval(), chain, side * stride, dtype)
    unet = read_unet(places["unet"], device, dtype)
    text = read_text(places["text_encoder"], places["tokenizer"], device)
    if text.width != unet.config.context:
        raise UserError(
            f"the unet in {folder} reads a text of width {unet.config.context}, its text_encoder writes {text.width}; "
            "take both from one checkpoint"
        )
    return _published(folder, kind, codec, unet, text, chain, unet.config.size * stride, dtype)


def _from_file(path: Path, device: torch.device, dtype: torch.dtype) -> Published:
    if path.suffix.lower() in PICKLES:
        raise UserError(f"{path} is a pickle, which is never opened here; {CONVERT}")
    if path.suffix.lower() != ".safetensors":
        raise UserError(f"{path} is no checkpoint; give the folder of one, or a file that ends in .safetensors")
    if not (path.parent / "vae").is_dir():
        raise UserError(f"{path} is a denoiser alone; put the folder vae of its autoencoder beside it")
    network, side = read_dit_file(path)
    codec = _codec(path.parent / "vae", device)
    text = ClassNames(network.config.classes, {}).to(device).eval()
    # Trained on this chain and respaced so (facebookresearch/DiT, diffusion/respace.py).
    chain = Chain(VPLinear(), spacing="linspace")
    network = network.to(device, dtype)
    return _published(path, DIT, codec, network, text, chain, side * codec.strides.h, dtype, guided=min(3, codec.channels))


def _codec(folder: Path, device: torch.device) -> ImageKL:
    weights_of(folder, WEIGHTS)
    return read_diffusers(folder).requires_grad_(False).to(device)


def _published(
    path: Path,
    kind: str,
    codec: ImageKL,
    network: DiT | UNet,
    text: TextEncoder,
    chain: Chain,
    side: int,
    dtype: torch.dtype,
    guided: int | None = None,
) -> Published:
    if isinstance(network, DiT):
        channels, cells = network.config.in_channels, network.config.patch
    else:
        channels, cells = network.config.channels, network.config.stride  # what its sides must be multiples of
    if channels != codec.channels:
        raise UserError(
            f"the denoiser of {path} takes {channels} latent channels, its vae makes {codec.channels}; "
            "take both from one checkpoint"
        )
    engine = Engine(
        codec,
        OnePicture(network, chain.path).eval(),
        text,
        chain.prediction,
        (1, cells, cells),
        path=chain.path,
        levels=chain.levels,
        guided_channels=guided,
    )
    name = path.resolve().stem if path.is_file() else path.resolve().name
    return Published(name, kind, engine, (side, side), dtype)
