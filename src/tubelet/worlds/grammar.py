"""The language of the worlds: scene attributes to captions, and any caption back to attributes.

A scene is a plain dict of canonical words. Only what is known is named:

- `kind`: one of constants.KINDS or constants.COMPOSED_KINDS.
- `objects`: list of dicts with `size`, `color`, `shape`, `motion` ("resting" or "oncoming", second objects only); the main
  object is first.
- `direction`: "left", "right" or "down"; `speed`: one of constants.SPEEDS; `place`: "left", "center" or "right", where the
  main object starts.
- `count`: bounces or bites; `moon`: True.
- `strokes` (paint): list of dicts with `color`, `stroke`, `direction` ("left", "right", "up", "down"); `food` and `side`
  (eat).

`compose` gives the short caption, `describe` the dense one, `paraphrase` a casual one; `parse` reads them all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tubelet.worlds.constants import COLORS, FOODS, SHAPES, SIZES, SPEEDS

Scene = dict[str, Any]
Event = tuple[float, str, tuple[int, ...]]

COLOR_WORDS: dict[str, tuple[str, ...]] = {
    "red": ("red", "crimson", "scarlet", "ruby", "cherry"),
    "orange": ("orange", "tangerine", "pumpkin", "apricot"),
    "yellow": ("yellow", "golden", "lemon", "gold"),
    "green": ("green", "emerald", "jade"),
    "cyan": ("cyan", "turquoise", "teal", "aqua"),
    "blue": ("blue", "azure", "cobalt", "navy", "sapphire"),
    "purple": ("purple", "violet", "plum", "lilac"),
    "pink": ("pink", "rose", "fuchsia", "bubblegum"),
}
SHAPE_WORDS: dict[str, tuple[str, ...]] = {
    "ball": ("ball", "sphere", "circle", "disc", "disk", "orb"),
    "square": ("square", "box", "cube", "block"),
    "triangle": ("triangle", "pyramid", "wedge"),
    "ring": ("ring", "donut", "doughnut", "hoop", "torus"),
}
SIZE_WORDS: dict[str, tuple[str, ...]] = {
    "small": ("small", "little", "tiny", "mini", "petite"),
    "medium": ("medium", "medium-sized", "mid-sized", "average", "middle-sized"),
    "large": ("large", "big", "huge", "giant", "massive", "enormous"),
}
SPEED_WORDS: dict[str, tuple[str, ...]] = {
    "slowly": ("slowly", "slow", "gently", "leisurely", "unhurriedly"),
    "steadily": ("steadily", "steady", "evenly"),
    "fast": ("fast", "quickly", "rapidly", "swiftly", "speedily", "quick", "rapid"),
}
COUNT_WORDS: dict[int, tuple[str, ...]] = {
    1: ("once", "one time", "a single time"),
    2: ("twice", "two times", "2 times"),
    3: ("three times", "3 times", "thrice"),
    4: ("several times", "many times", "again and again", "a few times", "four times", "4 times"),
}
"""Four stands for four and more."""
NUMBERS: dict[str, int] = {"a": 1, "one": 1, "two": 2, "three": 3, "four": 4, "1": 1, "2": 2, "3": 3, "4": 4}
MOTION_WORDS: dict[str, tuple[str, ...]] = {
    "resting": ("resting", "still", "waiting", "motionless", "standing", "stationary"),
    "oncoming": ("oncoming", "approaching"),
}
FOOD_WORDS: dict[str, tuple[str, ...]] = {
    "cookie": ("cookie", "biscuit"),
    "bread": ("bread", "loaf", "toast"),
    "apple": ("apple",),
}
FOOD_PHRASES: dict[str, tuple[str, ...]] = {
    "cookie": ("a cookie", "a biscuit", "the cookie"),
    "bread": ("a slice of bread", "a loaf", "bread", "a toast"),
    "apple": ("an apple", "the apple"),
}
STROKE_WORDS: dict[str, tuple[str, ...]] = {
    "horizontal": ("horizontal", "level", "sideways"),
    "vertical": ("vertical", "upright"),
    "diagonal": ("diagonal", "slanted", "slanting", "oblique"),
    "circle": ("circle", "ring", "loop", "hoop"),
}
GENERIC_WORDS = ("object", "shape", "thing", "item")

# (third person, -ing form) of the verbs that a person may choose; the first is the grammar's own.
VERBS: dict[str, tuple[tuple[str, str], ...]] = {
    "slide": (("slides", "sliding"), ("glides", "gliding"), ("moves", "moving"), ("travels", "traveling"), ("goes", "going")),
    "roll": (("rolls", "rolling"),),
    "fall": (("falls", "falling"), ("drops", "dropping"), ("plummets", "plummeting"), ("comes down", "coming down")),
    "bounce": (
        ("bounces", "bouncing"),
        ("drops and bounces", "dropping and bouncing"),
        ("falls and bounces", "falling and bouncing"),
    ),
    "parabola": (
        ("is thrown up", "thrown up"),
        ("is tossed", "tossed"),
        ("flies in an arc", "flying in an arc"),
        ("is lobbed", "lobbed"),
        ("is thrown", "thrown"),
    ),
    "collision": (
        ("hits", "hitting"),
        ("bumps into", "bumping into"),
        ("crashes into", "crashing into"),
        ("collides with", "colliding with"),
        ("knocks into", "knocking into"),
        ("strikes", "striking"),
    ),
    "occlude": (
        ("passes behind", "passing behind"),
        ("goes behind", "going behind"),
        ("moves behind", "moving behind"),
        ("disappears behind", "disappearing behind"),
        ("slides behind", "sliding behind"),
    ),
    "paint": (("paints", "painting"), ("draws", "drawing")),
    "eat": (("eats", "eating"), ("takes", "taking")),
}

# Words that name a kind, tried in this order: what is rarer and more telling comes first.
KIND_SIGNS: tuple[tuple[str, str], ...] = (
    ("billiard", r"billiards?|pool|snooker|cushions?"),
    ("paint", r"paint(?:s|ed|ing|brush)?|draw(?:s|n|ing)?|brush(?:es|stroke)?|strokes?"),
    ("eat", r"eat(?:s|en|ing)?|bit(?:e|es|ing|ten)|mouth|munch(?:es|ing)?|chew(?:s|ing)?|nibbl(?:e|es|ing)"),
)
MOTION_SIGNS: dict[str, str] = {
    "bounce": r"bounc(?:e|es|ed|ing)|rebound(?:s|ing)?|hop(?:s|ping)?",
    "occlude": r"behind|occluded|hidden by",
    "parabola": r"thrown|throw(?:s|ing)?|toss(?:ed|es|ing)?|lobbed|flung|launched|arc|parabola|hurled",
    "collision": r"hit(?:s|ting)?|collid(?:e|es|ed|ing)|collision|crash(?:es|ed|ing)?|bump(?:s|ed|ing)?|knock(?:s|ed|ing)?"
    r"|str(?:ikes?|uck|iking)|smash(?:es|ing)?|runs? into|running into|slams?|slamming",
    "fall": r"fall(?:s|ing)?|fell|drop(?:s|ped|ping)?|plummet(?:s|ing)?|plung(?:e|es|ing)|com(?:es|ing) down",
    "slide": r"slid(?:e|es|ing)|glid(?:e|es|ing)|mov(?:e|es|ing)|travel(?:s|ing|ling)?|roll(?:s|ing)?|drift(?:s|ing)?"
    r"|go(?:es|ing)?|cross(?:es|ing)?|pass(?:es|ing)?|speed(?:s|ing)|skat(?:es|ing)"
    r"|rac(?:e|es|ing)|rush(?:es|ing)|dash(?:es|ing)|zoom(?:s|ing)|skid(?:s|ding)|scoot(?:s|ing)|head(?:s|ing)",
}

OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}
FROM_TO = {
    "right": "from left to right",
    "left": "from right to left",
    "down": "from top to bottom",
    "up": "from bottom to top",
}
PLACE_PHRASE = {"left": "on the left", "center": "in the middle", "right": "on the right"}
WALLS = ("a gray wall", "a wall", "the wall", "a gray panel", "a screen", "a gray barrier")
OPENINGS = (
    "The camera is fixed and faces a pale plain backdrop above a sandy floor.",
    "A static camera looks straight ahead at a pale backdrop and a sandy floor.",
    "The view never changes: a pale empty backdrop above, a sandy floor below.",
)
OPENINGS_TABLE = (
    "The camera is fixed and looks straight down on a sandy billiard table with gray cushions.",
    "A static camera shows a sandy billiard table with gray cushions from above.",
    "The view never changes: a billiard table with gray cushions, seen from above.",
)
OPENINGS_PAPER = (
    "The camera is fixed and faces a blank sheet of paper.",
    "A static camera looks straight at a blank sheet of paper.",
    "The view never changes: a blank sheet of paper, seen from the front.",
)
OPENINGS_DESK = (
    "The camera is fixed and looks at food on a plain pale table.",
    "A static camera shows food on a plain pale table.",
    "The view never changes: food on a plain pale table.",
)


def _invert(table: Mapping[Any, Sequence[str]]) -> dict[str, Any]:
    return {word: canonical for canonical, words in table.items() for word in words}


_COLOR_OF, _SHAPE_OF, _SIZE_OF = _invert(COLOR_WORDS), _invert(SHAPE_WORDS), _invert(SIZE_WORDS)
_SPEED_OF, _MOTION_OF, _FOOD_OF, _STROKE_OF = (
    _invert(SPEED_WORDS),
    _invert(MOTION_WORDS),
    _invert(FOOD_WORDS),
    _invert(STROKE_WORDS),
)
_PLURALS = {("boxes" if word == "box" else word + "s"): word for word in (*_SHAPE_OF, *GENERIC_WORDS)}


def article(phrase: str) -> str:
    """The phrase with its indefinite article: "an orange ball", "a red ball". No word of the grammar needs more than its first
    letter."""
    return f"{'an' if phrase[0].lower() in 'aeiou' else 'a'} {phrase}"


def noun(thing: Mapping[str, str]) -> str:
    """The words of an object in order: motion, size, colour, shape; "object" when the shape is not known."""
    words = [thing[key] for key in ("motion", "size", "color") if key in thing]
    return " ".join([*words, thing.get("shape", "object")])


def _stroke_phrase(stroke: Mapping[str, str]) -> str:
    kind = stroke.get("stroke")
    words = [*([stroke["color"]] if "color" in stroke else []), "circle"] if kind == "circle" else []
    if kind != "circle":
        words = [*([kind] if kind else []), *([stroke["color"]] if "color" in stroke else []), "line"]
    text = article(" ".join(words))
    return f"{text} {FROM_TO[stroke['direction']]}" if "direction" in stroke else text


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def compose(scene: Mapping[str, Any]) -> str:
    """The short caption of a scene: one sentence, attributes that the scene does not name left out. parse(compose(scene)) ==
    scene."""
    kind = scene["kind"]
    if kind == "paint":
        return f"A brush paints {', then '.join(_stroke_phrase(s) for s in scene['strokes'])}."
    if kind == "eat":
        bites = {1: "one bite", 2: "two bites", 3: "three bites"}.get(scene.get("count", 0), "bites")
        side = f" from the {scene['side']}" if "side" in scene else ""
        food = "a slice of bread" if scene["food"] == "bread" else article(scene["food"])
        return f"A mouth takes {bites} out of {food}{side}."
    objects = scene["objects"]
    speed = f" {scene['speed']}" if "speed" in scene else ""
    where = scene.get("direction")
    toward = f" to the {where}" if where in ("left", "right") else ""
    place = f" {PLACE_PHRASE[scene['place']]}" if "place" in scene else ""
    count = f" {COUNT_WORDS[min(scene['count'], 4)][0]}" if "count" in scene else ""
    second = article(noun(objects[1])) if len(objects) > 1 else ""
    beside = f" next to {second}" if second else ""
    body = {
        "slide": f"slides{speed}{toward} along the floor{place}",
        "fall": f"falls{' straight down' if where == 'down' else ''}{place}{beside}",
        "bounce": f"drops and bounces{count}{toward}{place}{beside}",
        "parabola": f"is thrown up{toward}{place}{beside}",
        "collision": f"slides{speed}{toward} and hits {second or 'an object'}{place}",
        "billiard": f"rolls{speed}{toward} across a billiard table{place}",
        "occlude": f"passes{speed}{toward} behind a gray wall{place}",
        "bounce+occlude": f"drops and bounces{count}{toward} and passes behind a gray wall{place}",
        "collision+parabola": f"is thrown up{toward} and hits {second or 'an object'}{place}",
    }[kind]
    if kind == "billiard" and second:
        body += f" with {_listed([article(noun(o)) for o in objects[1:]])}"
    moon = " on the moon" if scene.get("moon") else ""
    text = f"{article(noun(objects[0]))} {body}{moon}."
    return text[0].upper() + text[1:]


def _the(thing: Mapping[str, str]) -> str:
    return f"the {thing['color']} {thing['shape']}"


def _times(events: Sequence[Event], kind: str) -> list[float]:
    return [t for t, k, _ in events if k == kind]


def _at(t: float) -> str:
    return f"at {t:.1f} s"


def where_along(x: float) -> str:
    """Words for a place along the width, a share of it from the left; thirds, the outer ones halved."""
    if x < 1 / 3:
        return "on the far left" if x < 1 / 6 else "on the left"
    return "in the middle" if x < 2 / 3 else "on the right" if x < 5 / 6 else "on the far right"


def where_within(x: float, y: float) -> str:
    """Words for a place in the picture, shares of width and height from the top left: one of nine."""
    across = "left" if x < 1 / 3 else "" if x < 2 / 3 else "right"
    if 1 / 3 <= y < 2 / 3:
        return f"on the {across}" if across else "in the middle"
    return f"at the {'top' if y < 1 / 3 else 'bottom'} {across}".rstrip()


def describe(
    scene: Mapping[str, Any],
    events: Sequence[Event],
    places: Sequence[str],
    *,
    wall: str = "",
    variant: int = 0,
    heavier: int | None = None,
) -> str:
    """The dense caption (45 to 66 words on average) of a fully attributed scene.

    It says where each thing is, since that is what a short one leaves most open: a model that is told need not decide.
    events: as in Episode, those that the clip shows; places: where objects start or strokes lie, of `where_along` or
    `where_within`; wall: where the gray wall stands, if there is one; variant: which of the openings; heavier: index of the
    heavier of the first two objects, None if they weigh the same.
    """
    kind = scene["kind"]
    openings = {"billiard": OPENINGS_TABLE, "paint": OPENINGS_PAPER, "eat": OPENINGS_DESK}.get(kind, OPENINGS)
    parts = [openings[variant % len(openings)]]
    if kind == "paint":
        names = ["A brush with a gray handle comes in and paints", "Then it paints"]
        ends = _times(events, "stroke_end")
        for i, stroke in enumerate(scene["strokes"]):
            done = f", done {_at(ends[i])}" if i < len(ends) else ""
            parts.append(f"{names[min(i, 1)]} {_stroke_phrase(stroke)} {places[i]}{done}.")
        gone = "At last the brush leaves, and all" if _times(events, "leave") else "All"
        parts.append(f"{gone} that has been painted stays where it was put, unchanged.")
        return " ".join(parts)
    if kind == "eat":
        count = {1: "one bite", 2: "two bites", 3: "three bites"}[scene["count"]]
        food = "a slice of bread" if scene["food"] == "bread" else article(scene["food"])
        parts.append(f"A gray mouth comes from the {scene['side']} and takes {count} out of {food} in the middle.")
        bites = _times(events, "bite")
        if bites:
            parts.append(f"It snaps shut {_listed([_at(t) for t in bites])}, and each time a round piece is gone for good.")
        if _times(events, "leave"):
            parts.append("Then it goes away, and the rest stays where it lay, unchanged.")
        else:
            parts.append("The rest stays where it lies and never moves.")
        return " ".join(parts)

    objects = scene["objects"]
    main = article(noun(objects[0]))
    main = main[0].upper() + main[1:]
    here = places[0]
    where = scene.get("direction")
    toward = f" to the {where}" if where in ("left", "right") else ""
    speed = f" {scene['speed']}" if "speed" in scene else ""
    lands, collides = _times(events, "floor"), _times(events, "collide")
    when = f" {_at(collides[0])}" if collides else ""
    if kind == "slide":
        parts.append(f"{main} starts {here} and slides{speed}{toward} along the floor in a straight line.")
        parts.append("Nothing pushes it and nothing holds it, so it keeps its speed and its outline all the way.")
    elif kind == "fall":
        parts.append(f"{main} starts high up {here}, is let go and falls straight down, gaining speed all the time.")
        parts.append(
            f"It lands on the floor {_at(lands[0])} and stays there at rest." if lands else "It is in the air all the time."
        )
    elif kind in ("bounce", "bounce+occlude"):
        count = COUNT_WORDS[min(scene["count"], 4)][0]
        how = " in ever lower hops" if toward else " on the spot"
        parts.append(f"{main} starts high up {here}, drops and bounces {count}{toward}{how}.")
        if lands:
            moments = _listed([_at(t) for t in lands[: scene["count"]]])
            parts.append(f"It meets the floor {moments}, and each time it comes back up less high.")
        if kind == "bounce+occlude":
            parts.append(
                f"On its way it passes behind a gray wall {wall} that stands on the floor and comes out on the other side."
            )
    elif kind in ("parabola", "collision+parabola"):
        parts.append(f"{main} starts {here} and is thrown up{toward} in a curved path.")
        tops = _times(events, "apex")
        parts.append(f"It is highest {_at(tops[0])}, then it comes down again." if tops else "It rises in a curve.")
        if kind == "collision+parabola":
            parts.append(f"It hits {article(noun(objects[1]))}{when}.")
        if lands:
            parts.append(f"It lands on the floor {_at(lands[0])} and stays there.")
    elif kind == "collision":
        parts.append(f"{main} starts {here}, slides{speed}{toward} and hits {article(noun(objects[1]))}")
        parts[-1] += f" that starts {places[1]}{when}."
    elif kind == "billiard":
        others = _listed([f"{article(noun(o))} {spot}" for o, spot in zip(objects[1:], places[1:], strict=True)])
        parts.append(f"{main} starts {here} and rolls{speed}{toward} across it, past {others}.")
        if collides:
            parts.append(f"Two of them meet {_listed([_at(t) for t in collides[:3]])} and part again without losing energy.")
        walls = _times(events, "wall")
        if walls:
            parts.append(f"The first contact with a cushion comes {_at(walls[0])}.")
    elif kind == "occlude":
        parts.append(f"{main} starts {here} and passes{speed}{toward} behind a gray wall {wall}.")
        enters, exits = _times(events, "enter"), _times(events, "exit")
        if enters:
            out = f" and comes out on the other side {_at(exits[0])}" if exits else ""
            parts.append(f"It is half covered {_at(enters[0])}{out}, with the same speed and outline as before.")
    if kind in ("collision", "collision+parabola"):
        names = _the(objects[0]), _the(objects[1])
        weigh = f"{names[heavier]} is heavier" if heavier is not None else "both weigh the same"
        parts.append(f"{weigh[0].upper()}{weigh[1:]}; they never overlap, and what motion one loses the other gets.")
    if kind in ("fall", "bounce", "parabola") and len(objects) > 1:
        second = article(noun(objects[1]))
        parts.append(f"{second[0].upper()}{second[1:]} lies on the floor {places[1]} and does nothing.")
    if scene.get("spin"):
        parts.append("It turns a little about its own center on the way.")
    for t, _, ids in [e for e in events if e[1] == "leave"][:2]:
        name = "It" if len(objects) == 1 else f"{_the(objects[ids[0]])[0].upper()}{_the(objects[ids[0]])[1:]}"
        parts.append(f"{name} is out of the picture {_at(t)}.")
    if scene.get("moon"):
        parts.append("All this happens on the moon, where things have little weight.")
    return " ".join(parts)


def _pick(random: np.random.RandomState, options: Sequence[Any]) -> Any:
    return options[random.randint(len(options))]


def _casual_noun(random: np.random.RandomState, thing: Mapping[str, str], fewer: float = 0.0) -> tuple[str, Scene]:
    """(words without article, what they still say): the shape always, colour mostly, size often, each as some synonym."""
    kept: Scene = {"shape": thing["shape"]}
    words = [_pick(random, SHAPE_WORDS[thing["shape"]])]
    if random.rand() < 0.9 - fewer:
        kept["color"] = thing["color"]
        synonym = random.rand() < 0.4
        words.insert(0, _pick(random, COLOR_WORDS[thing["color"]]) if synonym else thing["color"])
    if random.rand() < 0.45 - fewer:
        kept["size"] = thing["size"]
        words.insert(0, _pick(random, SIZE_WORDS[thing["size"]]))
    if "motion" in thing and random.rand() < 0.35:
        kept["motion"] = thing["motion"]
        words.insert(0, _pick(random, MOTION_WORDS[thing["motion"]]))
    return " ".join(words), kept


def paraphrase(scene: Mapping[str, Any], random: np.random.RandomState) -> str:
    """A caption as a person would type it: synonyms, attributes left out (never the subject or what happens to it), any casing
    and end."""
    kind = scene["kind"]
    ing = random.rand() < 0.5
    bare = random.rand() < 0.45

    def verb(of: str) -> str:
        finite, gerund = _pick(random, VERBS[of])
        if not ing:
            return finite
        passive = gerund.split()[0] in ("thrown", "tossed", "lobbed")
        return gerund if bare or passive else f"is {gerund}"

    def phrase(words: str) -> str:
        return words if bare else article(words)

    if kind == "paint":
        pieces = []
        for stroke in scene["strokes"]:
            color = _pick(random, COLOR_WORDS[stroke["color"]]) if random.rand() < 0.3 else stroke["color"]
            shape = stroke["stroke"]
            line = f"{color} circle" if shape == "circle" else f"{color} {_pick(random, ('line', 'stroke', 'stripe'))}"
            if shape != "circle" and random.rand() < 0.85:
                line = f"{_pick(random, STROKE_WORDS[shape])} {line}"
            elif shape == "circle" and random.rand() < 0.3:
                line = f"{color} {_pick(random, ('ring', 'loop'))}"
            line = phrase(line)
            if "direction" in stroke and random.rand() < 0.4:
                line += f" {FROM_TO[stroke['direction']]}"
            pieces.append(line)
        doing = "painting" if ing else "paints"
        who = _pick(random, ("brush", "paintbrush"))
        joined = _pick(random, (", then ", " then ", ", ")).join(pieces)
        text = f"{phrase(who)} {'is ' if ing and not bare else ''}{doing} {joined}"
    elif kind == "eat":
        food = _pick(random, FOOD_PHRASES[scene["food"]])
        count = scene["count"]
        number = {1: _pick(random, ("one bite", "a bite", "a single bite")), 2: "two bites", 3: "three bites"}[count]
        style = random.randint(3)
        if style == 0:
            text = f"{phrase('mouth')} {'taking' if ing and bare else 'takes'} {number} out of {food}"
        elif style == 1:
            text = f"{food} eaten in {number}" if bare else f"{food} is eaten in {number}"
        else:
            text = f"someone bites {food} {COUNT_WORDS[count][0]}"
        if random.rand() < 0.4:
            text += f" from the {scene['side']}"
    else:
        objects = scene["objects"]
        first, said = _casual_noun(random, objects[0])
        subject = phrase(first)
        where = scene.get("direction")
        toward = ""
        if where in ("left", "right") and random.rand() < 0.75:
            toward = _pick(
                random, (f" to the {where}", f" {where}", f" to the {where}", f" towards the {where}", f" {where}wards")
            )
        speed = f" {_pick(random, SPEED_WORDS[scene['speed']][:4])}" if "speed" in scene and random.rand() < 0.6 else ""
        if speed.strip() in ("slow", "steady"):
            speed = f" at a {speed.strip()} pace"
        count = f" {COUNT_WORDS[min(scene['count'], 4)][0]}" if "count" in scene and random.rand() < 0.8 else ""
        place = f" {PLACE_PHRASE[scene['place']]}" if "place" in scene and random.rand() < 0.4 else ""
        second, also = _casual_noun(random, objects[1], 0.1) if len(objects) > 1 else ("", {})
        if second:
            clash = any(said.get(key, also[key]) != also[key] for key in ("size", "color", "shape") if key in also)
            second = phrase(second) if clash else f"another {second}"
        rolls = objects[0]["shape"] in ("ball", "ring") and random.rand() < 0.3
        beside = f" {_pick(random, ('next to', 'beside'))} {second}" if second and random.rand() < 0.6 else ""
        wall = _pick(random, WALLS)
        if kind == "slide":
            ground = _pick(random, ("", "", " on the floor", " along the floor", " across the floor"))
            text = f"{subject} {verb('roll' if rolls else 'slide')}{speed}{toward}{ground}"
        elif kind == "fall":
            down = (
                _pick(random, ("", " down", " to the ground", " straight down", " onto the floor")) if where == "down" else ""
            )
            action = verb("fall")
            text = f"{subject} {action}{down if 'down' not in action else ''}{place}{beside}"
        elif kind == "bounce":
            text = f"{subject} {verb('bounce')}{count}{toward}{place}{beside}"
        elif kind == "parabola":
            text = f"{subject} {verb('parabola')}{toward}{beside}"
        elif kind == "collision":
            if random.rand() < 0.4:
                text = f"{subject} {verb('slide')}{speed}{toward} and {_pick(random, VERBS['collision'])[0]} {second}"
            else:
                text = f"{subject} {verb('collision')} {second}"
        elif kind == "billiard":
            table = _pick(random, (" on a billiard table", " on a pool table", ", billiard table", " across a billiard table"))
            rest = f" with {_listed([phrase(_casual_noun(random, o)[0]) for o in objects[1:]])}" if random.rand() < 0.4 else ""
            rest = "" if len(objects) > 1 and _ambiguous(subject + rest, len(objects)) else rest
            text = f"{subject} {verb('roll')}{speed}{toward}{table}{rest}"
        elif kind == "occlude":
            text = f"{subject} {verb('occlude')} {wall}{speed}{toward}"
        elif kind == "bounce+occlude":
            text = f"{subject} {verb('bounce')}{count}{toward} and goes behind {wall}"
        else:
            text = f"{subject} {verb('parabola')}{toward} and hits {second}"
        if scene.get("moon"):
            text = f"{text} on the moon" if random.rand() < 0.7 else f"on the moon {text}"
    casing = random.rand()
    if casing < 0.04:
        text = text.upper()
    elif casing < 0.5:
        text = text[0].upper() + text[1:]
    return text + (random.rand() < 0.4) * "."


def _ambiguous(text: str, count: int) -> bool:
    return len(parse(text).get("objects", [])) != count


_LANDING = re.compile(
    r"\b(?:hits?|hitting|strikes?|striking|meets?|touch(?:es|ing)?|reach(?:es|ing)?) (?:the )?(?:ground|floor|bottom)\b"
)
_FROM_TO = re.compile(
    r"\bfrom (?:the )?(left|right|top|bottom)(?: side)? (?:over |across )?to (?:the )?(left|right|top|bottom)\b"
)
_TOWARD = re.compile(r"\b(?:to|towards?|into) (?:the |its )?(left|right)\b|\b(left|right)wards?\b")
_PLACE = re.compile(
    r"\b(?:on|at|near|in|from) (?:the |its )?(?:far )?(?:(left|right) (?:side|edge|half|part)|(middle|center|centre))\b"
    r"|\b(?:on|at|near|in) (?:the |its )?(?:far )?(left|right)\b|\b(left|right) side\b|\bcentered\b"
)
_SIDE = re.compile(r"\bfrom (?:the )?(left|right)\b")
_BARE = re.compile(r"(?<!has )(?<!have )(?<!is )(?<!are )\b(left|right)\b")
_DOWN = re.compile(r"\b(?:straight down|downwards?|down|to the ground|onto the floor|to the floor|onto the ground)\b")
_MOON = re.compile(r"\b(?:moon|lunar)\b")
_COUNT = tuple((re.compile(rf"\b{re.escape(phrase)}\b"), n) for n, phrases in COUNT_WORDS.items() for phrase in phrases)
_BITES = re.compile(r"\b(a single|a|one|two|three|four|[1-4]) bites?\b")
_SIZED = re.compile(r"\b(small|medium|mid|middle|large|average)[ -]sized?\b")
_WORD = re.compile(r"[a-z]+|\d+(?:\.\d+)?|[.,;:]")
_MARKS = re.compile(r"\b(?:lines|strokes|stripes|brushstrokes|circles|rings|loops|hoops)\b")
_MOVES = re.compile("|".join(MOTION_SIGNS.values()))
# What ends the words of one thing.
_BREAKS = re.compile(
    r"[.,;:]|an?|the|one|two|three|four|another|other|and|or|but|then|that|which|who|is|are|was|were|be|been|has|have|its?|with|of"
    r"|on|in|at|to|from|into|onto|by|over|under|behind|across|along|past|towards?|next|beside|near|through|up|down|left|right|as"
    r"|while|when|for|than|not|no|never|without"
)


def parse(text: str) -> Scene:
    """The attributes that a caption names, in canonical words; what it does not name is absent. Never fails: unknown words are
    passed over."""
    lowered = re.sub(r"\s+", " ", text.lower().replace("doughnut", "donut")).strip()
    lowered = _SIZED.sub(lambda m: "medium" if m[1] in ("mid", "middle", "average") else m[1], lowered)
    scene: Scene = {}
    if kind := _kind(lowered):
        scene["kind"] = kind
    if kind == "paint":
        if strokes := _strokes(lowered):
            scene["strokes"] = strokes
        return scene
    if kind == "eat":
        for word in _WORD.findall(lowered):
            if "food" not in scene and (word in _FOOD_OF or word.removesuffix("s") in _FOOD_OF):
                scene["food"] = _FOOD_OF.get(word) or _FOOD_OF[word.removesuffix("s")]
        if match := _BITES.search(lowered):
            scene["count"] = NUMBERS[match[1].split()[0]]
        elif (count := _count(lowered)) is not None:
            scene["count"] = count
        if match := _SIDE.search(lowered):
            scene["side"] = match[1]
        return scene
    if objects := _objects(lowered):
        scene["objects"] = objects
    rest = lowered
    direction = None
    if match := _FROM_TO.search(rest):
        direction = {"left": "left", "right": "right", "top": "up", "bottom": "down"}[match[2]]
    elif match := _TOWARD.search(rest):
        direction = match[1] or match[2]
    rest = _TOWARD.sub(" ", _FROM_TO.sub(" ", rest))
    if match := _PLACE.search(rest):
        found = match[1] or match[3] or match[4]
        scene["place"] = found or "center"
    rest = _PLACE.sub(" ", rest)
    if direction is None and (match := _SIDE.search(rest)):
        direction = OPPOSITE[match[1]]
    rest = _SIDE.sub(" ", rest)
    if direction is None and (match := _BARE.search(rest)):
        direction = match[1]
    if direction is None and kind == "fall" and _DOWN.search(rest):
        direction = "down"
    if direction is not None:
        scene["direction"] = direction
    for word in _WORD.findall(rest):
        if word in _SPEED_OF:
            scene["speed"] = _SPEED_OF[word]
            break
    if (count := _count(rest)) is not None:
        scene["count"] = count
    if _MOON.search(lowered):
        scene["moon"] = True
    return scene


def _count(text: str) -> int | None:
    return next((n for pattern, n in _COUNT if pattern.search(text)), None)


def _kind(text: str) -> str | None:
    for kind, pattern in KIND_SIGNS:
        if re.search(rf"\b(?:{pattern})\b", text):
            return kind
    text = _LANDING.sub(" lands ", text)
    found = [kind for kind, pattern in MOTION_SIGNS.items() if re.search(rf"\b(?:{pattern})\b", text)]
    for pair in (("bounce", "occlude"), ("parabola", "collision")):
        if pair[0] in found and pair[1] in found:
            return "+".join(sorted(pair))
    order = ("collision", "occlude", "bounce", "parabola", "fall", "slide")
    return next((kind for kind in order if kind in found), None)


def _strokes(text: str) -> list[Scene]:
    strokes: list[Scene] = []
    bare = 0
    for clause in re.split(r"[.,;:]|\bthen\b|\band\b", text):
        words = _WORD.findall(_FROM_TO.sub(" ", clause))
        stroke: Scene = {}
        number = 1
        for word in words:
            if word in ("two", "three", "four", "2", "3", "4"):
                number = NUMBERS[word]
            elif word in _COLOR_OF and "color" not in stroke:
                stroke["color"] = _COLOR_OF[word]
            elif (name := _STROKE_OF.get(word) or _STROKE_OF.get(word.removesuffix("s"))) and "stroke" not in stroke:
                stroke["stroke"] = name
        if match := _FROM_TO.search(clause):
            direction = {"left": "left", "right": "right", "top": "up", "bottom": "down"}[match[2]]
            if stroke:
                stroke["direction"] = direction
            elif strokes:
                strokes[-1].setdefault("direction", direction)
        several = number if _MARKS.search(clause) else 1
        if "color" in stroke or "stroke" in stroke:
            strokes.extend(dict(stroke) for _ in range(several))
        else:
            bare = max(bare, several)
    # "two lines, a red one and a blue one": the number counts only where no stroke is named.
    return strokes or [{} for _ in range(bare if bare > 1 else 0)]


def _fits(thing: Scene, other: Scene) -> bool:
    return all(thing.get(key, value) == value for key, value in other.items() if key != "motion")


def _objects(text: str) -> list[Scene]:
    """The objects in order of first mention. "the red ball" after "a red ball" is the same one; "a" and "another" always open
    a new one, and "a blue one" is of the shape that was named last. A colour that no noun follows is kept: "a ball that is
    red" is a red ball."""
    objects: list[Scene] = []
    thing: Scene = {}
    loose: Scene = {}
    opens, number = False, 1
    words = [*_WORD.findall(text), "."]
    for place, word in enumerate(words):
        before = words[place - 1] if place else ""
        singular = _PLURALS.get(word, word)
        alone = len(objects) == 1 and not thing and before in ("another", "other")
        if word in _COLOR_OF:
            thing["color"] = _COLOR_OF[word]
        elif word in _SIZE_OF:
            thing["size"] = _SIZE_OF[word]
        elif word in _MOTION_OF:
            thing["motion"] = _MOTION_OF[word]
        elif word in ("one", "ones") and ("color" in thing or "size" in thing or alone):
            shape = next((o["shape"] for o in reversed(objects) if "shape" in o), None)
            known = next((o for o in objects if _fits(o, thing)), None)
            if known is None or opens:
                objects.extend({**thing, **({"shape": shape} if shape else {})} for _ in range(number))
            thing, opens, number = {}, False, 1
        elif word in ("a", "an", "another", "other", "one", "two", "three", "four"):
            opens, number = True, NUMBERS.get(word, number if word == "other" else 1)
        elif singular in _SHAPE_OF or (singular in GENERIC_WORDS and ("color" in thing or "size" in thing)):
            if singular in _SHAPE_OF:
                thing["shape"] = _SHAPE_OF[singular]
            known = next((o for o in objects if _fits(o, thing)), None)
            if known is None or opens:
                objects.extend(dict(thing) for _ in range(number if word != singular else 1))
            else:
                known.update({key: value for key, value in thing.items() if key != "motion"})
            thing, opens, number = {}, False, 1
        elif not (word == "sized" or word.isdigit() or (thing.keys() & {"color", "size"} and _modifies(words, place))):
            if alone and before == "another" and "shape" in objects[0]:
                objects.append({"shape": objects[0]["shape"]})
            said = {key: thing[key] for key in ("size", "color") if key in thing}
            if said and objects and words[place - 1 - len(said)] in ("is", "are", "was", "were", ","):
                objects[-1].update({key: value for key, value in said.items() if key not in objects[-1]})
            elif "color" in said:
                loose = loose or said
            thing, opens, number = {}, False, 1
    return objects or ([loose] if loose else [])


def _modifies(words: Sequence[str], place: int) -> bool:
    """Whether a word between a colour or size and a noun says more of the same thing, as in "a red bouncing ball"."""
    for word in words[place : place + 3]:
        if _PLURALS.get(word, word) in _SHAPE_OF:
            return True
        if _BREAKS.fullmatch(word) or (_MOVES.fullmatch(word) and not word.endswith("ing")):
            return False
    return False


assert (tuple(COLOR_WORDS), tuple(SHAPE_WORDS), tuple(SIZE_WORDS)) == (COLORS, SHAPES, SIZES)
assert (tuple(SPEED_WORDS), tuple(FOOD_WORDS)) == (SPEEDS, FOODS)
