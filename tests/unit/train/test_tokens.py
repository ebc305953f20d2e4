"""What tokenizers and models of words are trained on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tubelet.codecs.tokenizer import TokenizerConfig, VideoTokenizer
from tubelet.core.errors import UserError
from tubelet.models.maskgit import MaskGIT, MaskGITConfig
from tubelet.models.videopoet import Layout, VideoPoet, VideoPoetConfig, loss, text_to_video, together
from tubelet.text.own import OwnTextConfig, OwnTextEncoder
from tubelet.train.lineage import FrozenText
from tubelet.train.text_to_video import TextToVideo
from tubelet.train.tokens import LanguageObjective, MaskedObjective, TokenizerObjective

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
