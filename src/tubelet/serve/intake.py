"""Pictures and clips that strangers send: looked at, decoded and written anew, so that nothing of theirs is stored as it came.

What is let in: PNG, JPEG, WebP; MP4, MOV, WebM with H.264, H.265, VP8, VP9 or AV1. What comes out: an upright PNG without
alpha, or an upright H.264 mp4 of constant rate and even sides without sound; no metadata, but C2PA credentials are handed on
beside it. Of a mask comes out what its alpha says: white where a picture stays, black where it is to be made anew. Decoders
run in a child process (`confine`), and what a decoder says of a file is never shown to anyone.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, cast

from tubelet.serve import confine

if TYPE_CHECKING:
    import av
    import numpy as np
    from av.container import InputContainer
    from av.video.codeccontext import VideoCodecContext
    from av.video.stream import VideoStream
    from PIL import Image

Kind = Literal["image", "video"]
Want = Literal["image", "video", "any", "mask"]
"""What a file must be."""

_MESSAGES = {
    "unsupported_media": "This kind of file is not accepted; send a PNG, JPEG or WebP picture, or an MP4, MOV or WebM clip.",
    "too_large": "The picture or clip is too large; send a smaller one.",
    "too_long": "The clip is too long; send a shorter one.",
    "unreadable_media": "The file is damaged or cannot be read; export it again.",
    "no_transparency": "No part of the mask is transparent; send one that is so where the picture is to be changed.",
    "timeout": "The file takes too long to read; send a smaller or shorter one.",
}
CODES: tuple[str, ...] = tuple(_MESSAGES)

_CODECS = ("h264", "hevc", "vp8", "vp9", "av1")
_DECODERS = "h264,hevc,vp8,vp9,av1,libdav1d,libvpx,libvpx-vp9"
_STILLS = (b"avi", b"hei", b"hev", b"mif", b"msf", b"jp2", b"jpx", b"jpm", b"mjp", b"crx")  # pictures in a film's container
_C2PA_BOX = bytes.fromhex("d8fec3d61b0e483c92975828877ec481")  # C2PA 2.2, A.5
# Pillow's parsers let the errors of their own arithmetic escape on damaged files.
_BROKEN = (OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError)
_UNSTATED = 2  # of a colour space: ITU-T H.273, table 4
_LARGEST_CREDENTIALS = 4 << 20  # bytes; larger ones are dropped


@dataclass(frozen=True)
class Limits:
    """What is let in. Sizes in pixels, times in seconds."""

    bytes: int = 100_000_000
    picture_pixels: int = 50_000_000
    picture_side: int = 16_384
    clip_short_side: int = 2160
    clip_long_side: int = 4096
    clip_seconds: float = 60.0
    clip_frames: int = 7200
    clip_frame_pixels: int = 1_000_000_000
    """Frames times pixels of a clip: 16 s of 1080 lines at 30 frames a second, or 36 s of 720 lines."""
    wall: float = confine.SECONDS


@dataclass(frozen=True)
class Admitted:
    """What is stored: `data` of type `media` ("image/png", "video/mp4"), `size` (height, width) in pixels, its frames (1 for a
    picture) and frames per second (0 for a picture). `credentials`: the C2PA manifest store that stood in the file, if any."""

    data: bytes
    media: str
    kind: Kind
    size: tuple[int, int]
    frames: int
    fps: float
    credentials: bytes | None


class Refused(Exception):  # noqa: N818  an answer, not a defect: HTTP 400
    """The file is not let in. `code` is one of `CODES`; `message` is for the sender and says nothing about the decoder."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code
        self.message = _MESSAGES[code]


def sniff(head: bytes) -> str | None:
    """The type of a file by its first 64 bytes, whatever its name says; None for kinds that are not let in."""
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if head.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "image/webp"
    if head[4:8] == b"ftyp" and not head[8:12].lower().startswith(_STILLS):
        return "video/quicktime" if head[8:12] == b"qt  " else "video/mp4"
    if head.startswith(b"\x1aE\xdf\xa3") and b"webm" in head[:64]:
        return "video/webm"
    return None


