"""What every entry of TEXT_ENCODERS promises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tubelet.core.config import from_dict, to_dict
from tubelet.core.errors import UserError
from tubelet.core.types import Condition
from tubelet.text import TEXT_ENCODERS, TextEncoder, build_text
from tubelet.text.bpe import train

PROMPTS = ["a red ball falls", "blue ring", "", "日本 \ud800 🔴", "a " * 10]


def tiny_hub_model(folder: Path, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {w: i for i, w in enumerate(["<pad>", "<unk>", "a", "red", "blue", "ball", "ring", "falls"])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()  # without end mark: an empty prompt has no token at all
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    if kind == "hf":
        sizes: dict[str, Any] = {"vocab_size": 8, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
        transformers.T5EncoderModel(transformers.T5Config(**sizes)).save_pretrained(folder)
    else:
        narrow: dict[str, Any] = {
            "vocab_size": 8, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        }  # fmt: skip
        transformers.BertModel(transformers.BertConfig(**narrow)).save_pretrained(folder)


@pytest.fixture(scope="module", params=list(TEXT_ENCODERS))
def text(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "own":
        train(PROMPTS[:2] * 3, 300).save(folder / "tokenizer.json")
        encoder = build_text("own", {"vocab_size": 300, "width": 32, "heads": 2, "max_tokens": 24}, folder)
        for name, weight in encoder.named_parameters():
            if name.endswith(("out.weight", "down.weight")):
                torch.nn.init.normal_(weight, std=0.2)
        return encoder
    tiny_hub_model(folder, request.param)
    return build_text(request.param, {"path": str(folder), "max_tokens": 24})


def same(a: Condition, b: Condition) -> None:
    assert torch.equal(a.mask, b.mask)
    torch.testing.assert_close(a.states, b.states, atol=1e-5, rtol=1e-5)


def test_shapes_and_mask(text: TextEncoder) -> None:
    condition = text.encode(PROMPTS)
    lengths = condition.mask.sum(1)
    assert condition.states.shape == (len(PROMPTS), int(lengths.max()), text.width)
    assert condition.states.dtype == torch.float32
    assert condition.mask.dtype == torch.bool
    assert condition.states.isfinite().all()
    assert (lengths >= 1).all()
    first = torch.arange(condition.mask.shape[1]) < lengths[:, None]
    assert torch.equal(condition.mask, first)  # real tokens first, padding behind
    assert (condition.states[~condition.mask] == 0).all()
    assert (condition.states[condition.mask].abs().sum(-1) > 0).all()


def test_a_batch_equals_its_singles(text: TextEncoder) -> None:
    same(text.encode(PROMPTS), Condition.cat([text.encode([p]) for p in PROMPTS]))


def test_the_null_condition_is_the_empty_prompt(text: TextEncoder) -> None:
    same(text.null(3), text.encode(["", "", ""]))


def test_prompts_differ_and_repeat(text: TextEncoder) -> None:
    a = text.encode(["red ball"])
    same(a, text.encode(("red ball",)))
    b = text.encode(["blue ball"])
    assert a.states.shape == b.states.shape
    assert (a.states - b.states).abs().max() > 1e-3


def test_a_prompt_that_is_too_long_is_cut_and_says_so(text: TextEncoder) -> None:
    assert not text.truncated("a red ball")
    assert not text.truncated("")
    long = "red ball " * 100
    assert text.truncated(long)
    assert text.encode([long]).states.shape[1] == 24


def test_gradients_only_where_it_is_trained(text: TextEncoder) -> None:
    assert text.encode(["red ball"]).states.requires_grad == text.trainable
    assert any(p.requires_grad for p in text.parameters()) == text.trainable


def test_the_config_survives_json(text: TextEncoder) -> None:
    assert from_dict(type(text.config), to_dict(text.config)) == text.config


@pytest.mark.parametrize("wrong", [[], (), "a red ball", None, 3, [None], ["a", 3], [b"a"], [["a"]]])
def test_wrong_prompts(text: TextEncoder, wrong: Any) -> None:
    with pytest.raises(UserError, match="; "):
        text.encode(wrong)


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "2", None])
def test_wrong_null_batch(text: TextEncoder, wrong: Any) -> None:
    with pytest.raises(UserError, match="; "):
        text.null(wrong)


@pytest.mark.parametrize(
    ("name", "config", "sentence"),
    [
        ("none", None, "choose one of own, minilm, hf"),
        ("own", {"breadth": 3}, "no setting 'breadth'"),
        ("own", "some/path", "no model path"),
        ("own", 7, "takes a OwnTextConfig"),
        ("hf", None, "needs the setting 'path'"),
        ("hf", "no/such/folder/anywhere", "cannot load"),
        ("minilm", "no/such/folder/anywhere", "cannot load"),
    ],
)
def test_wrong_builds(name: str, config: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        build_text(name, config)


def test_a_folder_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.json does not exist"):
        build_text("own", None, tmp_path)
