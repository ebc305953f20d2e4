"""One film has one encoding, whatever lies in memory beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tubelet.media.encode import save


def test_a_small_film_is_encoded_alike_every_time(tmp_path: Path) -> None:
    rows, columns = np.mgrid[:64, :64]
    frames = np.full((17, 64, 64, 3), (232, 236, 242), np.uint8)
    frames[:, 55:] = (196, 190, 180)
    for t, frame in enumerate(frames):
        frame[np.hypot(rows - 48, columns - 56 + 3 * t) < 6.4] = (39, 158, 72)
    random = np.random.RandomState(0)
    frames = np.clip(frames + random.randint(-3, 4, frames.shape), 0, 255).astype(np.uint8)  # as a codec leaves it
    encodings = set()
    for number in range(40):
        beside = [random.bytes(random.randint(1000, 60000)) for _ in range(8)]
        save(frames, tmp_path / f"{number}.mp4", 8.0)
        encodings.add((tmp_path / f"{number}.mp4").read_bytes())
        del beside
    assert len(encodings) == 1
