"""Films with sound: written, read back to the sample, refused where they are broken."""

from __future__ import annotations

import itertools
import subprocess
import sys
import wave
from pathlib import Path

import av
import numpy as np
import pytest

from tubelet.core.errors import UserError
from tubelet.core.types import Video
from tubelet.generate.clip import Clip, read_settings
from tubelet.media.audio import Audio, spectrogram
from tubelet.media.decode import decode_audio, decode_uint8
from tubelet.media.encode import read_metadata, save


def clicks(rate: int, seconds: float = 2.125) -> Audio:
    """A tone that is struck at 0.5 and at 1.25 seconds."""
    t = np.arange(round(rate * seconds)) / rate
    wave = sum((t >= s) * np.exp(-np.maximum(t - s, 0) * 20) * np.sin(2 * np.pi * 440 * (t - s)) for s in (0.5, 1.25))
    return Audio.from_float(0.5 * np.asarray(wave), rate)


def film(count: int = 17) -> np.ndarray:
    return np.broadcast_to((10 * np.arange(count)).astype(np.uint8)[:, None, None, None], (count, 32, 48, 3)).copy()


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_sound_comes_back_to_the_sample(tmp_path: Path, rate: int) -> None:
    audio = clicks(rate)
    found = decode_audio(save(film(), tmp_path / "film.mp4", 8.0, {"prompt": "click"}, audio))
    assert found.rate == rate
    assert len(found.samples) == len(audio.samples)
    error = found.to_float() - audio.to_float()
    assert np.square(error).mean() < 1e-3 * np.square(audio.to_float()).mean(), "30 dB"
    first = np.flatnonzero(np.abs(found.to_float()) > 0.05)[0] / rate
    assert first == pytest.approx(0.5, abs=0.003)
    assert read_metadata(tmp_path / "film.mp4") == {"prompt": "click"}


def test_pixels_are_the_same_with_sound_and_without(tmp_path: Path) -> None:
    silent, heard = save(film(), tmp_path / "a.mp4", 8.0), save(film(), tmp_path / "b.mp4", 8.0, audio=clicks(8000))
    assert np.array_equal(decode_uint8(silent)[0], decode_uint8(heard)[0])


def test_a_film_with_sound_is_what_browsers_play(tmp_path: Path) -> None:
    path = save(film(), tmp_path / "film.mp4", 8.0, audio=clicks(16000))
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    with av.open(str(path)) as container:
        video, sound = container.streams.video[0], container.streams.audio[0]
        assert (video.codec_context.name, sound.codec_context.name, sound.layout.name) == ("h264", "aac", "mono")
        assert sound.codec_context.profile == "LC"
        assert float(sound.duration * sound.time_base) == float(video.duration * video.time_base) == 2.125
        packets = [packet for packet in container.demux(video, sound) if packet.dts is not None]
        times = [float(packet.dts * packet.time_base) for packet in packets]
        kinds = [packet.stream.type for packet in packets]
    with av.open(str(path)) as container:
        frames = sum(frame.samples for frame in container.decode(audio=0))
    assert frames >= 34_000
    assert kinds.index("audio") < 5, "side by side, not one behind the other"
    assert max(b - a for a, b in itertools.pairwise(times)) < 0.5


@pytest.mark.parametrize(("frames", "seconds"), [(17, 0.05), (17, 4.0), (1, 0.125)])
def test_sound_may_be_shorter_or_longer_than_the_film(tmp_path: Path, frames: int, seconds: float) -> None:
    path = save(film(frames), tmp_path / "film.mp4", 8.0, audio=clicks(8000, seconds))
    assert len(decode_audio(path).samples) == round(8000 * seconds)
    assert len(decode_uint8(path)[0]) == frames


def test_sound_is_resampled(tmp_path: Path) -> None:
    found = decode_audio(save(film(), tmp_path / "film.mp4", 8.0, audio=clicks(16000)), rate=8000)
    assert found.rate == 8000
    assert len(found.samples) == pytest.approx(17_000, abs=2)
    assert np.corrcoef(found.to_float()[:16_900], clicks(8000).to_float()[:16_900])[0, 1] > 0.99


def test_equal_sound_gives_equal_bytes_in_another_process(tmp_path: Path) -> None:
    code = (
        "import numpy as np; from tubelet.media.audio import Audio; from tubelet.media.encode import save;"
        "audio = Audio((np.arange(9000) % 97 * 300 - 14000).astype(np.int16), 8000);"
        f"save(np.full((9, 32, 32, 3), 90, np.uint8), {str(tmp_path / 'other.mp4')!r}, 8.0, audio=audio)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"})
    audio = Audio((np.arange(9000) % 97 * 300 - 14000).astype(np.int16), 8000)
    own = save(np.full((9, 32, 32, 3), 90, np.uint8), tmp_path / "own.mp4", 8.0, audio=audio)
    assert own.read_bytes() == (tmp_path / "other.mp4").read_bytes()


