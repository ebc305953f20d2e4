"""What strangers send: hostile files are refused by a short code with the server unharmed, good ones are written anew."""

from __future__ import annotations

import functools
import io
import json
import os
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tubelet.serve import confine
from tubelet.serve.intake import CODES, Admitted, Limits, Refused, Want, admit, credentials_in, mean_luma, sniff

GROWTH = 50 << 20  # bytes by which a hostile file may grow this process


# --- making files ------------------------------------------------------------------------------------------------------------


def numbered(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Frame k is grey of value 8 * k + 40, its left upper quarter brighter: its number and its turn can be read."""
    frames = np.empty((count, height, width, 3), np.uint8)
    frames[:] = (8 * np.arange(count) + 40)[:, None, None, None].astype(np.uint8)
    frames[:, : height // 2, : width // 2] += 40
    return frames


def film(
    frames: np.ndarray,
    times: list[int] | None = None,
    *,
    kind: str = "mp4",
    codec: str = "libx264",
    rate: int = 8,
    turn: tuple[float, bool, bool] | None = None,
    aspect: Fraction | None = None,
    pixels: str = "yuv420p",
    **movflags: str,
) -> bytes:
    """An encoded clip; frame k begins at times[k] thousandths of a second."""
    written, base = io.BytesIO(), Fraction(1, 1000)
    options = {"libx264": {"crf": "10", "preset": "ultrafast"}, "libvpx-vp9": {"crf": "10", "b": "0", "cpu-used": "8"}}
    with av.open(written, "w", format=kind, options=movflags) as container:
        stream = container.add_stream(codec, rate=rate, options=options.get(codec, {}))
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pixels
        stream.codec_context.time_base = base
        stream.time_base = base
        stream.thread_count = 1
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if turn is not None:
            stream.set_display_rotation(*turn)
        for number, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgba" if frame.shape[2] == 4 else "rgb24")
            picture.pts, picture.time_base = times[number] if times else round(1000 * number / rate), base
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return written.getvalue()


@functools.cache
def plain(kind: str = "mp4", codec: str = "libx264") -> bytes:
    return film(numbered(12), kind=kind, codec=codec)


def sound_only() -> bytes:
    written = io.BytesIO()
    with av.open(written, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return written.getvalue()


def no_frames() -> bytes:
    written = io.BytesIO()
    with av.open(written, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        container.start_encoding()
    return written.getvalue()


def picture(kind: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (64, 48), **options: object) -> bytes:
    written = io.BytesIO()
    values = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 4), dtype=np.uint8)
    Image.fromarray(values).convert(mode).save(written, kind, **options)
    return written.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, data: bytes = b"\0" * 100, *extra: bytes) -> bytes:
    """A PNG whose header says what it likes."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + chunk(b"IDAT", zlib.compress(data, 9)) + chunk(b"IEND", b"")


def bomb() -> bytes:
    """81 megapixels of black in 236 KB."""
    row = b"\0" * (9000 * 3 + 1)
    squeeze = zlib.compressobj(9)
    data = b"".join(squeeze.compress(row) for _ in range(9000)) + squeeze.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 9000, 9000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def huge_jpeg() -> bytes:
    data = bytearray(picture("JPEG"))
    start = data.index(b"\xff\xc0")
    data[start + 5 : start + 9] = struct.pack(">HH", 65500, 65500)
    return bytes(data)


def huge_webp() -> bytes:
    extended = b"VP8X" + struct.pack("<I", 10) + bytes(4) + (16382).to_bytes(3, "little") * 2
    body = b"WEBP" + extended + picture("WEBP", lossless=True)[12:]
    return b"RIFF" + struct.pack("<I", len(body)) + body


@functools.cache
def broad() -> bytes:
    """4096 x 2304, 60 frames of nothing: some 50 KB that decode to 850 MB."""
    written = io.BytesIO()
    black = av.VideoFrame.from_ndarray(np.full((2304 * 3 // 2, 4096), 128, np.uint8), format="yuv420p")
    with av.open(written, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=30, options={"preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = 2304, 4096, "yuv420p"
        for number in range(60):
            black.pts, black.time_base = number, Fraction(1, 30)
            container.mux(stream.encode(black))
        container.mux(stream.encode(None))
    return written.getvalue()


def broad_said_to_be_small() -> bytes:
    data = bytearray(broad())
    at = data.index(b"avc1", data.index(b"stsd")) + 28
    assert data[at : at + 4] == struct.pack(">HH", 4096, 2304)
    data[at : at + 4] = struct.pack(">HH", 64, 48)
    return bytes(data)


def many_samples() -> bytes:
    data = bytearray(plain())
    at = data.index(b"stsz")
    data[at + 12 : at + 16] = b"\x7f\xff\xff\xff"
    return bytes(data)


def emptied() -> bytes:
    """All that the frames are made of, zeroed."""
    data = plain()
    begin = data.index(b"mdat") + 4
    size = int.from_bytes(data[begin - 8 : begin - 4])
    return data[:begin] + bytes(size - 8) + data[begin + size - 8 :]


def flipped(kind: bytes) -> bytes:
    """A box whose name is gone."""
    return plain().replace(kind, b"\xff\xff\xff\xff")


def many_frames() -> bytes:
    return film(np.zeros((1, 16, 16, 3), np.uint8).repeat(7300, 0), list(range(7300)), rate=1000)


def playlist_as_film(text: bytes) -> bytes:
    return struct.pack(">I", 16) + b"ftypisom" + bytes(4) + text


HLS = b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"
CONCAT = b"ffconcat version 1.0\nfile /etc/passwd\n"
NO, BIG, BAD, LONG = "unsupported_media", "too_large", "unreadable_media", "too_long"

HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    # no picture and no film at all
    "empty": (lambda: b"", NO),
    "one byte": (lambda: b"\x89", NO),
    "text": (lambda: b"a red ball bounces\n" * 100, NO),
    "html": (lambda: b"<!DOCTYPE html><script>alert(1)</script>", NO),
    "svg": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>', NO),
    "pdf": (lambda: b"%PDF-1.7\n", NO),
    "zip": (lambda: b"PK\x03\x04" + bytes(60), NO),
    "gif": (lambda: picture("GIF", "P"), NO),
    "gif with a film's name in it": (lambda: b"GIF89aftypisom" + bytes(100), NO),
    "bmp": (lambda: picture("BMP"), NO),
    "tiff": (lambda: picture("TIFF"), NO),
    "jpeg 2000": (lambda: picture("JPEG2000"), NO),
    "avif": (lambda: struct.pack(">I", 24) + b"ftypavif" + bytes(200), NO),
    "heic": (lambda: struct.pack(">I", 24) + b"ftypheic" + bytes(200), NO),
    "hls": (lambda: HLS, NO),
    "concat": (lambda: CONCAT, NO),
    "dash": (lambda: b'<?xml version="1.0"?><MPD><BaseURL>http://127.0.0.1/</BaseURL></MPD>', NO),
    "sdp": (lambda: b"v=0\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n", NO),
    "flash": (lambda: b"FLV\x01" + bytes(100), NO),
    "avi": (lambda: film(numbered(3), kind="avi"), NO),
    # films in the right clothes
    "matroska": (lambda: film(numbered(3), kind="matroska"), NO),
    "hls named mp4": (lambda: playlist_as_film(HLS), BAD),
    "concat named mp4": (lambda: playlist_as_film(CONCAT), BAD),
    "jpeg 2000 in mov": (lambda: film(numbered(2), kind="mov", codec="jpeg2000"), NO),
    "mjpeg in mov": (lambda: film(numbered(2), kind="mov", codec="mjpeg", pixels="yuvj420p"), NO),
    "mpeg-4 part 2 in mp4": (lambda: film(numbered(2), codec="mpeg4"), NO),
    "png in mov": (lambda: film(numbered(2), kind="mov", codec="png", pixels="rgb24"), NO),
    "sound only": (sound_only, NO),
    "no frames": (no_frames, NO),
    "ftyp alone": (lambda: plain()[:32], BAD),
    "ftyp and zeros": (lambda: plain()[:32] + bytes(1000), BAD),
    "box smaller than its header": (lambda: plain()[:32] + struct.pack(">I", 4) + b"moov", BAD),
    "box of 2^63 bytes": (lambda: plain()[:32] + struct.pack(">I", 1) + b"mdat" + b"\x7f" + b"\xff" * 7, BAD),
    "index without frames": (emptied, BAD),
    "two thousand million samples": (many_samples, BAD),
    "no moov": (lambda: flipped(b"moov"), BAD),
    "no stsd": (lambda: flipped(b"stsd"), NO),
    "no avcC": (lambda: flipped(b"avcC"), BAD),
    "4096 x 2304": (broad, BIG),
    "4096 x 2304, said to be 64 x 48": (broad_said_to_be_small, BIG),
    "7300 frames": (many_frames, BIG),
    "61 seconds": (lambda: film(numbered(3), [0, 1000, 61_000]), LONG),
    "a day": (lambda: film(numbered(3), [0, 1000, 10**8]), LONG),
    **{f"film cut at {part}": (lambda part=part: plain()[: int(len(plain()) * part)], BAD) for part in (0.1, 0.3, 0.6, 0.9)},
    "film cut by one byte": (lambda: plain()[:-1], BAD),
    "film with its index first, cut": (lambda: film(numbered(12), moov_size="20000")[:-40], BAD),
    **{
        f"webm cut at {part}": (lambda part=part: (w := plain("webm", "libvpx-vp9"))[: int(len(w) * part)], BAD)
        for part in (0.05, 0.5, 0.95)
    },
    "webm of a header": (lambda: plain("webm", "libvpx-vp9")[:40], BAD),
    # pictures in the right clothes
    "png signature": (lambda: b"\x89PNG\r\n\x1a\n", BAD),
    "png of 65000 x 65000": (lambda: png(65000, 65000), BIG),
    "png of 65535 x 1": (lambda: png(65535, 1), BIG),
    "png of 2^31 x 2^31": (lambda: png(2**31 - 1, 2**31 - 1), BIG),
    "png of 0 x 0": (lambda: png(0, 0), BAD),
    "png bomb": (bomb, BIG),
    "png of too few rows": (lambda: png(64, 48), BAD),
    "png of noise": (lambda: png(64, 48)[:41] + os.urandom(50), BAD),
    "png with a wrong sum": (lambda: (p := bytearray(picture())).__setitem__(20, 99) or bytes(p), BAD),
    "png text bomb": (lambda: png(64, 48, b"\0", chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(100_000_000), 9))), BAD),
    "png profile bomb": (lambda: png(64, 48, b"\0", chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(100_000_000), 9))), BAD),
    "png cut": (lambda: picture()[:2000], BAD),
    "jpeg of 65500 x 65500": (huge_jpeg, BIG),
    "jpeg cut": (lambda: picture("JPEG")[:900], BAD),
    "jpeg marker": (lambda: b"\xff\xd8\xff", BAD),
    "webp of 16383 x 16383": (huge_webp, BIG),
    "webp cut": (lambda: picture("WEBP")[:300], BAD),
}


def code_of(data: bytes, limits: Limits | None = None, want: Want = "any") -> str:
    try:
        admit(data, limits or Limits(), want=want)
    except Refused as refused:
        return refused.code
    return "admitted"


@pytest.mark.parametrize("code", CODES)
def test_refusals_are_short_and_say_what_to_do(code: str) -> None:
    refused = Refused(code)
    assert refused.code == code
    assert len(refused.message) < 120
    assert "send" in refused.message or "export" in refused.message


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def memory(name: str) -> int:
    """VmRSS: memory held now; VmHWM: the most since the last reset."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) << 10


# --- tests -------------------------------------------------------------------------------------------------------------------


def test_there_are_enough_hostile_files() -> None:
    assert len(HOSTILE) >= 60


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_and_the_server_is_unharmed(name: str) -> None:
    make, expected = HOSTILE[name]
    data = make()
    files = open_files()
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    assert code_of(data) == expected
    assert memory("VmHWM") - before < GROWTH
    assert open_files() == files
    with pytest.raises(ChildProcessError):  # no child is left, not even a dead one
        os.waitpid(-1, os.WNOHANG)


@pytest.mark.parametrize(
    ("data", "limits", "expected"),
    [
        (plain, Limits(bytes=1000), "too_large"),
        (plain, Limits(clip_seconds=1.0), "too_long"),
        (plain, Limits(clip_frames=11), "too_large"),
        (plain, Limits(clip_frame_pixels=12 * 48 * 64 - 1), "too_large"),
        (plain, Limits(clip_frame_pixels=12 * 48 * 64, clip_frames=12), "admitted"),
        (plain, Limits(clip_long_side=63), "too_large"),
        (plain, Limits(wall=0.01), "timeout"),
        (picture, Limits(picture_pixels=64 * 48 - 1), "too_large"),
        (picture, Limits(picture_pixels=64 * 48, picture_side=64), "admitted"),
        (picture, Limits(picture_side=63), "too_large"),
    ],
)
def test_each_limit_holds_at_its_edge(data: Callable[[], bytes], limits: Limits, expected: str) -> None:
    assert code_of(data(), limits) == expected


def test_only_what_is_wanted_is_let_in() -> None:
    assert code_of(plain(), want="image") == "unsupported_media"
    assert code_of(picture(), want="video") == "unsupported_media"
    assert code_of(picture(), want="image") == "admitted"


def test_nothing_is_decoded_for_what_is_not_a_picture_or_film(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a child was started"))
    for data in (b"", HLS, CONCAT, picture("GIF", "P"), picture("JPEG2000")):
        assert code_of(data) == "unsupported_media"
    assert code_of(plain(), Limits(bytes=10)) == "too_large"


@pytest.mark.parametrize(
    "lie",
    [
        {"size": None}, {"size": [48]}, {"size": [48, -1]}, {"size": [48, 1e9]}, {"size": ["48", "64"]}, {"size": [True, 64]},
        {"kind": "sound"}, {"kind": []}, {"frames": 0}, {"frames": 10**12}, {"frames": "8"}, {"fps": float("nan")},
        {"fps": float("inf")}, {"fps": -1}, {"fps": None}, {"fps": "x"}, {"refused": "words of a decoder"}, {"refused": []},
    ],
)  # fmt: skip
def test_a_child_that_says_what_makes_no_sense_is_not_believed(lie: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As a decoder could that a file has taken over."""
    truth = {"kind": "video", "size": [48, 64], "frames": 8, "fps": 8.0}
    for header, parts, code in (
        (truth, [b"film", b""], "admitted"),
        ({**truth, **lie}, [b"film", b""], "unreadable_media"),
        (truth, [b"film"], "unreadable_media"),
        ({}, [], "unreadable_media"),
    ):
        monkeypatch.setattr(confine, "run", lambda *_, header=header, parts=parts: (dict(header), parts))
        assert code_of(plain()) == code
    for header, parts in (({}, [b""]), ({"size": [2, 2]}, [b"123"]), ({"size": [1e400, 1]}, [b"1234"]), ({"size": [2, 2]}, [])):
        monkeypatch.setattr(confine, "run", lambda *_, header=header, parts=parts: (header, parts))
        with pytest.raises(Refused, match="unreadable_media"):
            mean_luma(plain())


def decoded(admitted: Admitted) -> np.ndarray:
    with av.open(io.BytesIO(admitted.data)) as container:
        (stream,) = container.streams  # no sound, no text, no cover
        assert stream.codec_context.name == "h264"
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert float(stream.average_rate) == pytest.approx(admitted.fps, rel=1e-3)
    assert len(frames) == admitted.frames
    assert frames[0].shape[:2] == admitted.size
    return np.stack(frames)


def numbers(frames: np.ndarray) -> list[int]:
    """Which numbered frames these are, by their right lower corner."""
    return [round((float(frame[-8:, -8:].mean()) - 40) / 8) for frame in frames]


def brighter_corner(frame: np.ndarray) -> tuple[bool, bool]:
    """Whether the bright quarter is below, and right."""
    grey = frame.mean(2)
    height, width = grey.shape
    corners = np.array([[part.mean() for part in np.array_split(half, 2, axis=1)] for half in np.array_split(grey, 2)])
    assert height > 8 < width
    row, column = np.unravel_index(corners.argmax(), corners.shape)
    return bool(row), bool(column)


@pytest.mark.parametrize(
    ("kind", "codec"),
    [
        ("mp4", "libx264"),
        ("mov", "libx264"),
        ("webm", "libvpx-vp9"),
        ("webm", "libvpx"),
        ("mp4", "libx265"),
        ("webm", "libsvtav1"),
    ],
)
def test_each_kind_of_film_keeps_every_frame(kind: str, codec: str) -> None:
    admitted = admit(plain(kind, codec), want="video")
    assert (admitted.media, admitted.kind, admitted.size, admitted.frames) == ("video/mp4", "video", (48, 64), 12)
    assert admitted.fps == pytest.approx(8, rel=1e-3)
    frames = decoded(admitted)
    assert numbers(frames) == list(range(12))
    assert np.abs(frames.astype(int) - numbered(12)).mean() < 4
    assert admitted.credentials is None


def test_the_same_clip_gives_the_same_bytes() -> None:
    assert admit(plain()).data == admit(plain()).data


def test_the_index_stands_before_the_frames() -> None:
    data = admit(plain()).data
    assert data.index(b"moov") < data.index(b"mdat")


@pytest.mark.parametrize(
    ("turn", "size", "corner"),
    [
        ((0, False, False), (48, 64), (False, False)),
        ((90, False, False), (64, 48), (True, False)),
        ((180, False, False), (48, 64), (True, True)),
        ((270, False, False), (64, 48), (False, True)),
        ((0, True, False), (48, 64), (False, True)),
        ((0, False, True), (48, 64), (True, False)),
    ],
)
def test_films_are_turned_upright(turn: tuple[float, bool, bool], size: tuple[int, int], corner: tuple[bool, bool]) -> None:
    admitted = admit(film(numbered(4), turn=turn))
    assert admitted.size == size
    assert brighter_corner(decoded(admitted)[0]) == corner


def test_odd_sides_become_even() -> None:
    data = film(numbered(4, 47, 63), kind="mov", pixels="yuv444p")
    admitted = admit(data)
    assert admitted.size == (46, 62)
    assert numbers(decoded(admitted)) == [0, 1, 2, 3]


def test_pixels_that_are_not_square_become_so() -> None:
    assert admit(film(numbered(4), aspect=Fraction(2))).size == (48, 128)


def test_uneven_times_become_a_steady_rate() -> None:
    """Frames at 0, 0.1, 0.2, 1.0, 1.05 and 1.5 s: each stands as long as it stood."""
    admitted = admit(film(numbered(6), [0, 100, 200, 1000, 1050, 1500], rate=10))
    assert admitted.fps == 30
    stood = np.bincount(numbers(decoded(admitted)), minlength=6)
    assert stood[:5].tolist() == pytest.approx([3, 3, 24, 1.5, 13.5], abs=1)
    assert stood[5] >= 1


def test_times_rounded_to_milliseconds_are_steady() -> None:
    admitted = admit(film(numbered(12), [0, 33, 67, 100, 133, 167, 200, 233, 267, 300, 333, 367], rate=30))
    assert (admitted.frames, admitted.fps) == (12, pytest.approx(30, rel=0.01))


def test_very_fast_films_are_slowed_to_sixty_a_second() -> None:
    admitted = admit(film(numbered(20), [4 * k for k in range(20)], rate=250))
    assert admitted.fps == 60
    assert 4 <= admitted.frames <= 6


def test_a_film_of_one_frame() -> None:
    assert admit(film(numbered(1))).frames == 1


def test_alpha_of_a_film_is_laid_on_white() -> None:
    """A transparent film hides red under its alpha; no decoder without alpha may bring it to light."""
    frames = np.zeros((4, 48, 64, 4), np.uint8)
    frames[..., 0], frames[:, :24, :, 3] = 255, 255
    admitted = admit(film(frames, kind="webm", codec="libvpx-vp9", pixels="yuva420p"))
    shown = decoded(admitted)
    assert shown[:, 4:20].mean((0, 1, 2)).tolist() == pytest.approx([255, 0, 0], abs=12)
    assert shown[:, 30:].mean((0, 1, 2)).tolist() == pytest.approx([255, 255, 255], abs=6)


def opened(admitted: Admitted) -> Image.Image:
    assert (admitted.media, admitted.kind, admitted.frames, admitted.fps) == ("image/png", "image", 1, 0)
    image = Image.open(io.BytesIO(admitted.data), formats=["PNG"])
    image.load()
    assert image.mode == "RGB"
    assert (image.height, image.width) == admitted.size
    return image


@pytest.mark.parametrize(
    ("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("JPEG", {"quality": 100, "subsampling": 0})]
)
def test_each_kind_of_picture_keeps_its_pixels(kind: str, options: dict) -> None:
    data = picture(kind, **options)
    source = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(np.asarray(opened(admit(data))), source)


@pytest.mark.parametrize(
    ("orientation", "size", "corner"),
    [(1, (48, 64), (0, 0)), (3, (48, 64), (1, 1)), (6, (64, 48), (0, 1)), (8, (64, 48), (1, 0))],
)
def test_pictures_are_turned_upright(orientation: int, size: tuple[int, int], corner: tuple[int, int]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    written = io.BytesIO()
    Image.fromarray(numbered(1)[0]).save(written, "JPEG", exif=exif)
    admitted = admit(written.getvalue())
    assert admitted.size == size
    assert brighter_corner(np.asarray(opened(admitted))) == tuple(map(bool, corner))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_alpha_of_a_picture_is_laid_on_white(mode: str) -> None:
    image = Image.new("RGBA", (64, 48), (200, 0, 0, 0))
    image.paste((200, 0, 0, 255), (0, 0, 32, 48))
    written = io.BytesIO()
    image.convert(mode).save(written, "PNG")
    shown = np.asarray(opened(admit(written.getvalue())))
    assert (shown[:, 40:] == 255).all()
    assert (shown[:, :30] < 255).any()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_a_mask_says_what_stays(mode: str) -> None:
    image = Image.new("RGBA", (64, 48), (9, 9, 9, 255))
    image.paste((9, 9, 9, 0), (0, 0, 20, 48))
    written = io.BytesIO()
    image.convert(mode).save(written, "PNG")
    admitted = admit(written.getvalue(), want="mask")
    assert (admitted.media, admitted.kind, admitted.size) == ("image/png", "image", (48, 64))
    stays = np.asarray(opened(admitted))
    assert (stays[:, :20] == 0).all()
    assert (stays[:, 20:] == 255).all()


def test_a_mask_that_covers_nothing_is_none() -> None:
    assert code_of(picture("PNG", "RGB"), want="mask") == "no_transparency"
    opaque = io.BytesIO()
    Image.new("RGBA", (64, 48), (1, 2, 3, 255)).save(opaque, "PNG")
    assert code_of(opaque.getvalue(), want="mask") == "no_transparency"
    assert code_of(plain(), want="mask") == "unsupported_media"


def test_deep_greys_and_palettes_and_print_colours_are_read() -> None:
    ramp = np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16)
    written = io.BytesIO()
    Image.fromarray(ramp).save(written, "PNG")
    grey = np.asarray(opened(admit(written.getvalue())))
    assert np.abs(grey[..., 0] - ramp / 257).max() <= 1
    for data in (picture("PNG", "1"), picture("PNG", "P"), picture("PNG", "L"), picture("JPEG", "CMYK"), picture("JPEG", "L")):
        opened(admit(data))


def test_a_profile_is_applied_and_a_broken_one_ignored() -> None:
    from PIL import ImageCms

    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = picture("PNG")
    with_profile = picture("PNG", icc_profile=lab)
    assert np.array_equal(np.asarray(opened(admit(with_profile))), np.asarray(opened(admit(data))))
    assert np.array_equal(
        np.asarray(opened(admit(picture("PNG", icc_profile=os.urandom(500))))), np.asarray(opened(admit(data)))
    )


def secrets_of(kind: str) -> bytes:
    """A picture that tells where its maker lives, four times."""
    exif = Image.Exif()
    exif[0x010E] = exif[0x0110] = "CANARY home"
    text = PngInfo()
    text.add_text("Comment", "CANARY home")
    return picture(
        kind, exif=exif, **({"pnginfo": text} if kind == "PNG" else {}), **({"comment": b"CANARY"} if kind == "JPEG" else {})
    )


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_pictures_lose_their_metadata_and_what_hangs_behind(kind: str) -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("CANARY.html", "<script>CANARY</script>")
    data = secrets_of(kind) + archive.getvalue()
    assert b"CANARY" in data
    assert b"CANARY" not in admit(data).data


def test_films_lose_their_metadata_their_sound_and_foreign_boxes() -> None:
    written = io.BytesIO()
    with av.open(written, "w", format="mp4") as container:
        container.metadata["comment"] = container.metadata["title"] = "CANARY"
        stream, sound = container.add_stream("libx264", rate=8), container.add_stream("aac", rate=44100)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for frame in numbered(4):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 44100
        container.mux(sound.encode(silence))
        container.mux(stream.encode(None))
        container.mux(sound.encode(None))
    page = b"<script>CANARY</script>"
    data = written.getvalue() + struct.pack(">I", 8 + len(page)) + b"free" + page
    admitted = admit(data)
    assert b"CANARY" in data
    assert b"CANARY" not in admitted.data
    assert numbers(decoded(admitted)) == [0, 1, 2, 3]


def test_mean_luma_is_the_mean_of_the_frames() -> None:
    frames = numbered(12)
    mean = mean_luma(plain())
    assert mean.shape == (48, 64)
    assert np.abs(mean - frames[..., 0].mean(0)).mean() < 2
    assert np.abs(mean_luma(picture()) - np.asarray(Image.open(io.BytesIO(picture())).convert("L"))).max() == 0
    with pytest.raises(Refused):
        mean_luma(b"no film")


def test_mean_luma_reads_clips_of_any_length_from_their_beginning_on() -> None:
    """Films that are made here last up to two minutes, twice what is taken in."""
    long = film(numbered(61), rate=1)
    with pytest.raises(Refused, match="too_long"):
        admit(long)
    whole = mean_luma(long)
    assert np.abs(whole - mean_luma(film(numbered(61), rate=8))).max() < 0.5
    begun = mean_luma(long, replace(Limits(), clip_frame_pixels=48 * 64 * 12))
    assert np.abs(begun - mean_luma(plain())).max() < 1
    assert np.abs(begun - whole).max() > 5


def test_sniff_goes_by_bytes() -> None:
    assert sniff(picture()) == "image/png"
    assert sniff(picture("JPEG")) == "image/jpeg"
    assert sniff(picture("WEBP")) == "image/webp"
    assert sniff(plain()) == "video/mp4"
    assert sniff(film(numbered(1), kind="mov")) == "video/quicktime"
    assert sniff(plain("webm", "libvpx-vp9")) == "video/webm"
    assert sniff(b"") is None


def test_malformed_containers_do_not_break_the_search_for_credentials() -> None:
    random = np.random.default_rng(0)
    starts = {
        "image/png": picture()[:33],
        "image/jpeg": b"\xff\xd8\xff\xeb",
        "image/webp": picture("WEBP")[:12],
        "video/mp4": plain()[:32],
    }
    for media, start in starts.items():
        for _ in range(200):
            data = start + random.integers(0, 256, 200, dtype=np.uint8).tobytes()
            try:
                assert credentials_in(data, media) is None
            except Refused:
                assert media == "video/mp4"


def test_the_server_loads_no_decoder() -> None:
    code = (
        "import sys, json, tubelet.serve.intake, tubelet.serve.store, tubelet.serve.provenance;"
        "print(json.dumps([m for m in ('torch', 'av', 'numpy', 'PIL', 'c2pa', 'cryptography') if m in sys.modules]))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(loaded) == []
