"""tubelet: the open Sora system. Words, images and clips in, video out.

import tubelet
system = tubelet.load("worlds-64")
clip = system.generate("a red ball bounces", seed=0)
clip.save("ball.mp4")
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tubelet.generate.system import System

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def load(name_or_path: str = "worlds-64", device: str = "auto", dtype: str | None = None, *, expand: bool = True) -> System:
    """Load a whole system (codec, denoiser, text encoder) by shipped name or by folder.

    `device` is auto, cpu, cuda or mps; `dtype` float32 or bfloat16, by default bfloat16 where the device is fast at it.
    `expand`: prompts become captions of the kind that the system was trained on, where it names its rules, as
    `tubelet generate` does. Raises UserError as `tubelet.generate.system.load`.
    """
    from dataclasses import replace  # imported late: `import tubelet` stays instant

    from tubelet.generate.system import expander_of
    from tubelet.generate.system import load as load_system

    system = load_system(name_or_path, device, dtype)
    return replace(system, expander=expander_of(system.config) if expand else None)
