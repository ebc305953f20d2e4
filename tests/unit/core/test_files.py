"""Files are whole or absent; weights and settings are checked when read."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import torch

from tubelet.core import files
from tubelet.core.config import from_dict, to_dict
from tubelet.core.errors import UserError
from tubelet.core.files import held, read_json, sha256, whole_file, write_json
from tubelet.core.weights import load_module, load_tensors, save_module, save_tensors


def test_a_folder_is_held_by_one_process_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code = (
        "import sys; from tubelet.core.files import held\nwith held(sys.argv[1]): print('mine', flush=True); sys.stdin.read()"
    )

    def second() -> None:
        with held(folder):
            pass

    with subprocess.Popen([sys.executable, "-c", code, folder], stdin=-1, stdout=-1, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "mine\n"
        with pytest.raises(UserError, match="another process is at work in"):
            second()
        assert folder.is_dir(), "whose folder it is, keeps it"
        first.kill()
    second()
    assert [path.name for path in folder.iterdir()] == [".lock"]


def test_a_held_folder_in_which_nothing_is_made_goes_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with held(tmp_path / "empty"):
        pass
    with held(tmp_path / "runs" / "a" / "b"):
        pass
    assert not (tmp_path / "runs").exists()
    with held(tmp_path / "runs" / "a" / "b"):
        (tmp_path / "runs" / "other").mkdir()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["other"]
    (tmp_path / "runs" / "other").rmdir()
    (tmp_path / "runs").rmdir()
    with held(tmp_path / "full"):
        (tmp_path / "full" / "a").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    with pytest.raises(UserError, match="cannot write in"), held(tmp_path / "full" / "a"):
        pass
    with pytest.raises(UserError, match="cannot write in"), held(tmp_path / ("a" * 300)):
        pass
    monkeypatch.setattr(files, "fcntl", None)
    with held(tmp_path / "full"), held(tmp_path / "full"):
        pass


def test_a_folder_is_no_json(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        read_json(tmp_path)
    with pytest.raises(UserError, match="cannot read"):
        read_json(tmp_path / ("a" * 300))


def test_what_cannot_be_read_has_no_hash(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match=f"cannot read {path}"):
            sha256(path)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "note.txt"
    path.write_text("old")

    def interrupted() -> None:
        with whole_file(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["note.txt"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_is_one_sentence_and_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = tmp_path / "note.json"
    write_json(path, {"a": 1})

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(UserError, match=r"cannot write .*No space left"):
        write_json(path, {"a": 2})
    monkeypatch.undo()
    assert read_json(path) == {"a": 1}
    assert len(list(tmp_path.iterdir())) == 1


def test_a_place_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_json(tmp_path / "file" / "x.json", {})


def test_json_that_is_missing_or_broken(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_json(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text('{"a": ')
    with pytest.raises(UserError, match="not valid JSON"):
        read_json(tmp_path / "broken.json")


def test_tensors_round_trip_and_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_tensors(path, {"a": torch.arange(6.0).view(2, 3).T}, {"about": "a test"})
    assert torch.equal(load_tensors(path)["a"], torch.arange(6.0).view(2, 3).T)
    before = sha256(path)
    path.write_bytes(path.read_bytes()[:-5])
    assert sha256(path) != before
    with pytest.raises(UserError, match="truncated or corrupt"):
        load_tensors(path)
    with pytest.raises(UserError, match="does not exist"):
        load_tensors(tmp_path / "none.safetensors")


def test_modules_are_filled_exactly_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    module, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    save_module(path, module)
    load_module(path, other)
    assert torch.equal(module.weight, other.weight)
    with pytest.raises(UserError, match="wrong shape"):
        load_module(path, torch.nn.Linear(4, 2))
    with pytest.raises(UserError, match="unknown"):
        load_module(path, torch.nn.Linear(3, 2, bias=False))
    with torch.no_grad():
        module.weight[0, 0] = float("nan")
    save_module(path, module, torch.bfloat16)
    with pytest.raises(UserError, match="not finite"):
        load_module(path, other)


@dataclass(frozen=True)
class Inner:
    rate: float = 1.0
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Outer:
    steps: int
    inner: Inner = field(default_factory=Inner)
    sizes: tuple[int, ...] = (1, 2)
    pair: tuple[int, int] = (3, 4)
    maybe: Inner | None = None
    shares: dict[str, float] = field(default_factory=dict)


def test_settings_round_trip() -> None:
    config = Outer(3, Inner(2.0, "b"), (5,), (6, 7), Inner(), {"x": 0.5})
    assert from_dict(Outer, to_dict(config)) == config
    assert from_dict(Outer, {"steps": 1, "inner": {"rate": 2}}).inner.rate == 2.0


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "needs the setting 'steps'"),
        ({"steps": 1, "stepz": 2}, "no setting 'stepz'"),
        ({"steps": "1"}, "steps must be int"),
        ({"steps": True}, "steps must be int"),
        ({"steps": 1, "inner": {"kind": "c"}}, "must be one of a, b"),
        ({"steps": 1, "inner": 5}, "must be an object"),
        ({"steps": 1, "pair": [1, 2, 3]}, "must have 2 values"),
        ({"steps": 1, "sizes": 4}, "must be a list"),
    ],
)
def test_wrong_settings_are_named(values: dict[str, object], words: str) -> None:
    with pytest.raises(UserError) as caught:
        from_dict(Outer, values)
    assert words in str(caught.value)
