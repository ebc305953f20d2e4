"""Films written and read back: quality, size, metadata, equal bytes, and what browsers ask for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tubelet.core.errors import UserError
from tubelet.media.decode import decode_uint8
from tubelet.media.encode import FORMATS, read_metadata, save

METADATA = {"prompt": 'a réd "ball" 球\nfalls', "settings": '{"seed": 3, "size": [64, 64]}', "digest": "ab" * 32}


def ball(frames: int = 17, height: int = 64, width: int = 64) -> np.ndarray:
    """A red ball crosses a light ground, edges antialiased."""
    rows, columns = np.mgrid[:height, :width]
    clip = np.empty((frames, height, width, 3), np.uint8)
    for number in range(frames):
        x, y = 10 + (width - 20) * number / max(1, frames - 1), height / 2 + 5 * np.sin(number)
        cover = np.clip(9.5 - np.hypot(columns - x, rows - y), 0, 1)[..., None]
        clip[number] = (np.array((235, 235, 225)) * (1 - cover) + np.array((200, 30, 40)) * cover).round()
    return clip


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return float(10 * np.log10(255**2 / max(1e-9, np.square(a.astype(np.float64) - b).mean())))


def boxes(data: bytes) -> list[str]:
    """Names of an mp4's outermost boxes, in order."""
    names, at = [], 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        names.append(data[at + 4 : at + 8].decode("ascii"))
        at += size
    return names


@pytest.mark.parametrize(("suffix", "least"), [(".mp4", 36), (".webp", 36), (".gif", 38)])
def test_a_film_survives_the_round_trip(tmp_path: Path, suffix: str, least: float) -> None:
    clip = ball()
    path = save(clip, tmp_path / f"ball{suffix}", 8.0)
    frames, fps = decode_uint8(path)
    assert psnr(frames, clip) >= least
    assert fps == pytest.approx(8, rel=0.01)


def test_colours_do_not_drift(tmp_path: Path) -> None:
    """Flat fields test the matrix and the range: a wrong one is off by 10 and more."""
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 255, 255), (0, 0, 0), (128, 128, 128)]
    clip = np.stack([np.full((32, 32, 3), colour, np.uint8) for colour in colours])
    for suffix, most in ((".mp4", 3), (".webp", 4), (".gif", 1)):
        frames, _ = decode_uint8(save(clip, tmp_path / f"fields{suffix}", 4.0))
        assert np.abs(frames.astype(int) - clip).max() <= most, suffix


@pytest.mark.parametrize(("height", "width"), [(33, 65), (64, 63), (1, 1), (63, 64)])
@pytest.mark.parametrize("suffix", [".mp4", ".webp", ".gif"])
def test_odd_sizes_come_back_exactly(tmp_path: Path, suffix: str, height: int, width: int) -> None:
    clip = ball(3, height, width)
    path = save(clip, tmp_path / f"odd{suffix}", 8.0, {"prompt": "odd"})
    frames, _ = decode_uint8(path)
    assert frames.shape == clip.shape
    assert psnr(frames, clip) >= 25
    assert read_metadata(path) == {"prompt": "odd"}


def test_mp4_is_what_browsers_play(tmp_path: Path) -> None:
    path = save(ball(5, 64, 64), tmp_path / "ball.mp4", 8.0, METADATA)
    names = boxes(path.read_bytes())
    assert names[0] == "ftyp"
    assert names.index("moov") < names.index("mdat")
    with av.open(str(path)) as container:
        video = container.streams.video[0]
        assert video.codec_context.name == "h264"
        assert video.codec_context.pix_fmt == "yuv420p"
        assert video.codec_context.profile in ("High", "Main", "Baseline", "Constrained Baseline")
        assert video.average_rate == 8
        assert video.frames == 5
        frame = next(container.decode(video))
        assert (frame.colorspace, frame.color_primaries, frame.color_trc, frame.color_range) == (1, 1, 1, 1)


@pytest.mark.parametrize("fps", [1.0, 7.5, 23.976, 24.0, 60.0])
def test_the_frame_rate_is_kept(tmp_path: Path, fps: float) -> None:
    _, found = decode_uint8(save(ball(4), tmp_path / "rate.mp4", fps))
    assert found == pytest.approx(fps, rel=1e-4)


@pytest.mark.parametrize("suffix", FORMATS)
def test_metadata_survives(tmp_path: Path, suffix: str) -> None:
    long = {**METADATA, "long": "x" * 20_000}
    assert read_metadata(save(ball(3), tmp_path / f"a{suffix}", 8.0, long)) == long
    assert read_metadata(save(ball(3), tmp_path / f"b{suffix}", 8.0)) == {}