def admit(data: bytes, limits: Limits = Limits(), *, want: Want = "any") -> Admitted:
    """Check a file somebody sent, and write it anew. Takes up to `limits.wall` seconds: call it off the event loop.

    Raises Refused with unsupported_media, too_large, too_long, unreadable_media or timeout, a mask with no_transparency, too;
    StorageFull when there is no room for temporary files.
    """
    media = _checked_type(data, limits, "image" if want == "mask" else want)
    task = "mask" if want == "mask" else "admit"
    return _told(*_call({"task": task, "media": media, "limits": asdict(limits)}, data, limits))


def _told(header: dict[str, Any], parts: list[bytes]) -> Admitted:
    """The child's answer. A decoder that a file has taken over could say anything; what makes no sense is no answer."""
    try:
        (height, width), kind, frames, fps = header["size"], header["kind"], header["frames"], header["fps"]
        whole = all(type(number) is int and 0 < number < 1 << 31 for number in (height, width, frames))
        if not whole or kind not in ("image", "video") or not 0 <= float(fps) <= 1000:
            raise ValueError
        media = "image/png" if kind == "image" else "video/mp4"
        return Admitted(parts[0], media, kind, (height, width), frames, float(fps), parts[1] or None)
    except (LookupError, TypeError, ValueError, OverflowError):
        raise Refused("unreadable_media") from None


def mean_luma(data: bytes, limits: Limits = Limits()) -> np.ndarray:
    """The brightness of a picture or clip somebody sent, averaged over its frames: float32 (H, W), 0 to 255.

    This is what `mark.detect_luma` reads. A clip may be of any length: as many frames count as would be let in, from the first
    on. Raises as `admit` does.
    """
    import numpy as np

    media = _checked_type(data, limits, "any")
    header, parts = _call({"task": "luma", "media": media, "limits": asdict(limits)}, data, limits)
    try:
        return np.frombuffer(parts[0], np.float32).reshape(header["size"])
    except (LookupError, TypeError, ValueError, OverflowError):  # as in `_told`
        raise Refused("unreadable_media") from None


def _checked_type(data: bytes, limits: Limits, want: str) -> str:
    if len(data) > limits.bytes:
        raise Refused("too_large")
    media = sniff(data[:64])
    if media is None or want not in ("any", media.partition("/")[0]):
        raise Refused("unsupported_media")
    return media


def _call(request: dict[str, Any], data: bytes, limits: Limits) -> tuple[dict[str, Any], list[bytes]]:
    try:
        header, parts = confine.run(__name__, request, data, limits.wall)
    except confine.ChildFailed as error:
        raise Refused({"timeout": "timeout", "memory": "too_large", "broken": "unreadable_media"}[error.reason]) from None
    if "refused" in header:
        raise Refused(header["refused"] if header["refused"] in CODES else "unreadable_media")
    return header, parts


# --- the child ---------------------------------------------------------------------------------------------------------------


def _prepare(request: dict[str, Any]) -> None:
    """Import all that the work may touch, since afterwards no file can be opened: by a rehearsal, as imports hide deep."""
    import numpy as np

    limits = Limits(**request["limits"])
    if request["media"].startswith("video/"):
        import av

        av.logging.set_level(None)
        grey, film = np.full((16, 16), 128, np.uint8), io.BytesIO()
        _encode(iter([(grey, grey[:8, :8], grey[:8, :8])] * 2), film, _Plan(Fraction(8), 0.125, True, Fraction(1), 2), limits)
        _work_on_clip(io.BytesIO(film.getvalue()), "video/mp4", limits, luma=False)
        return
    from PIL import Image, ImageCms, MpoImagePlugin, TiffImagePlugin, WebPImagePlugin

    del MpoImagePlugin, TiffImagePlugin, WebPImagePlugin
    Image.MAX_IMAGE_PIXELS = None  # our own limit is checked before anything is decoded
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for kind in ("PNG", "JPEG", "WEBP"):
        picture = io.BytesIO()
        Image.new("RGB", (8, 8)).save(picture, kind, icc_profile=profile, exif=Image.Exif())
        _work_on_picture(picture, f"image/{kind.lower()}", limits, "admit")


