"""Write a clip as mp4, animated webp, gif or a png contact sheet, with its settings inside the file; read them back.

The same pixels and metadata give the same bytes: one encoder thread, no dates, no encoder tags.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path

import av
import av.error
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation
from av.video.stream import VideoStream
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from tubelet.core.errors import UserError
from tubelet.core.files import whole_file
from tubelet.media.audio import Audio, add_track, packets
from tubelet.media.sheet import contact_sheet

# h264 in 4:2:0 holds even sides only; the true size of an odd clip travels under this key and is cut back on reading.
CROP_KEY = "tubelet_size"
IMAGE_DESCRIPTION = 0x010E  # EXIF 2.32, table 4
PALETTE_FRAMES = 64


def save(
    frames: np.ndarray, path: str | Path, fps: float, metadata: Mapping[str, str] | None = None, audio: Audio | None = None
) -> Path:
    """Write uint8 `(T, H, W, 3)` as a film of exactly that size; the suffix chooses the format. Returns the path.

    `.mp4` h264 yuv420p with the index first, plays in browsers; an odd side is filled up by its last pixel line and cut
    off again by `decode`. `.webp` and `.gif` animate for ever. `.png` is a contact sheet, of one frame the picture itself.
    `metadata` is readable with `read_metadata`. `audio` becomes the film's sound, as AAC, from its first frame on; only an mp4
    has one. Raises UserError for an unknown suffix, an impossible rate, no frames, sound where there can be none, or a place
    that cannot be written.
    """
    path = Path(path)
    writer = _WRITERS.get(path.suffix.lower())
    if writer is None:
        wrong = f"a {path.suffix} file" if path.suffix else f"{str(path)!r}, whose name has no suffix"
        raise UserError(f"cannot write {wrong}; choose one of {', '.join(_WRITERS)}")
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8 or 0 in frames.shape:
        raise UserError(
            f"a clip to save is uint8 (T, H, W, 3) with at least one frame, got {frames.dtype} {frames.shape}; convert it"
        )
    if not (math.isfinite(fps) and 0.01 <= fps <= 1000):
        raise UserError(f"fps must be between 0.01 and 1000, got {fps}; choose another")
    if audio is not None:
        if path.suffix.lower() != ".mp4":
            raise UserError(f"{path.suffix} holds no sound; choose .mp4, or leave the sound out")
        writer = functools.partial(_write_mp4, audio=audio)
    with whole_file(path) as temporary:
        writer(np.ascontiguousarray(frames), temporary, fps, dict(metadata or {}))
    return path


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata that `save` put into a file; empty for files of other origin. Raises UserError when unreadable."""
    path = Path(path)
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise UserError(f"{path} is no regular file; name a file that a film or picture was written to")
        with open(path, "rb") as file:
            head = file.read(16)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; check the name") from error
    if head[4:8] == b"ftyp" or head[:4] == b"\x1aE\xdf\xa3":
        text = _container_comment(path)
    else:
        text = _image_comment(path)
    values = _parsed(text)
    values.pop(CROP_KEY, None)
    return values


def stored_size(comment: str | None) -> tuple[int, int] | None:
    """True height and width of an odd clip, from an mp4's comment tag."""
    height, _, width = _parsed(comment).get(CROP_KEY, "").partition("x")
    return (int(height), int(width)) if height.isdecimal() and width.isdecimal() else None


def _parsed(text: str | None) -> dict[str, str]:
    try:
        values = json.loads(text) if text else {}
    except (json.JSONDecodeError, RecursionError):
        return {}
    return {k: v for k, v in values.items() if isinstance(v, str)} if isinstance(values, dict) else {}


def _packed(metadata: Mapping[str, str]) -> str:
    # ASCII with escapes survives every one of the four containers.
    return json.dumps(dict(metadata), ensure_ascii=True, separators=(",", ":"))


def _container_comment(path: Path) -> str | None:
    try:
        with av.open(str(path), metadata_errors="replace") as container:
            assert isinstance(container, InputContainer)
            return container.metadata.get("comment") or container.metadata.get("COMMENT")
    except (av.error.FFmpegError, ValueError) as error:
        raise UserError(f"{path} is truncated or not a video; restore it from its source") from error


def _image_comment(path: Path) -> str | None:
    try:
        with Image.open(path) as image:
            exif = image.getexif().get(IMAGE_DESCRIPTION) if image.format == "WEBP" else None
            value = exif or image.info.get("comment") or image.info.get("Comment")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is neither a film nor a picture that can be read; check the name") from error
    return value.decode("latin-1") if isinstance(value, bytes) else value


