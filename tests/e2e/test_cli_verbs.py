"""The other verbs, start-up, and what is common to all."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import tomllib
import zlib
from pathlib import Path

import pytest
from PIL import Image

from tubelet import __version__
from tubelet.catalogue import MODELS
from tubelet.cli import VERBS
from tubelet.core.errors import UserError
from tubelet.core.files import held
from tubelet.evaluate import report
from tubelet.generate import system
from tubelet.media import sheet
from tubelet.recipes import RECIPES
from tubelet.serve import supervisor
from tubelet.text.expand import RuleExpander
from tubelet.worlds import WORLDS

PROJECT = Path(__file__).parents[2] / "pyproject.toml"


def process(*words: str, **more) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "tubelet", *words], capture_output=True, text=True, check=False, **more)


def test_a_world_is_shown(tubelet, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    said = tubelet("worlds", "phys2d", "--n", 3, "--frames", 4, "--sheet", out, "--json")
    assert said.code == 0, said.err
    clips = json.loads(said.out)
    assert [clip["tags"]["seed"] for clip in clips] == [0, 1, 2]
    truth = [WORLDS["phys2d"].sample(seed, frames=4) for seed in range(3)]
    assert [clip["short"] for clip in clips] == [episode.short for episode in truth]
    with Image.open(out) as image:
        assert image.width > 4 * 128
    said = tubelet("worlds", "persist2d", "--n", 2, "--kind", "eat", "--split", "held_out", "--frames", 2)
    wanted = [WORLDS["persist2d"].sample(seed, frames=2, kind="eat", split="held_out").short for seed in range(2)]
    assert said.out.splitlines() == wanted


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("phys3d",), "choose one of phys2d, persist2d"),
        (("--n", "0"), "--n must be at least 1"),
        (("--kind", "fly"), "no kind 'fly'"),
        (("--kind", "paint"), "no kind 'paint'"),
        (("--split", "test"), "no split 'test'"),
        (("--frames", "0"), "frames"),
        (("--fps", "0"), "frames per second"),
        (("--fps", "nan"), "frames per second"),
        (("--size", "8x8"), "too small"),
        (("--seed", "-1"), "seed"),
        (("--sheet", "out.jpg"), "must end in .png"),
        (("--sheet", "/proc/no/out.png"), "cannot write"),
        (("--sheet", ".png"), ".png has no name before its ending; call it film.png"),
        (("--n", "100000", "--size", "256x256", "--sheet", "out.png"), "too many for one sheet"),
    ],
)
def test_a_wrong_world_is_one_sentence(refused, words: tuple[str, ...], says: str) -> None:
    assert says in refused("worlds", *words)


def test_the_catalogue_and_one_model(tubelet, refused) -> None:
    assert list(json.loads(tubelet("models", "--json").out)) == list(MODELS)
    counted = json.loads(tubelet("models", "spacetime-xs", "--json").out)
    assert counted["name"] == "Spacetime-XS"
    assert counted["parameters"] == sum(
        p.numel() for p in MODELS["Spacetime-XS"].build(MODELS["Spacetime-XS"].config).parameters()
    )
    assert counted["macs"] > counted["parameters"]
    assert f"{counted['parameters']:,} parameters" in tubelet("models", "Spacetime-XS").out
    assert all(name in tubelet("models").out for name in MODELS)
    assert "choose one of Spacetime-XS" in refused("models", "Spacetime-XXS")


def test_a_verb_that_is_none_is_told_which_there_are(refused) -> None:
    said = refused("paint", "a red circle")
    assert said.startswith("tubelet: there is no verb 'paint'; choose one of generate, ")
    assert "unrecognized options: --paint" in refused("--paint")


def test_seeds_beyond_the_last_one_are_refused_before_anything_is_printed(tubelet) -> None:
    said = tubelet("worlds", "--seed", 2**32 - 6, "--n", 8)
    assert (said.code, said.out) == (2, "")
    assert "lower --seed or --n" in said.err
    assert tubelet("worlds", "--seed", 2**32 - 1, "--n", 1, "--frames", 1).code == 0


def test_evaluate_prints_one_flat_object(tubelet, refused, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "films.png"
    said = tubelet("evaluate", tiny, "--n", 1, "--samples", 1, "--json", "--sheet", out)
    assert said.code == 0, said.err
    figures = json.loads(said.out)
    assert all(value is None or isinstance(value, (int, float)) for value in figures.values())
    for root in ("caption/colour/in", "caption/event/held_out", "law/gravity/in", "law/steady/in", "codec/psnr"):
        assert root in figures
    for name in ("floor", "ceiling", "chance", "n"):
        assert f"caption/colour/in/{name}" in figures
        assert f"law/gravity/in/{name}" in figures
    assert out.exists()
    assert "there is no system" in refused("evaluate", "nope")
    assert "--n and --samples" in refused("evaluate", tiny, "--n", 0)
    assert "add --tasks" in refused("evaluate", tiny, "--only", "loop")
    assert "there is no task 'nope'" in refused("evaluate", tiny, "--tasks", "--only", "nope", "--n", 1)
    assert "must end in .png" in refused("evaluate", tiny, "--sheet", "a.mp4")


@pytest.mark.parametrize("evaluation", [(), ("--human",)])
def test_prompts_are_judged_as_generate_would_take_them(tubelet, monkeypatch: pytest.MonkeyPatch, evaluation: tuple) -> None:
    asked: list[object] = []
    for name in ("evaluate_system", "evaluate_human"):
        monkeypatch.setattr(report, name, lambda *_, expander, **__: asked.append(expander) or {})
    for words in ((), ("--no-expand",)):
        assert tubelet("evaluate", "worlds-64", *evaluation, *words, "--json").code == 0
    expanded, as_written = asked
    assert isinstance(expanded, RuleExpander)
    assert as_written is None


def test_figures_come_before_a_sheet_that_fails(tubelet, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise UserError("the disk is full; make room")

    monkeypatch.setattr(sheet, "save_sheet", full)
    how = ("--json", "--sheet", tmp_path / "films.png")
    for words, figure in (
        (("--tasks", "--only", "loop", "--n", 1), "task/loop/n"),
        (("--human", "--samples", 1), "human/all/n"),
    ):
        said = tubelet("evaluate", tiny, *words, *how)
        assert (said.code, said.err) == (2, "tubelet: the disk is full; make room\n")
        assert json.loads(said.out)[figure] > 0
    said = tubelet("worlds", "--n", 2, "--frames", 1, *how)
    assert said.code == 2
    assert len(json.loads(said.out)) == 2


@pytest.mark.parametrize("place", ["/proc/a.png", f"{'a' * 245}.png"])
def test_a_sheet_that_cannot_be_written_is_refused_before_any_work(
    refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("the work began")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(system, "load", forbidden)
    assert f"cannot write {place}" in refused("evaluate", "--sheet", place)
    assert f"cannot write {place}" in refused("generate", "a red ball", "--out", "a.mp4", "--sheet", place)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("evaluation", "option"),
    [
        ("--human", ("--n", 30)),
        ("--tasks", ("--samples", 2)),
        ("--tasks", ("--no-expand",)),
        ("--sizes", ("--samples", 2)),
        ("--splits", ("--sheet", "a.png")),
        ("--sizes", ("--no-expand",)),
        ("--sizes", ("--sheet", "a.png")),
    ],
)
def test_an_evaluation_refuses_what_it_has_no_use_for(refused, evaluation: str, option: tuple[str, ...]) -> None:
    assert f"{evaluation} has no use for {option[0]}; leave it out" in refused("evaluate", evaluation, *option)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("nope",), f"there is no recipe 'nope'; choose one of {', '.join(RECIPES)}"),
        ((), "RECIPE is missing"),
        (("worlds-64-tasks",), "tubelet train worlds-64 makes it"),
        (("footage",), "tubelet curate import FILMS --out data makes one"),
        (("smoke", "--set", "denoise.stepz=1"), "recipe smoke denoise has no setting 'stepz'; choose one of steps"),
        (("smoke", "--set", "nothing=1"), "has no setting 'nothing'"),
        (("smoke", "--set", "denoise.steps.more=1"), "denoise.steps of recipe smoke is a plain value"),
        (("smoke", "--set", "denoise"), "--set takes key=value"),
        (("smoke", "--set", "denoise.steps=few"), "must be int"),
        (("smoke", "--set", "denoise.steps=0"), "steps must be at least 1"),
        (("smoke", "--set", "denoise=7"), "must be an object"),
        (("smoke", "--set", "codec=magic"), "causal_conv"),
        (("smoke", "--out", "/dev/null/run"), "cannot write"),
    ],
)
def test_a_wrong_recipe_is_one_sentence(
    refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert says in refused("train", *words)
    assert not list(tmp_path.iterdir())


def test_a_run_folder_belongs_to_one_process_at_a_time(refused, tmp_path: Path) -> None:
    with held(tmp_path / "run"):
        assert "another process is at work in" in refused("train", "smoke", "--out", tmp_path / "run")


LONG = "a" * 300


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("generate", "a red ball falls", "--system", LONG), "there is no system"),
        (("generate", "a red ball falls", "--system", f"./{LONG}"), "there is no system"),
        (("generate", "a red ball falls", "--first", LONG), "cannot read"),
        (("generate", "a red ball falls", "--frames", "0"), "frames must be at least 1, got 0"),
        (("generate", "--like", "bomb.png"), "neither a film nor a picture that can be read"),
        (("generate", "a red ball falls", "--first", "bomb.png"), "bomb.png"),
        (("train", "smoke", "--out", LONG), "cannot write in"),
        (("train", "smoke", "--out", "list"), "must hold an object with settings"),
        (("train", "smoke", "--out", "folder"), "cannot read"),
        (("train", "smoke", "--set", 'clips.kinds={"slide":"x"}'), "Clips.kinds.slide must be float, got 'x'"),
        (("train", "smoke", "--set", 'captions.short="a"'), "captions.short must be float, got 'a'"),
        (("train", "smoke", "--set", "captions=[1]"), "captions must be an object"),
        (("storyboard", "folder"), "cannot read"),
        (("worlds", "--size", "99999x99999", "--frames", "1"), "too large for one clip"),
        (("worlds", "--frames", "999999999"), "too large for one clip"),
    ],
)
def test_what_cannot_be_read_or_held_is_one_sentence(
    refused, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "recipe.json").write_text("[]")
    (tmp_path / "folder" / "recipe.json").mkdir(parents=True)
    head = b"IHDR" + (60_000).to_bytes(4) * 2 + bytes([8, 2, 0, 0, 0])
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4) + head + zlib.crc32(head).to_bytes(4))
    system = ("--system", str(tiny)) if words[0] == "generate" and not {"--system", "--like"} & set(words) else ()
    assert says in refused(*words, *system)


def test_a_system_with_a_list_for_its_files_is_one_sentence(refused, tiny: Path, tmp_path: Path) -> None:
    values = json.loads((tiny / "system.json").read_text())
    (tmp_path / "system.json").write_text(json.dumps({**values, "files": []}))
    assert "SystemConfig.files must be an object, got []" in refused("generate", "a red ball falls", "--system", tmp_path)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--device", "nope"), "unknown device 'nope'"),
        (("--device", "cpu,nope"), "unknown device 'nope'"),
        (("--certificate", "none.pem"), "give both or neither"),
        (("--certificate", "none.pem", "--certificate-key", "key.pem"), "cannot read none.pem"),
        (("--port", "x"), "--port must be a whole number, got 'x'"),
    ],
)
def test_a_server_that_no_worker_could_work_for_is_not_begun(
    refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], says: str
) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("it answers")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(supervisor, "serve", forbidden)
    assert says in refused("serve", "--data", tmp_path, *(() if "--port" in words else ("--port", "0")), *words)


def test_numbers_that_are_none_are_told_so(refused) -> None:
    assert "--fps must be a number, got 'x'" in refused("worlds", "--fps", "x")
    assert "--n must be a whole number, got '1.5'" in refused("worlds", "--n", "1.5")


def test_unknown_verbs_and_options_are_one_sentence(refused, tubelet) -> None:
    assert f"{{{', '.join(VERBS)}}}; see tubelet --help" in refused()
    assert "there is no verb 'foo'" in refused("foo")
    for verb in ("generate", "evaluate", "worlds", "models"):
        said = refused(verb, "--nothing")
        assert "--nothing" in said
        assert f"see tubelet {verb} --help" in said
        assert tubelet(verb, "--help").code == 0
    assert tubelet("--version") == (0, f"tubelet {__version__}\n", "")


def test_help_starts_without_torch() -> None:
    code = (
        "import sys\nfrom tubelet.cli import main\n"
        "try:\n    main(['generate', '--help'])\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "heavy = {'torch', 'av', 'PIL', 'rich'} & set(sys.modules)\nassert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "--like" in result.stdout


def test_help_is_quick() -> None:
    """Processor time, not the clock's, so that other work does not count; the best of three."""

    def seconds() -> float:
        before = os.times()
        assert process("--help").returncode == 0
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert min(seconds() for _ in range(3)) < 0.6  # 0.2 where this was written


