"""The pages say what the code does: generated pages are fresh, commands parse, snippets run, links lead somewhere."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tubelet import cli
from tubelet.codecs import CODECS
from tubelet.diffusion.solvers import SOLVERS
from tubelet.evaluate.laws import LAWS
from tubelet.media.encode import FORMATS
from tubelet.recipes import RECIPES, load_recipe
from tubelet.text import TEXT_ENCODERS
from tubelet.worlds import WORLDS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in [*ROOT.glob("*.md"), *DOCS.rglob("*.md")] if path.name not in ("log.md", "CHANGELOG.md"))
ROOMS = ("worlds", "codecs", "text", "diffusion", "data", "tasks", "training", "evaluate", "media")


def blocks(path: Path, language: str) -> Iterator[str]:
    """The fenced blocks of a page in one language; "" is a block without."""
    for found in re.finditer(r"^```(\w*)\n(.*?)^```$", path.read_text(encoding="utf-8"), re.M | re.S):
        if found[1] == language:
            yield found[2]


def commands() -> Iterator[tuple[str, str]]:
    for path in PAGES:
        for language in ("", "sh", "bash", "console"):
            for block in blocks(path, language):
                for line in block.replace("\\\n", " ").splitlines():
                    if re.match(r"(\$ )?tubelet ", line):
                        yield path.name, line.removeprefix("$ ")


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["cli.md", "catalogue.md", "../README.md", "../src/tubelet/evaluate/thresholds.json"])
def test_generated_pages_are_fresh(generator: ModuleType, page: str) -> None:
    stored = (DOCS / page).read_text(encoding="utf-8")
    assert generator.PAGES[page]() == stored, "the code moved on: run `make docs`"


def test_the_command_line_page_names_every_option(generator: ModuleType) -> None:
    """The check that the page's source is the command line itself, not a copy of it."""
    page = (DOCS / "cli.md").read_text(encoding="utf-8")
    for name, verb in cli.VERBS.items():
        said = generator.attribute_docs(verb)
        assert set(said) == set(verb.__dataclass_fields__), f"every option of {name} needs its sentence"
        assert f"## tubelet {name}" in page
    assert "--like FILE" in page


@pytest.mark.parametrize(("page", "line"), commands())
def test_every_command_of_the_pages_parses(page: str, line: str) -> None:
    words = shlex.split(line.split(" | ")[0], comments=True)[1:]
    if "--version" in words or "--help" in words:
        return
    verb = cli._parse(words)
    if isinstance(verb, cli.Train):
        load_recipe(verb.recipe, verb.set)
    if isinstance(verb, cli.Worlds):
        assert verb.world in WORLDS
        assert verb.kind is None or verb.kind in WORLDS[verb.world].kinds
        assert verb.split in WORLDS[verb.world].splits


def test_commands_were_found() -> None:
    assert len(list(commands())) > 10


@pytest.mark.parametrize("page", [path for path in PAGES if any(blocks(path, "python"))], ids=lambda path: path.name)
def test_python_of_the_pages_runs_and_its_shapes_hold(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`x = ...  # (1, 3, 17)` states the shape of x. The blocks of the tour and of a room's page run in order; elsewhere, where
    weights may be needed, only the imports do."""
    monkeypatch.chdir(tmp_path)
    space: dict[str, object] = {}
    for block in blocks(page, "python"):
        tree = ast.parse(block)
        if page.stem not in (*ROOMS, "tour"):
            tree.body = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        exec(compile(tree, str(page), "exec"), space)
        for name, stated in re.findall(r"^(\w+)(?:, \w+)* = .*# \((\d[\d, ]*)\)$", block, re.M):
            if name in space:
                shape = tuple(int(number) for number in stated.split(",") if number.strip())
                assert tuple(space[name].shape) == shape, f"{page.name}: {name}"  # type: ignore[attr-defined]


def test_the_tour_states_shapes() -> None:
    text = (DOCS / "tour.md").read_text(encoding="utf-8")
    assert len(re.findall(r"# \(\d", text)) > 10


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_and_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in target and not target.startswith("mailto:"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
    for name in re.findall(r"`((?:src|tests|docs|benchmarks)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), f"{page.name} names {name}"
    for name in re.findall(r"`tubelet((?:\.\w+)+)", text):
        assert resolves(name.strip(".").split(".")), f"{page.name} names tubelet{name}"


def resolves(parts: list[str]) -> bool:
    """Whether `tubelet.a.b.c` is a module, or something that a module holds."""
    thing: object = importlib.import_module("tubelet")
    path = "tubelet"
    for part in parts:
        path = f"{path}.{part}"
        if hasattr(thing, part):
            thing = getattr(thing, part)
            continue
        try:
            thing = importlib.import_module(path)
        except ModuleNotFoundError:
            return False
    return True


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_has_its_page(room: str) -> None:
    text = (DOCS / f"{room}.md").read_text(encoding="utf-8")
    assert "**The one idea.**" in text
    assert "## Adding" in text or room == "data"
    assert 25 <= text.count("\n") <= 90


def test_pages_name_what_their_catalogues_hold() -> None:
    held = {
        "worlds": [*WORLDS, *(kind for world in WORLDS.values() for kind in world.kinds)],
        "codecs": list(CODECS),
        "text": list(TEXT_ENCODERS),
        "evaluate": [law for law in LAWS if law != "inertia_strict"],
        "media": list(FORMATS),
        "recipes": ["smoke", "worlds-64"],
        "catalogue": [*SOLVERS, *LAWS, *WORLDS, *CODECS, *TEXT_ENCODERS, *RECIPES],
    }
    for page, names in held.items():
        text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
        assert [name for name in names if name not in text] == [], page
    splits = {split for world in WORLDS.values() for split in world.splits}
    text = (DOCS / "worlds.md").read_text(encoding="utf-8")
    assert [split for split in splits if f"`{split}`" not in text] == []


def test_every_promise_has_its_tests_and_its_figure() -> None:
    """The two tables of docs/serving.md name every promise, tests that there are, and trials that there are."""
    promises = {f"{kind}{n}" for kind, last in (("R", 15), ("S", 10), ("T", 4)) for n in range(1, last + 1)}
    tests, figures = (ROOT / "docs" / "serving.md").read_text().split("## Promises, ")[1].split("## At length")
    trees = [ast.parse(path.read_text()) for path in (ROOT / "tests").rglob("test_*.py")]
    known = {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    named = set(re.findall(r"`(test_\w+)", tests))
    assert len(named) > 50
    assert named <= known, f"no such tests: {sorted(named - known)}"
    for part in (tests, figures):
        rows = [line.split("|")[1] for line in part.splitlines() if line.startswith("|")]
        missing = promises - set(re.findall(r"[RST]\d+", " ".join(rows)))
        assert not missing, f"without a row: {sorted(missing)}"
    commands = re.findall(r"python -m tests\.soak (?:--minutes \d+ )?--only ([a-z ]+)`", figures)
    trials = set(re.findall(r'^    "(\w+)": ', (ROOT / "tests" / "soak" / "__main__.py").read_text(), re.MULTILINE))
    assert {name for words in commands for name in words.split()} <= trials
