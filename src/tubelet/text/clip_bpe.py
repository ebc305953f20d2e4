"""CLIP's tokenizer: bytes joined by rank within words, whose last piece ends in `</w>`.

After the code published with CLIP (Radford et al. 2021, section 2.4; byte-pair encoding, Sennrich et al. 2016, section 3.2; on
bytes, Radford et al. 2019). Read from the files that CLIP models carry, `vocab.json` with `merges.txt` or `tokenizer.json`,
with nothing but Python: a plain install has no other reader, and a prompt is short.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from tubelet.core.errors import UserError
from tubelet.core.files import read_json

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"

_CONTRACTION = re.compile(r"'(?:s|t|re|ve|m|ll|d)")
_BLANKS = "\t\n\v\f\r\x85"
_PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
# A byte as a visible character: itself where it is one, else the next of those above 255 (Radford et al. 2019, published code).
_LETTERS = {byte: chr(byte) for byte in _PRINTABLE}
_LETTERS |= {byte: chr(256 + n) for n, byte in enumerate(b for b in range(256) if b not in _LETTERS)}


def words_of(text: str) -> list[str]:
    """The pieces that merges stay inside of: an English contraction, a run of letters, one digit, or a run of other signs."""
    text = unicodedata.normalize("NFC", text).lower()
    kinds = [_kind(c) for c in text]
    words, begin = [], 0
    while begin < len(text):
        kind, end = kinds[begin], begin + 1
        if found := _CONTRACTION.match(text, begin):
            kind, end = "'", found.end()
        while kind in "LO" and end < len(text) and kinds[end] == kind:
            end += 1
        if kind != " ":
            words.append(text[begin:end])
        begin = end
    return words


def _kind(c: str) -> str:
    """L: letter, N: number, blank, O: anything else."""
    group = unicodedata.category(c)[0]
    if group == "Z" or c in _BLANKS:
        return " "
    return group if group in "LN" else "O"


class CLIPTokenizer:
    """Texts to ids between a start and an end mark. Marks that a text spells out are read as letters.

    `pad` is the token that fills up a row; Stable Diffusion repeats the end mark.
    """

    def __init__(self, vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], pad: str = END) -> None:
        """Raises UserError when marks are missing or a merge makes what has no id."""
        for token in (START, END, pad):
            if token not in vocab:
                raise UserError(f"the tokenizer's vocabulary has no {token}; restore it from the model's source")
        for left, right in merges:
            if left + right not in vocab:
                raise UserError(f"the tokenizer's merge of {left!r} and {right!r} is not in its vocabulary; restore both files")
        self.vocab = dict(vocab)
        self.start, self.end, self.pad = vocab[START], vocab[END], vocab[pad]
        self._rank = {pair: rank for rank, pair in enumerate(merges)}

    @classmethod
    def read(cls, folder: Path) -> CLIPTokenizer:
        """From a folder with `vocab.json` and `merges.txt`, or `tokenizer.json`; `tokenizer_config.json` may name the padding.

        Raises UserError when files are missing or broken.
        """
        if (folder / "vocab.json").is_file() or (folder / "merges.txt").is_file():
            path = folder / "vocab.json"
            vocab, merges = read_json(path), _merges_of(folder / "merges.txt")
        elif (folder / "tokenizer.json").is_file():
            path = folder / "tokenizer.json"
            model = _get(read_json(path), "model")
            vocab, merges = _get(model, "vocab"), _get(model, "merges")
        else:
            raise UserError(f"{folder} holds neither vocab.json and merges.txt nor tokenizer.json; copy the whole checkpoint")
        pairs = _pairs(merges)
        if pairs is None or not isinstance(vocab, dict) or not all(type(n) is int and n >= 0 for n in vocab.values()):
            raise UserError(f"{path} holds no vocabulary and merges of CLIP; restore it from the model's source")
        config = folder / "tokenizer_config.json"
        pad = _get(read_json(config), "pad_token") if config.is_file() else None
        pad = _get(pad, "content") if isinstance(pad, dict) else pad
        return cls(vocab, pairs, pad if isinstance(pad, str) else END)

    def encode(self, text: str) -> list[int]:
        """All ids of a text with both marks; never fails on a string. Text is read in lower case."""
        ids = [self.start]
        for word in words_of(text):
            # Half a surrogate pair has no UTF-8 form.
            letters = [_LETTERS[byte] for byte in word.encode(errors="replace")]
            ids += [self.vocab.get(piece, self.end) for piece in self._joined([*letters[:-1], letters[-1] + WORD_END])]
        return [*ids, self.end]

    def row(self, text: str, length: int) -> list[int]:
        """Exactly `length` ids: cut, with the end mark kept, or filled up."""
        ids = self.encode(text)
        if len(ids) > length:
            return [*ids[: length - 1], self.end]
        return ids + [self.pad] * (length - len(ids))

    def _joined(self, pieces: list[str]) -> list[str]:
        while len(pieces) > 1:
            best = min(pairwise(pieces), key=lambda pair: self._rank.get(pair, len(self._rank)))
            if best not in self._rank:
                break
            made: list[str] = []
            for piece in pieces:
                # A piece that has just been made is longer than the one it begins with, so it does not join again.
                if made and (made[-1], piece) == best:
                    made[-1] += piece
                else:
                    made.append(piece)
            pieces = made
        return pieces


def _merges_of(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is missing or broken; copy the whole checkpoint") from error
    return [line for line in lines if line and not line.startswith("#version")]


def _pairs(merges: Any) -> list[tuple[str, str]] | None:
    """Merges as pairs, from lines or from lists of two; None when they are something else."""
    pairs: list[tuple[str, str]] = []
    for merge in merges if isinstance(merges, list) else [None]:
        both = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(both, list) or len(both) != 2 or not all(isinstance(one, str) for one in both):
            return None
        pairs.append((both[0], both[1]))
    return pairs


def _get(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, dict) else None
