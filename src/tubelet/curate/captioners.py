"""Who writes captions: a trained CoCa from its folder, or a chat model that is shown a few frames.

DALL-E 3 (Betker et al. 2023, section 2.1) has a captioner write two kinds: short ones of the main subject, dense ones of all
that is to be seen. A captioner here writes both, of clips that were fitted to what it sees (`View`).
"""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from tubelet.core.config import from_file, to_dict
from tubelet.core.errors import UserError
from tubelet.core.files import read_json, sha256, write_json
from tubelet.core.types import Video
from tubelet.core.weights import load_module, save_module
from tubelet.media.decode import probe, stream
from tubelet.media.resize import Fit, resize
from tubelet.models.coca import CoCa, CoCaConfig, caption
from tubelet.runtime.device import choose_device
from tubelet.text import TOKENIZER_FILE
from tubelet.text.bpe import Tokenizer
from tubelet.text.expand import ChatModel
from tubelet.text.writing import STYLES, Writing

FORMAT = "tubelet-captioner-1"
CONFIG_FILE, WEIGHTS_FILE = "captioner.json", "captioner.safetensors"
LARGEST_SIDE = 512
"""Pixels; larger pictures are made smaller before a chat model is shown them."""

_SHOWN = "You caption clips for a text-to-video model. You are shown a few frames of one clip, in order of time."
INSTRUCTIONS = {
    "short": (
        f"{_SHOWN} Say in one plain sentence in present tense what the main subject is and what it does. "
        "Answer with the caption only."
    ),
    "dense": (
        f"{_SHOWN} Write one dense caption of at most 100 words in plain present tense: the subjects with colour, shape and "
        "size, what each does and in which direction, the surroundings, any text, the style, the camera. Say only what is to "
        "be seen. Answer with the caption only."
    ),
}
"""What a chat model is told, by style."""