def _work(request: dict[str, Any], file: BinaryIO) -> tuple[dict[str, Any], Sequence[bytes]]:
    limits = Limits(**request["limits"])
    media, task = request["media"], request["task"]
    try:
        if media.startswith("image/"):
            return _work_on_picture(file, media, limits, task)
        return _work_on_clip(file, media, limits, luma=task == "luma")
    except Refused as refused:
        return {"refused": refused.code}, ()


def _work_on_picture(file: BinaryIO, media: str, limits: Limits, task: str) -> tuple[dict[str, Any], Sequence[bytes]]:
    import struct

    import numpy as np
    from PIL import Image, UnidentifiedImageError

    try:
        # Pillow makes room for a WebP before it says how large it is.
        if media == "image/webp" and math.prod(_webp_size(file.read(30))) > limits.picture_pixels:
            raise Refused("too_large")
        file.seek(0)
        with Image.open(file, formats=("PNG", "JPEG", "WEBP")) as opened:
            if max(opened.size) > limits.picture_side or opened.width * opened.height > limits.picture_pixels:
                raise Refused("too_large")
            opened.load()
            picture = _kept(opened) if task == "mask" else _flat(opened)
    except (UnidentifiedImageError, struct.error, *_BROKEN):
        raise Refused("unreadable_media") from None
    size = (picture.height, picture.width)
    if task == "luma":
        return {"size": size}, (np.asarray(picture.convert("L"), np.float32).tobytes(),)
    written = io.BytesIO()
    picture.save(written, format="PNG", compress_level=1)
    file.seek(0)
    credentials = credentials_in(file.read(), media)
    return {"kind": "image", "size": size, "frames": 1, "fps": 0.0}, (_fitting(written, limits), credentials or b"")


def _webp_size(head: bytes) -> tuple[int, int]:
    """Width and height by the header of the first chunk (RFC 9649, 2.5 to 2.7)."""
    if head[12:16] == b"VP8X":
        return 1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little")
    if head[12:16] == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return int.from_bytes(head[26:28], "little") & 0x3FFF, int.from_bytes(head[28:30], "little") & 0x3FFF


