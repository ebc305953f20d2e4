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


def load(name_or_path: str = "worlds-64") -> System:
    """Load a whole system (codec, denoiser, text encoder) by shipped name or by folder; see `tubelet.generate.system.load`."""
    from tubelet.generate.system import load as load_system  # imported late: `import tubelet` stays instant

    return load_system(name_or_path)
