"""Simulated, captioned clips with exact state: any size, any length, from a seed."""

from __future__ import annotations

from tubelet.worlds.base import Episode, World, foreground
from tubelet.worlds.persist2d import Persist2D
from tubelet.worlds.phys2d import Phys2D

WORLDS: dict[str, World] = {world.name: world for world in (Phys2D(), Persist2D())}

__all__ = ["WORLDS", "Episode", "World", "foreground"]
