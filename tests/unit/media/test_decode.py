"""Reading films and pictures made here: seek, rates, rotation, alpha, and everything that is broken."""

from __future__ import annotations

import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tubelet.core.errors import UserError
from tubelet.media.decode import decode, decode_uint8, probe, stream
from tubelet.media.encode import save


def numbered(count: int, height: int = 32, width: int = 48) -> np.ndarray:
    """Frame k is grey of value 4 * k + 8: which frame was decoded can be read from its pixels."""
    return np.broadcast_to((4 * np.arange(count) + 8).astype(np.uint8)[:, None, None, None], (count, height, width, 3)).copy()


def numbers(frames: np.ndarray) -> list[int]:
    return [round((float(frame.mean()) - 8) / 4) for frame in frames]


def write(
    path: Path,
    frames: np.ndarray,
    times: list[int],
    *,
    base: Fraction = Fraction(1, 1000),
    codec: str = "libx264",
    turn=None,
    rate=30,
    aspect: Fraction | None = None,
    sound: float = 0.0,
) -> Path:
    """A film whose frame k stands from times[k] * base seconds, with few key frames and with B frames; `sound` in seconds."""
    with av.open(str(path), "w") as container:
        options = {"libx264": {"crf": "8"}, "ffv1": {}, "libvpx-vp9": {"crf": "8", "b": "0", "cpu-used": "8"}}[codec]
        video = container.add_stream(codec, rate=rate, options=options)
        video.height, video.width, video.pix_fmt, video.gop_size = frames.shape[1], frames.shape[2], "yuv420p", 12
        video.codec_context.time_base = base
        video.time_base = base
        if aspect is not None:
            video.sample_aspect_ratio = aspect
        if turn is not None:
            video.set_display_rotation(*turn)
        hum = container.add_stream("aac" if path.suffix == ".mp4" else "libopus", rate=48000, layout="mono") if sound else None
        for number in range(round(sound * 50) if hum is not None else 0):
            block = av.AudioFrame.from_ndarray(np.zeros((1, 960), np.int16), format="s16", layout="mono")
            block.sample_rate, block.pts, block.time_base = 48000, 960 * number, Fraction(1, 48000)
            container.mux(hum.encode(block))
        if hum is not None:
            container.mux(hum.encode(None))
        for frame, time in zip(frames, times, strict=True):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = time, base
            container.mux(video.encode(picture))
        container.mux(video.encode(None))
    return path


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 numbered frames at 10 fps, a key frame every 12, B frames between."""
    return write(tmp_path_factory.mktemp("films") / "film.mp4", numbered(60), [100 * k for k in range(60)], rate=10)


@pytest.fixture(scope="module")
def varying(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Frames at 0, 0.1, 0.2, 1.0, 1.05, 1.1, 2.0 seconds."""
    return write(tmp_path_factory.mktemp("films") / "varying.mp4", numbered(7), [0, 100, 200, 1000, 1050, 1100, 2000])


def test_probe_says_what_the_file_is(film: Path) -> None:
    info = probe(film)
    assert (info.height, info.width, info.frames, info.codec) == (32, 48, 60, "h264")
    assert info.fps == pytest.approx(10, rel=1e-3)
    assert info.seconds == pytest.approx(6, abs=0.1)


def test_decode_gives_every_frame_in_order(film: Path) -> None:
    frames, fps = decode_uint8(film)
    assert numbers(frames) == list(range(60))
    assert fps == pytest.approx(10, rel=1e-3)


@pytest.mark.parametrize("first", [0, 1, 11, 12, 13, 23, 37, 59])
def test_seek_is_exact_between_key_frames(film: Path, first: int) -> None:
    count = min(3, 60 - first)
    frames, _ = decode_uint8(film, start=first / 10, frames=count)
    assert numbers(frames) == list(range(first, first + count))


def test_a_start_inside_a_frame_shows_the_frame_that_stands_then(film: Path) -> None:
    assert numbers(decode_uint8(film, start=1.57, frames=2)[0]) == [15, 16]


@pytest.mark.parametrize(
    ("suffix", "codec"), [(".webm", "libvpx-vp9"), (".mkv", "libx264"), (".ts", "libx264"), (".avi", "ffv1")]
)
def test_seek_is_exact_in_other_containers(tmp_path: Path, suffix: str, codec: str) -> None:
    path = write(tmp_path / f"film{suffix}", numbered(40), list(range(40)), base=Fraction(1, 30), codec=codec)
    for first in (0, 7, 25):
        assert numbers(decode_uint8(path, start=first / 30, frames=3)[0]) == [first, first + 1, first + 2]


