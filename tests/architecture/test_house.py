"""The house stands as drawn: imports point down, and a few things stay where they belong."""

from __future__ import annotations

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "tubelet"


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(SOURCE.rglob("*.py")):
        yield path.relative_to(SOURCE).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    code = (
        "import sys; sys.path.insert(0, 'src'); "
        "from importlinter.cli import lint_imports_command; lint_imports_command(['--no-cache'])"
    )
    return subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(SOURCE, tmp_path / "src" / "tubelet", ignore=shutil.ignore_patterns("weights", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_imports_point_down(copy: Path) -> None:
    result = lint_imports(copy)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("core/types.py", "import tubelet.nn.attention"),
        ("models/spacetime.py", "import tubelet.codecs.base"),
        ("models/dit.py", "import tubelet.models.vit"),
        ("diffusion/paths.py", "import transformers"),
        ("evaluate/laws.py", "import tubelet.train.loop"),
    ],
)
def test_a_forbidden_import_turns_red(copy: Path, place: str, line: str) -> None:
    path = copy / "src" / "tubelet" / place
    path.write_text(path.read_text(encoding="utf-8") + f"\n{line}\n", encoding="utf-8")
    assert lint_imports(copy).returncode == 1


def test_a_new_room_must_be_placed(copy: Path) -> None:
    room = copy / "src" / "tubelet" / "attic"
    room.mkdir()
    (room / "__init__.py").touch()
    assert lint_imports(copy).returncode == 1


def test_the_contracts_name_everything_they_are_about() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
    layers, maths, models = contracts
    assert layers["exhaustive"]
    assert layers["layers"] == [
        "cli", "(serve)", "recipes | catalogue", "train | (curate)", "evaluate", "generate",
        "models | codecs | diffusion | decoding | (tasks) | data | worlds", "media | text | runtime | (distributed)",
        "nn", "core",
    ]  # fmt: skip
    rooms = {"core", "nn", "models", "codecs", "diffusion", "tasks", "decoding"}
    assert set(maths["source_modules"]) == {f"tubelet.{room}" for room in rooms}
    files = {path.stem for path in (SOURCE / "models").glob("*.py")} - {"__init__"}
    assert set(models["modules"]) == {f"tubelet.models.{name}" for name in files}


def test_the_environment_is_read_only_in_cli_and_runtime() -> None:
    for name, tree in modules():
        if name.startswith(("cli/", "runtime/")):
            continue
        used = [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr in ("environ", "getenv")]
        imports = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module == "os"]
        used += [n.lineno for n in imports if {a.name for a in n.names} & {"environ", "getenv"}]
        assert not used, f"{name}:{used} reads the environment"


def test_processes_meet_only_in_distributed() -> None:
    for name, tree in modules():
        if name.startswith("distributed/"):
            continue
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names += [f"{node.module}.{a.name}" for a in node.names]
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                names.append(f"{node.value.id}.{node.attr}")
            assert not any(n.startswith("torch.distributed") for n in names), f"{name}:{getattr(node, 'lineno', 0)}"


def test_nothing_is_unpickled() -> None:
    forbidden = {("torch", "load"), ("pickle", "load"), ("pickle", "loads"), ("np", "load"), ("numpy", "load")}
    for name, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in forbidden, f"{name}:{node.lineno} unpickles"


def test_no_archive_is_unpacked() -> None:
    """Shards are tar files, and are read by the places in their index: no name within one ever becomes a path."""
    unpackers = {"extract", "extractall", "unpack_archive", "extractfile", "getmembers", "ZipFile"}
    for name, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                assert node.attr not in unpackers, f"{name}:{node.lineno} unpacks an archive"
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                assert not {"zipfile", "zipimport"} & set(names), f"{name}:{node.lineno} opens zip files"
                assert "tarfile" not in names or name == "data/shards.py", f"{name}:{node.lineno} opens tar files"


def test_what_is_dangerous_is_found_by_lint() -> None:
    """ruff's rules of bandit are on for what is shipped."""
    code = "import subprocess\n\nsubprocess.run(input(), shell=True)\neval(input())\n"
    words = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise", "--stdin-filename"]
    said = subprocess.run([*words, "src/tubelet/x.py", "-"], cwd=ROOT, input=code, capture_output=True, text=True, check=False)
    assert {"S602", "S307"} <= set(said.stdout.replace(":", " ").split()), said


def test_every_exception_to_these_says_why() -> None:
    for path in [*SOURCE.rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]:
        lines = path.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines):
            found = re.search(r"# noqa: S\d+(.*)", line)
            if found:
                assert found[1].strip() or lines[number - 1].strip().startswith("#"), f"{path}:{number + 1} gives no reason"


def test_every_file_names_a_concept() -> None:
    for path in SOURCE.rglob("*.py"):
        assert path.stem not in {"utils", "util", "helpers", "helper", "common", "misc"}, f"{path} names no concept"


def test_every_module_says_what_it_is() -> None:
    for name, tree in modules():
        if tree.body:
            assert ast.get_docstring(tree), f"{name} has no docstring"


def test_torchvision_is_absent() -> None:
    assert importlib.util.find_spec("torchvision") is None, "torchvision breaks the CPU torch: uninstall it"
