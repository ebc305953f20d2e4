"""What a prompt says that the worlds cannot show: a thing, a colour or a number that they have not, a way that nothing goes
here, or a "not".

A prompt with such a word is better left alone than rewritten into another scene. What only describes ("a shiny red ball
bounces happily") is passed over; a noun is known by where it stands, after an article, a colour or a size.
"""

from __future__ import annotations

import re

from tubelet.worlds.grammar import (
    COLOR_WORDS,
    COUNT_WORDS,
    FOOD_WORDS,
    GENERIC_WORDS,
    KIND_SIGNS,
    MOTION_SIGNS,
    MOTION_WORDS,
    SHAPE_WORDS,
    SIZE_WORDS,
    SPEED_WORDS,
    STROKE_WORDS,
    Scene,
)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _plural(words: frozenset[str]) -> frozenset[str]:
    return words | {word + ("es" if word.endswith(("x", "sh", "ch")) else "s") for word in words}


_COLORS = {word: name for name, words in COLOR_WORDS.items() for word in words}
_SHAPES = _plural(frozenset(word for words in SHAPE_WORDS.values() for word in words))
_FOODS = _plural(frozenset(word for words in FOOD_WORDS.values() for word in words) | {"food", "snack"})
_MARKS = _plural(_words("line stroke stripe brushstroke mark circle ring loop hoop"))
_STROKES = frozenset(word for words in STROKE_WORDS.values() for word in words)
_GENERIC = _plural(frozenset(GENERIC_WORDS))
_SIZES = frozenset(word for words in SIZE_WORDS.values() for word in words) | {"sized"}
_MOTIONS = frozenset(word for words in MOTION_WORDS.values() for word in words)
_SPEEDS = frozenset(word for words in SPEED_WORDS.values() for word in words)
_COUNTS = frozenset(word for phrases in COUNT_WORDS.values() for phrase in phrases for word in phrase.split())
_MEETS = re.compile(MOTION_SIGNS["collision"])
_SIGNS = re.compile("|".join([*(pattern for _, pattern in KIND_SIGNS), *MOTION_SIGNS.values()]))

_OTHER_COLORS = _words(
    "black white gray grey brown silver magenta indigo maroon beige tan ivory khaki olive mauve lavender bronze copper "
    "burgundy rainbow multicolored multicoloured colorless colourless transparent invisible striped spotted dotted "
    "checkered lime cerulean amber mint charcoal coral salmon mustard ochre peach cream vermilion chartreuse ultramarine rust "
    "slate ebony taupe sepia sienna"
)
_PALE = _words("white gray grey")
"""Colours that the worlds' surroundings may be said to have."""
_NO = _words("no not never none nothing nobody nor neither without cannot") | {
    f"{verb}nt" for verb in _words("do does did is are was were has have would should could")
}
_ARTICLES = _words("a an the one two three four this these those some every each his her its their my your our any 1 2 3 4")
_MANY = _words(
    "five six seven eight nine ten eleven twelve dozen dozens twenty thirty forty fifty hundred hundreds thousand thousands "
    "many several few multiple numerous countless"
)
_BREAKS = _words(
    ". , ; : ! ? and or but then that which who where when while as if than so with of on in at to from into onto by over "
    "under behind across along past toward towards around through up down upward upwards downward downwards left leftward "
    "leftwards rightward rightwards near against between off beside next out above below back away for until before after "
    "is are was were be been being am has have had do does did gets get got getting will would can could should may might "
    "must let lets it they them i you we he she me us"
)
_SURROUNDINGS = _plural(
    _words(
        "wall panel screen barrier floor ground table surface cushion moon air sky background backdrop paper canvas sheet page "
        "plate desk room brush paintbrush mouth handle"
    )
)
_PERSONS = _plural(_words("artist painter person man woman boy girl child kid player hand")) | _words(
    "someone somebody people men women children anyone"
)
_REST = _plural(
    _words(
        "arc curve path way side left right middle center centre top bottom edge half part corner picture frame view spot "
        "place scene film video clip movie animation gif image photo shot render rendering drawing cartoon closeup camera bite "
        "piece slice time pace speed velocity rate motion movement direction distance second minute moment end start beginning "
        "rest front turn bit lot while hurry other pair couple billiard pool snooker game collision impact line loop"
    )
)
_DEEDS = _words("hit bounce fall drop throw toss slide roll crash rush")
"""Nouns right after an article, verbs elsewhere."""
_FILLERS = _words(
    "show shows make makes please want see create generate give watch there here something anything things thing again very "
    "first second last just only too also both all another about like alone itself themselves together straight flat hard "
    "plain pale sandy empty blank simple static fixed whole single own same new low high long short quick start starts stop "
    "stops stay stays land lands come comes keep keeps begin begins end ends take takes happen happens appear appears "
    "flying fly flies heading going apart forward forwards backward backwards horizontally vertically diagonally sideways d "
    "k s hd"
)
_PRONOUNS = _words("it they them he she him her")
_NO_NOUNS = _ARTICLES | _MANY | _FILLERS | _COUNTS
PHRASE = 12
"""Words that a noun phrase has at most."""

