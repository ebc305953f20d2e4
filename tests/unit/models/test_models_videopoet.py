from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tubelet.core.errors import UserError
from tubelet.core.types import Condition
from tubelet.models.videopoet import (
    EPS,
    FILM_TASKS,
    MAX_TEXT,
    SIZES,
    SPECIALS,
    Layout,
    Mixture,
    PrefixBlock,
    Special,
    Task,
    VideoPoet,
    VideoPoetConfig,
    audio_to_video,
    cut,
    draw_task,
    example,
    film_rows,
    frame_prediction,
    image_share,
    image_to_video,
    loss,
    painting,
    reads_words,
    stated,
    text_to_audio,
    text_to_video,
    tiny,
    together,
    video_to_audio,
    visible,
)

PAPER = Layout()
TINY = tiny(SIZES["300M"])
LAYOUT = TINY.layout
S = Special


def video(T: int = 3, H: int = 2, W: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(0, LAYOUT.visual, (T, H, W), generator=torch.Generator().manual_seed(seed))


def sound(T: int = 3) -> Tensor:
    return torch.randint(0, LAYOUT.codes, (LAYOUT.levels, T), generator=torch.Generator().manual_seed(9))


def condition(B: int = 2, K: int = 4, lengths: tuple[int, ...] = (4, 4)) -> Condition:
    states = torch.randn(B, K, TINY.text, generator=torch.Generator().manual_seed(3))
    return Condition(states, torch.arange(K) < torch.tensor(lengths)[:, None])


@pytest.fixture
def model() -> VideoPoet:
    """As after some training: far from its small initial weights, nothing zero."""
    torch.manual_seed(0)
    model = VideoPoet(TINY)
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def batch() -> tuple[Tensor, Tensor, Condition]:
    """Two rows of one length from text to video, the second with two text tokens masked."""
    ids, prefix = together([text_to_video(LAYOUT, video(seed=i), 4) for i in range(2)])
    return ids, prefix, condition(lengths=(4, 2))


# Ids


def test_the_ids_are_the_papers() -> None:
    assert PAPER.visual_range == range(256, 262_400)
    assert PAPER.audio_range(0) == range(262_400, 263_424)
    assert PAPER.audio_range(3) == range(265_472, 266_496)
    assert PAPER.size == 266_496
    specials = [*Special, *Task, S.SOURCE + 63]
    assert len(set(map(int, specials))) == len(specials), "every special token has an id of its own"
    assert 0 <= min(specials) <= max(specials) < SPECIALS


def test_codes_become_ids_and_back_exactly() -> None:
    codes = torch.tensor([[[0, 1], [2, 262_143]], [[5, 6], [7, 8]]])
    ids = PAPER.visual_ids(codes)
    assert ids.tolist() == [256, 257, 258, 262_399, 261, 262, 263, 264]
    assert torch.equal(PAPER.visual_codes(ids, (2, 2, 2)), codes)
    assert torch.equal(PAPER.visual_codes(PAPER.visual_ids(codes[None]), (2, 2, 2)), codes[None])
    heard = torch.tensor([[0, 1023], [0, 1], [2, 3], [4, 1023]])
    ids = PAPER.audio_ids(heard)
    assert ids.tolist() == [262_400, 263_423, 263_424, 263_425, 264_450, 264_451, 265_476, 266_495], "level by level"
    assert torch.equal(PAPER.audio_codes(ids), heard)
    assert torch.equal(PAPER.audio_codes(PAPER.audio_ids(heard.expand(3, 4, 2))), heard.expand(3, 4, 2))
    whole = torch.arange(PAPER.visual)
    assert torch.equal(PAPER.visual_codes(PAPER.visual_ids(whole.view(1, 1, -1)), (1, 1, len(whole))).flatten(), whole)


def test_ids_that_are_not_there_are_named() -> None:
    with pytest.raises(UserError, match="visual code must be in 0 to 262143"):
        PAPER.visual_ids(torch.full((1, 1, 1), 2**18))
    with pytest.raises(UserError, match="visual code"):
        PAPER.visual_ids(torch.full((1, 1, 1), -1))
    for wrong in (255, 262_400):
        with pytest.raises(UserError, match="visual id must be in 256 to 262399"):
            PAPER.visual_codes(torch.tensor([wrong]), (1, 1, 1))
    with pytest.raises(UserError, match="give 4"):
        PAPER.visual_codes(torch.tensor([300]), (1, 2, 2))
    with pytest.raises(UserError, match="audio code"):
        PAPER.audio_ids(torch.full((4, 1), 1024))
    with pytest.raises(UserError, match="4 levels"):
        PAPER.audio_ids(torch.zeros(3, 5, dtype=torch.long))
    with pytest.raises(UserError, match="audio id in its level"):
        PAPER.audio_codes(torch.tensor([262_400, 262_401, 264_450, 265_476]))
    with pytest.raises(UserError, match="divide into 4"):
        PAPER.audio_codes(torch.tensor([262_400]))
    with pytest.raises(UserError, match="no audio level 4"):
        PAPER.audio_range(4)
    with pytest.raises(UserError, match="at least one"):
        Layout(visual=0)


# Rows


def test_rows_of_every_task_are_figure_two() -> None:
    clip, heard = video(), sound()
    c, a, first, rest = (
        x.tolist() for x in (LAYOUT.visual_ids(clip), LAYOUT.audio_ids(heard), *LAYOUT.visual_ids(clip).split([4, 8]))
    )
    text = [S.BOT_I, S.TEXT, S.TEXT, S.EOT_I]
    hole = video(seed=5)
    h = LAYOUT.visual_ids(hole).tolist()
    expected = [
        (text_to_video(LAYOUT, clip, 2), [Task.GENERATE, *text, S.SOURCE], [S.BOV_O, *c, S.EOV_O, S.EOS]),
        (text_to_video(LAYOUT, clip), [Task.GENERATE, S.SOURCE], [S.BOV_O, *c, S.EOV_O, S.EOS]),
        (text_to_video(LAYOUT, clip[:1], 2, source=3), [Task.GENERATE, *text, S.SOURCE + 3], [S.BOV_O, *first]),
        (
            image_to_video(LAYOUT, clip, 2),
            [Task.GENERATE, *text, S.BOV_I, *first, S.EOV_I, S.SOURCE],
            [S.BOV_O, *rest, S.EOV_O, S.EOS],
        ),
        (
            frame_prediction(LAYOUT, clip, 1),
            [Task.FRAME_PREDICTION, S.BOV_I, *first, S.EOV_I, S.SOURCE],
            [S.BOV_O, *rest, S.EOV_O, S.EOS],
        ),
        (
            painting(LAYOUT, hole, clip, outside=False),
            [Task.INPAINTING, S.BOV_I, *h, S.EOV_I, S.SOURCE],
            [S.BOV_O, *c, S.EOV_O, S.EOS],
        ),
        (
            painting(LAYOUT, hole, clip, outside=True),
            [Task.OUTPAINTING, S.BOV_I, *h, S.EOV_I, S.SOURCE],
            [S.BOV_O, *c, S.EOV_O, S.EOS],
        ),
        (
            video_to_audio(LAYOUT, clip, heard),
            [Task.VIDEO_TO_AUDIO, S.BOV_I, *c, S.EOV_I, S.SOURCE],
            [S.BOA_O, *a, S.EOA_O, S.EOS],
        ),
        (
            audio_to_video(LAYOUT, heard, clip),
            [Task.AUDIO_TO_VIDEO, S.BOA_I, *a, S.EOA_I, S.SOURCE],
            [S.BOV_O, *c, S.EOV_O, S.EOS],
        ),
        (
            text_to_audio(LAYOUT, heard, 2),
            [Task.TEXT_TO_AUDIO, S.BOT_I, S.TEXT, S.TEXT, S.EOT_I, S.SOURCE],
            [S.BOA_O, *a, S.EOA_O, S.EOS],
        ),
    ]
    for row, given, made in expected:
        assert row.ids[: row.prefix].tolist() == [S.BOS, *given]
        assert row.ids[row.prefix :].tolist() == made
    tall = text_to_video(LAYOUT, video(2, 4, 2))
    assert tall.ids[: tall.prefix].tolist() == [S.BOS, Task.GENERATE, S.SOURCE, S.RES], "only what is not square says so"


@pytest.mark.parametrize("task", FILM_TASKS)
def test_rows_of_films_together_are_rows_one_by_one(task: str) -> None:
    films, holes = (torch.stack([video(seed=seed + i) for i in range(3)]) for seed in (0, 7))  # (3, 3, 2, 2)
    alone = {
        "text to image": lambda v, _: text_to_video(LAYOUT, v[:1], 4),
        "text to video": lambda v, _: text_to_video(LAYOUT, v, 4),
        "image to video": lambda v, _: image_to_video(LAYOUT, v, 4),
        "frame prediction": lambda v, _: frame_prediction(LAYOUT, v, 2),
        "inpainting": lambda v, h: painting(LAYOUT, h, v, outside=False, text=4),
        "outpainting": lambda v, h: painting(LAYOUT, h, v, outside=True, text=4),
    }[task]
    row, ids = film_rows(task, LAYOUT, films, holes, given=2, text=4)
    assert len(ids) == 3
    for place, (film, hole) in enumerate(zip(films, holes, strict=True)):
        expected = alone(film, hole)
        assert torch.equal(ids[place], expected.ids)
        assert row.prefix == expected.prefix
    assert reads_words(task) == (task != "frame prediction")


def test_rows_of_films_that_cannot_be_are_named() -> None:
    films = video()[None]
    with pytest.raises(UserError, match="no task 'smell'; choose one of text to image"):
        film_rows("smell", LAYOUT, films)
    with pytest.raises(UserError, match="inpainting reads films with a hole"):
        film_rows("inpainting", LAYOUT, films)
    with pytest.raises(UserError, match="of 3 token frames 3"):
        film_rows("frame prediction", LAYOUT, films, given=3)


def test_lengths_are_the_papers() -> None:
    zeros = torch.zeros(5, 16, 16, dtype=torch.long)
    row = text_to_video(PAPER, zeros, 64)
    assert len(row.ids) - row.prefix == 1280 + 3
    assert len(text_to_video(PAPER, torch.zeros(5, 28, 16, dtype=torch.long)).ids) == 2240 + 4 + 3
    assert len(text_to_video(PAPER, torch.zeros(11, 16, 16, dtype=torch.long)).ids) == 2816 + 3 + 3
    assert len(text_to_video(PAPER, zeros[:1]).ids) == 256 + 3 + 1
    row = video_to_audio(PAPER, zeros, torch.zeros(4, 106, dtype=torch.long))
    assert len(row.ids) - row.prefix == 424 + 3


def test_a_prompt_is_cut_to_what_a_row_holds() -> None:
    long = Condition(torch.arange(70.0)[None, :, None], torch.ones(1, 70, dtype=torch.bool))
    short = cut(long)
    assert torch.equal(short.states, long.states[:, :MAX_TEXT])
    assert short.mask.shape == (1, MAX_TEXT)
    text_to_video(LAYOUT, video(), short.states.shape[1])


def test_choices_are_of_the_same_kind_and_level() -> None:
    row = video_to_audio(LAYOUT, video(), sound(2))
    at = LAYOUT.choices(row.ids)
    assert at[0] == range(S.BOS, S.BOS + 1)
    assert at[3] == LAYOUT.visual_range
    assert at[row.prefix + 1 : -2] == [LAYOUT.audio_range(n) for n in (0, 0, 1, 1, 2, 2, 3, 3)]
    assert at[-1] == range(S.EOS, S.EOS + 1)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: text_to_video(LAYOUT, video(), MAX_TEXT + 1), "at most 64 text tokens, got 65"),
        (lambda: text_to_video(LAYOUT, video(), source=64), "64 sources"),
        (lambda: frame_prediction(LAYOUT, video(), 3), "of 3 token frames 3"),
        (lambda: image_to_video(LAYOUT, video(1)), "of 1 token frames 1"),
        (lambda: painting(LAYOUT, video(2), video(3), outside=True), "in one size"),
        (lambda: VideoPoetConfig(width=100), "16 heads need .* try 1024"),
        (lambda: VideoPoetConfig(depth=0), "at least 1"),
        (lambda: image_share(1.5), "in \\[0, 1\\]"),
        (lambda: Mixture({"a": 0.0}), "one above 0"),
        (lambda: Mixture({"a": -1.0, "b": 2.0}), "at least 0"),
    ],
)
def test_what_does_not_fit_is_named(build: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build()  # type: ignore[operator]


# Training mix


def test_tasks_come_by_their_shares_and_images_come_first() -> None:
    assert [image_share(p) for p in (0.0, 0.2499, 0.25, 1.0)] == [0.9, 0.9, 0.1, 0.1]
    images, videos = Mixture({"t2i": 1.0}), Mixture({"t2v": 3.0, "never": 0.0, "fp": 1.0})
    for progress, share in ((0.1, 0.9), (0.6, 0.1)):
        drawn = [[draw_task(images, videos, progress, g) for _ in range(2000)] for g in map(torch.manual_seed, (4, 4))]
        assert drawn[0] == drawn[1]
        assert all((name == "t2i") == image for image, name in drawn[0])
        assert sum(image for image, _ in drawn[0]) / 2000 == pytest.approx(share, abs=0.03)
        names = [name for image, name in drawn[0] if not image]
        assert "never" not in names
        assert names.count("t2v") / len(names) == pytest.approx(0.75, abs=0.1)


# Model


def test_a_block_without_rotation_equals_torchs_encoder_layer() -> None:
    torch.manual_seed(4)
    reference = nn.TransformerEncoderLayer(32, 4, 128, 0.0, "gelu", EPS, batch_first=True, norm_first=True)
    block = PrefixBlock(32, 4)
    assert [p.shape for p in block.parameters()].count(torch.Size([32])) == 6
    pairs = [
        (block.attention_norm, reference.norm1),
        (block.attention.out, reference.self_attn.out_proj),
        (block.mlp_norm, reference.norm2),
        (block.mlp.up, reference.linear1),
        (block.mlp.down, reference.linear2),
    ]
    for p in reference.parameters():
        p.data.add_(torch.randn_like(p) * 0.2)
    for own, other in pairs:
        own.weight.data.copy_(other.weight.data)
        own.bias.data.copy_(other.bias.data)
    block.attention.qkv.weight.data.copy_(reference.self_attn.in_proj_weight.data)
    block.attention.qkv.bias.data.copy_(reference.self_attn.in_proj_bias.data)
    x, mask = torch.randn(1, 5, 32), visible(torch.tensor([2]), torch.ones(1, 5, dtype=torch.bool), 5)
    still = (torch.ones(1, 1, 5, 4), torch.zeros(1, 1, 5, 4))
    expected = reference(x, src_mask=~mask[0, 0])
    torch.testing.assert_close(block(x, still, mask, None), expected, atol=1e-5, rtol=0)


def test_the_mask_is_two_way_in_the_prefix_and_causal_behind_it() -> None:
    prefix, real = torch.tensor([3, 1]), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 1, 1]], dtype=torch.bool)
    mask = visible(prefix, real, 5)
    assert mask.shape == (2, 1, 5, 5)
    for b in range(2):
        for q in range(5):
            for k in range(5):
                both = q < prefix[b] and k < prefix[b]
                assert bool(mask[b, 0, q, k]) == bool((both or k <= q) and real[b, k])
    assert torch.equal(visible(prefix, real, 2), mask[:, :, 3:])


