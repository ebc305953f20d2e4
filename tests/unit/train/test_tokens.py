"""What tokenizers and models of words are trained on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tubelet.codecs.tokenizer import TokenizerConfig, VideoTokenizer
from tubelet.core.errors import UserError
from tubelet.data.stream import TensorSource
from tubelet.decoding.masked import commit, draw_hidden
from tubelet.models.maskgit import MaskGIT, MaskGITConfig, token_loss
from tubelet.models.super_resolution import SuperResolution, SuperResolutionConfig
from tubelet.models.videopoet import FILM_TASKS, Layout, VideoPoet, VideoPoetConfig, film_rows, loss, text_to_video, together
from tubelet.nn.subtokens import MASK
from tubelet.text.own import OwnTextConfig, OwnTextEncoder
from tubelet.train.lineage import FrozenText
from tubelet.train.text_to_video import TextToVideo
from tubelet.train.tokens import (
    FilmTasksObjective,
    LanguageObjective,
    MaskedObjective,
    Progressing,
    SuperResolutionObjective,
    TokenizerObjective,
)

WIDTH, BITS, SHAPE = 32, 4, (2, 2, 3)
CAPTIONS = ["a red ball falls", "a blue box slides", "a ring"]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def model(network: nn.Module) -> TextToVideo:
    torch.manual_seed(1)
    return TextToVideo(FrozenText(OwnTextEncoder(OwnTextConfig(vocab_size=300, width=WIDTH, depth=1, heads=2))), network)


def masked() -> TextToVideo:
    torch.manual_seed(0)
    return model(MaskGIT(MaskGITConfig(WIDTH, 1, 2, 12, 2, 4, text_width=WIDTH, dropout=0.0)))


def language() -> TextToVideo:
    torch.manual_seed(0)
    return model(VideoPoet(VideoPoetConfig(WIDTH, 2, 1, WIDTH, Layout(2**BITS, 1, 1))))


@pytest.fixture
def batch() -> dict[str, Any]:
    return {"tokens": torch.randint(2**BITS, (3, *SHAPE), generator=rng(5), dtype=torch.int32), "caption": CAPTIONS}


def clips(frames: int = 9) -> Tensor:
    """Grey, with a red square that moves."""
    video = torch.full((2, frames, 16, 16, 3), 128, dtype=torch.uint8)
    for t in range(frames):
        video[:, t, 4:9, t : t + 5] = torch.tensor([230, 30, 30], dtype=torch.uint8)
    return video


@pytest.mark.parametrize("way", ["lfq", "vq"])
def test_a_tokenizer_learns(way: Any) -> None:
    torch.manual_seed(0)
    tokenizer, batch = VideoTokenizer(TokenizerConfig(BITS, way)), {"video": clips(5)}
    optimizer = torch.optim.AdamW(tokenizer.parameters(), 1e-3)
    found = []
    for _ in range(12):
        losses = TokenizerObjective()(tokenizer, batch, rng())
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        found.append(float(losses["reconstruction"].detach()))
    assert found[-1] < 0.6 * found[0]
    assert all(p.grad is not None for p in tokenizer.parameters())


def test_the_loss_is_the_weighted_sum_and_foreground_weighs_more() -> None:
    torch.manual_seed(0)
    tokenizer = VideoTokenizer(TokenizerConfig(BITS)).eval()
    video = clips(5)
    weights = {"reconstruction": 2.0, "commitment": 3.0, "entropy": 0.5, "codebook": 7.0}
    losses = TokenizerObjective(weights=weights)(tokenizer, {"video": video}, rng())
    expected = sum(weights[name] * value for name, value in losses.items() if name != "loss")
    torch.testing.assert_close(losses["loss"], expected)
    plain = TokenizerObjective(foreground=1.0)(tokenizer, {"video": video}, rng())["reconstruction"]
    pixels = video.permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    error = tokenizer(pixels) - pixels
    torch.testing.assert_close(plain, (error.square() + error.abs()).mean())
    assert losses["reconstruction"] > plain, "a new tokenizer errs most where colour is"


def test_a_step_sees_one_stretch_of_each_clip() -> None:
    seen: list[Tensor] = []

    class Watching(VideoTokenizer):
        def before_words(self, pixels: Tensor, stream: Any = None) -> Tensor:
            seen.append(pixels)
            return super().before_words(pixels, stream)

    torch.manual_seed(0)
    tokenizer, video = Watching(TokenizerConfig(BITS)), clips(9)
    for seed in range(12):
        TokenizerObjective(frames=5)(tokenizer, {"video": video}, rng(seed))
    whole = video.permute(0, 4, 1, 2, 3).float().div(127.5).sub(1.0)
    begins = {next(b for b in range(5) if torch.equal(piece, whole[:, :, b : b + 5])) for piece in seen}
    assert len(begins) > 2
    TokenizerObjective(frames=5)(tokenizer, {"video": video}, rng(0))
    assert torch.equal(seen[-1], seen[0]), "random numbers come from the generator alone"
    with pytest.raises(UserError, match="frames must be 1"):
        TokenizerObjective(frames=4)(tokenizer, {"video": video}, rng())
    with pytest.raises(UserError, match="at least 0"):
        TokenizerObjective(frames=-1)


@torch.no_grad()
def test_a_language_model_learns_the_row_of_the_paper(batch: dict[str, Any]) -> None:
    whole = language()
    network: Any = whole.denoiser
    ours = LanguageObjective(text_drop=0.0)(whole, batch, rng())["loss"]
    states = whole.text.encode(CAPTIONS)
    rows = [text_to_video(network.config.layout, one.long(), states.states.shape[1]) for one in batch["tokens"]]
    ids, prefix = together(rows)
    torch.testing.assert_close(ours, loss(network(ids, prefix, states), ids, prefix))


@pytest.mark.parametrize("build", [(masked, MaskedObjective), (language, LanguageObjective)])
def test_words_and_captions_matter_and_captions_are_dropped(build: Any, batch: dict[str, Any]) -> None:
    whole, objective = build[0](), build[1]
    losses = objective(text_drop=0.0)(whole, batch, rng())
    losses["loss"].backward()
    assert all(p.grad is not None for name, p in whole.denoiser.named_parameters() if "segments" not in name)
    with torch.no_grad():
        plain = losses["loss"].detach()
        assert torch.equal(objective(text_drop=0.0)(whole, batch, rng())["loss"], plain)
        assert objective(text_drop=0.0)(whole, {**batch, "tokens": batch["tokens"].flip(0)}, rng())["loss"] != plain
        assert objective(text_drop=0.0)(whole, {**batch, "caption": CAPTIONS[::-1]}, rng())["loss"] != plain
        dropped = objective(text_drop=1.0)(whole, batch, rng())["loss"]
        torch.testing.assert_close(dropped, objective(text_drop=0.0)(whole, {**batch, "caption": [""] * 3}, rng())["loss"])
    with pytest.raises(UserError, match="lacks 'caption'"):
        objective()(whole, {"tokens": batch["tokens"]}, rng())


@torch.no_grad()
def test_a_prompt_longer_than_a_row_holds_is_cut(batch: dict[str, Any]) -> None:
    whole = language()
    long = ["x" * 80 for _ in CAPTIONS]
    assert whole.text.encode(long).states.shape[1] > 64
    assert LanguageObjective()(whole, {**batch, "caption": long}, rng())["loss"].isfinite()


def test_a_share_of_steps_sees_clips_at_half_their_size() -> None:
    seen: list[Tensor] = []

    class Watching(VideoTokenizer):
        def before_words(self, pixels: Tensor, stream: Any = None) -> Tensor:
            seen.append(pixels)
            return super().before_words(pixels, stream)

    torch.manual_seed(0)
    tokenizer, video = Watching(TokenizerConfig(BITS, temporal_stride=1)), clips(1)
    generator = rng(0)
    for _ in range(40):
        TokenizerObjective(halved=0.7)(tokenizer, {"video": video}, generator)
    sides = [pixels.shape[-1] for pixels in seen]
    assert 20 < sides.count(8) < 36
    assert set(sides) == {8, 16}
    small = next(pixels for pixels in seen if pixels.shape[-1] == 8)
    whole = video.permute(0, 4, 1, 2, 3).float() / 127.5 - 1  # (B, 3, 1, 16, 16)
    torch.testing.assert_close(small, whole.unflatten(4, (8, 2)).unflatten(3, (8, 2)).mean((4, 6)))
    with pytest.raises(UserError, match="halved is a share"):
        TokenizerObjective(halved=1.5)


# Hints


def hinting(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with words of two conditions: only the first frame, and a film with a hole of one column."""
    first = batch["tokens"].clone()
    first[:, 1:] = MASK
    hole = (batch["tokens"] + 1) % 2**BITS
    hole[..., 1] = MASK
    return {**batch, "first": first, "hole": hole}


