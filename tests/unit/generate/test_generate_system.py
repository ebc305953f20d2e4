"""A tiny random system saved, loaded, used, regenerated; and everything that may be wrong with its folder."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import tubelet
from tubelet.codecs import build_codec
from tubelet.codecs.base import Codec
from tubelet.core.errors import UserError
from tubelet.core.files import sha256
from tubelet.core.types import Video
from tubelet.generate import folder as room
from tubelet.generate.clip import Clip, read_settings
from tubelet.generate.engine import Sampling
from tubelet.generate.folder import read_config, save_system, shipped
from tubelet.generate.system import Rolling, Shot, System, load, regenerate
from tubelet.media.decode import decode_uint8
from tubelet.models.spacetime import Spacetime, SpacetimeConfig
from tubelet.runtime.cpu import accelerate
from tubelet.text.bpe import train
from tubelet.text.expand import Expansion
from tubelet.text.own import OwnTextConfig, OwnTextEncoder

TINY = SpacetimeConfig(width=32, depth=2, heads=2, in_channels=4, patch=(2, 2, 2), text_width=32)
CODEC = {"channels": 4, "fine_width": 16, "coarse_width": 16, "decoder_blocks": [1, 1, 1]}


def write(folder: Path, seed: int = 0, shape: dict | None = None, network: SpacetimeConfig = TINY, **settings) -> Path:
    torch.manual_seed(seed)
    codec, denoiser = build_codec("causal_conv", CODEC | (shape or {})), Spacetime(network)
    tokenizer = train(["a red ball falls", "a blue box slides left"] * 4, 280)
    text = OwnTextEncoder(OwnTextConfig(vocab_size=300, width=32, depth=1, heads=2), tokenizer)
    for parameter in denoiser.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    codec.set_statistics(torch.randn(4) / 3, torch.rand(4) + 0.3)
    more = {"size": (32, 32), "frames": 5, "fps": 8.0, "defaults": Sampling(steps=2), "training": {"seed": seed}, **settings}
    save_system(folder, name="tiny", codec=("causal_conv", codec), denoiser=("spacetime", denoiser), text=("own", text), **more)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("systems") / "tiny")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder, tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture(scope="module")
def system(folder: Path) -> System:
    return load(folder, device="cpu", dtype="float32")


def edit(folder: Path, **changes) -> None:
    path = folder / "system.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_folder_holds_what_it_says(folder: Path) -> None:
    names = {"system.json", "codec.safetensors", "denoiser.safetensors", "text.safetensors", "tokenizer.json"}
    assert {p.name for p in folder.iterdir()} == names
    values = json.loads((folder / "system.json").read_text())
    assert values["format"] == 1
    assert values["files"] == {name: sha256(folder / name) for name in sorted(names - {"system.json"})}
    assert values["denoiser"]["name"] == "spacetime"
    assert values["prediction"] == "skip"
    assert values["training"] == {"seed": 0}


def test_loading_gives_the_saved_networks(folder: Path, system: System, tmp_path: Path) -> None:
    again = write(tmp_path / "again")
    assert {p.name: sha256(p) for p in again.iterdir()} == {p.name: sha256(p) for p in folder.iterdir()}
    torch.manual_seed(0)
    codec = build_codec("causal_conv", CODEC)
    for name, value in codec.named_parameters():
        torch.testing.assert_close(system.codec.get_parameter(name), value.to(torch.bfloat16).float(), rtol=0, atol=0)
    assert system.codec.std.dtype == torch.float32
    assert not torch.equal(system.codec.std, system.codec.std.bfloat16().float()), "statistics are not narrowed"
    assert not any(p.requires_grad or p.is_meta for p in system.denoiser.parameters())
    assert not system.denoiser.training


def test_large_parts_lie_in_pieces(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load(write(tmp_path / "tiny"), device="cpu", dtype="float32")
    monkeypatch.setattr(room, "PIECE", 20_000)
    write(tmp_path / "tiny")  # over the one that was there
    names = sorted(p.name for p in (tmp_path / "tiny").glob("denoiser*"))
    assert len(names) > 2
    assert names[0] == "denoiser-1.safetensors"
    assert all((tmp_path / "tiny" / name).stat().st_size <= 20_000 for name in names)
    again = load(tmp_path / "tiny", device="cpu", dtype="float32")
    for name, value in whole.denoiser.state_dict().items():
        assert torch.equal(value, again.denoiser.state_dict()[name])
    (tmp_path / "tiny" / names[1]).unlink()
    with pytest.raises(UserError, match=r"denoiser-2\.safetensors is missing"):
        load(tmp_path / "tiny")
    monkeypatch.undo()
    assert {p.name for p in write(tmp_path / "tiny").iterdir()} == {p.name for p in folder.iterdir()}, "no piece is left over"


def test_words_beyond_what_the_encoder_reads_are_told_of(system: System, capsys: pytest.CaptureFixture[str]) -> None:
    limit = system.text.config.max_tokens
    system.generate("a red ball falls", frames=3)
    assert capsys.readouterr().err == ""
    system.generate("a red ball falls " * limit, frames=3)
    assert "more words than the model reads" in capsys.readouterr().err
    system.film([Shot("a red ball falls", 3), Shot("a blue box slides left " * limit, 2)])
    assert "more words than the model reads" in capsys.readouterr().err


def test_loaded_and_built_compute_the_same(system: System) -> None:
    """Loading skips initialisation: whatever is computed at build time must be there all the same."""
    plain = accelerate(build_codec("causal_conv", CODEC).eval())
    assert isinstance(plain, Codec)
    plain.load_state_dict(system.codec.state_dict())
    latents = torch.randn(1, 4, 3, 4, 4)
    assert torch.equal(system.codec.decode(latents), plain.decode(latents))
    denoiser = accelerate(Spacetime(TINY).eval())
    denoiser.load_state_dict(system.denoiser.state_dict())
    condition = system.text.encode(["a red ball"])
    with torch.inference_mode():
        expected = denoiser(latents, torch.tensor([0.5]), condition)
        assert torch.equal(system.denoiser(latents, torch.tensor([0.5]), condition), expected)


def test_generate_uses_the_defaults_and_says_all(system: System) -> None:
    clip = system.generate("a red ball falls", seed=7)
    assert clip.video.pixels.shape == (1, 3, 5, 32, 32)
    assert clip.video.fps == 8.0
    assert clip.settings == {
        "prompt": "a red ball falls",
        "text": "a red ball falls",
        "seed": 7,
        "size": [32, 32],
        "frames": 5,
        "fps": 8.0,
        "steps": 2,
        "guidance": 2.0,
        "interval": [0.0, 1.0],
        "solver": "dpmpp_2m",
        "shift": 1.0,
        "tokens": 0,
        "eta": 1.0,
        "eta_above": 0.0,
        "system": "tiny",
        "digest": system.digest,
        "dtype": "float32",
        "device": "cpu",
        "version": tubelet.__version__,
    }
    assert json.loads(json.dumps(clip.settings)) == clip.settings
    assert set(clip.timings) == {"text", "denoise", "decode"}
    other = system.generate("a red ball falls", size=(16, 48), frames=3, steps=3, guidance=1.0, solver="euler")
    assert other.video.pixels.shape == (1, 3, 3, 16, 48)
    assert [other.settings[n] for n in ("size", "frames", "steps", "guidance", "solver")] == [[16, 48], 3, 3, 1.0, "euler"]


def test_a_batch_is_its_singles(system: System) -> None:
    prompts, seeds = ["a red ball falls", "a blue box slides to the left"], [1, 2]
    together = system.generate_batch(prompts, seeds)
    for clip, prompt, seed in zip(together, prompts, seeds, strict=True):
        alone = system.generate(prompt, seed=seed)
        assert alone.settings == clip.settings
        torch.testing.assert_close(alone.video.pixels, clip.video.pixels, rtol=0, atol=2e-5)
    with pytest.raises(UserError, match="one seed per prompt"):
        system.generate_batch(prompts, [1])


def test_a_system_names_the_rules_for_its_prompts(tmp_path: Path) -> None:
    write(tmp_path / "plain")
    write(tmp_path / "ruled", expander="worlds")
    words = "a red ball bounces"
    clip = tubelet.load(str(tmp_path / "ruled")).generate(words)
    assert clip.settings["prompt"] == words
    assert "bounces" in clip.settings["text"] != words
    assert tubelet.load(str(tmp_path / "ruled"), expand=False).generate(words).settings["text"] == words
    assert tubelet.load(str(tmp_path / "plain")).generate(words).settings["text"] == words
    assert load(tmp_path / "ruled").generate(words).settings["text"] == words, "what measures says what is asked"
    config = json.loads((tmp_path / "ruled" / "system.json").read_text())
    (tmp_path / "ruled" / "system.json").write_text(json.dumps(config | {"expander": "gpt"}))
    with pytest.raises(UserError, match="there is no expander 'gpt'"):
        load(tmp_path / "ruled")


def test_an_expander_is_used_and_both_texts_are_kept(system: System) -> None:
    class Dense:
        def expand(self, prompt: str) -> Expansion:
            return Expansion(prompt, f"{prompt}, on a light ground", "rules")

    clip = system.generate("a red ball", expander=Dense())
    assert (clip.settings["prompt"], clip.settings["text"]) == ("a red ball", "a red ball, on a light ground")
    assert torch.equal(clip.video.pixels, system.generate("a red ball, on a light ground").video.pixels)
    assert torch.equal(regenerate(clip.settings, system).video.pixels, clip.video.pixels)


@pytest.mark.parametrize("suffix", [".mp4", ".webp", ".gif", ".png"])
def test_a_film_is_made_again_from_its_file_byte_for_byte(folder: Path, tmp_path: Path, suffix: str) -> None:
    first = load(folder, dtype="float32").generate("a réd ball “falls”", seed=5, steps=3, frames=3)
    path = first.save(tmp_path / f"first{suffix}")
    settings = read_settings(path)
    assert settings == first.settings
    again = regenerate(settings, load(folder, dtype=settings["dtype"])).save(tmp_path / f"again{suffix}")
    assert again.read_bytes() == path.read_bytes()
    if suffix != ".png":
        frames, fps = decode_uint8(path)
        assert frames.shape == (3, 32, 32, 3)
        assert fps == pytest.approx(8.0, rel=0.05)
        assert np.abs(frames.astype(int) - first.video.to_uint8()[0]).mean() < 16  # noise is the hardest of films


def test_regenerate_finds_the_system_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "SHIPPED", folder.parent)
    assert shipped() == ["tiny"]
    clip = tubelet.load("tiny").generate("a red ball falls")
    assert torch.equal(regenerate(clip.settings).video.pixels, clip.video.pixels)
    with pytest.raises(UserError, match=r"no system 'worlds-9'.*tiny"):
        load("worlds-9")


def test_regenerate_refuses_another_system(system: System, tmp_path: Path) -> None:
    other = load(write(tmp_path / "other", seed=1), dtype="float32")
    assert other.digest != system.digest
    clip = system.generate("a red ball")
    with pytest.raises(UserError) as caught:
        regenerate(clip.settings, other)
    assert system.digest[:12] in str(caught.value)
    assert other.digest[:12] in str(caught.value)
    wide = load(tmp_path / "other", dtype="bfloat16")
    with pytest.raises(UserError, match="float32"):
        regenerate({**clip.settings, "digest": wide.digest}, wide)


def test_what_is_longer_than_the_system_is_made_in_windows(system: System) -> None:
    words, long = ("a red ball falls", "a blue ball slides"), system.config.frames + 4
    seen: list[tuple[int, int]] = []
    films = system.generate_batch(words, (3, 4), frames=long, progress=lambda done, steps: seen.append((done, steps)))
    for film, prompt, seed in zip(films, words, (3, 4), strict=True):
        assert torch.equal(film.video.pixels, system.film([Shot(prompt, long)], seed=seed).video.pixels)
        assert torch.equal(film.video.pixels, system.generate(prompt, frames=long, seed=seed).video.pixels)
        assert torch.equal(film.video.pixels, regenerate(film.settings, system).video.pixels)
    assert seen == [(done + 1, len(seen)) for done in range(len(seen))]
    at_once = system.film([Shot(words[0], long)], seed=3, rolling=Rolling(window=long)).video.pixels
    assert not torch.equal(films[0].video.pixels, at_once)
    with pytest.raises(UserError, match="one seed per prompt"):
        system.generate_batch(words, (3,), frames=long)


@pytest.fixture(scope="module")
def strided(tmp_path_factory: pytest.TempPathFactory) -> System:
    """A system whose latent frames after the first hold four frames each."""
    network = dataclasses.replace(TINY, patch=(1, 2, 2))
    folder = write(tmp_path_factory.mktemp("systems") / "strided", shape={"temporal_stride": 4}, network=network, frames=9)
    return load(folder, device="cpu", dtype="float32")


def test_films_with_several_frames_in_a_latent_one(strided: System) -> None:
    words = "a red ball falls"
    still = [Video(torch.full((1, 3, 1, 32, 32), level), 8.0) for level in (-0.5, 0.5)]
    for pictures in ({0: still[0]}, {-1: still[1]}, {0: still[0], -1: still[1]}):
        film = strided.film([Shot(words, 9, pictures)], seed=3).video.pixels
        assert film.shape == (1, 3, 9, 32, 32)
        for frame, picture in pictures.items():
            assert torch.equal(film[:, :, frame], picture.pixels[:, :, 0])
    ends = strided.film([Shot(words, 9, {-1: still[1]})], seed=3).video.pixels
    assert float((ends - strided.film([Shot(words, 9)], seed=3).video.pixels)[:, :, 5:8].abs().max()) > 1e-3, "it is seen"
    assert torch.equal(strided.film([Shot(words, 9)], seed=3).video.pixels, strided.generate(words, seed=3).video.pixels)
    long = strided.film([Shot(words, 17), Shot(words, 8, {0: still[0]})], seed=3).video
    assert long.frames == 25
    assert torch.equal(long.pixels[:, :, 17], still[0].pixels[:, :, 0])
    assert strided.film([Shot(words, 8)], past=long).video.frames == 33
    with pytest.raises(UserError, match=r"frames must be 1 \+ a multiple of 4"):
        strided.film([Shot(words, 7)], past=long)
    with pytest.raises(UserError, match=r"keep 21 of them \(2.625 seconds\), and make a multiple of 4"):
        strided.film([Shot(words, 8)], past=Video(long.pixels[:, :, :24], 8.0))
    assert strided.film([Shot(words, 8)], past=Video(long.pixels[:, :, 3:24], 8.0)).video.frames == 29


def test_a_loop_needs_latents_of_one_frame(strided: System, system: System) -> None:
    for one, count in ((strided, 4), (system, 2)):
        with pytest.raises(UserError, match=f"{count} frames") as caught:
            one.generate("a red ball falls", loop=True)
        assert "loop" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_settings_of_strangers_are_refused(system: System, tmp_path: Path) -> None:
    good = system.generate("a red ball").settings
    for change, says in (
        ({"seed": "5"}, "seed"),
        ({"size": [32]}, "size"),
        ({"size": 32}, "size"),
        ({"steps": 0}, "steps"),
        ({"frames": 10**9 + 1}, "too large"),
        ({"solver": "magic"}, "solver"),
        ({"text": ""}, "empty"),
        ({"interval": [1, 0]}, "interval"),
    ):
        with pytest.raises(UserError, match=says):
            regenerate({**good, **change}, system)
    with pytest.raises(UserError, match="'digest'"):
        regenerate({k: v for k, v in good.items() if k != "digest"}, system)
    from tubelet.media.encode import save

    path = save(np.zeros((2, 16, 16, 3), np.uint8), tmp_path / "plain.mp4", 8.0, {"settings": "[1]"})
    with pytest.raises(UserError, match="no settings"):
        read_settings(path)


def test_the_digest_follows_weights_and_settings(folder: Path, copy: Path, tmp_path: Path) -> None:
    assert read_config(folder).digest == read_config(copy).digest
    edit(copy, name="other", training={})
    assert read_config(copy).digest == read_config(folder).digest
    edit(copy, prediction="velocity")
    assert read_config(copy).digest != read_config(folder).digest
    whole = json.loads((folder / "system.json").read_text())
    for part in ("codec", "denoiser", "text"):
        settings = {**whole[part]["config"], "of another": 1}
        (copy / "system.json").write_text(json.dumps({**whole, part: {**whole[part], "config": settings}}))
        assert read_config(copy).digest != read_config(folder).digest, part


@pytest.mark.parametrize("file", ["codec.safetensors", "denoiser.safetensors", "text.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("harm", ["truncate", "flip", "remove"])
def test_harmed_files_are_found_and_named(copy: Path, file: str, harm: str) -> None:
    data = bytearray((copy / file).read_bytes())
    if harm == "remove":
        (copy / file).unlink()
    elif harm == "truncate":
        (copy / file).write_bytes(data[:-7])
    else:
        data[len(data) // 2] ^= 1
        (copy / file).write_bytes(data)
    with pytest.raises(UserError, match=file) as caught:
        load(copy)
    assert "\n" not in str(caught.value)


def test_harmed_settings_are_found(copy: Path) -> None:
    good = json.loads((copy / "system.json").read_text())
    for changes, says in (
        ({"format": 99}, "update"),
        ({"wings": 2}, "wings"),
        ({"denoiser": {"name": "magic", "config": {}}}, "spacetime"),
        ({"codec": {"name": "magic", "config": {}}}, "causal_conv"),
        ({"text": {"name": "magic", "config": {}}}, "own"),
        ({"prediction": "luck"}, "skip"),
        ({"denoiser": {"name": "spacetime", "config": {**good["denoiser"]["config"], "depth": 3}}}, "does not fit"),
        ({"denoiser": {"name": "spacetime", "config": {**good["denoiser"]["config"], "in_channels": 5}}}, "does not fit"),
        ({"defaults": {**good["defaults"], "solver": "magic"}}, "solver"),
        ({"files": {}}, "lists no"),
        *(
            ({"files": {name: digest for name, digest in good["files"].items() if name != left_out}}, f"lists no {left_out}")
            for left_out in good["files"]
        ),
        ({"files": {**good["files"], "../system.json": "0"}}, "missing"),
        ({"files": {**good["files"], "denoiser.safetensors": 5}}, "must be str"),
        ({"fps": 0.0}, "fps"),
    ):
        (copy / "system.json").write_text(json.dumps({**good, **changes}))
        with pytest.raises(UserError, match=says):
            load(copy)
    for broken in ("{", "[]", "", "\x00"):
        (copy / "system.json").write_text(broken)
        with pytest.raises(UserError, match=r"system\.json"):
            load(copy)


def test_unknown_systems_are_refused(tmp_path: Path) -> None:
    for name in ("no-such-system", str(tmp_path / "nowhere"), "..", "", "."):
        with pytest.raises(UserError):
            load(name)
    with pytest.raises(UserError, match=r"holds no system\.json"):
        load(tmp_path)
    with pytest.raises(UserError, match="dtype"):
        load(tmp_path, dtype="int8")
    with pytest.raises(UserError, match="named by words"):
        load(None)  # type: ignore[arg-type]


def test_wrong_wishes_are_one_sentence(system: System) -> None:
    for wish, says in (
        ({"prompt": ""}, "empty"),
        ({"prompt": "   "}, "empty"),
        ({"size": (30, 32)}, "height"),
        ({"prompt": 3}, "a prompt is words, got 3"),
        ({"prompt": ["a"]}, "a prompt is words"),
        ({"size": (32,)}, "size"),
        ({"size": 32}, "size"),
        ({"size": "32"}, "size"),
        ({"size": (32.0, 32)}, "height must be a whole number"),
        ({"frames": "5"}, "frames must be a whole number"),
        ({"frames": 5.0}, "frames must be a whole number"),
        ({"steps": "3"}, "steps must be a whole number"),
        ({"steps": 1.5}, "steps must be a whole number"),
        ({"guidance": "3"}, "guidance must be a number"),
        ({"guidance": float("nan")}, "guidance"),
        ({"solver": 3}, "solver"),
        ({"seed": "3"}, "seed must be a whole number"),
        ({"seed": True}, "seed must be a whole number"),
        ({"frames": 0}, "frames"),
        ({"frames": 4}, "frames"),
        ({"frames": 4 * 10**9 + 1}, "too large"),
        ({"size": (2**20, 2**20)}, "too large"),
        ({"steps": 0}, "steps"),
        ({"guidance": -2.0}, "guidance"),
        ({"solver": "magic"}, "solver"),
        ({"seed": -1}, "seed"),
        ({"seed": -1, "frames": 4 * system.config.frames + 1}, "seed"),
        ({"seed": 2**63, "frames": 4 * system.config.frames + 1}, "seed"),
    ):
        with pytest.raises(UserError, match=says) as caught:
            system.generate(**{"prompt": "a red ball", **wish})
        assert "\n" not in str(caught.value)
    film = system.generate("a red ball").video
    with pytest.raises(UserError, match="a known clip has 30 frames a second, the film 8; decode it with fps=8"):
        system.film([Shot("a red ball", 2)], past=Video(film.pixels, 30.0))
    with pytest.raises(UserError, match=r"a mask is \(T, H, W\)"):
        system.inpaint(film, torch.ones(*film.size), "a red ball")


def test_numbers_of_other_libraries_make_the_same_film(system: System, tmp_path: Path) -> None:
    for frames in (5, 4 * system.config.frames + 1):
        wish = {"frames": frames, "guidance": 3.0, "seed": 3, "steps": 2}
        other = {"frames": np.int32(frames), "guidance": np.float32(3), "seed": np.int64(3), "steps": np.int16(2)}
        clip, again = system.generate("a red ball", **wish), system.generate("a red ball", **other)  # type: ignore[arg-type]
        assert again.save(tmp_path / "b.mp4").read_bytes() == clip.save(tmp_path / "a.mp4").read_bytes()


def test_numbers_of_other_libraries_are_numbers(system: System, tmp_path: Path) -> None:
    own = system.generate("a red ball", size=(32, 32), frames=5, seed=3, steps=2)
    theirs = system.generate(
        "a red ball", size=(np.int64(32), np.int32(32)), frames=np.int64(5), seed=np.int64(3), steps=np.int64(2)
    )
    assert theirs.settings == own.settings
    assert torch.equal(theirs.video.pixels, own.video.pixels)
    theirs.save(tmp_path / "a.gif")
    own.save(tmp_path / "b.gif")
    assert (tmp_path / "a.gif").read_bytes() == (tmp_path / "b.gif").read_bytes()


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    codec, denoiser, text = build_codec("causal_conv", CODEC), Spacetime(TINY), OwnTextEncoder(OwnTextConfig(width=32, heads=2))
    denoiser.head.weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"head\.weight"):
        save_system(
            tmp_path / "bad", name="bad", codec=("causal_conv", codec), denoiser=("spacetime", denoiser), text=("own", text),
            size=(32, 32), frames=5, fps=8.0,
        )  # fmt: skip
    assert not (tmp_path / "bad" / "system.json").exists()
    good = read_config(write(tmp_path / "good")).digest
    with pytest.raises(UserError, match=r"head\.weight"):
        save_system(
            tmp_path / "good", name="bad", codec=("causal_conv", codec), denoiser=("spacetime", denoiser), text=("own", text),
            size=(32, 32), frames=5, fps=8.0,
        )  # fmt: skip
    load(tmp_path / "good")
    assert read_config(tmp_path / "good").digest == good, "what was saved there before is still whole"


def test_a_clip_refuses_other_suffixes(system: System, tmp_path: Path) -> None:
    clip = system.generate("a red ball")
    assert isinstance(clip, Clip)
    with pytest.raises(UserError, match="mp4"):
        clip.save(tmp_path / "ball.avi")
    assert not list(tmp_path.iterdir())


def test_loading_needs_neither_media_nor_web_libraries(folder: Path) -> None:
    """Start-up counts: what a first film does not need is not imported before it."""
    code = (
        f"import sys; from tubelet.generate.system import load; load({str(folder)!r}).generate('a red ball');"
        "print(sorted({'av', 'PIL', 'transformers', 'rich', 'pyarrow', 'torch._dynamo'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out.strip() == "[]"
