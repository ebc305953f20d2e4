"""The constants of the simulated worlds, fixed so that any judge can read any clip: colours, shapes, radii, floor, gravity,
words.

Lengths are in short sides of the frame (the shorter of height and width is 1.0), x to the right, y down from the top left
corner; times are in seconds.
"""

from __future__ import annotations

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (214, 48, 49),
    "orange": (232, 126, 20),
    "yellow": (240, 200, 20),
    "green": (39, 158, 72),
    "cyan": (0, 178, 190),
    "blue": (40, 90, 215),
    "purple": (132, 60, 190),
    "pink": (236, 100, 170),
}
"""Name -> sRGB. Saturated colour is used for objects only, so one colour tracker reads every world."""
COLORS: tuple[str, ...] = tuple(PALETTE)
SHAPES: tuple[str, ...] = ("ball", "square", "triangle", "ring")
SIZES: tuple[str, ...] = ("small", "medium", "large")
RADIUS: dict[str, float] = {"small": 0.07, "medium": 0.10, "large": 0.14}

SQUARE_HALF = 0.86
"""Half side of a square over its radius."""
RING_INNER = 0.44
"""Inner over outer radius of a ring."""
TRIANGLE_CIRCUM = 1.2
"""Circumradius of the (equilateral) triangle over its radius."""
HALF_WIDTH: dict[str, float] = {"ball": 1.0, "square": SQUARE_HALF, "triangle": TRIANGLE_CIRCUM * 0.75**0.5, "ring": 1.0}
"""Half of the widest horizontal extent over the radius, at angle 0."""
ABOVE: dict[str, float] = {"ball": 1.0, "square": SQUARE_HALF, "triangle": TRIANGLE_CIRCUM, "ring": 1.0}
"""Extent above the centre over the radius, at angle 0."""
BELOW: dict[str, float] = {"ball": 1.0, "square": SQUARE_HALF, "triangle": TRIANGLE_CIRCUM / 2, "ring": 1.0}
"""Extent below the centre over the radius, at angle 0: an object at rest has its centre this far above the floor."""
AREA: dict[str, float] = {
    "ball": 3.141592653589793,
    "square": 4 * SQUARE_HALF**2,
    "triangle": 0.75 * 3**0.5 * TRIANGLE_CIRCUM**2,
    "ring": 3.141592653589793 * (1 - RING_INNER**2),
}
"""Area over the squared radius. Mass is area."""

FLOOR_Y = 0.86
"""The floor line over the frame's height, from the top."""
WALL = (232, 236, 242)
GROUND = (196, 190, 180)
PANEL = (120, 124, 130)
PANEL_HALF = 0.20
PANEL_HEIGHT = 0.46
"""How far the panel rises above the floor."""
PANEL_FOOT = 0.02
"""How far the panel reaches below the floor line."""
CUSHION = (150, 146, 140)
CUSHION_WIDTH = 0.04
PAPER = (244, 243, 240)
DESK = (208, 208, 206)
BRUSH_TIP = (84, 82, 80)
BRUSH_HANDLE = (150, 142, 132)
MOUTH = (92, 94, 100)
MOUTH_EYE = (240, 240, 240)

GRAVITY = 2.2
"""Short sides per second squared."""
MOON_GRAVITY = 0.7
"""The same when the caption says "on the moon"."""
RESTITUTIONS: tuple[float, ...] = (0.5, 0.7, 0.9)

SPEEDS: tuple[str, ...] = ("slowly", "steadily", "fast")
SLOW_BELOW = 0.35
"""Frame widths per second; below is "slowly"."""
FAST_ABOVE = 0.75
"""Frame widths per second; above is "fast"."""
SPEED_HULL = (0.245, 0.95)
"""Initial horizontal speeds seen in training, frame widths per second. Beyond `FAST_ABOVE`: "fast" is seen."""
SPEED_HOLE = (0.42, 0.49)
"""Never trained on together with the middle radius: the interior hole of the (speed, radius) plane."""
SHELL = 0.30
"""The outer shell reaches this far (relative) beyond the hull in speed or radius."""

PHYS2D_KINDS: tuple[str, ...] = ("slide", "fall", "bounce", "parabola", "collision", "billiard", "occlude")
PERSIST2D_KINDS: tuple[str, ...] = ("paint", "eat")
KINDS: tuple[str, ...] = PHYS2D_KINDS + PERSIST2D_KINDS
COMPOSED_KINDS: tuple[str, ...] = ("bounce+occlude", "collision+parabola")
"""Compositions of kinds that only tests show."""
HELD_OUT_MODULUS = 4
HELD_OUT_SIZE_MODULUS = 6

STROKES: tuple[str, ...] = ("horizontal", "vertical", "diagonal", "circle")
STROKE_RADIUS = 0.035
FOODS: tuple[str, ...] = ("cookie", "bread", "apple")
FOOD_COLOR: dict[str, tuple[int, int, int]] = {"cookie": (205, 140, 62), "bread": (226, 178, 92), "apple": PALETTE["red"]}
FOOD_RADIUS = 0.25
BITE_RADIUS = 0.12
HELD_OUT_FOOD = ("apple", 3)
"""(food, bites) that training never shows."""

NOMINAL_SECONDS = 2.0
"""Scenes are planned so that their law can be read within this time (17 frames at 8 fps)."""

TRAIN_SEEDS = range(2**31)
VALIDATION_SEEDS = range(2**31, 2**31 + 2**29)
TEST_SEEDS = range(2**31 + 2**29, 2**32)


def held_out_pair(color: int, shape: int) -> bool:
    """Whether the colour index and the shape (or stroke) index form a pair that training never shows."""
    return (color + shape) % HELD_OUT_MODULUS == 0


def held_out_size(size: int, kind: str) -> bool:
    """Whether the size index and the kind form a pair that training never shows; a composed kind counts as neither of its
    parts."""
    return kind in KINDS and (size + KINDS.index(kind)) % HELD_OUT_SIZE_MODULUS == 0


def speed_word(speed: float) -> str:
    """The word for an absolute speed in frame widths per second."""
    return "slowly" if speed < SLOW_BELOW else "fast" if speed > FAST_ABOVE else "steadily"
