"""A small byte-level subword tokenizer: byte-pair encoding (Sennrich et al. 2016, section 3.2; on bytes, Radford et al. 2019).

Any Unicode text can be encoded: what no merge covers stays single bytes. Text is normalised first (`normalise`), so
capitals, doubled spaces and typographic quotes do not matter. Merges never cross word boundaries, each digit stays
alone (numbers are read digit by digit), and a word is the same token at the start of a sentence and inside it.
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from tubelet.core.errors import UserError
from tubelet.core.files import read_json, write_json

PAD, START = 0, 1
_BYTES = 2  # the id of byte 0
FIRST_MERGE = _BYTES + 256
FORMAT = "tubelet-bpe-1"

_PLAIN = str.maketrans("‘’‚“”„‐‑–—−", "'''\"\"\"-----")
_WORD = re.compile(r" ?[^\W\d_]+| ?\d| ?[^\w\s]| ?_")
_REPEATED = re.compile(r"([!?.,;:-])\1+")
_CACHE_LIMIT = 100_000

Pair = tuple[int, int]


def normalise(text: str) -> str:
    """Lower case, NFKC, plain quotes and dashes, single spaces, repeated punctuation once, no control characters."""
    if text.isascii() and text.isprintable():  # nothing below changes such a text but its capitals, spaces and repetitions
        return " ".join(_REPEATED.sub(r"\1", text.lower()).split())
    # Cc, Cf: invisible; Cs: half a surrogate pair cannot be written as UTF-8.
    text = "".join(" " if c.isspace() else "" if unicodedata.category(c) in ("Cc", "Cf", "Cs") else c for c in text)
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).lower()).translate(_PLAIN)
    return " ".join(_REPEATED.sub(r"\1", text).split())


def words_of(text: str) -> list[str]:
    """The pieces of a normalised text that merges stay inside of; a piece carries the space before it."""
    text = f" {text}" if text else ""
    return _WORD.findall(text)


class Tokenizer:
    """Encoding and decoding with a fixed list of merges; merge `i` makes the id `FIRST_MERGE + i`."""

    def __init__(self, merges: Sequence[Pair] = ()) -> None:
        """`merges`: pairs of ids, each made before it is used. Raises UserError when one is not."""
        self._bytes: list[bytes] = [b"", b"", *(bytes([b]) for b in range(256))]
        self._rank: dict[Pair, int] = {}
        for left, right in merges:
            made = len(self._bytes)
            if not (_BYTES <= left < made and _BYTES <= right < made) or (left, right) in self._rank:
                raise UserError(f"the tokenizer's merge {made - FIRST_MERGE} ({left}, {right}) is not valid; train it again")
            self._rank[left, right] = made
            self._bytes.append(self._bytes[left] + self._bytes[right])
        self._cache: dict[str, tuple[int, ...]] = {}

    @property
    def size(self) -> int:
        """Number of ids: padding, start, 256 bytes and the merges."""
        return len(self._bytes)

    @property
    def merges(self) -> list[Pair]:
        """Pairs of ids in the order in which they were learned."""
        return list(self._rank)

    def spelling(self, index: int) -> bytes:
        """The bytes that an id stands for. Raises UserError on an id that does not exist."""
        if not 0 <= index < self.size:
            raise UserError(f"token id {index} does not exist; ids are 0 to {self.size - 1}")
        return self._bytes[index]

    def encode(self, text: str, *, split: float = 0.0, rng: random.Random | None = None) -> list[int]:
        """Ids of a text, starting with `START`, so that even an empty text has one token. Never fails on a string.

        `split`, for training only: the chance that a word is cut in two at a random place, each half being encoded alone,
        drawn from `rng`. Words that every caption spells as one token thus also lend their stems and endings to words that no
        caption has ("bounces" to "bounce"): the purpose of BPE-dropout (Provilkov et al. 2020) at the cost of one draw a word.
        """
        assert split == 0 or rng is not None, "splitting draws from a generator"
        ids = [START]
        for word in words_of(normalise(text)):
            first = 2 if word[0] == " " else 1  # where a cut leaves something on both sides
            if rng is not None and first < len(word) and rng.random() < split:
                cut = rng.randrange(first, len(word))
                ids += self._word(word[:cut])
                ids += self._word(word[cut:])
            else:
                ids += self._word(word)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The normalised text of ids; `PAD` and `START` are silent. Raises UserError on an id that does not exist."""
        return b"".join(self.spelling(i) for i in ids).decode(errors="replace").removeprefix(" ")

    def pieces(self, text: str) -> list[str]:
        """The tokens of a text as strings, for people to look at (the start token is left out)."""
        return [self._bytes[i].decode(errors="backslashreplace") for i in self.encode(text)[1:]]

    def _word(self, word: str) -> tuple[int, ...]:
        ids = self._cache.get(word)
        if ids is None:
            if len(self._cache) >= _CACHE_LIMIT:
                self._cache.clear()
            ids = self._cache[word] = self._merge(word.encode())
        return ids

    def _merge(self, word: bytes) -> tuple[int, ...]:
        ids = [_BYTES + b for b in word]
        while len(ids) > 1:
            best = min(pairwise(ids), key=lambda pair: self._rank.get(pair, self.size))
            made = self._rank.get(best)
            if made is None:
                break
            ids = _replaced(ids, best, made)
        return tuple(ids)

    def save(self, path: str | Path) -> None:
        """Write `tokenizer.json`: the format's name and the merges, one "left right" per line."""
        write_json(path, {"format": FORMAT, "merges": [f"{left} {right}" for left, right in self._rank]})

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read `tokenizer.json`. Raises UserError when it is missing, broken or of another format."""
        value = read_json(path)
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise UserError(f"{path} is not a {FORMAT} tokenizer; use one that tubelet wrote")
        try:
            merges = [(int(left), int(right)) for left, right in (m.split() for m in value["merges"])]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path} has broken merges ({error}); restore it from its source") from error
        return cls(merges)


def train(corpus: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn merges from texts until there are `vocab_size` ids or no pair occurs twice.

    Deterministic: the most frequent pair is merged, ties go to the lexicographically smaller bytes.
    Raises UserError when `vocab_size` is smaller than the byte alphabet.
    """
    if vocab_size < FIRST_MERGE:
        raise UserError(f"a byte-level vocabulary needs at least {FIRST_MERGE} ids, got {vocab_size}; ask for more")
    texts = Counter(corpus)
    counts: Counter[str] = Counter()
    for text, times in texts.items():
        for word in words_of(normalise(text)):
            counts[word] += times
    words = [[_BYTES + b for b in word.encode()] for word in counts]
    times_of = list(counts.values())
    spelled: list[bytes] = [b"", b"", *(bytes([b]) for b in range(256))]

    pairs: Counter[Pair] = Counter()
    where: defaultdict[Pair, set[int]] = defaultdict(set)
    for index, ids in enumerate(words):
        for pair in pairwise(ids):
            pairs[pair] += times_of[index]
            where[pair].add(index)

    merges: list[Pair] = []
    while len(spelled) < vocab_size and pairs:
        best = min(pairs, key=lambda p: (-pairs[p], spelled[p[0]], spelled[p[1]]))
        if pairs[best] < 2:
            break
        made = len(spelled)
        merges.append(best)
        spelled.append(spelled[best[0]] + spelled[best[1]])
        for index in where[best].copy():
            ids, times = words[index], times_of[index]
            for pair in pairwise(ids):
                pairs[pair] -= times
                where[pair].discard(index)
                if pairs[pair] <= 0:
                    del pairs[pair]
            words[index] = ids = _replaced(ids, best, made)
            for pair in pairwise(ids):
                pairs[pair] += times
                where[pair].add(index)
    return Tokenizer(merges)


def _replaced(ids: list[int], pair: Pair, made: int) -> list[int]:
    """`ids` with every occurrence of `pair`, from the left, replaced by `made`."""
    out: list[int] = []
    i = 0
    while i < len(ids):
        if i + 1 < len(ids) and (ids[i], ids[i + 1]) == pair:
            out.append(made)
            i += 2
        else:
            out.append(ids[i])
            i += 1
    return out