@pytest.mark.parametrize("fps", [3.0, 5.0, 8.0, 10.0, 20.0, 24.0])
def test_a_constant_rate_is_resampled_by_timestamp(film: Path, fps: float) -> None:
    frames, rate = decode_uint8(film, fps=fps)
    expected = [int(k / fps * 10 + 1e-6) for k in range(round(6 * fps))]
    assert rate == fps
    assert numbers(frames) == expected


def test_a_varying_rate_is_resampled_by_timestamp(varying: Path) -> None:
    times = [0, 0.1, 0.2, 1.0, 1.05, 1.1, 2.0]
    frames, _ = decode_uint8(varying, fps=10.0, frames=20)
    expected = [max(i for i, time in enumerate(times) if time <= k / 10 + 1e-6) for k in range(20)]
    assert numbers(frames) == expected
    assert numbers(decode_uint8(varying, start=0.5, fps=4.0, frames=4)[0]) == [2, 2, 3, 5]
    assert numbers(decode_uint8(varying)[0]) == list(range(7))


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        ((0, False, False), lambda x: x),
        ((90, False, False), lambda x: np.rot90(x, 1)),
        ((-90, False, False), lambda x: np.rot90(x, -1)),
        ((180, False, False), lambda x: np.rot90(x, 2)),
        ((0, True, False), lambda x: x[:, ::-1]),
        ((0, False, True), lambda x: x[::-1]),
        ((90, True, False), lambda x: np.rot90(x, 1)[:, ::-1]),
    ],
)
def test_rotation_metadata_is_applied(tmp_path: Path, turn: tuple, expected) -> None:
    picture = np.full((32, 64, 3), 40, np.uint8)
    picture[:16, :32] = 220  # top left
    picture[16:, :32] = 130  # bottom left
    path = write(tmp_path / "turned.mp4", picture[None].repeat(3, 0), [0, 33, 66], turn=turn)
    frames, _ = decode_uint8(path)
    truth = expected(picture)
    assert frames[0].shape == truth.shape
    assert np.abs(frames[0].astype(int) - truth).mean() < 4
    assert (probe(path).height, probe(path).width) == truth.shape[:2]


def test_alpha_is_laid_on_white(tmp_path: Path) -> None:
    picture = np.zeros((16, 16, 4), np.uint8)
    picture[..., 0] = 200
    picture[:, :8, 3] = 255
    picture[:8, 8:, 3] = 128
    still = tmp_path / "still.png"
    Image.fromarray(picture).save(still)
    frames, _ = decode_uint8(still)
    assert frames.shape == (1, 16, 16, 3)
    assert frames[0, 0, 0].tolist() == [200, 0, 0]
    assert frames[0, 15, 15].tolist() == [255, 255, 255]
    assert np.abs(frames[0, 0, 15].astype(int) - [227, 127, 127]).max() <= 1

    moving = tmp_path / "moving.webp"
    images = [Image.fromarray(np.roll(picture, 2 * k, axis=1)) for k in range(4)]
    images[0].save(moving, save_all=True, append_images=images[1:], duration=[100, 200, 300, 100], lossless=True, exact=True)
    frames, _ = decode_uint8(moving)
    assert len(frames) == 4
    assert frames[1, 15, 0].tolist() == [255, 255, 255]
    assert numbers(decode_uint8(moving, fps=10.0)[0]) == [numbers(frames)[i] for i in (0, 1, 1, 2, 2, 2, 3)]


def test_alpha_inside_a_film_is_laid_on_white(tmp_path: Path) -> None:
    path = tmp_path / "film.mov"
    picture = np.zeros((16, 16, 4), np.uint8)
    picture[:, :8] = (0, 0, 200, 255)
    with av.open(str(path), "w") as container:
        video = container.add_stream("qtrle", rate=5)
        video.height, video.width, video.pix_fmt = 16, 16, "argb"
        for _ in range(2):
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgba").reformat(format="argb")))
        container.mux(video.encode(None))
    frames, _ = decode_uint8(path)
    assert frames.shape == (2, 16, 16, 3)
    assert frames[0, 8, 2].tolist() == [0, 0, 200]
    assert frames[0, 8, 12].tolist() == [255, 255, 255]