_WALLS = r"walls?|barriers?|panels?|screens?"
_THINGS = "|".join(sorted(_SHAPES | _GENERIC))
# What a kind of event has no room for: a way that it never goes, a wall that is hit or gone through, paint that is taken away.
_NEVER = {
    kinds: re.compile(rf"\b(?:{before})(?: straight)? ({after})\b")
    for kinds, before, after in (
        (("slide", "occlude", "collision", "billiard"), MOTION_SIGNS["slide"], "up|upwards?|down|downwards?"),
        (("fall",), MOTION_SIGNS["fall"], "up|upwards?"),
        (("parabola",), MOTION_SIGNS["parabola"], "down|downwards?"),
        (("collision",), rf"(?:{MOTION_SIGNS['collision']})(?: against| into)?(?: an?| the)?(?: \w+)?", _WALLS),
        (("slide", "fall", "bounce", "parabola"), r"through(?: an?| the)?(?: \w+)?", _WALLS),
    )
}
_UNDONE = re.compile(r"\b(?:eras|wip|remov|unpaint)(?:es?|ed|ing|s)\b")
# One thing moves in these; another one may only stand by.
_ALONE = ("slide", "fall", "bounce", "parabola", "occlude")
_MOTION = "|".join(MOTION_SIGNS[kind] for kind in ("fall", "bounce", "slide"))
_TOGETHER = re.compile(rf"\b(?:{_THINGS}) (?:both |all )?(fall|drop|bounce|hop|slide|glide|roll|move|drift|go)\b")
_ASKED = re.compile(r"\b(?:make|let|lets|see|watch|show|have)\b")  # "make a ball fall" says so of one
_EACH = re.compile(rf"\b(?:{_THINGS}) (?:\w+ly )?({_MOTION})\b")


