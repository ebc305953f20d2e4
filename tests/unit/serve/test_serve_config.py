"""What a server serves, and under which names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tubelet.cli import serve as cli
from tubelet.core.errors import UserError
from tubelet.runtime import device
from tubelet.serve import supervisor
from tubelet.serve.config import SHIPPED, ServeConfig, read_served


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """`folder(name)`: a system's folder, as far as a server looks into it."""

    def made(name: str, at: str = "") -> Path:
        place = tmp_path / (at or name)
        place.mkdir()
        facts = json.loads((SHIPPED / "worlds-64" / "system.json").read_text())
        (place / "system.json").write_text(json.dumps({**facts, "name": name}))
        return place

    return made


def test_soras_names_are_the_default_system_unless_they_say_otherwise(folder: Callable[..., Path], tmp_path: Path) -> None:
    assert read_served("worlds-64", [])[1] == {"sora-2": "worlds-64", "sora-2-pro": "worlds-64"}
    large = folder("large")
    systems, aliases = read_served("worlds-64", [f"sora-2-pro={large}", "mine=worlds-64", "big=large"])
    assert list(systems) == ["worlds-64", "large"], "the default one first"
    assert systems["large"].folder == large
    assert aliases == {"sora-2": "worlds-64", "sora-2-pro": "large", "mine": "worlds-64", "big": "large"}
    config = ServeConfig(tmp_path, systems, aliases=aliases)
    assert config.default == "worlds-64"
    assert config.system("sora-2-pro") == systems["large"]
    systems, aliases = read_served(str(large), [f"mine={tmp_path / 'large'}/", "small=worlds-64"])
    assert list(systems) == ["large", "worlds-64"], "the same folder is the same system"
    assert aliases == {"sora-2": "large", "sora-2-pro": "large", "mine": "large", "small": "worlds-64"}
    systems, aliases = read_served("worlds-64", [f"mine={folder('sora-2')}"])
    assert aliases == {"sora-2-pro": "worlds-64", "mine": "sora-2"}, "a system is called what it is called"


@pytest.mark.parametrize("wrong", ["sora-2", "=worlds-64", "sora-2=", "so ra=worlds-64", "a" * 101 + "=worlds-64"])
def test_what_is_no_alias(wrong: str) -> None:
    with pytest.raises(UserError, match="an alias is a name without blanks and a system, like sora-2=worlds-64, got"):
        read_served("worlds-64", [wrong])


def test_aliases_that_contradict_each_other(folder: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'mine' is given twice"):
        read_served("worlds-64", ["mine=worlds-64", "mine=worlds-64"])
    with pytest.raises(UserError, match="there is no system 'nothing'"):
        read_served("worlds-64", ["mine=nothing"])
    first, second = folder("large"), folder("large", at="copy")
    with pytest.raises(UserError, match="two systems are called 'large'"):
        read_served(str(first), [f"mine={second}"])
    systems, aliases = read_served("worlds-64", ["worlds-64=worlds-64"])
    with pytest.raises(UserError, match="both a system and an alias"):
        ServeConfig(tmp_path, systems, aliases=aliases)


def test_each_system_gets_a_worker_on_each_device(
    folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[ServeConfig, Any]] = []
    monkeypatch.setattr(supervisor, "serve", lambda config, url, commands, **more: started.append((config, commands)) or 0)
    looked_for: list[str] = []
    monkeypatch.setattr(device, "choose_device", looked_for.append)
    large = folder("large")
    cli.Serve(data=tmp_path / "data", alias=(f"sora-2={large}",), device="cuda:0,cuda:1")()
    assert looked_for == ["cuda:0", "cuda:1"]
    ((config, commands),) = started
    assert config.named == {"sora-2": "large", "sora-2-pro": "worlds-64"}
    words = [command("name") for command in commands]
    told = [(line[line.index("--system") + 1], line[line.index("--device") + 1]) for line in words]
    places = [str(SHIPPED / "worlds-64"), str(large)]
    assert told == [(place, name) for place in places for name in ("cuda:0", "cuda:1")]
    shutil.rmtree(large)
    with pytest.raises(UserError, match="there is no system"):
        cli.Serve(data=tmp_path / "data", alias=(f"sora-2={large}",))()