def _write_mp4(frames: np.ndarray, path: Path, fps: float, metadata: dict[str, str], audio: Audio | None = None) -> None:
    _, height, width, _ = frames.shape
    if height % 2 or width % 2:
        frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")  # (T, even H, even W, 3)
        metadata = {**metadata, CROP_KEY: f"{height}x{width}"}
    rate = Fraction(fps).limit_denominator(1001)
    options = {"movflags": "+faststart", "fflags": "+bitexact"}
    if audio is not None:
        # Lengths of tracks are kept in these ticks: milliseconds would round sound.
        options["movie_timescale"] = str(audio.rate)
    with av.open(str(path), "w", format="mp4", options=options) as container:
        if metadata:
            container.metadata["comment"] = _packed(metadata)
        stream = container.add_stream("libx264", rate=rate, options={"preset": "slow", **_quality(height, width)})
        assert isinstance(stream, VideoStream)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.thread_count = 1
        stream.codec_context.color_range = ColorRange.MPEG
        stream.codec_context.colorspace = Colorspace.ITU709
        stream.codec_context.color_primaries = ColorPrimaries.BT709
        stream.codec_context.color_trc = ColorTrc.BT709
        tracks = [_pictures(stream, frames, rate)]
        if audio is not None:
            tracks.append(packets(add_track(container, audio), audio))
        # In order of time, so that a player finds both side by side.
        for packet in heapq.merge(*tracks, key=lambda packet: float((packet.dts or 0) * packet.time_base)):
            container.mux(packet)


def _pictures(stream: VideoStream, frames: np.ndarray, rate: Fraction) -> Iterator[Packet]:
    """The packets of a film of uint8 `(T, H, W, 3)`."""
    for number, frame in enumerate(frames):
        picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(
            format="yuv420p",
            dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.MPEG,
            interpolation=Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INP | Interpolation.ACCURATE_RND,
            threads=1,
        )
        picture.pts, picture.time_base = number, 1 / rate
        yield from stream.encode(picture)
    yield from stream.encode(None)


def _quality(height: int, width: int) -> dict[str, str]:
    """Constant quality: near lossless for small clips, where a lost pixel is seen, the usual high quality for large ones.

    Small clips are encoded without vector instructions: those for 512 bits read beyond the encoder's half-size pictures where
    these are narrower than a register, and one film then had two encodings (29 and 1 of 30 on a 64 x 64 clip).
    """
    return {"crf": "12", "x264-params": "asm=0"} if height * width <= 256 * 256 else {"crf": "16"}


def _write_webp(frames: np.ndarray, path: Path, fps: float, metadata: dict[str, str]) -> None:
    exif = Image.Exif()
    exif[IMAGE_DESCRIPTION] = _packed(metadata)
    images = [Image.fromarray(frame) for frame in frames]
    images[0].save(
        path,
        format="WEBP",
        save_all=True,
        append_images=images[1:],
        duration=_durations(len(images), fps, 1000),
        loop=0,
        quality=92,
        method=4,
        exif=exif.tobytes() if metadata else b"",
    )


def _write_gif(frames: np.ndarray, path: Path, fps: float, metadata: dict[str, str]) -> None:
    # One palette for the whole clip: a palette per frame flickers.
    chosen = np.linspace(0, len(frames) - 1, min(PALETTE_FRAMES, len(frames))).round().astype(int)
    tall = Image.fromarray(frames[chosen].reshape(-1, frames.shape[2], 3))
    palette = tall.quantize(256, method=Image.Quantize.MEDIANCUT, kmeans=1)
    images = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    images[0].save(
        path,
        format="GIF",
        save_all=True,
        append_images=images[1:],
        duration=[10 * d for d in _durations(len(images), fps, 100)],
        loop=0,
        optimize=False,
        comment=_packed(metadata).encode("ascii") if metadata else b"",
    )


def _write_png(frames: np.ndarray, path: Path, fps: float, metadata: dict[str, str]) -> None:
    caption = metadata.get("prompt")
    scale = max(1, 128 // max(frames.shape[1:3]))
    info = PngInfo()
    if metadata:
        info.add_text("Comment", _packed(metadata))
    # A film of one frame is a picture, and is kept as it is: it can begin another film.
    picture = frames[0] if len(frames) == 1 else contact_sheet([frames], [caption] if caption else None, scale=scale)
    Image.fromarray(picture).save(path, format="PNG", pnginfo=info)


def _durations(count: int, fps: float, ticks: int) -> list[int]:
    """How many ticks of a second each frame stands, rounded so that the sum never drifts; at least one each."""
    edges = [round(number * ticks / fps) for number in range(count + 1)]
    return [max(1, after - before) for before, after in itertools.pairwise(edges)]


_WRITERS: dict[str, Callable[[np.ndarray, Path, float, dict[str, str]], None]] = {
    ".mp4": _write_mp4,
    ".webp": _write_webp,
    ".gif": _write_gif,
    ".png": _write_png,
}
FORMATS: tuple[str, ...] = tuple(_WRITERS)
