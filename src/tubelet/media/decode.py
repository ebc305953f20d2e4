"""Read any film or picture, and sound: exact seek, frame rate by timestamps, pixels made square, turned upright, alpha laid.

Only what is asked for is decoded, so an excerpt of a ten-hour film costs an excerpt. A frame stands from its own time until
the next frame's; the frame "at" a time is the one that stands then. Times count from the film's first frame.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import struct
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import av
import av.error
import numpy as np
import torch
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.packet import Packet
from av.sidedata.sidedata import Type as SideDataType
from av.stream import Disposition, Stream
from av.video.reformatter import Interpolation
from av.video.stream import VideoStream
from PIL import Image, ImageOps, UnidentifiedImageError

from tubelet.core.errors import UserError
from tubelet.core.types import Video
from tubelet.media.audio import Audio, joined
from tubelet.media.encode import stored_size
from tubelet.media.resize import Fit, resize

Ground = Literal["white", "black"]
"""What shows through where a picture is transparent."""

STILL_SECONDS = 1.0  # how long a picture without a duration stands, as a one-frame video of 1 fps
LARGEST_BYTES = 4 << 30  # of uint8 frames held by one `decode`
QUALITY = Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND
_PICTURES = (b"GIF8", b"\x89PNG", b"\xff\xd8\xff", b"BM", b"II*\x00", b"MM\x00*")

_NOT_FILMS = ("hls", "concat", "dash", "tty", "lavfi")  # playlists and plain text, which FFmpeg would render as a film

# Pillow's parsers let the errors of their own arithmetic escape on damaged files.
_PILLOW_ERRORS = (
    UnidentifiedImageError,
    Image.DecompressionBombError,
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    struct.error,
)


@dataclass(frozen=True)
class MediaInfo:
    """What a file holds: upright height and width in pixels, frames per second (the mean where it varies), seconds, codec.

    `frames` is the count that the file states, or an estimate from its length where it states none. `still`: a picture without
    a duration, whose seconds are no more than a convention. Sound that outlasts the picture does not count.
    """

    height: int
    width: int
    fps: float
    seconds: float
    frames: int
    codec: str
    still: bool = False


@dataclass(frozen=True)
class _Shown:
    """One stored frame: stands from `begin` until `end` seconds; `picture` makes its pixels, only where they are wanted.

    `end` is early by half a tick of the file's clock, so that a time on the boundary belongs to the frame after it.
    """

    begin: float
    end: float
    picture: Callable[[], np.ndarray]


def probe(path: str | Path) -> MediaInfo:
    """Describe a file by its header and first frame. Raises UserError when it is not a film or picture."""
    path = _checked(path)
    if _is_picture(path):
        with _pictures(path) as image:
            count = getattr(image, "n_frames", 1)
            durations = []
            for number in range(count):
                image.seek(number)
                image.load()
                durations.append(_still_seconds(image, count))
            image.seek(0)
            height, width = _flat(image, "white").shape[:2]
            seconds, kind = sum(durations), (image.format or "picture").lower()
            return MediaInfo(height, width, count / seconds, seconds, count, kind, still=count == 1)
    with _container(path) as (container, stream):
        first = next(_shown_from(path, container, stream, 0.0, "white"), None)
        if first is None:
            raise UserError(f"{path} holds no frame that can be decoded; restore it from its source")
        height, width = first.picture().shape[:2]
        fps = _rate(stream)
        if stream.duration and stream.time_base:
            seconds = float(stream.duration * stream.time_base)
        else:
            stated = (container.duration or 0) / av.time_base
            seconds = _end(container, stream) or stated or (stream.frames / fps if stream.frames else 1 / fps)
        return MediaInfo(height, width, fps, seconds, stream.frames or max(1, round(seconds * fps)), stream.codec_context.name)


def stream(
    path: str | Path,
    *,
    start: float = 0.0,
    fps: float | None = None,
    size: tuple[int, int] | None = None,
    fit: Fit = "crop",
    ground: Ground = "white",
) -> Generator[np.ndarray, None, None]:
    """Yield uint8 `(H, W, 3)` frames from `start` seconds to the end, one at a time, however long the film.

    `fps=None` yields every stored frame; otherwise the frame standing at `start + k / fps` for every k, which is right for
    constant and variable rates alike. Animated pictures store a frame that repeats only once: read them with an `fps`.
    `size` (H, W) and `fit` as in `media.resize`; `ground` shows through what is transparent.
    Raises UserError when the file is missing, empty, truncated, damaged or no film, or when `start` lies behind the end.
    """
    path = _checked(path)
    if not (math.isfinite(start) and start >= 0):
        raise UserError(f"start must be 0 seconds or more, got {start}; choose another")
    if fps is not None and not (math.isfinite(fps) and fps > 0):
        raise UserError(f"fps must be positive, got {fps}; choose another or leave it out")
    return _stream(path, start, fps, size, fit, ground)


def _stream(
    path: Path, start: float, fps: float | None, size: tuple[int, int] | None, fit: Fit, ground: Ground
) -> Generator[np.ndarray, None, None]:
    emitted, end = 0, 0.0
    with contextlib.closing(_shown(path, start, ground)) as shown:
        for item in shown:
            end = item.end
            if item.end <= start:
                continue
            if fps is None:
                emitted += 1
                yield _fitted(item.picture(), size, fit)
                continue
            picture = None
            while start + emitted / fps < item.end:
                picture = _fitted(item.picture(), size, fit) if picture is None else picture
                emitted += 1
                yield picture
    if not emitted and end:
        raise UserError(f"{path} ends at {end:.3f} seconds, before the start of {start:g}; choose an earlier start")
    if not emitted:
        raise UserError(f"{path} holds no frame that can be decoded; restore it from its source")


def decode_uint8(
    path: str | Path,
    *,
    start: float = 0.0,
    frames: int | None = None,
    fps: float | None = None,
    size: tuple[int, int] | None = None,
    fit: Fit = "crop",
    ground: Ground = "white",
) -> tuple[np.ndarray, float]:
    """`frames` frames from `start` as uint8 `(T, H, W, 3)` and their rate; all up to the end when `frames` is None.

    Raises UserError as `stream` does, and when the film holds fewer frames than asked or more than memory should hold.
    """
    if frames is not None and frames < 1:
        raise UserError(f"frames must be at least 1, got {frames}; ask for one or more, or leave it out for all")
    taken: list[np.ndarray] = []
    held = 0
    with contextlib.closing(stream(path, start=start, fps=fps, size=size, fit=fit, ground=ground)) as source:
        for picture in source:
            held += picture.nbytes
            if held > LARGEST_BYTES:
                raise UserError(
                    f"{path} is too long to hold at once ({len(taken)} frames are {LARGEST_BYTES >> 30} GiB); "
                    "ask for fewer frames or a smaller size, or read it with media.decode.stream"
                )
            taken.append(picture)
            if len(taken) == frames:
                break
    if frames is not None and len(taken) < frames:
        raise UserError(f"{path} holds only {len(taken)} frames from {start:g} seconds on, not {frames}; ask for fewer")
    if len({picture.shape for picture in taken}) > 1:
        raise UserError(f"{path} changes its size on the way; give a size to bring every frame to")
    return np.stack(taken), fps if fps is not None else probe(path).fps


def decode(
    path: str | Path,
    *,
    start: float = 0.0,
    frames: int | None = None,
    fps: float | None = None,
    size: tuple[int, int] | None = None,
    fit: Fit = "crop",
    ground: Ground = "white",
) -> Video:
    """As `decode_uint8`, as a `Video` `(1, 3, T, H, W)` in [-1, 1]."""
    return Video.from_uint8(*decode_uint8(path, start=start, frames=frames, fps=fps, size=size, fit=fit, ground=ground))


def decode_audio(path: str | Path, *, rate: int | None = None) -> Audio:
    """The sound of a film, or of a file of sound alone, at its own rate or resampled to `rate` samples a second.

    Channels are mixed to one. Time counts from the film's first frame: sound that begins later begins with silence, what is
    earlier is cut off. Raises UserError as `stream`, and when there is no sound.
    """
    path = _checked(path)
    if rate is not None and rate < 1:
        raise UserError(f"rate must be at least 1 sample a second, got {rate}; choose another or leave it out")
    if _is_picture(path):
        raise UserError(f"{path} is a picture and holds no sound; choose a film")
    with _opened(path) as container:
        if not container.streams.audio:
            raise UserError(f"{path} holds no sound; choose another file, or do without")
        track = container.streams.audio[0]
        _refuse_truncated(path, track)
        rate = rate or track.rate
        late = _begin(track) - _begin(_films(container)[0]) if _films(container) else 0.0
        samples = joined(_decoded(path, container, track), rate)
        # The last block is filled up; an index of all blocks, as in mp4, comes with the true length.
        if track.frames and track.duration and track.time_base:
            samples = samples[: round(track.duration * track.time_base * rate)]
    samples = np.concatenate([np.zeros(max(0, round(late * rate)), np.int16), samples[max(0, round(-late * rate)) :]])
    if not len(samples):
        raise UserError(f"{path} holds no sound that can be decoded; restore it from its source")
    return Audio(samples, rate)


def _checked(path: str | Path) -> Path:
    path = Path(path)
    try:
        if path.is_dir():
            raise UserError(f"{path} is a folder, not a film; name a file in it")
        if path.exists() and not path.is_file():  # a pipe would be waited for, a device never ends
            raise UserError(f"{path} is no regular file; write the film to a file and name that")
        with open(path, "rb") as file:
            if not file.read(1):
                raise UserError(f"{path} is empty (0 bytes); restore it from its source")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; check the name") from error
    return path


def _is_picture(path: Path) -> bool:
    """By content, not by name: what Pillow reads better than FFmpeg (animated webp, alpha, EXIF)."""
    with open(path, "rb") as file:
        head = file.read(16)
    return head.startswith(_PICTURES) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP") or head[4:12] == b"ftypavif"


def _shown(path: Path, start: float, ground: Ground) -> Generator[_Shown, None, None]:
    if _is_picture(path):
        with _pictures(path) as image:
            yield from _shown_pictures(image, ground)
    else:
        with _container(path) as (container, video):
            yield from _shown_from(path, container, video, start, ground)


@contextlib.contextmanager
def _pictures(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except _PILLOW_ERRORS as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is a truncated or damaged picture ({error}); restore it from its source") from error


def _shown_pictures(image: Image.Image, ground: Ground) -> Iterator[_Shown]:
    count = getattr(image, "n_frames", 1)
    begin = 0.0
    for number in range(count):
        image.seek(number)
        image.load()
        end = begin + _still_seconds(image, count)
        tick = 0.01 if image.format == "GIF" else 0.001
        flat = _flat(image, ground)
        yield _Shown(begin, end - tick / 2, functools.partial(np.copy, flat))
        begin = end


def _still_seconds(image: Image.Image, count: int) -> float:
    if count == 1:
        return STILL_SECONDS
    # Browsers give 0.1 s to frames that state none.
    return float(image.info.get("duration") or 100) / 1000


def _flat(image: Image.Image, ground: Ground) -> np.ndarray:
    """uint8 `(H, W, 3)`, upright, alpha laid on `ground`."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith(("I;16", "I", "F")) and upright.mode != "RGB":
        deep = np.asarray(upright, np.float64)
        # 16-bit greys clip when Pillow converts them.
        grey = (deep / (257.0 if deep.max(initial=0) > 255 else 1.0)).clip(0, 255).round().astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)  # (H, W, 3)
    if upright.has_transparency_data:
        upright = Image.alpha_composite(Image.new("RGBA", upright.size, ground), upright.convert("RGBA"))
    return np.asarray(upright.convert("RGB"))  # (H, W, 3)


