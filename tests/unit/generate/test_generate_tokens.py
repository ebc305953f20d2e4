"""From prompts to films through words: both kinds of model make what they have learned, alone as in a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tubelet.codecs.tokenizer import TokenizerConfig, VideoTokenizer
from tubelet.core.errors import UserError
from tubelet.generate.engine import Request
from tubelet.generate.tokens import Enlarger, EnlargeSampling, Known, WordEngine, WordSampling
from tubelet.models.maskgit import MaskGIT, MaskGITConfig
from tubelet.models.super_resolution import SuperResolution, SuperResolutionConfig
from tubelet.models.videopoet import Layout, VideoPoet, VideoPoetConfig
from tubelet.nn.subtokens import MASK
from tubelet.text.own import OwnTextConfig, OwnTextEncoder
from tubelet.train.lineage import FrozenText
from tubelet.train.text_to_video import TextToVideo
from tubelet.train.tokens import FilmTasksObjective, LanguageObjective, MaskedObjective, SuperResolutionObjective

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


# What is known of a film


def text_encoder() -> FrozenText:
    torch.manual_seed(1)
    return FrozenText(OwnTextEncoder(OwnTextConfig(vocab_size=300, width=WIDTH, depth=1, heads=2)))


def learned(objective: Any, network: Any, text: FrozenText, batch: dict[str, Any], steps: int) -> None:
    model, rng = TextToVideo(text, network), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(network.parameters(), 5e-3)
    for _ in range(steps):
        loss = objective(model, batch, rng)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()


FILMS = torch.randint(2**BITS, (4, 2, 2, 2), generator=torch.Generator().manual_seed(2))
"""Words of four films, all under one prompt: only what is known of one tells it from the others."""
HOLE = torch.tensor([[False, True], [False, True]]).expand(4, 2, 2, 2)
HOLED = FILMS.masked_fill(HOLE, 0)
TASKS = ("image to video", "frame prediction", "inpainting", "outpainting")


@pytest.fixture(scope="module")
def going_on() -> WordEngine:
    """A language model that has learned to go on from what is known of each film."""
    torch.manual_seed(0)
    network, text = VideoPoet(VideoPoetConfig(WIDTH, 2, 2, WIDTH, Layout(2**BITS, 1, 1))), text_encoder()
    batch = {"tokens": FILMS.repeat(4, 1, 1, 1), "caption": ["a ball"] * 16, "progress": 1.0}
    batch |= {"inpainting": HOLED.repeat(4, 1, 1, 1), "outpainting": HOLED.repeat(4, 1, 1, 1)}
    learned(FilmTasksObjective(videos=dict.fromkeys(TASKS, 1.0), given=1), network, text, batch, 160)
    return WordEngine(VideoTokenizer(TokenizerConfig(BITS)).eval(), network, text)


def known(task: str) -> Known:
    return Known(task, FILMS[:, :1] if task in TASKS[:2] else HOLED)


def near(films: Tensor, right: Tensor) -> bool:
    """Whether films are far nearer to the right ones than to each other's, which a few wrong words leave true."""
    return bool((films - right).abs().mean() < 0.3 * (films - right.roll(1, 0)).abs().mean())


REQUESTS = [Request("a ball", number) for number in range(4)]
CALM = WordSampling(guidance=1.0, temperature=0.3, steps=4, choice_temperature=0.5)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_made_from_what_is_known_alone_as_together(going_on: WordEngine, task: str) -> None:
    what = known(task)
    films, _ = going_on.sample(REQUESTS, SIZE, FRAMES, CALM, known=what, batch=3)
    with torch.no_grad():
        right = going_on.tokenizer.from_tokens(FILMS).clamp(-1, 1)
    assert near(films, right)
    hot = WordSampling(guidance=2.0, temperature=30.0)
    together = going_on.sample(REQUESTS, SIZE, FRAMES, hot, known=what)[0]
    for number in range(4):
        alone = going_on.sample(REQUESTS[number : number + 1], SIZE, FRAMES, hot, known=what.part(number, number + 1))[0]
        torch.testing.assert_close(alone[0], together[number], atol=1e-5, rtol=1e-5)
    again = [Request("a ball", request.seed + 9) for request in REQUESTS]
    assert not torch.equal(going_on.sample(again, SIZE, FRAMES, hot, known=what)[0], together)
    if what.begins:
        first = going_on.tokenizer.from_tokens(FILMS[:, :1]).clamp(-1, 1)
        torch.testing.assert_close(together[:, :, :1], first)  # what is known stays, whatever follows


def test_prediction_hears_no_prompt(going_on: WordEngine) -> None:
    hot = WordSampling(guidance=3.0, temperature=2.0)
    others = [Request("something else", request.seed) for request in REQUESTS]
    pairs = [
        [going_on.sample(asked, SIZE, FRAMES, hot, known=known(task))[0] for asked in (REQUESTS, others)] for task in TASKS[:2]
    ]
    assert not torch.equal(*pairs[0])
    assert torch.equal(*pairs[1])