def test_what_is_transparent_may_be_laid_on_black(tmp_path: Path) -> None:
    strokes = np.zeros((16, 16, 4), np.uint8)
    strokes[4:8] = 255
    Image.fromarray(strokes).save(tmp_path / "strokes.png")
    assert (decode_uint8(tmp_path / "strokes.png")[0] == 255).all()
    assert np.array_equal(decode_uint8(tmp_path / "strokes.png", ground="black")[0][0], strokes[..., :3])
    with av.open(str(tmp_path / "strokes.mov"), "w") as container:
        video = container.add_stream("qtrle", rate=5)
        video.height, video.width, video.pix_fmt = 16, 16, "argb"
        container.mux(video.encode(av.VideoFrame.from_ndarray(strokes, format="rgba").reformat(format="argb")))
        container.mux(video.encode(None))
    assert np.array_equal(decode_uint8(tmp_path / "strokes.mov", ground="black")[0][0], strokes[..., :3])
    assert (decode_uint8(tmp_path / "strokes.mov")[0] == 255).all()


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize(("aspect", "width"), [(Fraction(2), 128), (Fraction(1, 2), 32), (Fraction(1), 64), (Fraction(9), 64)])
def test_pixels_that_are_not_square_are_made_square(tmp_path: Path, aspect: Fraction, width: int, suffix: str) -> None:
    picture = np.full((32, 64, 3), 40, np.uint8)
    picture[:, :16] = 220
    path = write(tmp_path / f"film{suffix}", picture[None].repeat(3, 0), [0, 33, 66], aspect=aspect)
    frames, _ = decode_uint8(path)
    assert frames.shape == (3, 32, width, 3)
    assert abs(int(frames[0, 16, width // 8].mean()) - 220) < 6
    assert abs(int(frames[0, 16, width // 2].mean()) - 40) < 6
    assert (probe(path).height, probe(path).width) == (32, width)
    # A film that lies on its side is squared before it is turned.
    turned = write(tmp_path / "turned.mp4", picture[None].repeat(3, 0), [0, 33, 66], aspect=aspect, turn=(90, False, False))
    assert decode_uint8(turned)[0].shape == (3, width, 32, 3)


@pytest.mark.parametrize(("suffix", "codec"), [(".mp4", "libx264"), (".mkv", "libx264"), (".webm", "libvpx-vp9")])
@pytest.mark.parametrize("sound", [0.0, 1.0, 9.0])
def test_a_film_ends_with_its_picture_not_with_its_sound(tmp_path: Path, suffix: str, codec: str, sound: float) -> None:
    path = write(tmp_path / f"film{suffix}", numbered(20), [100 * k for k in range(20)], codec=codec, rate=10, sound=sound)
    about = probe(path)
    assert about.seconds == pytest.approx(2.0, abs=0.02)
    assert about.frames == 20
    assert numbers(decode_uint8(path, start=about.seconds - 0.3, fps=10.0, frames=3)[0]) == [17, 18, 19]


def test_only_a_picture_without_a_duration_is_still(film: Path, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "two.gif", save_all=True, append_images=[Image.new("RGB", (8, 8), "red")])
    assert [probe(path).still for path in (tmp_path / "one.png", tmp_path / "two.gif", film)] == [True, False, False]


def test_exif_orientation_of_a_photograph_is_applied(tmp_path: Path) -> None:
    picture = np.zeros((16, 32, 3), np.uint8)
    picture[:, :16] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to view
    Image.fromarray(picture).save(tmp_path / "photo.jpg", exif=exif, quality=95)
    frames, fps = decode_uint8(tmp_path / "photo.jpg")
    assert frames.shape == (1, 32, 16, 3)
    assert fps == 1.0
    assert frames[0, 4, 8, 0] > 250
    assert frames[0, 28, 8, 0] < 5


def test_sixteen_bit_grey_keeps_its_range(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    frames, _ = decode_uint8(tmp_path / "deep.png")
    assert np.abs(frames[0, ..., 0].astype(int) - ramp / 257).max() <= 1


def test_size_and_fit(film: Path) -> None:
    video = decode(film, frames=2, size=(16, 16))
    assert video.pixels.shape == (1, 3, 2, 16, 16)
    assert -1 <= float(video.pixels.min()) <= float(video.pixels.max()) <= 1
    padded, _ = decode_uint8(film, start=5.9, frames=1, size=(48, 48), fit="pad")
    assert (padded[0, 0] == 0).all()
    assert numbers(padded[:, 10:38]) == [59]


def test_an_odd_clip_and_a_single_frame(tmp_path: Path) -> None:
    clip = numbered(1, 33, 65)
    save(clip, tmp_path / "one.mp4", 8.0)
    frames, fps = decode_uint8(tmp_path / "one.mp4")
    assert frames.shape == (1, 33, 65, 3)
    assert fps == 8.0
    assert numbers(frames) == [0]


def test_only_what_is_needed_is_decoded(film: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []
    original = av.Packet.decode

    class Counting:
        def __init__(self, packet: av.Packet) -> None:
            self.packet = packet

        def __getattr__(self, name: str):
            return getattr(self.packet, name)

        def decode(self):
            counted.append(self.packet.pts)
            return original(self.packet)

    from tubelet.media import decode as room

    plain = room.InputContainer.demux
    monkeypatch.setattr(room, "_packets", lambda container, video: map(Counting, plain(container, video)))
    decode_uint8(film, start=4.9, frames=2)
    assert 0 < len(counted) <= 24
    counted.clear()
    source = stream(film)
    next(source)
    source.close()
    assert 0 < len(counted) <= 12


@pytest.mark.parametrize("kind", ["cut", "half", "webm", "gif", "webp", "png", "head", "hole"])
def test_truncated_and_damaged_files_are_found(tmp_path: Path, kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (30, 48, 48, 3), dtype=np.uint8)
    suffix = {"webm": ".webm", "gif": ".gif", "webp": ".webp", "png": ".png"}.get(kind, ".mp4")
    path = tmp_path / f"film{suffix}"
    if kind == "webm":
        write(path, noise, list(range(30)), base=Fraction(1, 30), codec="libvpx-vp9")
    else:
        save(noise[:3] if kind == "gif" else noise, path, 30.0)
    data = path.read_bytes()
    half = len(data) // 2
    path.write_bytes(
        {"cut": data[:-100], "head": data[:300], "hole": data[:half] + bytes(4000) + data[half + 4000 :]}.get(kind, data[:half])
    )
    with pytest.raises(UserError, match=r"truncated|damaged") as caught:
        decode_uint8(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("empty.mp4", b"", "empty"),
        ("text.mp4", b"this is a text, not a film\n" * 40, "not a film"),
        ("text.png", b"\x89PNG\r\n\x1a\nnothing behind the signature", "picture"),
        ("list.mp4", b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n/etc/hostname\n#EXT-X-ENDLIST\n", "not a film"),
        ("list.ffconcat", b"ffconcat version 1.0\nfile other.mp4\n", "not a film"),
        ("page.nfo", b"plain words that FFmpeg would type onto a screen\n" * 20, "not a film"),
    ],
)
def test_what_is_no_film_is_refused(tmp_path: Path, name: str, data: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(data)
    for read in (decode_uint8, probe):
        with pytest.raises(UserError, match=says):
            read(tmp_path / name)


def test_sound_alone_a_folder_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(8000))
    for name, says in (("sound.wav", "no video"), (".", "folder"), ("missing.mp4", "No such file")):
        with pytest.raises(UserError, match=says):
            decode_uint8(tmp_path / name)


def test_impossible_wishes_are_refused(film: Path, varying: Path) -> None:
    for wish, says in (
        ({"start": 60.0}, "ends at"),
        ({"start": -1.0}, "start"),
        ({"start": float("nan")}, "start"),
        ({"fps": 0.0}, "fps"),
        ({"frames": 0}, "at least 1"),
        ({"frames": 61}, "only 60"),
        ({"start": 5.0, "frames": 11}, "only 10"),
        ({"size": (0, 16)}, "size"),
    ):
        with pytest.raises(UserError, match=says):
            decode_uint8(film, **wish)


def test_a_film_too_long_to_hold_is_refused(film: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tubelet.media.decode.LARGEST_BYTES", 32 * 48 * 3 * 10)
    with pytest.raises(UserError, match="too long"):
        decode_uint8(film)
    assert len(decode_uint8(film, frames=10)[0]) == 10
    assert sum(1 for _ in stream(film)) == 60