@torch.no_grad()
def test_hints_stand_in_hidden_places_by_their_shares(batch: dict[str, Any]) -> None:
    whole = masked()
    network: Any = whole.denoiser
    batch = hinting(batch)
    ids = batch["tokens"].long().flatten(1)

    def expected(hints: Tensor) -> Tensor:
        generator = rng(4)
        torch.rand(3, generator=generator)  # as `read_words`
        shown, hinted = commit(ids, draw_hidden(3, ids.shape[1], generator), hints)
        assert hinted.any()
        logits = network(shown, whole.text.encode(CAPTIONS), hinted)
        return token_loss(logits, ids, torch.ones_like(ids, dtype=torch.bool))

    for name in ("first", "hole"):
        found = MaskedObjective(text_drop=0.0, hints={name: 1.0})(whole, batch, rng(4))["loss"]
        torch.testing.assert_close(found, expected(batch[name].long().flatten(1)))
    plain = MaskedObjective(text_drop=0.0)(whole, batch, rng(4))["loss"]
    never = MaskedObjective(text_drop=0.0, hints={"first": 0.0, "hole": 0.0})(whole, batch, rng(4))["loss"]
    torch.testing.assert_close(never, plain)

    asked: list[Tensor] = []
    network.register_forward_pre_hook(lambda _, inputs: asked.append(inputs[2].any(1)))
    generator, objective = rng(1), MaskedObjective(hints={"first": 0.3, "hole": 0.5})
    for _ in range(60):
        objective(whole, batch, generator)
    share = torch.cat(asked).float().mean()
    assert 0.65 < share < 0.85, "a hint may stand where nothing is hidden, so a little fewer than 0.8"