def test_the_module_is_the_command(tmp_path: Path) -> None:
    result = process("generate", "a red ball", "--system", "nope", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("tubelet: there is no system 'nope'")


def test_a_closed_pipe_is_no_error() -> None:
    words = [sys.executable, "-m", "tubelet", "worlds", "--n", "300", "--frames", "1", "--size", "16x16", "--json"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.read(10)
        child.stdout.close()
        errors = child.stderr.read()
        assert (child.wait(), errors) == (0, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no disk that is always full")
@pytest.mark.parametrize(
    "words", [("--version",), ("--help",), ("worlds", "--n", "300", "--frames", "1", "--size", "16x16", "--json")]
)
def test_a_full_disk_behind_stdout_is_one_sentence(words: tuple[str, ...]) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        result = subprocess.run([sys.executable, "-m", "tubelet", *words], stdout=full, stderr=-1, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == "tubelet: cannot write to stdout: No space left on device; make room, or send it elsewhere\n"


def test_closed_outputs_are_no_errors() -> None:
    words = [sys.executable, "-m", "tubelet", "worlds", "--n", "2", "--frames", "1", "--size", "16x16"]
    for closed in (">&-", ">&- 2>&-"):
        result = subprocess.run(["sh", "-c", f'exec "$@" {closed}', "sh", *words], capture_output=True, check=False)
        assert (result.returncode, result.stderr) == (0, b"")


def test_ctrl_c_while_it_starts_is_no_traceback() -> None:
    code = """
import os, signal, sys
class Pressed:
    def find_spec(self, name, *_):
        if name == "tyro":
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except KeyboardInterrupt:  # as some modules do with what comes up inside them
                raise ImportError(name)
sys.meta_path.insert(0, Pressed())
from tubelet.__main__ import main
main()
"""
    words = [sys.executable, "-c", code, "--version"]
    # What runs these tests may itself be in the background, where Ctrl-C is ignored, and hand that on.
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    result = subprocess.run(words, capture_output=True, text=True, check=False, preexec_fn=heard)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "tubelet: stopped\n")
    ignored = ["sh", "-c", "trap '' INT; exec \"$@\"", "sh", *words]
    result = subprocess.run(ignored, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, ""), "what runs in the background goes on"
    assert tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["scripts"] == {"tubelet": "tubelet.__main__:main"}
