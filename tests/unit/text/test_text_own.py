from __future__ import annotations

import random
import time

import pytest
import torch

from tubelet.core.errors import UserError
from tubelet.core.weights import load_module, save_module
from tubelet.text.bpe import Tokenizer, train
from tubelet.text.own import OwnTextConfig, OwnTextEncoder

CAPTIONS = ["A small red ball falls.", "A large blue ring slides to the left.", "A large blue ring slides to the right."]
SMALL = OwnTextConfig(vocab_size=320, width=32, depth=2, heads=2, max_tokens=16)


def encoder(config: OwnTextConfig = SMALL, *, mixed: bool = True) -> OwnTextEncoder:
    """`mixed`: with branches that do something; they start at zero."""
    torch.manual_seed(0)
    made = OwnTextEncoder(config, train(CAPTIONS * 3, config.vocab_size))
    if mixed:
        for block in made.blocks:
            torch.nn.init.normal_(block.attention.out.weight, std=0.3)
            torch.nn.init.normal_(block.mlp.down.weight, std=0.3)
    return made


def test_shapes_padding_and_mask() -> None:
    text = encoder()
    ids, mask = text.tokenize(CAPTIONS)
    lengths = [len(text.tokenizer.encode(c)) for c in CAPTIONS]
    assert mask.sum(1).tolist() == lengths
    assert ids.shape == mask.shape == (3, max(lengths))
    assert (ids[~mask] == 0).all()
    states = text(ids, mask).states
    assert states.shape == (3, max(lengths), 32)
    assert states.dtype == torch.float32
    assert (states[~mask] == 0).all()


def test_a_fresh_encoder_gives_each_token_its_own_state() -> None:
    text = encoder(mixed=False)
    a, b = text.encode(["red ball"]).states, text.encode(["a red ball"]).states
    assert torch.allclose(a[0, 1], b[0, 2], atol=1e-6)


def test_order_matters() -> None:
    text = encoder()
    a, b = (text.encode([p]).states[0] for p in ("red ball blue ring", "blue ball red ring"))
    assert (a[2] - b[2]).abs().max() > 1e-2  # "ball" beside "red" is not "ball" beside "blue"


def test_every_token_sees_both_sides() -> None:
    text = encoder()
    ids, mask = text.tokenize([CAPTIONS[1]])
    embedded = text.embed(ids).detach().requires_grad_()
    text.embed.register_forward_hook(lambda *_: embedded)
    text(ids, mask).states[0, 4].sum().backward()
    assert embedded.grad is not None
    assert (embedded.grad[0].abs().sum(-1) > 0).all()


def test_every_weight_learns() -> None:
    text = encoder()
    condition = text.encode(CAPTIONS)
    (condition.states * torch.randn_like(condition.states)).sum().backward()
    for name, weight in text.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.abs().sum() > 0, name


def test_it_learns_what_a_sentence_says() -> None:
    text = encoder(mixed=False)
    head = torch.nn.Linear(32, 2)
    prompts = [f"a {c} {s} slides to the {d}" for c in ("red", "blue") for s in ("ball", "ring") for d in ("left", "right")]
    truth = torch.tensor([p.endswith("right") for p in prompts]).long()
    optimiser = torch.optim.AdamW([*text.parameters(), *head.parameters()], lr=3e-3)
    for _ in range(60):
        optimiser.zero_grad()
        # Read from the start token, which knows nothing by itself.
        loss = torch.nn.functional.cross_entropy(head(text.encode(prompts).states[:, 0]), truth)
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.1


def test_a_long_prompt_is_cut_and_says_so() -> None:
    text = encoder()
    fits, long = "red " * 15, "red " * 16
    assert not text.truncated(fits)
    assert text.truncated(long)
    assert text.tokenize([long])[0].shape == (1, 16)
    assert torch.equal(text.tokenize([long])[0], text.tokenize([fits])[0])


def test_split_words_are_cut_and_padded_like_whole_ones() -> None:
    text = encoder()
    rng = random.Random(0)
    ids, mask = text.tokenize([*CAPTIONS, "red " * 16], split=0.8, rng=rng)
    assert ids.shape == mask.shape
    assert ids.shape[1] == 16
    assert torch.equal(mask, ids != 0)
    assert not torch.equal(ids, text.tokenize([*CAPTIONS, "red " * 16], split=0.8, rng=rng)[0])
    assert torch.equal(ids, text.tokenize([*CAPTIONS, "red " * 16], split=0.8, rng=random.Random(0))[0])


def test_weights_save_and_load(tmp_path) -> None:
    text, other = encoder(), encoder(mixed=False)
    save_module(tmp_path / "text.safetensors", text)
    load_module(tmp_path / "text.safetensors", other)
    assert torch.equal(text.encode(CAPTIONS).states, other.encode(CAPTIONS).states)


def test_names_that_checkpoints_rely_on() -> None:
    names = {name for name, _ in encoder().named_parameters() if not name.startswith("blocks.1")}
    inner = ("attention_norm", "attention.qkv", "attention.out", "attention.q_norm", "attention.k_norm", "mlp_norm")
    assert names == {
        "embed.weight",
        "norm.weight",
        *(f"blocks.0.{n}.weight" for n in (*inner, "mlp.gate_up", "mlp.down")),
    }


def test_built_on_meta() -> None:
    with torch.device("meta"):
        text = OwnTextEncoder(SMALL)
    text.to_empty(device="cpu")
    text.init_weights()
    assert text.encode(["a"]).states.isfinite().all()


def test_batched_tokenising_is_quick() -> None:
    text = encoder()
    prompts = [f"{c} {i}" for i in range(400) for c in CAPTIONS]
    text.tokenize(prompts)
    start = time.perf_counter()
    text.tokenize(prompts)
    assert time.perf_counter() - start < 0.1  # cached: 1,200 prompts


@pytest.mark.parametrize(
    "wrong",
    [{"width": 30, "heads": 4}, {"heads": 0}, {"vocab_size": 100}, {"depth": -1}, {"max_tokens": 0}],
)
def test_wrong_sizes(wrong: dict[str, int]) -> None:
    with pytest.raises(UserError, match="; "):
        OwnTextConfig(**wrong)


def test_a_tokenizer_that_does_not_fit() -> None:
    with pytest.raises(UserError, match="raise vocab_size"):
        OwnTextEncoder(OwnTextConfig(vocab_size=258, width=32, heads=2), Tokenizer([(40, 41)]))
