"""Files of weights: whatever stands in one, it is read or refused in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tubelet.core.errors import UserError
from tubelet.core.weights import load_tensors, save_tensors


def raw(header: Any, body: bytes = b"") -> bytes:
    """A file with any header."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def of(dtype: str, shape: list[Any], *places: int) -> dict[str, Any]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": list(places)}}


BROKEN = [
    b"",
    b"\0" * 7,
    b"\xff" * 40,
    raw([]),
    raw({"a": 1}),
    raw(of("F32", [0, 2**63], 0, 0)),
    raw(of("F32", [2**40, 2**40], 0, 0)),
    raw(of("F32", [1], 0, 4)),
    raw(of("F32", [-1], 0, 4), bytes(4)),
    raw(of("F33", [1], 0, 4), bytes(4)),
    raw(of("F32", [1], 4, 0), bytes(4)),
    raw({**of("F32", [1], 0, 4), "__metadata__": {"a": 1}}, bytes(4)),
]


@pytest.mark.parametrize("data", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_file_is_refused_in_words(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(data)
    with pytest.raises(UserError, match="truncated or corrupt"):
        load_tensors(path)


def test_a_good_one_comes_back(tmp_path: Path) -> None:
    save_tensors(tmp_path / "a.safetensors", {"a": torch.ones(2, 3), "none": torch.zeros(0, 3)})
    found = load_tensors(tmp_path / "a.safetensors")
    assert {name: tuple(value.shape) for name, value in found.items()} == {"a": (2, 3), "none": (0, 3)}