def test_the_segment_of_hints_learns_and_hints_that_cannot_be_are_named(batch: dict[str, Any]) -> None:
    whole = masked()
    MaskedObjective(hints={"first": 1.0})(whole, hinting(batch), rng())["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in whole.denoiser.parameters())
    with pytest.raises(UserError, match="lacks 'hole'"):
        MaskedObjective(hints={"hole": 1.0})(whole, batch, rng())
    for wrong in ({"first": 0.6, "hole": 0.5}, {"first": -0.1}):
        with pytest.raises(UserError, match="shares of hints"):
            MaskedObjective(hints=wrong)


# A mixture of tasks


def told(batch: dict[str, Any], progress: float = 1.0) -> dict[str, Any]:
    hole = (batch["tokens"] + 1) % 2**BITS
    return {**batch, "progress": progress, "inpainting": hole, "outpainting": hole.flip(0)}


@torch.no_grad()
@pytest.mark.parametrize("task", FILM_TASKS)
def test_each_task_s_loss_is_of_its_own_rows(task: str, batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = language()
    network: Any = whole.denoiser
    batch = told(batch)
    monkeypatch.setattr(FilmTasksObjective, "task", lambda *_: task)
    found = FilmTasksObjective(given=1, text_drop=0.0)(whole, batch, rng())["loss"]
    states = whole.text.encode(CAPTIONS)
    masked_words = batch[task].long() if task.endswith("painting") else None
    row, ids = film_rows(task, network.config.layout, batch["tokens"].long(), masked_words, 1, states.states.shape[1])
    prefix = torch.full((3,), row.prefix)
    read = None if task == "frame prediction" else states
    torch.testing.assert_close(found, loss(network(ids, prefix, read), ids, prefix))


@torch.no_grad()
def test_pictures_come_first_and_films_by_their_shares(batch: dict[str, Any]) -> None:
    objective = FilmTasksObjective(videos={"text to video": 3.0, "inpainting": 1.0, "outpainting": 0.0})
    generator = rng(2)
    for progress, share in ((0.1, 0.9), (0.25, 0.1)):
        drawn = [objective.task(progress, generator) for _ in range(1000)]
        assert drawn.count("text to image") / 1000 == pytest.approx(share, abs=0.03)
        rest = [task for task in drawn if task != "text to image"]
        assert rest.count("text to video") / len(rest) == pytest.approx(0.75, abs=0.12)
        assert "outpainting" not in rest
    whole, generator = language(), rng(0)
    mixed = FilmTasksObjective(given=1, text_drop=0.0)
    losses = {round(float(mixed(whole, told(batch), generator)["loss"]), 5) for _ in range(60)}
    assert len(losses) == len(FILM_TASKS), "one loss a task, since rows and network stay the same"


def test_a_mixture_is_learned(batch: dict[str, Any]) -> None:
    whole, generator = language(), rng(0)
    objective = FilmTasksObjective(given=1, text_drop=0.0)
    optimizer = torch.optim.Adam(whole.denoiser.parameters(), 1e-2)
    found = []
    for _ in range(60):
        value = objective(whole, told(batch), generator)["loss"]
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        found.append(float(value.detach()))
    assert sum(found[-10:]) < 0.6 * sum(found[:10])
    assert all(p.grad is not None for p in whole.denoiser.parameters())


def test_mixtures_that_cannot_be_are_named(batch: dict[str, Any]) -> None:
    whole = language()
    with pytest.raises(UserError, match="no task 'smell'"):
        FilmTasksObjective(videos={"smell": 1.0})
    with pytest.raises(UserError, match="at least 0"):
        FilmTasksObjective(videos={"inpainting": -1.0})
    with pytest.raises(UserError, match="draw from a Progressing"):
        FilmTasksObjective()(whole, batch, rng())
    with pytest.raises(UserError, match="lacks 'inpainting'"):
        FilmTasksObjective(videos={"inpainting": 1.0})(whole, {**batch, "progress": 1.0}, rng(2))


def test_a_source_tells_its_progress_and_goes_on_where_it_stopped() -> None:
    def source() -> Progressing:
        return Progressing(TensorSource({"tokens": torch.arange(6)}, seed=1), 10)

    one, other = source(), source()
    assert [one.draw(4)["progress"] for _ in range(4)] == [0.0, 0.4, 0.8, 1.0]
    first = other.draw(4)
    third = source()
    third.restore(other.state())
    assert first["progress"] == 0.0
    again, follows = third.draw(4), other.draw(4)
    assert again["progress"] == follows["progress"] == 0.4
    assert torch.equal(again["tokens"], follows["tokens"])


# Super-resolution


def enlarging() -> TextToVideo:
    torch.manual_seed(0)
    windows = ((1, 4, 2), (1, 2, 4), (2, 2, 2))
    return model(SuperResolution(SuperResolutionConfig(WIDTH, 2, 1, windows, WIDTH, factor=4)))


def pairs() -> dict[str, Any]:
    """Films of 2 x 4 x 4 words, each four times the word of its coarse cell."""
    coarse = torch.randint(2**BITS, (3, 2, 2, 2), generator=rng(5))
    fine = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)
    return {"tokens": fine.int(), "coarse": coarse.int(), "caption": CAPTIONS}


def test_super_resolution_learns_to_copy_what_it_reads() -> None:
    whole, generator = enlarging(), rng(0)
    objective = SuperResolutionObjective(noise=0.0, coarse_drop=0.0)
    optimizer = torch.optim.Adam(whole.denoiser.parameters(), 1e-2)
    found = []
    for _ in range(60):
        value = objective(whole, pairs(), generator)["loss"]
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        found.append(float(value.detach()))
    assert sum(found[-5:]) < 0.3 * sum(found[:5])
    assert all(p.grad is not None for p in whole.denoiser.parameters())


@torch.no_grad()
def test_coarse_words_are_noised_and_dropped_by_their_shares() -> None:
    whole, batch = enlarging(), pairs()
    asked: list[tuple[Tensor, Tensor]] = []
    whole.denoiser.register_forward_pre_hook(lambda _, inputs: asked.append((inputs[1], inputs[3])))
    objective, generator = SuperResolutionObjective(noise=0.6, coarse_drop=0.25), rng(3)
    for _ in range(200):
        objective(whole, batch, generator)
    changed = torch.stack([coarse != batch["coarse"] for coarse, _ in asked]).float().mean((2, 3, 4))  # (200, 3)
    assert changed.mean() == pytest.approx(0.3 * 15 / 16, abs=0.03), "uniform below 0.6, a sixteenth stays by chance"
    assert changed.max() > 0.7 > 0.05 > changed.min(), "each sample has its own share"
    assert torch.stack([keep for _, keep in asked]).float().mean() == pytest.approx(0.75, abs=0.06)
    one, same, other = (objective(whole, batch, rng(seed))["loss"] for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert one != other
    blind = SuperResolutionObjective(coarse_drop=1.0)
    losses = [blind(whole, {**batch, "coarse": words}, rng())["loss"] for words in (batch["coarse"], batch["coarse"] * 0)]
    assert torch.equal(*losses)
    with pytest.raises(UserError, match="lacks 'coarse'"):
        objective(whole, {"tokens": batch["tokens"], "caption": CAPTIONS}, rng())
    with pytest.raises(UserError, match="noise is a share"):
        SuperResolutionObjective(noise=1.2)