@torch.no_grad()
def test_every_token_of_the_prefix_reaches_all_and_none_of_the_output_the_past(model: VideoPoet) -> None:
    row = frame_prediction(LAYOUT, video(2), 1, text=0)
    ids, prefix = together([row])
    base = model(ids, prefix)
    for place in range(ids.shape[1]):
        poisoned = ids.clone()
        poisoned[0, place] = LAYOUT.size - 1
        moved = (model(poisoned, prefix) - base).abs().amax(-1)[0] > 1e-4  # (L,)
        assert moved.tolist() == [place < row.prefix or at >= place for at in range(len(moved))], place


@torch.no_grad()
def test_every_text_state_reaches_all_and_stands_in_its_own_place(model: VideoPoet) -> None:
    ids, prefix, text = batch()
    base = model(ids, prefix, text)
    for place in range(4):
        other = text.states.clone()
        other[:, place] += 3.0
        moved = (model(ids, prefix, Condition(other, text.mask)) - base).abs().amax(-1)  # (B, L)
        assert bool((moved[0] > 1e-4).all())
        seen = moved[1][ids[1] != S.TEXT].max() > 1e-4
        assert bool(seen) == (place < 2), "what is masked is seen by none"
    swapped = model(ids, prefix, Condition(text.states.flip(1), text.mask))
    assert (swapped - base)[0].abs().max() > 1e-3, "text has an order"
    assert (model(ids, prefix) - base).abs().max() > 1e-3


