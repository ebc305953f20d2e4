"""`tubelet generate`: words to a file, the same file again, and everything that may be asked for wrongly."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tubelet.generate import folder as room
from tubelet.generate.clip import metadata_of, read_settings
from tubelet.generate.system import System, load
from tubelet.media.decode import decode_uint8
from tubelet.media.encode import save

WORDS = "a red ball bounces"


@pytest.fixture(scope="module")
def ball(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A film made by Python, not by the command line, as --like must read both."""
    clip = load(tiny).generate(WORDS, size=(32, 48), frames=3, seed=7, steps=3)
    return clip.save(tmp_path_factory.mktemp("films") / "ball.mp4")


def test_words_in_film_out(tubelet, tiny: Path, tmp_path: Path) -> None:
    out, sheet = tmp_path / "new" / "ball.mp4", tmp_path / "sheet.png"
    said = tubelet(
        *("generate", WORDS, "--system", tiny, "--size", "32x48", "--frames", 3, "--steps", 2, "--guidance", 1.5),
        *("--seed", 5, "--out", out, "--sheet", sheet, "--json"),
    )
    assert said.code == 0, said.err
    answer = json.loads(said.out)
    assert set(answer) == {"out", "settings", "timings"}
    assert {"start", "text", "denoise", "decode", "write", "total"} == set(answer["timings"])
    assert all(seconds > 0 for seconds in answer["timings"].values())
    wanted = {"prompt": WORDS, "seed": 5, "size": [32, 48], "frames": 3, "steps": 2, "guidance": 1.5, "system": "tiny"}
    assert wanted.items() <= answer["settings"].items()
    assert answer["settings"]["digest"] == load(tiny).digest
    assert read_settings(out) == read_settings(sheet) == answer["settings"]
    frames, fps = decode_uint8(out)
    assert (frames.shape, fps) == ((3, 32, 48, 3), 8.0)
    assert {p.name for p in tmp_path.rglob("*") if p.is_file()} == {"ball.mp4", "sheet.png"}


def test_the_expansion_is_shown_and_can_be_refused(tubelet, tiny: Path, tmp_path: Path) -> None:
    said = tubelet("generate", WORDS, "--system", tiny, "--out", tmp_path / "a.gif")
    settings = read_settings(tmp_path / "a.gif")
    assert settings["text"] != settings["prompt"] == WORDS
    assert settings["seed"] == 0, "where nothing is said"
    assert f"read as: {settings['text']}" in said.out
    said = tubelet("generate", WORDS, "--system", tiny, "--no-expand", "--out", tmp_path / "b.gif")
    assert read_settings(tmp_path / "b.gif")["text"] == WORDS
    assert "read as" not in said.out


def test_words_that_are_not_read_are_told_of(tubelet, tiny: Path, tmp_path: Path) -> None:
    said = tubelet("generate", "happy days " * 300, "--system", tiny, "--out", tmp_path / "a.gif")
    assert said.code == 0, said.err
    assert said.err == "warning: these are more words than the model reads; the last ones do not count\n"


@pytest.mark.parametrize(
    "words",
    [
        "a brush paints a red line, a blue line, a green line and a yellow line",
        "a red star falls",
        "a red ball bounces three times",
    ],
)
def test_what_the_worlds_cannot_show_is_read_as_it_is(tubelet, tiny: Path, tmp_path: Path, words: str) -> None:
    said = tubelet("generate", words, "--system", tiny, "--out", tmp_path / "a.gif")
    assert said.code == 0, said.err
    assert "read as" not in said.out
    assert read_settings(tmp_path / "a.gif")["text"] == words


@pytest.mark.parametrize("suffix", [".mp4", ".webp", ".gif", ".png"])
def test_like_makes_it_again_byte_for_byte(tubelet, tiny: Path, tmp_path: Path, suffix: str) -> None:
    first, second = tmp_path / f"first{suffix}", tmp_path / f"second{suffix}"
    assert tubelet("generate", WORDS, "--system", tiny, "--seed", 3, "--frames", 3, "--out", first).code == 0
    assert tubelet("generate", "--system", tiny, "--like", first, "--out", second).code == 0
    assert first.read_bytes() == second.read_bytes()
    assert tubelet("generate", WORDS, "--system", tiny, "--seed", 4, "--frames", 3, "--out", second).code == 0
    assert first.read_bytes() != second.read_bytes()


