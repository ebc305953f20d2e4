from __future__ import annotations

import json
import random
import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tubelet.core.errors import UserError
from tubelet.text.bpe import FIRST_MERGE, PAD, START, Tokenizer, normalise, train, words_of

CORPUS = [
    f"A {size} {color} {shape} {verb}."
    for size in ("small", "medium", "large")
    for color in ("red", "orange", "blue")
    for shape in ("ball", "ring", "triangle")
    for verb in ("falls", "bounces twice", "slides slowly to the left")
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(CORPUS, 1024)


@given(st.text())
@settings(max_examples=300, deadline=None)
def test_any_text_comes_back_normalised(text: str) -> None:
    tokenizer = train(CORPUS, 300)
    ids = tokenizer.encode(text)
    assert ids[0] == START
    assert PAD not in ids
    assert tokenizer.decode(ids) == normalise(text)


@given(st.text(st.characters(max_codepoint=126)))
@settings(max_examples=300, deadline=None)
def test_the_short_way_through_plain_text_is_the_long_one(text: str) -> None:
    assert normalise(f"{text} \N{GREEK SMALL LETTER ALPHA}") == f"{normalise(text)} \N{GREEK SMALL LETTER ALPHA}".strip()


@given(st.text())
@settings(max_examples=300, deadline=None)
def test_normalising_twice_changes_nothing(text: str) -> None:
    once = normalise(text)
    once.encode()  # no half surrogates are left
    assert normalise(once) == once


@pytest.mark.parametrize(
    "text", ["\ud800", "\udfff red", "\x00", "\u200b", "🔴 bounces", "日本語", "e\u0301", "\ufdfa", "a" * 5000]
)
def test_hostile_text_is_encoded(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == normalise(text)


@pytest.mark.parametrize(
    "other",
    ["A RED BALL", "  a  red\tball\n", "a ｒｅｄ ball", "a red\u00a0ball", "a r\u00aded ball", "\ufeffa red ball"],
)
def test_spelling_that_does_not_matter(tokenizer: Tokenizer, other: str) -> None:
    assert tokenizer.encode(other) == tokenizer.encode("a red ball")


def test_punctuation_is_plain() -> None:
    assert normalise("“it’s” — falling!!! wait…") == '"it\'s" - falling! wait.'
    assert normalise("1.25 s, 2.5") == "1.25 s, 2.5"


def test_words_of_the_corpus_are_single_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.pieces("A small red triangle slides slowly to the left.") == [
        " a", " small", " red", " triangle", " slides", " slowly", " to", " the", " left", ".",
    ]  # fmt: skip


def test_a_word_is_the_same_token_anywhere(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("red ball")[1] == tokenizer.encode("a red ball")[2]


def test_digits_stay_alone() -> None:
    tokenizer = train(["at 1234 seconds"] * 50, 400)
    assert tokenizer.pieces("1234") == [" 1", "2", "3", "4"]
    assert words_of("at 12.5 s") == [" at", " 1", "2", ".", "5", " s"]


def test_the_empty_text_is_the_start_token(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("") == tokenizer.encode(" \n") == [START]
    assert tokenizer.decode([START, PAD, PAD]) == ""


def test_unseen_words_reuse_known_pieces(tokenizer: Tokenizer) -> None:
    assert 1 < len(tokenizer.pieces("redder")) < len("redder")


def test_splitting_lends_stems_to_unseen_words(tokenizer: Tokenizer) -> None:
    text = "A small red ball bounces twice."
    plain = tokenizer.encode(text)
    assert tokenizer.encode(text, split=0.0, rng=random.Random(0)) == plain
    rng = random.Random(0)
    draws = [tokenizer.encode(text, split=0.5, rng=rng) for _ in range(300)]
    assert all(tokenizer.decode(ids) == normalise(text) for ids in draws)
    seen = {i for ids in draws for i in ids}
    missing = set(tokenizer.encode("bounce")) - set(plain)
    assert missing  # these would never have been trained
    assert missing <= seen
    assert draws[0] == tokenizer.encode(text, split=0.5, rng=random.Random(0))
    whole = sum(len(tokenizer.encode("red", split=0.25, rng=rng)) == 2 for _ in range(2000))
    assert 0.71 < whole / 2000 < 0.79
    assert tokenizer.encode("a", split=1.0, rng=rng) == tokenizer.encode("a")  # nothing to cut


def test_training_ignores_the_order_of_the_corpus() -> None:
    shuffled = CORPUS.copy()
    random.Random(1).shuffle(shuffled)
    assert train(shuffled, 320).merges == train(CORPUS, 320).merges


def test_ties_are_broken_by_spelling() -> None:
    # " c", "cd", " a" and "ab" all occur twice: the smallest bytes are merged first.
    merged = train(["cd ab", "cd ab"], FIRST_MERGE + 1)
    assert merged.pieces("ab cd") == [" a", "b", " ", "c", "d"]


def test_training_is_the_same_in_any_process() -> None:
    corpus = "['the red ball falls', 'the blue ring bounces'] * 3"
    code = f"from tubelet.text.bpe import train; print(train({corpus}, 300).merges)"
    other = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONHASHSEED": "7"}, capture_output=True, text=True, check=True
    )
    assert json.loads(other.stdout.replace("(", "[").replace(")", "]")) == [
        list(pair) for pair in train(["the red ball falls", "the blue ring bounces"] * 3, 300).merges
    ]


def naive_merges(corpus: list[str], count: int) -> list[tuple[bytes, bytes]]:
    """The textbook algorithm on lists of bytes, recounting everything at each step."""
    words = [[bytes([b]) for b in word.encode()] for text in corpus for word in words_of(normalise(text))]
    merges = []
    for _ in range(count):
        pairs: dict[tuple[bytes, bytes], int] = {}
        for word in words:
            for pair in pairwise(word):
                pairs[pair] = pairs.get(pair, 0) + 1
        if not pairs or max(pairs.values()) < 2:
            break
        best = min(pairs, key=lambda p: (-pairs[p], p))
        merges.append(best)
        for word in words:
            i = 0
            while i + 1 < len(word):
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = [best[0] + best[1]]
                i += 1
    return merges


@given(st.lists(st.text(alphabet="aabbc ", max_size=20), max_size=6))
@settings(max_examples=100, deadline=None)
def test_incremental_counting_equals_recounting(corpus: list[str]) -> None:
    trained = train(corpus, FIRST_MERGE + 20)
    spelled = [(trained.spelling(left), trained.spelling(right)) for left, right in trained.merges]
    assert spelled == naive_merges(corpus, 20)


def test_vocabulary_is_not_exceeded() -> None:
    assert train(CORPUS, 280).size == 280
    assert train(CORPUS, 100_000).size < 1000
    assert train([], FIRST_MERGE).size == FIRST_MERGE


def test_save_and_load(tokenizer: Tokenizer, tmp_path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "tokenizer.json")
    assert again.merges == tokenizer.merges
    assert again.encode(CORPUS[5]) == tokenizer.encode(CORPUS[5])


@pytest.mark.parametrize(
    "value",
    [
        [],
        {"format": "other", "merges": []},
        {"format": "tubelet-bpe-1"},
        {"format": "tubelet-bpe-1", "merges": ["1"]},
        {"format": "tubelet-bpe-1", "merges": [3]},
        {"format": "tubelet-bpe-1", "merges": ["a b"]},
        {"format": "tubelet-bpe-1", "merges": ["0 1"]},
        {"format": "tubelet-bpe-1", "merges": [f"{FIRST_MERGE} 40"]},
        {"format": "tubelet-bpe-1", "merges": ["40 41", "40 41"]},
    ],
)
def test_a_broken_file_is_one_sentence(tmp_path, value: object) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(value))
    with pytest.raises(UserError, match=r"; "):
        Tokenizer.load(path)


def test_a_missing_file_and_bad_numbers(tmp_path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="does not exist"):
        Tokenizer.load(tmp_path / "no.json")
    with pytest.raises(UserError, match="at least 258"):
        train(CORPUS, 257)
    for bad in (-1, tokenizer.size):
        with pytest.raises(UserError, match="does not exist"):
            tokenizer.decode([bad])
