"""The Makefile's choice of a torch: the CPU build where it is meant, the plain install whatever comes of that."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CPU = "https://download.pytorch.org/whl/cpu"
PLAIN = "-m pip --disable-pip-version-check -q install -c constraints.txt -e ."

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")


class Machine:
    """A copy of the Makefile, and commands that say what they are told to instead of asking the machine."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log"
        for name in ("Makefile", "constraints.txt", "pyproject.toml"):
            shutil.copy(ROOT / name, folder)
        self.say("uname", "echo Linux x86_64")
        self.say("ls", "exit 2")
        self.python()

    def say(self, name: str, script: str) -> None:
        path = self.folder / "commands" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def python(self, there: bool = False, config: str = "", reached: bool = True) -> None:
        """The environment's Python: whether it has torch, pip's configuration, whether the other index is reached."""
        self.say(
            "python",
            f"""echo "$@" >> {self.log}
case "$*" in
  *find_spec*) exit {0 if there else 1};;
  *"config list"*) echo "{config}";;
  *--index-url*) echo "no such host" >&2; exit {0 if reached else 1};;
esac""",
        )

    def installed(self, *words: str, **environment: str) -> list[str]:
        """The installs that `make` asks for: the index of each, "" for the plain one."""
        binaries = self.folder / "commands"
        (binaries / ".runtime").unlink(missing_ok=True)
        self.log.unlink(missing_ok=True)
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "UV_", "TORCH_", "MAKE", "MFLAGS"))}
        result = subprocess.run(
            ["make", "-s", f"VENV={binaries}", f"BIN={binaries}", str(binaries / ".runtime"), *words],
            cwd=self.folder,
            env={**clean, "PATH": f"{binaries}:{clean['PATH']}", **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
        lines = [line for line in self.log.read_text().splitlines() if " install " in line]
        assert lines[-1] == PLAIN
        assert all("--no-deps --retries 0 --timeout 5" in line and line.endswith(" torch==2.13.0") for line in lines[:-1])
        return [line.partition("--index-url ")[2].partition(" ")[0] for line in lines]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_without_a_card_the_cpu_build_is_tried_first(machine: Machine) -> None:
    assert machine.installed() == [CPU, ""]
    machine.python(reached=False)
    assert machine.installed() == [CPU, ""], "and where it is not reached, the plain install follows"


def test_what_the_environment_says_counts(machine: Machine) -> None:
    assert machine.installed(UV_INDEX_URL="http://mirror") == [""]
    for config in (":env:.index-url='http://mirror'", "global.extra-index-url='file:///a'", "global.find-links='/wheels'"):
        machine.python(config=config)
        assert machine.installed() == [""]
    assert (
        machine.installed(TORCH_INDEX="http://other") == machine.installed("TORCH_INDEX=http://other") == ["http://other", ""]
    )
    machine.python(config="global.timeout='60'")
    assert machine.installed() == [CPU, ""]
    assert machine.installed(TORCH_INDEX="") == machine.installed("TORCH_INDEX=") == [""]
    machine.python(there=True)
    assert machine.installed() == machine.installed(TORCH_INDEX="http://other") == [""]


def test_a_card_or_another_machine_takes_the_plain_build(machine: Machine) -> None:
    machine.say("ls", "echo /dev/nvidiactl; exit 2")
    assert machine.installed() == [""]
    machine.say("ls", "exit 2")
    for name in ("Darwin arm64", "Linux aarch64"):
        machine.say("uname", f"echo {name}")
        assert machine.installed() == [""]
