"""From prompts to films through words: both kinds of model make what they have learned, alone as in a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tubelet.codecs.tokenizer import TokenizerConfig, VideoTokenizer
from tubelet.core.errors import UserError
from tubelet.generate.engine import Request
from tubelet.generate.tokens import WordEngine, WordSampling
from tubelet.models.maskgit import MaskGIT, MaskGITConfig
from tubelet.models.videopoet import Layout, VideoPoet, VideoPoetConfig
from tubelet.text.own import OwnTextConfig, OwnTextEncoder
from tubelet.train.lineage import FrozenText
from tubelet.train.text_to_video import TextToVideo
from tubelet.train.tokens import LanguageObjective, MaskedObjective

WIDTH, BITS, SIZE, FRAMES = 32, 4, (16, 16), 5
PROMPTS = ["a red ball", "blue"]


def networks() -> list[tuple[Any, Any]]:
    torch.manual_seed(0)
    mask = MaskGIT(MaskGITConfig(WIDTH, 2, 2, 8, 2, 4, text_width=WIDTH, dropout=0.0))
    poet = VideoPoet(VideoPoetConfig(WIDTH, 2, 2, WIDTH, Layout(2**BITS, 1, 1)))
    return [(mask, MaskedObjective(text_drop=0.2)), (poet, LanguageObjective(text_drop=0.2))]


@pytest.fixture(params=[0, 1], ids=["masked", "language"])
def trained(request: pytest.FixtureRequest) -> tuple[WordEngine, Tensor]:
    """An engine whose network has learned one film for each of two prompts, and their words `(2, 2, 2, 2)`."""
    network, objective = networks()[request.param]
    torch.manual_seed(1)
    text = FrozenText(OwnTextEncoder(OwnTextConfig(vocab_size=300, width=WIDTH, depth=1, heads=2)))
    words = torch.randint(2**BITS, (2, 2, 2, 2), generator=torch.Generator().manual_seed(2))
    model, rng = TextToVideo(text, network), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(network.parameters(), 5e-3)
    batch = {"tokens": words.repeat(8, 1, 1, 1), "caption": PROMPTS * 8}
    for _ in range(80):
        loss = objective(model, batch, rng)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return WordEngine(VideoTokenizer(TokenizerConfig(BITS)).eval(), network.eval(), text), words


def test_it_makes_what_it_was_asked_for_alone_as_together(trained: tuple[WordEngine, Tensor]) -> None:
    engine, words = trained
    sampling = WordSampling(guidance=2.0, temperature=0.7, steps=4, choice_temperature=1.0)
    requests = [Request(PROMPTS[n % 2], n) for n in range(4)]
    counted: list[tuple[int, int]] = []
    films, timings = engine.sample(requests, SIZE, FRAMES, sampling, batch=3, progress=lambda *n: counted.append(n))
    assert films.shape == (4, 3, 5, 16, 16)
    assert films.abs().max() <= 1
    assert counted == [(3, 4), (4, 4)]
    assert set(timings) == {"text", "words", "decode"}
    with torch.no_grad():
        right = engine.tokenizer.from_tokens(words).clamp(-1, 1)
    for number in range(4):
        torch.testing.assert_close(films[number], right[number % 2])
        alone, _ = engine.sample(requests[number : number + 1], SIZE, FRAMES, sampling)
        torch.testing.assert_close(alone[0], films[number], atol=1e-5, rtol=1e-5)


def test_guidance_steers_towards_the_words_and_seeds_differ(trained: tuple[WordEngine, Tensor]) -> None:
    engine, _ = trained

    def made(seed: int, **how: Any) -> Tensor:
        return engine.sample([Request(PROMPTS[0], seed)], SIZE, FRAMES, WordSampling(steps=4, **how))[0]

    assert torch.equal(made(0, temperature=0.0, choice_temperature=0.0), made(7, temperature=0.0, choice_temperature=0.0))
    hot = {"temperature": 50.0, "guidance": 1.0}
    assert torch.equal(made(3, **hot), made(3, **hot))
    assert not torch.equal(made(3, **hot), made(4, **hot))
    # Without any guidance towards the prompt both are the empty one's.
    zero = {"temperature": 0.0, "choice_temperature": 0.0, "guidance": 0.0}
    other = engine.sample([Request(PROMPTS[1], 0)], SIZE, FRAMES, WordSampling(steps=4, **zero))[0]
    torch.testing.assert_close(made(0, **zero), other)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance": -1.0}, "guidance must be between"),
        ({"steps": 0}, "at least 1"),
        ({"choice_temperature": float("inf")}, "choice_temperature"),
        ({"temperature": -0.1}, "temperature must be"),
        ({"top_k": -1}, "top_k must be"),
    ],
)
def test_sampling_that_cannot_be_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        WordSampling(**settings)


def test_what_does_not_fit_is_named() -> None:
    network, _ = networks()[0]
    text = OwnTextEncoder(OwnTextConfig(vocab_size=300, width=WIDTH, depth=1, heads=2))
    engine = WordEngine(VideoTokenizer(TokenizerConfig(BITS)), network, text)
    with pytest.raises(UserError, match="nothing to generate"):
        engine.sample([], SIZE, FRAMES, WordSampling())
    with pytest.raises(UserError, match="frames must be"):
        engine.sample([Request("a ball", 0)], SIZE, 6, WordSampling())
    with pytest.raises(UserError, match="this model holds 8"):
        engine.sample([Request("a ball", 0)], (32, 32), FRAMES, WordSampling())