@torch.no_grad()
def test_masked_text_and_padding_change_nothing(model: VideoPoet) -> None:
    ids, prefix, text = batch()
    base = model(ids, prefix, text)
    short, place = together([text_to_video(LAYOUT, video(seed=1), 2)])
    alone = model(short, place, Condition(text.states[1:, :2], text.mask[1:, :2]))
    keep = torch.ones(ids.shape[1], dtype=torch.bool)
    keep[5:7] = False  # <bos> <task> <bot_i> and two states stand before the masked two
    torch.testing.assert_close(base[1:, keep], alone, atol=1e-5, rtol=1e-5)
    rows = [text_to_video(LAYOUT, video(1)), text_to_video(LAYOUT, video(3))]
    padded, prefixes = together(rows)
    both = model(padded, prefixes)
    for i, row in enumerate(rows):
        torch.testing.assert_close(both[i : i + 1, : len(row.ids)], model(*together([row])), atol=1e-5, rtol=1e-5)
        assert padded[i, len(row.ids) :].eq(S.PAD).all()
    torch.testing.assert_close(loss(both[:1], padded[:1], prefixes[:1]), loss(model(*together(rows[:1])), *together(rows[:1])))


@torch.no_grad()
def test_with_a_cache_it_says_the_same(model: VideoPoet) -> None:
    ids, prefix, text = batch()
    given = int(prefix[0])
    whole, step, cache = model(ids, prefix, text), model.step(given, text), model.cache()
    assert cache.real is None
    read = 0
    for end in (given, given + 1, given + 4, ids.shape[1]):
        cached = step(ids[:, read:end], cache)
        torch.testing.assert_close(cached, step(ids[:, :end], None), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(cached, whole[:, end - 1], atol=1e-5, rtol=1e-5)
        read = end
    assert cache.real is not None
    assert cache.real.shape == ids.shape


def test_the_loss_is_of_the_output_alone() -> None:
    g = torch.Generator().manual_seed(2)
    logits = torch.randn(2, 6, 9, generator=g, requires_grad=True)
    ids, prefix = torch.randint(1, 9, (2, 6), generator=g), torch.tensor([2, 4])
    ids[0, 5] = S.PAD
    found = loss(logits, ids, prefix)
    places = [(0, 2), (0, 3), (0, 4), (1, 4), (1, 5)]
    expected = -sum(logits[b, t - 1].log_softmax(-1)[ids[b, t]] for b, t in places) / len(places)
    torch.testing.assert_close(found, torch.as_tensor(expected))
    found.backward()
    assert logits.grad is not None
    touched = logits.grad.abs().sum(-1) > 0
    assert touched.nonzero().tolist() == [[b, t - 1] for b, t in places]
    prefix_changed = ids.clone()
    prefix_changed[:, :2] = 8
    assert torch.equal(loss(logits, prefix_changed, prefix), found)
    assert loss(logits[:, :2], ids[:, :2], prefix).item() == 0


def test_a_new_model_knows_nothing_and_gradient_reaches_every_parameter() -> None:
    torch.manual_seed(0)
    model = VideoPoet(TINY)
    ids, prefix, text = batch()
    found = loss(model(ids, prefix, text), ids, prefix)
    assert float(found.detach()) == pytest.approx(math.log(LAYOUT.size), abs=0.2)
    found.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().sum() > 0, name


def test_ids_and_states_that_do_not_fit_are_named(model: VideoPoet) -> None:
    ids, prefix, text = batch()
    for bad, message in (
        ((ids + LAYOUT.size, prefix, text), f"ids are from 0 to {LAYOUT.size - 1}"),
        ((ids, prefix, Condition(text.states[:, :2], text.mask[:, :2])), "numbers of TEXT ids are from 0 to 2, got 4"),
        ((ids, prefix, Condition(text.states[..., 1:], text.mask)), "states of width"),
    ):
        with pytest.raises(UserError, match=message):
            model(*bad)


@pytest.mark.parametrize("size", SIZES)
def test_counts_agree_with_arithmetic(size: str) -> None:
    config = SIZES[size]
    D, n, V = config.width, config.depth, config.layout.size
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = VideoPoet(config)
        ids, prefix, text = example(config)
        model(ids, prefix, text)
    L = ids.shape[1]
    assert L == 4 + 2 + 64 + 1280 + 3 - 1
    blocks = n * (12 * D * D + 13 * D)
    assert sum(p.numel() for p in model.parameters()) == blocks + V * D + config.text * D + D + 2 * D
    macs = n * (12 * D * D * L + 2 * L * L * D) + V * D * L + 64 * config.text * D
    assert counter.get_total_flops() == 2 * macs


def test_the_stated_input_is_the_one_counted() -> None:
    read = "64 text tokens, 5 x 16 x 16 video tokens (T, H, W), 266,496 ids"
    assert stated(SIZES["8B"]) == f"{read}; sizes are ours, named as the paper's"
    ids, prefix, text = example(TINY, 2)
    assert ids.shape == (2, 1352)
    assert prefix.tolist() == [69, 69]
    assert (ids == S.TEXT).sum().item() == 2 * text.states.shape[1] == 128
    assert ids[:, 70:-2].min() >= LAYOUT.visual_range.start