def unread(prompt: str, scene: Scene) -> str | None:
    """The first word of a prompt, read as `scene` (`grammar.parse`, with a kind), that the worlds cannot do justice to; None
    where there is none."""
    words = re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)?|\d+(?:\.\d+)?|[.,;:!?]", prompt.lower().replace("’", "'"))
    kind = scene["kind"]
    things = {"paint": _MARKS | _STROKES, "eat": _FOODS}.get(kind, _SHAPES | _GENERIC)
    if wrong := _contrary(" ".join(words), scene):
        return wrong
    nouns = things | _SURROUNDINGS | _REST | _PERSONS
    adjectives = frozenset(_COLORS) | _SIZES | _MOTIONS | _SPEEDS | _OTHER_COLORS
    verbs = {word for word in words if _SIGNS.fullmatch(word)}
    known = nouns | adjectives | verbs | _ARTICLES | _MANY | _BREAKS | _FILLERS | _COUNTS
    named = {thing["color"] for thing in (*scene.get("objects", ()), *scene.get("strokes", ())) if "color" in thing}
    counted = things | {"times", "bites"}
    elsewhere = (_SHAPES | _FOODS) - things - _FILLERS - _REST - verbs
    bare = not (scene.get("objects") or scene.get("strokes") or scene.get("food"))
    for place, word in enumerate(words):
        if word in _NO or word.endswith("n't"):
            return word
        if (word in _COLORS or word in _OTHER_COLORS) and not _shown(words, place, kind, named, nouns, things):
            return word
        if word in elsewhere:
            return word
        # Where no thing is named at all, any word may be the thing, and what "it" is can only be seen.
        if bare and (word in _PRONOUNS or (word not in known and not _aside(word))):
            return word
        after = words[place + 1] if place + 1 < len(words) else "."
        if (word in ("behind", "into", "against") or _MEETS.fullmatch(word)) and after not in known and not _aside(after):
            return after
        opens = word in _ARTICLES or word in _MANY or re.fullmatch(r"\d+", word)
        if (opens or (word in adjectives and word not in _SPEEDS)) and (wrong := _phrase(words, place, nouns, adjectives)):
            return wrong
        if (word in _MANY or re.fullmatch(r"[5-9]|\d\d+", word)) and _counted(words, place, counted):
            return word
    return None


def _contrary(said: str, scene: Scene) -> str | None:
    """The word that asks for what no event of the scene's kind does; None where there is none."""
    kind, objects = scene["kind"], scene.get("objects", ())
    for kinds, never in _NEVER.items():
        if kind in kinds and (found := never.search(said)):
            return found[1]
    if kind == "paint" and (found := _UNDONE.search(said)):
        return found[0]
    if kind in _ALONE and len(objects) > 1:
        if (found := _TOGETHER.search(said)) and not _ASKED.search(said):
            return found[1]
        if len(each := _EACH.findall(said)) > 1:
            return each[1]
    return None


def _phrase(words: list[str], place: int, nouns: frozenset[str], adjectives: frozenset[str]) -> str | None:
    """What is wrong with the noun phrase that begins at a word: a noun that is not known, or a colour that stands for one."""
    wrong = colour = None
    for word in words[place : place + PHRASE]:
        first = word == words[place]
        if word in nouns or (word in ("one", "ones") and not first) or (word in _DEEDS and not (wrong or colour)):
            return None
        if word in _BREAKS or (_SIGNS.fullmatch(word) and not word.endswith("ing")):
            break
        if word in _COLORS:
            colour = word
        elif not (word in adjectives or word in _NO_NOUNS or word.endswith("ing") or _aside(word)):
            wrong = wrong or word
    # "an orange falls" is about the fruit.
    return wrong or (colour if words[place] in _ARTICLES else None)


def _aside(word: str) -> bool:
    """Whether a word can be no thing: a number, or how something is done."""
    return word[0].isdigit() or word.endswith("ly")


def _shown(words: list[str], place: int, kind: str, named: set[str], nouns: frozenset[str], things: frozenset[str]) -> bool:
    """Whether a colour is that of a thing which gets it, or one that the surroundings have anyway."""
    word = words[place]
    noun = next((w for w in words[place + 1 : place + PHRASE] if w in nouns or w in _BREAKS), ".")
    if noun in _SURROUNDINGS and noun not in things:
        return word in _PALE
    if kind == "eat":
        fits = _COLORS.get(word) == "red" if noun.startswith("apple") else word in ("brown", "golden")
        return fits and noun in _FOODS
    return _COLORS.get(word) in named


def _counted(words: list[str], place: int, things: frozenset[str]) -> bool:
    """Whether a number counts things: a noun follows before the phrase ends."""
    for word in words[place + 1 : place + PHRASE]:
        if word in _BREAKS:
            return False
        if word in things:
            return True
    return False
