"""A DiT that reads prompts: their mean stands where the label did, and nothing else is another network."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tubelet.core.config import from_dict, to_dict
from tubelet.core.errors import UserError
from tubelet.core.types import Condition
from tubelet.models.dit import CONDITIONINGS, SIZES, DiT, DiTConfig, example, load_published, stated, tiny

WIDTH = 24
TINY = replace(tiny(SIZES["S/2"]), text_width=WIDTH)


def built(conditioning: Any) -> DiT:
    """As after some training: nothing is zero any more."""
    torch.manual_seed(0)
    model = DiT(replace(TINY, conditioning=conditioning))
    for p in model.parameters():
        if p.eq(0).all():
            torch.nn.init.normal_(p, std=0.05)
    return model


def prompts(batch: int = 3, words: int = 5) -> Condition:
    g = torch.Generator().manual_seed(1)
    mask = torch.arange(words) < torch.tensor([[words], [2], [1]])[:batch]
    return Condition(torch.randn(batch, words, WIDTH, generator=g), mask)


def latents(batch: int = 3) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(2)
    return torch.randn(batch, 4, 4, 6, generator=g), torch.tensor([999.0, 3.5, 500.0])[:batch]


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_it_is_the_network_of_labels_told_another_vector(conditioning: Any) -> None:
    model, said, (x, t) = built(conditioning), prompts(), latents()
    labelled = DiT(replace(model.config, text_width=0))
    labelled.load_state_dict(model.state_dict(), strict=False)
    assert model.text_in is not None
    assert labelled.labels is not None
    means = torch.stack([states[mask].mean(0) for states, mask in zip(said.states, said.mask, strict=True)])
    with torch.no_grad():
        labelled.labels.weight[:3] = model.text_in(means)
        torch.testing.assert_close(model(x, t, said), labelled(x, t, torch.arange(3)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_words_matter_padding_does_not_and_gradients_arrive(conditioning: Any) -> None:
    model, said, (x, t) = built(conditioning), prompts(), latents()
    out = model(x, t, said)
    padded = Condition(
        torch.nn.functional.pad(said.states, (0, 0, 0, 2), value=9.0), torch.nn.functional.pad(said.mask, (0, 2))
    )
    torch.testing.assert_close(model(x, t, padded), out, atol=1e-5, rtol=1e-5)
    assert (model(x, t, Condition(said.states.flip(0), said.mask)) - out).abs().max() > 1e-4
    out.square().mean().backward()
    assert model.text_in is not None
    assert model.text_in.weight.grad is not None
    assert model.text_in.weight.grad.abs().sum() > 0
    assert "labels.weight" not in model.state_dict()


def test_counts_of_published_sizes_are_what_they_were() -> None:
    """The table of labels is gone, a linear has come, and a model without words has neither more nor less than before."""
    for size in ("S/2", "B/4"):
        counts = []
        for width in (0, 256):
            config = replace(SIZES[size], text_width=width)
            with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False):
                model = DiT(config)
                assert model(*example(config)).shape == (1, 8, 32, 32)
            counts.append(sum(p.numel() for p in model.parameters()))
        D = SIZES[size].width
        assert counts[1] - counts[0] == 256 * D + D - 1001 * D
    assert stated(replace(SIZES["S/2"], text_width=256)).endswith("patch 2 x 2, 16 tokens of width 256")


def test_built_on_meta_then_filled_equals_built_in_place() -> None:
    with torch.device("meta"):
        late = DiT(TINY)
    late = late.to_empty(device="cpu")
    torch.manual_seed(3)
    late.init_weights()
    now = DiT(TINY)
    torch.manual_seed(3)
    now.init_weights()
    for (name, a), (_, b) in zip(late.named_parameters(), now.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert from_dict(DiTConfig, to_dict(TINY)) == TINY


def test_what_does_not_fit_is_named() -> None:
    model, said, (x, t) = DiT(TINY), prompts(), latents()
    plain = DiT(replace(TINY, text_width=0))
    for network, bad, message in (
        (model, torch.zeros(3, dtype=torch.long), "prompts are given to a DiT with text_width"),
        (plain, said, "prompts are given to a DiT with text_width"),
        (model, said[:2], "3 step numbers and 3 labels, got .* and .2,."),
        (model, Condition(said.states[..., :8], said.mask), "reads states of width 24, got"),
    ):
        with pytest.raises(UserError, match=message):
            network(x, t, bad)
    with pytest.raises(UserError, match="text_width at least 0"):
        replace(TINY, text_width=-1)
    with pytest.raises(UserError, match="build it without text_width"):
        load_published("none", model)