def test_a_shipped_system_is_found_again_by_its_name(
    tubelet, tiny: Path, tmp_path: Path, ball: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "SHIPPED", tiny.parent)
    assert tubelet("generate", "--like", ball, "--out", tmp_path / "again.mp4").code == 0
    assert (tmp_path / "again.mp4").read_bytes() == ball.read_bytes()


def test_like_refuses_what_it_cannot_honour(refused, tiny: Path, ball: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny, tmp_path / "other")
    values = json.loads((other / "system.json").read_text())
    values["prediction"] = "velocity"
    (other / "system.json").write_text(json.dumps(values))
    plain = tmp_path / "plain.mp4"
    load(tiny).generate(WORDS, steps=1).save(plain)
    out = ("--out", tmp_path / "no.mp4")
    assert "give its folder with --system" in refused("generate", "--like", ball, *out)
    assert "the film was made by tiny" in refused("generate", "--like", ball, "--system", other, *out)
    like = ("generate", "--like", ball, "--system", tiny)
    assert "leave out the words" in refused(*like, WORDS, *out)
    for option, value in (
        ("--seed", 0),
        ("--steps", 3),
        ("--size", "32x32"),
        ("--frames", 3),
        ("--guidance", 1),
        ("--fit", "crop"),
    ):
        assert f"leave out {option}" in refused(*like, option, value, *out)
    assert "leave out --no-expand" in refused(*like, "--no-expand", *out)
    assert "--fit says how" in refused("generate", WORDS, "--system", tiny, "--fit", "crop", *out)
    np_film = tmp_path / "foreign.gif"
    from tubelet.media.encode import save

    save(np.zeros((2, 16, 16, 3), np.uint8), np_film, 8.0)
    assert "holds no settings" in refused("generate", "--like", np_film, "--system", tiny, *out)
    assert "check the name" in refused("generate", "--like", tmp_path / "none.mp4", "--system", tiny, *out)
    (tmp_path / "torn.mp4").write_bytes(ball.read_bytes()[:600])
    refused("generate", "--like", tmp_path / "torn.mp4", "--system", tiny, *out)
    save(np.zeros((2, 16, 16, 3), np.uint8), np_film, 8.0, {"settings": '{"system": ["x"], "dtype": {"a": 1}, "seed": "0"}'})
    refused("generate", "--like", np_film, "--system", tiny, *out)
    refused("generate", "--like", np_film, *out)
    assert not (tmp_path / "no.mp4").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "needs words"),
        (("",), "needs words"),
        ((" \t",), "needs words"),
        (("a", "red", "ball"), "quotes"),
        ((WORDS, "--size", "30x32"), "height must be a positive multiple of 16, got 30: try 16 or 32"),
        ((WORDS, "--size", "32x0"), "width"),
        ((WORDS, "--size", "32"), "must look like 64x64"),
        ((WORDS, "--size", "-32x32"), "--size"),
        ((WORDS, "--size", "32x32x3"), "must look like 64x64"),
        ((WORDS, "--size", "99999x99999"), "width|height|too large"),
        ((WORDS, "--frames", "0"), "frames"),
        ((WORDS, "--frames", "-1"), "frames"),
        ((WORDS, "--frames", "2.5"), "--frames must be a whole number, got '2.5'"),
        ((WORDS, "--frames", "999999999"), "too large"),
        ((WORDS, "--steps", "0"), "steps must be between"),
        ((WORDS, "--steps", "many"), "--steps must be a whole number, got 'many'"),
        ((WORDS, "--guidance", "nan"), "guidance"),
        ((WORDS, "--guidance", "-1"), "guidance"),
        ((WORDS, "--seed", "-1"), "seed"),
        ((WORDS, "--seed"), "--seed needs a value"),
        ((WORDS, "--bad", "3"), "--bad"),
        ((WORDS, "--system", "nope"), "there is no system 'nope'"),
        ((WORDS, "--system", "/"), "holds no system.json"),
        ((WORDS, "--system", ""), "there is no system"),
        ((WORDS, "--out", "ball.avi"), "must end in .mp4"),
        ((WORDS, "--out", "ball"), "must end in .mp4"),
        ((WORDS, "--out", "/proc/nowhere/ball.mp4"), "cannot write"),
        ((WORDS, "--out", "/dev/null/ball.mp4"), "cannot write"),
        ((WORDS, "--out", "x" * 300 + ".mp4"), "cannot write"),
        ((WORDS, "--out", ".mp4"), ".mp4 has no name before its ending; call it film.mp4"),
        ((WORDS, "--sheet", "sheet.jpg"), "must end in .png"),
        ((WORDS, "--out", "a.png", "--sheet", "a.png"), "another name"),
    ],
)
def test_a_wrong_wish_is_one_sentence(
    refused, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    more = () if "--system" in words else ("--system", tiny)
    said = refused("generate", *words, *more)
    assert any(part in said for part in says.split("|")), said
    assert not list(tmp_path.iterdir()), "nothing half-written"


@pytest.mark.parametrize("part", ["codec.safetensors", "denoiser.safetensors", "text.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_damaged_weights_are_named(refused, tiny: Path, tmp_path: Path, part: str, damage: str) -> None:
    folder = shutil.copytree(tiny, tmp_path / "copy")
    file, data = folder / part, (tiny / part).read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(data[:-100] if damage == "truncated" else data[:-1] + bytes([data[-1] ^ 1]))
    out = tmp_path / "a.mp4"
    assert str(file) in refused("generate", WORDS, "--system", folder, "--out", out)
    assert not out.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_weights_that_may_not_be_read_are_named(refused, tiny: Path, tmp_path: Path) -> None:
    file = shutil.copytree(tiny, tmp_path / "copy") / "denoiser.safetensors"
    file.chmod(0)
    assert f"cannot read {file}" in refused("generate", WORDS, "--system", file.parent, "--out", tmp_path / "a.mp4")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 9}', '{"zzz": 1}'])
def test_a_broken_system_file_is_named_in_one_sentence(refused, tiny: Path, tmp_path: Path, text: str) -> None:
    folder = shutil.copytree(tiny, tmp_path / "copy")
    (folder / "system.json").write_text(text)
    said = refused("generate", WORDS, "--system", folder, "--out", tmp_path / "a.mp4")
    assert str(folder / "system.json") in said
    assert "restore" in said


def test_a_network_that_no_machine_holds_is_one_sentence(refused, tiny: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "copy")
    values = json.loads((folder / "system.json").read_text())
    values["denoiser"]["config"]["width"] = 10**9
    (folder / "system.json").write_text(json.dumps(values))
    said = refused("generate", WORDS, "--system", folder, "--out", tmp_path / "a.mp4")
    assert f"the denoiser of {folder} cannot be built" in said


def test_a_record_that_is_not_whole_is_named(refused, tiny: Path, tmp_path: Path) -> None:
    path, frames = tmp_path / "a.gif", np.zeros((2, 32, 32, 3), np.uint8)
    whole = {"prompt": WORDS, "system": str(tiny), "dtype": "float32"}
    for settings, says in ((whole, "it needs the setting"), ({**whole, "dtype": "int3"}, "no dtype"), ({}, "not a shipped")):
        save(frames, path, 8.0, metadata_of(settings))
        said = refused("generate", "--like", path, "--out", tmp_path / "b.mp4", *(("--system", tiny) if settings else ()))
        assert str(path) in said
        assert says in said
        assert "_Recorded" not in said


def test_interrupted_is_130(tubelet, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(System, "generate", interrupt)
    code, out, err = tubelet("generate", WORDS, "--system", tiny, "--out", tmp_path / "a.mp4")
    assert (code, out, err) == (130, "", "tubelet: stopped\n")
    assert not (tmp_path / "a.mp4").exists()


def test_a_full_disk_leaves_nothing(tiny: Path, tmp_path: Path) -> None:
    """A real process that may write 200 bytes and no more."""
    code = (
        "import resource, sys; from tubelet.cli import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200)); main(sys.argv[1:])"
    )
    words = ["generate", WORDS, "--system", str(tiny), "--out", str(tmp_path / "films" / "a.gif")]
    result = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stderr
    assert "cannot write" in result.stderr
    assert result.stderr.count("\n") == 1
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