@pytest.mark.parametrize("suffix", FORMATS)
def test_equal_input_gives_equal_bytes_in_another_process(tmp_path: Path, suffix: str) -> None:
    code = (
        "import numpy as np; from tubelet.media.encode import save;"
        "clip = np.random.default_rng(5).integers(0, 255, (4, 48, 48, 3), dtype=np.uint8) // 64 * 64;"
        f"save(clip, {str(tmp_path / 'other')!r} + {suffix!r}, 8.0, {{'prompt': 'p'}})"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"})
    clip = np.random.default_rng(5).integers(0, 255, (4, 48, 48, 3), dtype=np.uint8) // 64 * 64
    one = save(clip, tmp_path / f"one{suffix}", 8.0, {"prompt": "p"}).read_bytes()
    assert one == (tmp_path / f"other{suffix}").read_bytes()
    clip[2, 5:20, 5:20] ^= 255
    assert one != save(clip, tmp_path / f"two{suffix}", 8.0, {"prompt": "p"}).read_bytes()


def test_animations_repeat_for_ever_and_keep_their_length(tmp_path: Path) -> None:
    for suffix in (".gif", ".webp"):
        with Image.open(save(ball(17), tmp_path / f"ball{suffix}", 8.0)) as image:
            assert image.info["loop"] == 0
            assert image.n_frames == 17  # type: ignore[attr-defined]
            total = 0
            for number in range(17):
                image.seek(number)
                image.load()
                total += image.info["duration"]
        assert total == pytest.approx(17 / 8 * 1000, abs=10)


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".webp"])
def test_a_film_that_stands_still_keeps_its_length(tmp_path: Path, suffix: str) -> None:
    """Animated pictures store repeated frames once; by timestamp all come back."""
    clip = ball(17)
    clip[5:] = clip[5]
    frames, _ = decode_uint8(save(clip, tmp_path / f"still{suffix}", 8.0), fps=8.0, frames=17)
    assert psnr(frames, clip) >= 35


def test_a_gif_has_one_palette(tmp_path: Path) -> None:
    """A palette per frame makes still grounds flicker."""
    clip = ball(9)
    frames, _ = decode_uint8(save(clip, tmp_path / "ball.gif", 8.0))
    ground = frames[:, :4, :4].reshape(9, -1)
    assert (ground == ground[0]).all()


def test_png_of_one_frame_is_the_picture_itself(tmp_path: Path) -> None:
    frame = ball(1)
    path = save(frame, tmp_path / "picture.png", 8.0, {"prompt": "a red ball"})
    assert np.array_equal(decode_uint8(path)[0], frame)
    assert read_metadata(path)["prompt"] == "a red ball"


def test_png_is_a_sheet(tmp_path: Path) -> None:
    path = save(ball(17), tmp_path / "sheet.png", 8.0, {"prompt": "a red ball"})
    with Image.open(path) as image:
        assert image.width > 8 * 64
        assert image.height > 2 * 64
    assert read_metadata(path)["prompt"] == "a red ball"


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ball.mp4").write_bytes(b"older")
    monkeypatch.setattr("tubelet.media.encode._quality", lambda height, width: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(ball(2), tmp_path / "ball.mp4", 8.0)
    assert [p.name for p in tmp_path.iterdir()] == ["ball.mp4"]
    assert (tmp_path / "ball.mp4").read_bytes() == b"older"


def test_wrong_input_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "text.mp4").write_text("no film" * 10)
    cases = [
        (lambda: save(ball(2), tmp_path / "ball.avi", 8.0), r"\.mp4, \.webp, \.gif, \.png"),
        (lambda: save(ball(2), tmp_path / "ball", 8.0), "suffix"),
        (lambda: save(ball(2)[:0], tmp_path / "ball.mp4", 8.0), "at least one frame"),
        (lambda: save(ball(2).astype(np.float32), tmp_path / "ball.mp4", 8.0), "uint8"),  # type: ignore[arg-type]
        (lambda: save(ball(2)[..., :1], tmp_path / "ball.mp4", 8.0), "uint8"),
        (lambda: save(ball(2), tmp_path / "ball.mp4", 0.0), "fps"),
        (lambda: save(ball(2), tmp_path / "ball.mp4", float("nan")), "fps"),
        (lambda: save(ball(2), tmp_path / "file" / "ball.mp4", 8.0), "cannot write"),
        (lambda: read_metadata(tmp_path / "missing.mp4"), "cannot read"),
        (lambda: read_metadata(tmp_path / "text.mp4"), "neither a film nor a picture"),
    ]
    for call, says in cases:
        with pytest.raises(UserError, match=says) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "text.mp4"]
