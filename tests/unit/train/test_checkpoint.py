from __future__ import annotations

import builtins
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from tubelet.core.errors import UserError
from tubelet.train import checkpoint
from tubelet.train.checkpoint import newest, random_state, restore_random_state, save, whole

PARTS = ("model", "ema")


def put(folder: Path, step: int, keep: int = 2) -> None:
    parts = {part: {"w": torch.full((50,), float(step)), "n": torch.tensor([step])} for part in PARTS}
    save(folder, step, parts, {"step": step}, keep)


def get(folder: Path) -> int | None:
    found = newest(folder)
    if found is None:
        return None
    assert found.state()["step"] == found.step
    for part in PARTS:
        assert found.tensors(part)["w"].eq(found.step).all()
    return found.step


class Killed(BaseException):
    pass


def operations(monkeypatch: pytest.MonkeyPatch, fail: Callable[[str, int], None]) -> Callable[[], int]:
    """Call `fail(name, number)` before every file operation of the writer; a file's write is torn half-way first."""
    done = 0

    def guard(owner: Any, name: str, tear: bool = False) -> None:
        real = getattr(owner, name)

        def guarded(*args: Any, **settings: Any) -> Any:
            nonlocal done
            done += 1
            try:
                fail(name, done)
            except BaseException:
                if tear:
                    result = real(*args, **settings)
                    path = Path(args[1] if name == "save_file" else args[0])
                    content = path.read_bytes()
                    path.write_bytes(content[: len(content) // 2])
                    del result
                raise
            return real(*args, **settings)

        monkeypatch.setattr(owner, name, guarded)

    guard(checkpoint, "save_file", tear=True)
    guard(Path, "write_text", tear=True)
    guard(Path, "mkdir")
    guard(checkpoint.os, "fsync")
    guard(checkpoint.os, "rename")
    guard(checkpoint.os, "open")
    guard(checkpoint.shutil, "rmtree")
    return lambda: done


def test_round_trip_and_only_the_newest_are_kept(tmp_path: Path) -> None:
    assert newest(tmp_path / "nothing") is None
    for step in (1, 2, 10, 30):
        put(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000030"]
    assert get(tmp_path) == 30


@pytest.mark.parametrize("keep", [1, 2])
def test_a_kill_at_any_file_operation_leaves_the_newest_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: int
) -> None:
    for at in range(1, 100):
        folder = tmp_path / str(at)
        put(folder, 5, keep)
        put(folder, 10, keep)
        with monkeypatch.context() as patch:

            def kill(name: str, number: int, at: int = at) -> None:
                if number == at:
                    raise Killed

            count = operations(patch, kill)
            try:
                put(folder, 20, keep)
                killed = False
            except Killed:
                killed = True
        if not killed:
            assert count() < at
            assert at > 15
            return
        assert get(folder) in (10, 20)
        put(folder, 30, keep)
        assert get(folder) == 30
        assert len(list(folder.iterdir())) == keep, "what the crash left is cleared"
    pytest.fail("the writer never came to its end")


def refusal(folder: Path) -> str | None:
    try:
        put(folder, 10)
    except UserError as error:
        return str(error)
    return None


def test_a_full_disk_at_any_write_keeps_the_old_one_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = 0
    for at in range(1, 24):
        for error in (OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device")):
            folder = tmp_path / f"{at}-{type(error).__name__}"
            put(folder, 5)
            with monkeypatch.context() as patch:

                def full(name: str, number: int, at: int = at, error: Exception = error) -> None:
                    writes = (
                        ("save_file",) if isinstance(error, SafetensorError) else ("save_file", "write_text", "mkdir", "fsync")
                    )
                    if number >= at and name in writes:
                        raise error

                operations(patch, full)
                message = refusal(folder)
            if message is None:
                assert get(folder) == 10
            else:
                refused += 1
                assert "No space left on device" in message
                assert "make room" in message
            assert get(folder) in (5, 10)
            put(folder, 20)
            assert get(folder) == 20
    assert refused > 15


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "missing", "empty"])
def test_a_torn_checkpoint_is_passed_over(tmp_path: Path, name: str, damage: str) -> None:
    put(tmp_path, 5)
    put(tmp_path, 10)
    path = tmp_path / "step-00000010" / name
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[content.index(b":") if name == "manifest.json" else len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "truncate" else b"")
    assert not whole(tmp_path / "step-00000010")
    assert get(tmp_path) == 5
    put(tmp_path, 10)
    assert get(tmp_path) == 10


def test_a_torn_one_takes_no_place_of_a_whole_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, 200)
    put(tmp_path, 300)
    (tmp_path / "step-00000300" / "model.safetensors").write_bytes(b"torn")
    assert get(tmp_path) == 200
    assert "step-00000300 is damaged; step-00000200 is taken in its place" in capsys.readouterr().err
    put(tmp_path, 250)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000200", "step-00000250"]


def test_where_all_are_torn_nothing_is_begun_anew(tmp_path: Path) -> None:
    put(tmp_path, 5)
    (tmp_path / "step-00000005" / "ema.safetensors").unlink()
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged; restore one"):
        newest(tmp_path)


def test_foreign_names_are_ignored(tmp_path: Path) -> None:
    put(tmp_path, 5)
    (tmp_path / "step-00000099").write_text("a file")
    (tmp_path / "step-abc").mkdir()
    shutil.copytree(tmp_path / "step-00000005", tmp_path / "other-00000100")
    assert get(tmp_path) == 5


def test_an_unwritable_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the checkpoint of step 1"):
        put(tmp_path / "file" / "run", 1)


def test_tied_and_sliced_tensors_are_stored_whole(tmp_path: Path) -> None:
    stack = torch.arange(24.0).view(2, 3, 4)
    tensors = {"a": stack[0], "b": stack[1], "tied": stack[1], "turned": stack[0].T}
    save(tmp_path, 1, {"model": tensors}, {})
    found = newest(tmp_path)
    assert found is not None
    for name, value in found.tensors("model").items():
        assert torch.equal(value, tensors[name])


def test_random_states_go_round() -> None:
    generator = torch.Generator().manual_seed(5)
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    random.gauss(0, 1)
    np.random.randn()

    def draws() -> list[float]:
        own = torch.randn(3, generator=generator).tolist()
        return [random.gauss(0, 1), random.random(), np.random.randn(), np.random.rand(), *torch.randn(3).tolist(), *own]

    state = {name: value.clone() for name, value in random_state(generator).items()}
    first = draws()
    restore_random_state(state, generator)
    assert draws() == first
    assert builtins.all(value.dtype in (torch.uint8, torch.int64, torch.float64) for value in state.values())


def test_nothing_is_pickled(tmp_path: Path) -> None:
    put(tmp_path, 1)
    names = sorted(os.listdir(tmp_path / "step-00000001"))
    assert names == ["ema.safetensors", "manifest.json", "model.safetensors", "state.json"]
    assert json.loads((tmp_path / "step-00000001" / "manifest.json").read_text())["files"].keys() == set(names) - {
        "manifest.json"
    }
