"""The text-state cache gives what the encoder gives, and says what it lacks."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from tubelet.core.errors import UserError
from tubelet.core.types import Condition
from tubelet.data.states import CachedStates, CachedTextEncoder, cache_states
from tubelet.text.base import TextEncoder

calls: list[list[str]] = []


def encode(texts: list[str]) -> Condition:
    """Each character a token of two numbers; the empty text is one token."""
    calls.append(list(texts))
    rows = [[[float(ord(c)), 1.0] for c in text] or [[0.0, 0.5]] for text in texts]
    longest = max(map(len, rows))
    states = torch.tensor([row + [[9.0, 9.0]] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for row in rows])
    return Condition(states, mask)


def test_cached_equals_encoded_and_nothing_is_encoded_twice(tmp_path: Path) -> None:
    texts = ["ab", "c", "ab", "defg"]
    assert cache_states(encode, texts, tmp_path, batch=2) == 4
    calls.clear()
    assert cache_states(encode, texts, tmp_path, batch=2) == 4
    assert calls == []
    got, direct = CachedStates(tmp_path).encode(["defg", "", "ab"]), encode(["defg", "", "ab"])
    assert torch.equal(got.mask, direct.mask)
    assert torch.equal(got.states[got.mask], direct.states[direct.mask])
    assert got.states[~got.mask].abs().sum() == 0


def test_new_captions_are_added_and_unknown_ones_named(tmp_path: Path) -> None:
    cache_states(encode, ["ab"], tmp_path)
    with pytest.raises(UserError, match="has no states of 'xyz'"):
        CachedStates(tmp_path).encode(["xyz"])
    assert cache_states(encode, ["ab", "xyz"], tmp_path) == 3
    assert CachedStates(tmp_path).encode(["xyz"]).mask.sum() == 3


class Letters(TextEncoder):
    trainable = False
    config = None
    width = 2

    def truncated(self, prompt: str) -> bool:
        return False

    def _encode(self, prompts: list[str]) -> Condition:
        return encode(prompts)


def test_a_frozen_encoder_reads_captions_from_its_cache_and_other_prompts_itself(tmp_path: Path) -> None:
    cache_states(encode, ["ab", "c"], tmp_path)
    encoder = CachedTextEncoder(Letters(), tmp_path)
    calls.clear()
    assert encoder.encode(["ab", "c"]).mask.sum(1).tolist() == [2, 1]
    assert encoder.null(2).states.shape == (2, 1, 2)
    assert calls == []
    assert encoder.encode(["ab", "new"]).mask.sum(1).tolist() == [2, 3]
    assert calls == [["ab", "new"]]
    assert copy.deepcopy(encoder) is encoder, "what is frozen is shared with the average"