def test_files_of_other_origin_are_heard(tmp_path: Path) -> None:
    """Two channels, no film; a film whose sound sets in late."""
    song = tmp_path / "song.wav"
    with wave.open(str(song), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(np.stack([clicks(8000).samples, np.zeros(17_000, np.int16)], axis=1).tobytes())
    found = decode_audio(song)
    assert len(found.samples) == 17_000
    assert np.corrcoef(found.to_float(), clicks(8000).to_float())[0, 1] > 0.99
    late = tmp_path / "late.mkv"
    with av.open(str(late), "w") as container:
        video, sound = container.add_stream("libx264", rate=8), container.add_stream("pcm_s16le", rate=8000)
        video.height, video.width, video.pix_fmt, sound.layout = 32, 48, "yuv420p", "mono"
        for number, frame in enumerate(film()):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts = number
            container.mux(video.encode(picture))
        container.mux(video.encode(None))
        frame = av.AudioFrame.from_ndarray(clicks(8000).samples[None], format="s16", layout="mono")
        frame.rate, frame.pts = 8000, 4000
        container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
    found = decode_audio(late)
    assert not found.samples[:7900].any()
    assert np.flatnonzero(np.abs(found.to_float()) > 0.05)[0] / 8000 == pytest.approx(1.0, abs=0.003)


def test_a_truncated_film_is_refused(tmp_path: Path) -> None:
    whole = save(film(), tmp_path / "film.mp4", 8.0, audio=clicks(16000)).read_bytes()
    for share in (0.98, 0.7, 0.3):
        (tmp_path / "part.mp4").write_bytes(whole[: round(share * len(whole))])
        with pytest.raises(UserError, match="truncated"):
            decode_audio(tmp_path / "part.mp4")


def test_wrong_input_is_one_sentence(tmp_path: Path) -> None:
    silent = save(film(), tmp_path / "silent.mp4", 8.0)
    picture = save(film(1), tmp_path / "picture.png", 8.0)
    (tmp_path / "text.mp4").write_text("no film" * 10)
    cases = [
        (lambda: decode_audio(silent), "holds no sound"),
        (lambda: decode_audio(picture), "is a picture and holds no sound"),
        (lambda: decode_audio(tmp_path / "missing.mp4"), "cannot read"),
        (lambda: decode_audio(tmp_path / "text.mp4"), "not a film"),
        (lambda: decode_audio(silent, rate=0), "rate must be at least 1"),
        (lambda: save(film(), tmp_path / "film.gif", 8.0, audio=clicks(8000)), "choose .mp4"),
        (lambda: save(film(), tmp_path / "film.mp4", 8.0, audio=clicks(9000)), "got 9000; resample"),
        (lambda: Audio(np.zeros(3), 8000), "int16"),
        (lambda: Audio(np.zeros(0, np.int16), 8000), "not empty"),
        (lambda: Audio(np.zeros(3, np.int16), 0), "one sample a second"),
    ]
    for call, said in cases:
        with pytest.raises(UserError, match=said) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*film*")), "nothing is left behind"


def test_floats_and_samples() -> None:
    audio = Audio.from_float(np.array([-2.0, -1.0, 0.0, 0.5, 1.0]), 8000)
    assert audio.samples.tolist() == [-32767, -32767, 0, 16384, 32767]
    assert audio.to_float() == pytest.approx([-1, -1, 0, 0.5, 1], abs=1e-4)
    assert audio.seconds == 5 / 8000


def test_a_generated_clip_is_saved_with_sound(tmp_path: Path) -> None:
    clip = Clip(Video.from_uint8(film(), 8.0), {"prompt": "it clicks", "seed": 3})
    path = clip.save(tmp_path / "clip.mp4", clicks(8000))
    assert len(decode_audio(path).samples) == 17_000
    assert read_settings(path) == clip.settings


def test_a_picture_of_a_tone_is_a_line_at_its_pitch() -> None:
    picture = spectrogram(clicks(8000), 64, 200)
    assert picture.shape == (64, 200, 3)
    assert (picture[:, :30] == 255).all(), "silence is white"
    struck = picture[:, 50, 0].astype(int)
    assert abs(64 - 1 - struck.argmin() - 440 * 64 // 4000) <= 1
    assert struck.min() < 100
    with pytest.raises(UserError, match="at least 1 x 1"):
        spectrogram(clicks(8000), 0, 9)