def _flat(image: Image.Image) -> Image.Image:
    """Eight-bit RGB, upright, alpha laid on white, in sRGB where the file names another colour space."""
    import numpy as np
    from PIL import Image, ImageCms, ImageOps

    profile = image.info.get("icc_profile")
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith(("I", "F")):
        deep = np.asarray(upright, np.float32)
        # 16-bit greys clip when Pillow converts them.
        upright = Image.fromarray((deep / (257.0 if deep.max(initial=0) > 255 else 1.0)).clip(0, 255).round().astype(np.uint8))
    if upright.has_transparency_data:
        transparent = upright.convert("RGBA")
        flat = Image.new("RGB", upright.size, "white")
        flat.paste(transparent, mask=transparent.getchannel("A"))
    else:
        flat = upright
    if profile and flat.mode in ("RGB", "CMYK", "L"):
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(flat, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
            flat = converted or flat
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            pass  # a broken profile is as good as none
    return flat.convert("RGB")


def _kept(image: Image.Image) -> Image.Image:
    """Upright RGB of a mask: white where it is opaque, black where it is mostly transparent."""
    import numpy as np
    from PIL import Image, ImageOps

    upright = ImageOps.exif_transpose(image)
    opaque = np.asarray(upright.convert("RGBA").getchannel("A")) >= 128  # (H, W)
    if opaque.all():
        raise Refused("no_transparency")
    return Image.fromarray(opaque.astype(np.uint8) * 255).convert("RGB")


def _fitting(written: io.BytesIO, limits: Limits) -> bytes:
    if written.tell() > confine.ANSWER - _LARGEST_CREDENTIALS or written.tell() > 2 * limits.bytes:
        raise Refused("too_large")
    return written.getvalue()


@dataclass(frozen=True)
class _Plan:
    """What a clip is, known from its packets before anything is decoded. `rate` is that of the new clip; `step`, in seconds,
    how long a frame without a length stands; `steady`: each frame of the file is one of the new clip; `aspect`: width of a
    pixel by its height; `frames`: about how many the new clip has."""

    rate: Fraction
    step: float
    steady: bool
    aspect: Fraction
    frames: int = 1


def _work_on_clip(file: BinaryIO, media: str, limits: Limits, *, luma: bool) -> tuple[dict[str, Any], Sequence[bytes]]:
    import av.error
    import numpy as np

    data = file.read()
    if not _whole(data, media):
        raise Refused("unreadable_media")
    if luma:  # the first frames say as much as all
        whole = replace(limits, clip_seconds=math.inf, clip_frame_pixels=limits.clip_frames * limits.clip_long_side**2)
    else:
        whole = limits
    written = io.BytesIO()
    total: np.ndarray | None = None
    size, frames = (0, 0), 0
    try:
        with _opened(data, media) as container:
            plan = _plan(container, whole)
        with _opened(data, media) as container:
            pictures = _steady(_decoded(container, limits), plan)
            if luma:
                for picture in pictures:
                    plane = picture[0].astype(np.float32)
                    total = plane if total is None else total + plane
                    frames += 1
                    if (frames + 1) * plane.size > limits.clip_frame_pixels:
                        break
            else:
                size, frames = _encode(pictures, written, plan, limits)
    except (av.error.FFmpegError, ValueError, OverflowError, ZeroDivisionError):
        raise Refused("unreadable_media") from None
    if frames == 0:
        raise Refused("unreadable_media")
    if total is not None:
        mean = ((total / frames - 16) * (255 / 219)).astype(np.float32)  # ITU-T H.273: studio range to full
        return {"size": mean.shape}, (mean.tobytes(),)
    credentials = credentials_in(data, media)
    header = {"kind": "video", "size": size, "frames": frames, "fps": float(plan.rate)}
    return header, (_fitting(written, limits), credentials or b"")


def _opened(data: bytes, media: str) -> InputContainer:
    """The demuxer is named, not guessed; only listed decoders may look at the streams; nothing else can be opened by name."""
    import av
    from av.container import InputContainer

    demuxer = "matroska" if media == "video/webm" else "mov"
    options = {"codec_whitelist": _DECODERS, "protocol_whitelist": "pipe", "max_streams": "16", "enable_drefs": "0"}
    if demuxer == "matroska":
        del options["enable_drefs"]
    container = av.open(io.BytesIO(data), format=demuxer, options=options, metadata_errors="ignore")
    assert isinstance(container, InputContainer)
    return container


def _film(container: InputContainer) -> VideoStream:
    from av.stream import Disposition

    # The cover of a song is a stream of one picture, and not a film.
    films = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not films or films[0].codec_context is None or films[0].codec_context.codec.canonical_name not in _CODECS:
        raise Refused("unsupported_media")
    return films[0]


def _check_sides(height: int, width: int, limits: Limits) -> None:
    if min(height, width) > limits.clip_short_side or max(height, width) > limits.clip_long_side:
        raise Refused("too_large")
    if min(height, width) < 2:
        raise Refused("unreadable_media")


def _plan(container: InputContainer, limits: Limits) -> _Plan:
    """Weigh the packets. Raises Refused when decoding them would be too much."""
    film = _film(container)
    tick = film.time_base
    if not tick:
        raise Refused("unreadable_media")
    height, width = film.codec_context.height, film.codec_context.width
    _check_sides(height, width, limits)
    times, last = [], 0
    for packet in container.demux(film):
        if packet.size == 0:
            continue
        if len(times) >= limits.clip_frames:
            raise Refused("too_large")
        time = packet.pts if packet.pts is not None else packet.dts
        if time is None:
            raise Refused("unreadable_media")
        times.append(time)
        last = max(last, time + (packet.duration or 0))
    if not times or (film.frames and len(times) < film.frames):
        raise Refused("unreadable_media")
    times.sort()
    seconds = float((max(last, times[-1]) - times[0]) * tick)
    if seconds > limits.clip_seconds:
        raise Refused("too_long")
    plan = _rate(times, tick, film, seconds)
    frames = max(len(times), math.ceil(seconds * plan.rate))
    if frames > limits.clip_frames or frames * height * width > limits.clip_frame_pixels:
        raise Refused("too_large")
    return replace(plan, frames=frames)


def _rate(times: list[int], tick: Fraction, film: VideoStream, seconds: float) -> _Plan:
    """The rate of the new clip: the file's own where its frames are evenly spaced and 1 to 60 a second, else 30 or 60."""
    stated = [rate for rate in (film.base_rate, film.average_rate) if rate and 0 < rate <= 1000]
    aspect = film.sample_aspect_ratio or Fraction(1)
    aspect = aspect if Fraction(1, 4) <= aspect <= 4 else Fraction(1)
    if len(times) == 1:
        rate = Fraction(1) if seconds <= 0 else Fraction(1 / seconds).limit_denominator(1001)
        rate = stated[0] if stated and not seconds else rate
        return _Plan(min(max(rate, Fraction(1)), Fraction(60)), seconds, rate >= 1, aspect)
    steps = [after - before for before, after in itertools.pairwise(times)]
    mean = Fraction(times[-1] - times[0], len(steps)) * tick
    if mean <= 0:
        raise Refused("unreadable_media")
    measured = 1 / mean
    # Time stamps in milliseconds make 29.97 a second look like 30.003: what the file states is nearer where it is near.
    near = [rate for rate in stated if abs(rate / measured - 1) < Fraction(1, 100)]
    rate = (near[0] if near else measured).limit_denominator(1001)
    even = max(steps) - min(steps) <= max(2, 0.1 * float(mean / tick))
    if even and 1 <= rate <= 60:
        return _Plan(rate, float(mean), True, aspect)
    return _Plan(Fraction(30 if measured <= 30 else 60), float(mean), False, aspect)


def _decoded(container: InputContainer, limits: Limits) -> Iterator[tuple[float, float, av.VideoFrame]]:
    """(begins, stands for) in seconds, and the frame; a length of 0 is unknown."""
    film = _film(container)
    film.codec_context.thread_count = 1
    film.codec_context.options = {"max_pixels": str(limits.clip_long_side * limits.clip_short_side)}
    first: tuple[int, int, float] | None = None
    for number, frame in enumerate(_frames(container, film)):
        if frame.is_corrupt or number >= limits.clip_frames:
            raise Refused("unreadable_media")
        begin = frame.time if frame.time is not None else 0.0
        if first is None:
            _check_sides(frame.height, frame.width, limits)
            first = (frame.height, frame.width, begin)
        if (frame.height, frame.width) != first[:2]:
            raise Refused("unreadable_media")  # a clip that changes its size on the way
        length = float(frame.duration * frame.time_base) if frame.duration and frame.time_base else 0.0
        yield begin - first[2], length, frame


def _frames(container: InputContainer, film: VideoStream) -> Iterator[av.VideoFrame]:
    import av

    transparent = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(film.codec_context.codec.canonical_name)
    if film.metadata.get("alpha_mode") != "1" or transparent is None:
        yield from container.decode(film)
        return
    # The usual decoder drops the alpha, and would show what the film hides.
    decoder = cast("VideoCodecContext", av.CodecContext.create(transparent, "r"))
    decoder.thread_count = 1
    for packet in container.demux(film):
        yield from decoder.decode(packet)


def _steady(decoded: Iterator[tuple[float, float, av.VideoFrame]], plan: _Plan) -> Iterator[tuple[np.ndarray, ...]]:
    """The planes of the frame that stands at k / rate, for every k."""
    if plan.steady:
        for _, _, frame in decoded:
            yield _planes(frame, plan.aspect)
        return
    made, held, end = 0, None, 0.0
    for begin, length, frame in decoded:
        if held is not None and (due := math.ceil(begin * plan.rate - 1e-6)) > made:
            planes = _planes(held, plan.aspect)
            for _ in range(due - made):
                yield planes
            made = due
        held, end = frame, begin + (length or plan.step)
    if held is not None:
        planes = _planes(held, plan.aspect)
        for _ in range(max(1, math.ceil(end * plan.rate - 1e-6) - made)):
            yield planes


def _planes(frame: av.VideoFrame, aspect: Fraction) -> tuple[np.ndarray, ...]:
    """Y, U, V of a frame as a player shows it: square pixels, upright, alpha on white, even sides; BT.709, studio range."""
    from av.sidedata.sidedata import Type
    from av.video.reformatter import ColorRange, Colorspace, Interpolation

    side_data: Any = frame.side_data  # the library's stub knows motion vectors only
    matrix = bytes(side_data[Type.DISPLAYMATRIX]) if Type.DISPLAYMATRIX in side_data else None
    if any(component.is_alpha for component in frame.format.components):
        frame = _on_white(frame)
    width = min(Limits.clip_long_side, round(frame.width * aspect))
    even = frame.reformat(
        width=max(2, width - width % 2),
        height=frame.height - frame.height % 2,
        format="yuv420p",
        # What players take for granted where a film of many lines does not say.
        src_colorspace=Colorspace.ITU709 if frame.colorspace == _UNSTATED and frame.height >= 720 else None,
        dst_colorspace=Colorspace.ITU709,
        dst_color_range=ColorRange.MPEG,
        interpolation=Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INP | Interpolation.ACCURATE_RND,
        threads=1,
    )
    planes = tuple(_plane(even, number) for number in range(3))
    return planes if matrix is None else tuple(_turned(plane, matrix) for plane in planes)


def _on_white(frame: av.VideoFrame) -> av.VideoFrame:
    import av
    import numpy as np

    rgba = frame.to_ndarray(format="rgba", threads=1).astype(np.float32)  # (H, W, 4)
    alpha = rgba[..., 3:] / 255
    return av.VideoFrame.from_ndarray((rgba[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8), format="rgb24")


def _plane(frame: av.VideoFrame, number: int) -> np.ndarray:
    import numpy as np

    plane = frame.planes[number]
    return np.frombuffer(cast(Any, plane), np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width]


def _turned(plane: np.ndarray, matrix: bytes) -> np.ndarray:
    """Quarter turns and mirrorings of the display matrix (ISO/IEC 14496-12, 8.3.2: x' = a x + c y, y' = b x + d y)."""
    import numpy as np

    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    if abs(a) >= abs(b):
        across, down = a, d
    else:
        plane, across, down = plane.T, c, b
    plane = plane[:, ::-1] if across < 0 else plane
    return plane[::-1] if down < 0 else plane


def _encode(
    pictures: Iterator[tuple[np.ndarray, ...]], written: io.BytesIO, plan: _Plan, limits: Limits
) -> tuple[tuple[int, int], int]:
    """Write an mp4; (height, width) and the number of frames. One thread, no dates, no tags: same pixels, same bytes."""
    import av
    import numpy as np
    from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
    from av.video.stream import VideoStream

    first = next(pictures, None)
    if first is None:
        raise Refused("unreadable_media")
    height, width = first[0].shape
    small = height * width <= 256 * 256
    # Small pictures without vector instructions, for the reason that `tubelet.media.encode` gives.
    quality = {"crf": "12", "x264-params": "asm=0"} if small else {"crf": "16"}
    # The index at the front, so that players start at once: room for it is kept, since a stream cannot be rewritten.
    index = 4096 + 48 * plan.frames
    frames = 0
    with av.open(written, "w", format="mp4", options={"moov_size": str(index), "fflags": "+bitexact"}) as container:
        film = container.add_stream(
            "libx264", rate=plan.rate, options={"preset": "superfast", "tune": "zerolatency", **quality}
        )
        assert isinstance(film, VideoStream)
        film.height, film.width, film.pix_fmt = height, width, "yuv420p"
        film.thread_count = 1
        film.codec_context.color_range = ColorRange.MPEG
        film.codec_context.colorspace = Colorspace.ITU709
        film.codec_context.color_primaries = ColorPrimaries.BT709
        film.codec_context.color_trc = ColorTrc.BT709
        for planes in itertools.chain((first,), pictures):
            flat = np.concatenate([np.ravel(plane) for plane in planes]).reshape(-1, width)  # (3 H / 2, W)
            picture = av.VideoFrame.from_ndarray(flat, format="yuv420p")
            picture.pts, picture.time_base = frames, 1 / plan.rate
            container.mux(film.encode(picture))
            frames += 1
            if frames > limits.clip_frames or written.tell() > 2 * limits.bytes:
                raise Refused("too_large")
        container.mux(film.encode(None))
    return (height, width), frames


def _whole(data: bytes, media: str) -> bool:
    """Whether the outermost boxes end where the file ends or before: a film that lost its tail often opens well."""
    if media == "video/webm":
        return _whole_matroska(data)
    return all(end <= len(data) for _, _, end in _boxes(data))


def _boxes(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(type, begin of the content, end) of the outermost boxes of an mp4 or mov (ISO/IEC 14496-12, 4.2)."""
    at = 0
    while at + 8 <= len(data):
        size, kind, begin = int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8], at + 8
        if size == 1:
            size, begin = int.from_bytes(data[at + 8 : at + 16]), at + 16
        if size == 0:
            size = len(data) - at
        if size < begin - at:
            raise Refused("unreadable_media")
        yield kind, begin, at + size
        at += size


def _whole_matroska(data: bytes) -> bool:
    """RFC 9559: the EBML header, then one segment, whose size may be unknown."""
    header = _vint(data, 4)
    if header is None:
        return False
    at = header[1] + header[0]
    if data[at : at + 4] != b"\x18S\x80g":
        return False
    segment = _vint(data, at + 4)
    return segment is not None and (segment[0] < 0 or segment[1] + segment[0] <= len(data))


def _vint(data: bytes, at: int) -> tuple[int, int] | None:
    """A variable-length size (RFC 8794, 4) and where it ends; -1 is unknown."""
    if at >= len(data) or data[at] == 0:
        return None
    length = 9 - data[at].bit_length()
    value = int.from_bytes(data[at : at + length]) & ((1 << 7 * length) - 1)
    return (-1 if value == (1 << 7 * length) - 1 else value), at + length


def credentials_in(data: bytes, media: str) -> bytes | None:
    """The C2PA manifest store inside a file (C2PA 2.2, appendix A), unread and unverified; None when there is none."""
    finders = {"image/png": _png_credentials, "image/jpeg": _jpeg_credentials, "image/webp": _webp_credentials}
    found = finders.get(media, _mp4_credentials)(data)
    return found if found is not None and found[4:8] == b"jumb" and len(found) <= _LARGEST_CREDENTIALS else None


def _png_credentials(data: bytes) -> bytes | None:
    at = 8
    while at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4])
        if data[at + 4 : at + 8] == b"caBX":
            return data[at + 8 : at + 8 + size]
        at += 12 + size
    return None


def _webp_credentials(data: bytes) -> bytes | None:
    at = 12
    while at + 8 <= len(data):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        if data[at : at + 4] == b"C2PA":
            return data[at + 8 : at + 8 + size]
        at += 8 + size + size % 2
    return None


def _jpeg_credentials(data: bytes) -> bytes | None:
    """JUMBF in APP11 segments (ISO/IEC 19566-5, D): marker, length, "JP", instance, sequence; each repeats the box's header."""
    at, parts = 2, []
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        size = int.from_bytes(data[at + 2 : at + 4])
        if data[at + 1] == 0xEB and data[at + 4 : at + 6] == b"JP" and data[at + 16 : at + 20] == b"jumb":
            parts.append(data[at + (20 if parts else 12) : at + 2 + size])
        at += 2 + size
    return b"".join(parts) or None


def _mp4_credentials(data: bytes) -> bytes | None:
    """A `uuid` box: its 16 bytes, version and flags, the purpose "manifest" with a zero, eight bytes of offset, the store."""
    for kind, begin, end in _boxes(data):
        if kind == b"uuid" and data[begin : begin + 16] == _C2PA_BOX and data[begin + 20 : begin + 29] == b"manifest\0":
            store = data[begin + 37 : end]
            return store[: int.from_bytes(store[:4])]
    return None


if __name__ == "__main__":
    confine.serve(_work, prepare=_prepare)