@dataclass(frozen=True)
class View:
    """What a captioner sees of a clip: at most `frames` frames, at `fps` frames per second where so many show the whole clip.

    A longer clip, one of unknown rate, and any clip where `fps` is None are shown by frames spread evenly over them. `side`:
    pixels of the square that pictures are padded to; None shows them as they are, made smaller where a side exceeds 512.
    """

    frames: int
    fps: float | None = None
    side: int | None = None

    def __post_init__(self) -> None:
        if self.frames < 1 or (self.side is not None and self.side < 1) or (self.fps is not None and not self.fps > 0):
            raise UserError("a captioner sees at least 1 frame, of at least 1 pixel, at a rate above 0; correct its settings")

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width at which a picture of this size is shown."""
        if self.side is not None:
            return self.side, self.side
        scale = min(1.0, LARGEST_SIDE / max(height, width))
        return max(1, round(height * scale)), max(1, round(width * scale))

    @property
    def fit(self) -> Fit:
        """How pictures are brought to `size`: nothing is cut off, since a caption may need it."""
        return "pad" if self.side is not None else "stretch"

    def places(self, count: int, fps: float | None) -> list[int]:
        """Which of `count` frames at `fps` frames per second (None: not known) are shown, in order."""
        if self.fps is not None and fps is not None and count / fps <= self.frames / self.fps + 1e-6:
            own = (int(k / self.fps * fps + 1e-6) for k in range(self.frames))
            return [place for place in own if place < count]
        shown = min(self.frames, count)
        return [int((k + 0.5) * count / shown) for k in range(shown)]


def fitted(video: np.ndarray, fps: float | None, view: View) -> np.ndarray:
    """A uint8 clip `(T, H, W, 3)` as a captioner sees it, `(t, h, w, 3)`."""
    shown = video[view.places(len(video), fps)]  # (t, H, W, 3)
    size = view.size(*shown.shape[1:3])
    if size == shown.shape[1:3]:
        return shown
    values = torch.from_numpy(shown).permute(3, 0, 1, 2).float()[None]  # (1, 3, t, H, W)
    small = resize(values, size, fit=view.fit, background=0.0)
    return small[0].permute(1, 2, 3, 0).round().clamp(0, 255).byte().numpy()  # (t, h, w, 3)


def read(path: str | Path, view: View) -> tuple[np.ndarray, float]:
    """A film or picture as a captioner sees it, uint8 `(t, h, w, 3)`, and the seconds it lasts. Raises UserError as `probe`."""
    info = probe(path)
    count = 1 if info.frames == 1 else view.frames
    rate, start = view.fps, 0.0
    if rate is None or info.seconds > view.frames / rate + 1e-6:
        rate = count / info.seconds
        start = 0.5 / rate
    frames = stream(path, start=start, fps=rate, size=view.size(info.height, info.width), fit=view.fit)
    return np.stack(list(itertools.islice(frames, count))), info.seconds


class Captioner(Protocol):
    """Anything that writes captions of what it sees."""

    @property
    def source(self) -> str:
        """The `source` of its captions."""
        ...

    @property
    def identity(self) -> Mapping[str, Any]:
        """JSON values that say which captioner it is: a run that was begun with another does not go on with this one."""
        ...

    @property
    def view(self) -> View: ...

    @property
    def batch(self) -> int:
        """Clips that are best given together."""
        ...

    def write(self, clips: Sequence[np.ndarray], styles: Sequence[str] = STYLES) -> list[dict[str, str]]:
        """For each clip, uint8 `(t, h, w, 3)` as `fitted` gives it, style -> caption. Raises UserError when it cannot."""
        ...


@dataclass(frozen=True)
class CaptionerConfig:
    """captioner.json: what a folder holds, so that it can be loaded by itself."""

    format: str
    name: str
    """The `source` of its captions."""
    coca: CoCaConfig
    limit: int
    """Tokens of the longest caption, start and end included."""
    frames: int
    fps: float
    files: dict[str, str]
    """Name -> sha256 of every other file."""


@dataclass(frozen=True)
class CoCaCaptioner:
    """A trained CoCa. The same clips in the same batches give the same captions, letter for letter."""

    model: CoCa
    writing: Writing
    view: View
    source: str
    digest: str
    """sha256 of its weights."""
    batch: int = 32

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"captioner": self.source, "weights": self.digest}

    def write(self, clips: Sequence[np.ndarray], styles: Sequence[str] = STYLES) -> list[dict[str, str]]:
        """As `Captioner`; clips of fewer frames than it could see are captioned apart from the others."""
        texts: list[dict[str, str]] = [{} for _ in clips]
        for length in sorted({len(clip) for clip in clips}):
            places = [place for place, clip in enumerate(clips) if len(clip) == length]
            video = np.stack([clips[place] for place in places])  # (B, t, h, w, 3)
            for style in styles:
                for place, text in zip(places, write(self.model, self.writing, video, style, self.batch), strict=True):
                    texts[place][style] = text
        return texts


@torch.no_grad()
def write(model: CoCa, writing: Writing, video: np.ndarray, style: str, batch: int = 32) -> list[str]:
    """Captions of uint8 clips `(B, T, H, W, 3)`, greedily."""
    model.eval()
    device = next(model.parameters()).device
    texts: list[str] = []
    for first in range(0, len(video), batch):
        pixels = Video.from_uint8(video[first : first + batch], 1.0).pixels.to(device)  # (B, 3, T, H, W)
        texts += writing.decode(caption(model, pixels, writing.start(style), writing.end, writing.limit))
    return texts


def save_captioner(folder: str | Path, model: CoCa, writing: Writing, frames: int, fps: float, name: str = "coca") -> None:
    """Write weights, tokenizer and, last, captioner.json. `frames` at `fps` per second: what the model was trained to see."""
    folder = Path(folder)
    save_module(folder / WEIGHTS_FILE, model)
    writing.tokenizer.save(folder / TOKENIZER_FILE)
    files = {file: sha256(folder / file) for file in (WEIGHTS_FILE, TOKENIZER_FILE)}
    config = CaptionerConfig(FORMAT, name, model.config, writing.limit, frames, fps, files)
    write_json(folder / CONFIG_FILE, to_dict(config))


def load_captioner(folder: str | Path, device: str = "auto") -> CoCaCaptioner:
    """The captioner of a folder that `save_captioner` wrote.

    Raises UserError when there is none, when it is of another version, and when its files do not belong together.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise UserError(
            f"{folder} holds no captioner ({CONFIG_FILE} is missing); tubelet train captioner makes one in runs/captioner"
        )
    values = read_json(path)
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise UserError(f"{path} is not a {FORMAT} captioner; use one that this version of tubelet wrote")
    config = from_file(CaptionerConfig, path)
    for name in (WEIGHTS_FILE, TOKENIZER_FILE):
        file = path.with_name(name)
        if not file.is_file() or sha256(file) != config.files.get(name):
            raise UserError(f"{file} is missing or is not the one that {CONFIG_FILE} names; restore it from its source")
    view = View(config.frames, config.fps, config.coca.image)
    writing = Writing(Tokenizer.load(path.with_name(TOKENIZER_FILE)), config.limit)
    model = CoCa(config.coca)
    load_module(path.with_name(WEIGHTS_FILE), model)
    return CoCaCaptioner(model.to(choose_device(device)).eval(), writing, view, config.name, config.files[WEIGHTS_FILE])


@dataclass(frozen=True)
class ChatCaptioner:
    """A chat model that sees pictures, behind any OpenAI-compatible endpoint: each caption is one question with a few PNGs."""

    chat: ChatModel
    view: View = View(4)
    batch: int = 1

    @property
    def source(self) -> str:
        return self.chat.model

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"captioner": "chat", "model": self.chat.model}

    def write(self, clips: Sequence[np.ndarray], styles: Sequence[str] = STYLES) -> list[dict[str, str]]:
        """As `Captioner`. Raises UserError as `ChatModel.answer`."""
        return [self._write(clip, styles) for clip in clips]

    def _write(self, clip: np.ndarray, styles: Sequence[str]) -> dict[str, str]:
        pictures = [{"type": "image_url", "image_url": {"url": data_url(frame)}} for frame in clip]
        content = [{"type": "text", "text": f"The clip, in {len(pictures)} frames:"}, *pictures]
        return {style: self.chat.answer(INSTRUCTIONS[style], content) for style in styles}


def data_url(picture: np.ndarray) -> str:
    """A uint8 picture `(H, W, 3)` as a `data:` URL of a PNG (RFC 2397)."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
