"""A generated clip: its pixels, the settings that make it again, and how long it took."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tubelet.core.errors import UserError
from tubelet.core.types import Video

if TYPE_CHECKING:
    from tubelet.media.audio import Audio

SETTINGS_KEY = "settings"


@dataclass(frozen=True, eq=False)
class Clip:
    """One film (`video`, batch of 1).

    `settings` holds everything that `tubelet.generate.system.regenerate` needs, as JSON values: prompt, text (what the model
    read, where the prompt was expanded), seed, size, frames, fps, steps, guidance, interval, solver, shift, system, digest,
    dtype, device, version. `timings` are seconds for text, denoise and decode; they are not stored in files.
    """

    video: Video
    settings: dict[str, Any]
    timings: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert len(self.video) == 1, f"a clip is one film, got a batch of {len(self.video)}"

    def __repr__(self) -> str:
        film = self.video
        form = f"{film.frames} frames of {film.size[0]}x{film.size[1]}, {film.fps:g} a second"
        return f"<Clip {self.settings.get('prompt', '')!r}: {form}>"

    def save(self, path: str | Path, audio: Audio | None = None) -> Path:
        """Write the film by its suffix: .mp4, .webp, .gif, or .png for a contact sheet (of one frame: the picture).

        The settings travel inside, and so does `audio`, which only an .mp4 holds.

        Returns the path. Raises UserError for another suffix or a place that cannot be written.
        """
        from tubelet.media import encode  # imported late: generating needs no media library

        return encode.save(self.video.to_uint8()[0], path, self.video.fps, metadata_of(self.settings), audio)


def metadata_of(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings as a file carries them: readable prompt and maker, and the whole as JSON."""
    return {
        "software": f"tubelet {settings.get('version', '')}".strip(),
        "prompt": str(settings.get("prompt", "")),
        SETTINGS_KEY: json.dumps(dict(settings), sort_keys=True, ensure_ascii=True, separators=(",", ":")),
    }


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings of a file that `Clip.save` wrote. Raises UserError when it is unreadable or holds none."""
    from tubelet.media import encode

    text = encode.read_metadata(path).get(SETTINGS_KEY)
    try:
        settings = json.loads(text) if text else None
    except (json.JSONDecodeError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise UserError(f"{path} holds no settings of tubelet; name a file that tubelet generate wrote")
    return settings