@contextlib.contextmanager
def _container(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    with _opened(path) as container:
        if not _films(container):
            raise UserError(f"{path} holds no video; choose another file")
        yield container, _films(container)[0]


def _films(container: InputContainer) -> list[VideoStream]:
    """Cover art of a song is a stream of one picture, and not a film."""
    return [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[InputContainer]:
    try:
        # The prefix and the list keep a name such as "http:x", or a playlist in a film's clothes, from reaching elsewhere.
        options = {"protocol_whitelist": "file"}
        with av.open(f"file:{path}", options=options, metadata_errors="replace") as container:
            assert isinstance(container, InputContainer)
            if container.format.name in _NOT_FILMS:
                raise UserError(f"{path} is a {container.format.name} listing, not a film; choose another file")
            yield container
    except av.error.FFmpegError as error:
        reason = error.strerror or error
        raise UserError(f"{path} is truncated, damaged or not a film ({reason}); restore it from its source") from error


def _begin(track: Stream) -> float:
    return float((track.start_time or 0) * (track.time_base or 0))


def _rate(video: VideoStream) -> float:
    rate = video.average_rate or video.guessed_rate or video.base_rate
    return float(rate) if rate else 25.0


def _aspect(video: VideoStream) -> Fraction:
    """Width of a stored pixel over its height; 1 where the file states none, or none that a camera has."""
    aspect = video.sample_aspect_ratio or Fraction(1)
    return aspect if Fraction(1, 4) <= aspect <= 4 else Fraction(1)


def _end(container: InputContainer, video: VideoStream) -> float | None:
    """Seconds from the first frame's begin to the last one's end; nothing is decoded. None where the packets do not tell.

    The container's own length is that of its longest track, which may be the sound.
    """
    tick, whole = float(video.time_base or 0), (container.duration or 0) / av.time_base
    if not tick or whole <= 0:
        return None
    origin, usual = _begin(video), round(1 / _rate(video) / tick)
    back = 0.0
    with contextlib.suppress(av.error.FFmpegError):
        while back < 4 * whole:
            container.seek(round((origin + max(0.0, whole - back)) / tick), stream=video, backward=True)
            ends = [packet.pts + (packet.duration or usual) for packet in container.demux(video) if packet.pts is not None]
            if ends:
                return max(ends) * tick - origin
            # Without an index the jump may land behind the last frame.
            back = max(1.0, back * 4)
    return None


def _shown_from(path: Path, container: InputContainer, video: VideoStream, start: float, ground: Ground) -> Iterator[_Shown]:
    """Frames from the one that stands at `start` on; decoding begins at the key frame before it."""
    _refuse_truncated(path, video)
    tick = float(video.time_base or 0)
    rate = _rate(video)
    origin = _begin(video)
    upright = functools.partial(
        _upright, path, crop=stored_size(container.metadata.get("comment")), aspect=_aspect(video), ground=ground
    )
    decoded = _seeked(path, container, video, start, origin) if start > 0 and tick else _decoded(path, container, video)

    held: av.VideoFrame | None = None
    begin = 0.0
    step = 1 / rate
    for number, frame in enumerate(decoded):
        time = number / rate if frame.time is None else frame.time - origin
        if held is not None:
            # Two frames at one instant, or a clock that jumps back, would otherwise stand for a negative time.
            time = max(time, begin + tick)
            step = time - begin
            yield _Shown(begin, time - tick / 2, functools.partial(upright, held))
        held, begin = frame, time
    if held is not None:
        length = float(held.duration * held.time_base) if held.duration and held.time_base else step
        yield _Shown(begin, begin + length - tick / 2, functools.partial(upright, held))


def _refuse_truncated(path: Path, track: Stream) -> None:
    """A film that lost its tail often opens well and just ends early: what its header promises tells."""
    stated = _stated_bytes(path)
    entries = track.index_entries
    # An index is complete only with an entry per frame, as in mp4.
    if track.frames and len(entries) >= track.frames:
        last = entries[len(entries) - 1]
        stated = max(stated, last.pos + last.size)
    if stated > os.path.getsize(path):
        raise UserError(f"{path} is truncated (its header promises {stated} bytes or more); restore it from its source")


def _stated_bytes(path: Path) -> int:
    """File length by the outermost header of Matroska / WebM (RFC 9559: EBML header, then the segment) or RIFF; else 0."""
    with open(path, "rb") as file:
        head = file.read(4096)
    if head[:4] == b"RIFF":
        return int.from_bytes(head[4:8], "little") + 8
    if head[:4] != b"\x1aE\xdf\xa3":
        return 0
    header_size, segment = _ebml_size(head, 4)
    segment += header_size or 0
    if head[segment : segment + 4] != b"\x18S\x80g":
        return 0
    size, begin = _ebml_size(head, segment + 4)
    return begin + size if size is not None else 0


def _ebml_size(data: bytes, at: int) -> tuple[int | None, int]:
    """An EBML element's size (RFC 8794, 6.4; None when the writer left it open) and where the element's body begins."""
    if at >= len(data) or not data[at]:
        return None, at
    width = 9 - data[at].bit_length()
    value = int.from_bytes(data[at : at + width], "big") & ((1 << 7 * width) - 1)
    return (None if value == (1 << 7 * width) - 1 else value), at + width


def _decoded(path: Path, container: InputContainer, track: VideoStream | AudioStream) -> Iterator[Any]:
    """Frames of pixels or of samples, as the track has them."""
    for packet in _packets(container, track):
        if packet.is_corrupt:
            seconds = float((packet.pts or 0) * (packet.time_base or 0))
            raise UserError(f"{path} is truncated or damaged at {seconds:.2f} seconds; restore it from its source")
        yield from packet.decode()


def _packets(container: InputContainer, track: VideoStream | AudioStream) -> Iterator[Packet]:
    return container.demux(track)


def _seeked(path: Path, container: InputContainer, video: VideoStream, start: float, origin: float) -> Iterator[av.VideoFrame]:
    """Frames from a key frame at or before `start` on."""
    assert video.time_base is not None
    tick = float(video.time_base)
    back = 0.0
    while back < start:
        container.seek(round((origin + start - back) / tick), stream=video, backward=True)
        decoded = _decoded(path, container, video)
        first = next(decoded, None)
        if first is not None and first.time is not None and first.time - origin <= start + tick / 2:
            yield first
            yield from decoded
            return
        # Transport streams have no index, and some indexes are sparse or wrong: the jump landed behind its aim.
        back = max(1.0, back * 4)
    with _container(path) as (again, video_again):
        yield from _decoded(path, again, video_again)


def _upright(path: Path, frame: av.VideoFrame, crop: tuple[int, int] | None, aspect: Fraction, ground: Ground) -> np.ndarray:
    """uint8 `(H, W, 3)` with square pixels, as a player shows it."""
    if frame.is_corrupt:
        raise UserError(f"{path} is damaged at {frame.time or 0.0:.2f} seconds; restore it from its source")
    how: dict[str, Any] = {"interpolation": QUALITY, "threads": 1}
    if aspect != 1:
        # Lines are what was filmed; as players do, columns are made to fit.
        how |= {"width": max(1, round(frame.width * aspect)), "height": frame.height}
    if any(component.is_alpha for component in frame.format.components):
        rgba = frame.to_ndarray(format="rgba", **how).astype(np.float32)  # (H, W, 4)
        alpha, behind = rgba[..., 3:] / 255, {"white": 255, "black": 0}[ground]
        pixels = (rgba[..., :3] * alpha + behind * (1 - alpha)).round().astype(np.uint8)  # (H, W, 3)
    else:
        pixels = frame.to_ndarray(format="rgb24", **how)  # (H, W, 3)
    if crop is not None and 0 <= pixels.shape[0] - crop[0] <= 1 and 0 <= pixels.shape[1] - crop[1] <= 1:
        pixels = pixels[: crop[0], : crop[1]]
    return _turned(pixels, frame)


def _turned(pixels: np.ndarray, frame: av.VideoFrame) -> np.ndarray:
    """Apply the display matrix: quarter turns and mirrorings (ISO/IEC 14496-12, 8.3.2: x' = a x + c y, y' = b x + d y)."""
    side_data: Any = frame.side_data  # the library's stub knows motion vectors only
    if SideDataType.DISPLAYMATRIX not in side_data:
        return pixels
    data = side_data[SideDataType.DISPLAYMATRIX]
    a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].tolist()
    if abs(a) >= abs(b):
        across, down = a, d
    else:
        pixels = pixels.transpose(1, 0, 2)  # (W, H, 3)
        across, down = c, b
    pixels = pixels[:, ::-1] if across < 0 else pixels
    pixels = pixels[::-1] if down < 0 else pixels
    return np.ascontiguousarray(pixels)


def _fitted(pixels: np.ndarray, size: tuple[int, int] | None, fit: Fit) -> np.ndarray:
    if size is None or pixels.shape[:2] == tuple(size):
        return pixels
    values = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).float()[None, :, None]  # (1, 3, 1, H, W)
    small = resize(values, size, fit=fit, background=0.0)
    return small[0, :, 0].permute(1, 2, 0).round().clamp(0, 255).byte().numpy()  # (H, W, 3)