def test_a_masked_model_goes_on_from_hints_alone_as_together() -> None:
    torch.manual_seed(0)
    network = MaskGIT(MaskGITConfig(WIDTH, 2, 2, 8, 2, 4, text_width=WIDTH, dropout=0.0))
    text = text_encoder()
    first = FILMS.clone()
    first[:, 1:] = MASK
    hole = HOLED.masked_fill(HOLE, MASK)
    batch = {"tokens": FILMS.repeat(4, 1, 1, 1), "caption": ["a ball"] * 16}
    batch |= {"first": first.repeat(4, 1, 1, 1), "hole": hole.repeat(4, 1, 1, 1)}
    learned(MaskedObjective(hints={"first": 0.4, "hole": 0.4}), network, text, batch, 140)
    engine = WordEngine(VideoTokenizer(TokenizerConfig(BITS)).eval(), network, text)
    with torch.no_grad():
        right = engine.tokenizer.from_tokens(FILMS).clamp(-1, 1)
    for what in (Known("image to video", FILMS[:, :1]), Known("inpainting", HOLED, HOLE)):
        films, _ = engine.sample(REQUESTS, SIZE, FRAMES, CALM, known=what, batch=3)
        assert near(films, right)
        hot = WordSampling(guidance=2.0, temperature=30.0, steps=3)
        together = engine.sample(REQUESTS, SIZE, FRAMES, hot, known=what)[0]
        for number in range(4):
            alone = engine.sample(REQUESTS[number : number + 1], SIZE, FRAMES, hot, known=what.part(number, number + 1))[0]
            torch.testing.assert_close(alone[0], together[number], atol=1e-5, rtol=1e-5)
    assert not near(engine.sample(REQUESTS, SIZE, FRAMES, CALM)[0], right), (
        "one prompt for four films: without hints none can be told"
    )


def test_what_is_known_and_does_not_fit_is_named(going_on: WordEngine) -> None:
    for message, make in (
        ("no task 'smell'", lambda: Known("smell", FILMS)),
        ("nothing but a prompt", lambda: Known("text to video", FILMS)),
        ("hidden like them", lambda: Known("inpainting", FILMS, HOLE[:, :1])),
        ("hidden like them", lambda: Known("inpainting", FILMS[0])),
    ):
        with pytest.raises(UserError, match=message):
            make()
    for wrong in (
        Known("image to video", FILMS),
        Known("frame prediction", FILMS),
        Known("frame prediction", FILMS[:2, :1]),
        Known("inpainting", FILMS[:, :1]),
        Known("inpainting", FILMS[..., :1]),
    ):
        with pytest.raises(UserError, match="cannot go on from"):
            going_on.sample(REQUESTS, SIZE, FRAMES, CALM, known=wrong)


# Super-resolution


@pytest.fixture(scope="module")
def enlarger() -> tuple[Enlarger, Tensor]:
    """A super-resolution that has learned to repeat each word, and four small films `(4, 2, 2, 2)`."""
    torch.manual_seed(0)
    windows = ((1, 4, 2), (1, 2, 4), (2, 2, 2))
    network, text = SuperResolution(SuperResolutionConfig(WIDTH, 2, 1, windows, WIDTH, factor=4)), text_encoder()
    fine = FILMS.repeat_interleave(2, 2).repeat_interleave(2, 3)
    batch = {"tokens": fine.repeat(2, 1, 1, 1), "coarse": FILMS.repeat(2, 1, 1, 1), "caption": PROMPTS * 4}
    learned(SuperResolutionObjective(noise=0.0), network, text, batch, 110)
    return Enlarger(VideoTokenizer(TokenizerConfig(BITS)).eval(), network, text), FILMS


def test_small_films_are_enlarged_alone_as_together(enlarger: tuple[Enlarger, Tensor]) -> None:
    engine, small = enlarger
    requests = [Request(PROMPTS[n % 2], n) for n in range(4)]
    films, timings = engine.enlarge(
        requests, small, EnlargeSampling(text=1.0, temperature=0.3, choice_temperature=0.5), batch=3
    )
    assert films.shape == (4, 3, 5, 32, 32)
    assert set(timings) == {"text", "words", "decode"}
    with torch.no_grad():
        right = engine.tokenizer.from_tokens(small.repeat_interleave(2, 2).repeat_interleave(2, 3)).clamp(-1, 1)
    assert near(films, right)
    hot = EnlargeSampling(steps=3, text=2.0, coarse=2.0, temperature=30.0)
    together, _ = engine.enlarge(requests, small, hot)
    for number in range(4):
        one = slice(number, number + 1)
        torch.testing.assert_close(engine.enlarge(requests[one], small[one], hot)[0], together[one], atol=1e-5, rtol=1e-5)
    others = [Request(request.text, request.seed + 9) for request in requests]
    assert not torch.equal(engine.enlarge(others, small, hot)[0], together)
    calls: list[Tensor] = []
    hook = engine.network.register_forward_pre_hook(lambda _, inputs: calls.append(inputs[0]))
    engine.enlarge(requests, small, EnlargeSampling())
    hook.remove()
    assert len(calls) == EnlargeSampling().steps == 24


def test_enlarging_that_cannot_be_is_named(enlarger: tuple[Enlarger, Tensor]) -> None:
    engine, small = enlarger
    for requests, films in (([], small[:0]), ([Request("a", 0)], small)):
        with pytest.raises(UserError, match="as many small films"):
            engine.enlarge(requests, films, EnlargeSampling())
    for settings, message in (
        ({"text": -1.0}, "guidance is 0 to"),
        ({"coarse": 99.0}, "guidance is 0 to"),
        ({"steps": 0}, "at least 1"),
        ({"temperature": -1.0}, "temperatures at least 0"),
    ):
        with pytest.raises(UserError, match=message):
            EnlargeSampling(**settings)
