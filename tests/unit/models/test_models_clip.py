from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig as TheirConfig
from transformers import CLIPModel

from tubelet.core.errors import UserError
from tubelet.core.weights import save_tensors
from tubelet.models.clip import CLIP, MEAN, SIZES, STD, CLIPConfig, example, load_checkpoint, loss, normalise, stated, tiny
from tubelet.nn.contrastive import contrastive_loss

TINY = tiny(SIZES["B/32"])  # 64 x 64 px in 2 x 2 patches, ids below 64, the end token is 63
# Millions, as openai/CLIP's models have them (the counts of open_clip's model table).
PUBLISHED = {"B/32": 151.28, "B/16": 149.62, "L/14": 427.62, "L/14@336": 427.94}


@pytest.fixture(params=["mean", "attention"])
def model(request: pytest.FixtureRequest) -> CLIP:
    """As after some training: nothing is zero any more."""
    torch.manual_seed(0)
    model = CLIP(replace(TINY, video=request.param))
    for p in model.parameters():
        if p.eq(0).all():
            nn.init.normal_(p, std=0.05)
    return model


def batch(n: int = 3, frames: int = 0) -> tuple[Tensor, Tensor]:
    """Images or videos, and texts of different lengths whose end token is followed by padding."""
    g = torch.Generator().manual_seed(1)
    pixels = torch.randn(n, 3, *([frames] if frames else []), 64, 64, generator=g)
    ids = torch.randint(1, 63, (n, 8), generator=g)
    for i in range(n):
        ids[i, 3 + i], ids[i, 4 + i :] = 63, 0
    return pixels, ids


@pytest.mark.parametrize("size", SIZES)
def test_counts_are_the_published_ones(size: str) -> None:
    config = SIZES[size]
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = CLIP(config)
        model(*example(config))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == PUBLISHED[size]
    cells, macs = (config.image // config.patch) ** 2, 0
    macs += cells * 3 * config.patch**2 * config.image_width
    for L, D, depth in ((cells + 1, config.image_width, config.image_depth), (77, config.text_width, config.text_depth)):
        macs += depth * (L * 12 * D * D + 2 * L * L * D) + D * config.embed
    assert counter.get_total_flops() == 2 * macs


def test_sizes_are_the_published_table() -> None:
    table = {name: (c.image_width // c.head, c.text_width // c.head, c.embed, c.vocab) for name, c in SIZES.items()}
    base, large = (12, 8, 512, 49408), (16, 12, 768, 49408)
    assert table == {"B/32": base, "B/16": base, "L/14": large, "L/14@336": large}
    assert stated(SIZES["L/14@336"]) == "3 x 336 x 336 image (C, H, W), patch 14, 77 text tokens"


def theirs() -> CLIPModel:
    text = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 63, "pad_token_id": 0, "projection_dim": 32}
    image = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    image |= {"image_size": 64, "patch_size": 32, "projection_dim": 32}
    torch.manual_seed(2)
    model = CLIPModel(TheirConfig(text_config=text, vision_config=image, projection_dim=32)).eval()
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.1)
    return model


def openai_layout(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of `transformers.CLIPModel` as openai/CLIP writes it, with what its archives hold beside the weights."""
    out = {
        "visual.class_embedding": found["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": found["vision_model.embeddings.position_embedding.weight"],
        "visual.conv1.weight": found["vision_model.embeddings.patch_embedding.weight"],
        "visual.proj": found["visual_projection.weight"].T,
        "token_embedding.weight": found["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": found["text_model.embeddings.position_embedding.weight"],
        "text_projection": found["text_projection.weight"].T,
        "logit_scale": found["logit_scale"],
        "input_resolution": torch.tensor(64),
        "context_length": torch.tensor(8),
        "vocab_size": torch.tensor(64),
    }
    for kind in ("weight", "bias"):
        out[f"visual.ln_pre.{kind}"] = found[f"vision_model.pre_layrnorm.{kind}"]
        out[f"visual.ln_post.{kind}"] = found[f"vision_model.post_layernorm.{kind}"]
        out[f"ln_final.{kind}"] = found[f"text_model.final_layer_norm.{kind}"]
        for here, there in (("visual.transformer", "vision_model"), ("transformer", "text_model")):
            for i in range(2):
                ours, block = f"{here}.resblocks.{i}.", f"{there}.encoder.layers.{i}."
                out[f"{ours}ln_1.{kind}"] = found[f"{block}layer_norm1.{kind}"]
                out[f"{ours}ln_2.{kind}"] = found[f"{block}layer_norm2.{kind}"]
                qkv = [found[f"{block}self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
                out[f"{ours}attn.in_proj_{kind}"] = torch.cat(qkv)
                out[f"{ours}attn.out_proj.{kind}"] = found[f"{block}self_attn.out_proj.{kind}"]
                out[f"{ours}mlp.c_fc.{kind}"] = found[f"{block}mlp.fc1.{kind}"]
                out[f"{ours}mlp.c_proj.{kind}"] = found[f"{block}mlp.fc2.{kind}"]
    return out


def hugging_face_layout(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As older files are: with the counters that they also hold."""
    return {**found, "text_model.embeddings.position_ids": torch.arange(8)[None]}


Layout = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
LAYOUTS = [openai_layout, hugging_face_layout]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_and_gradients_equal_transformers(layout: Layout, tmp_path: Path) -> None:
    reference, model = theirs(), CLIP(TINY)
    save_tensors(tmp_path / "weights.safetensors", layout(reference.state_dict()))
    load_checkpoint(tmp_path / "weights.safetensors", model)
    pixels, ids = batch()
    expected = reference(input_ids=ids, pixel_values=pixels, return_loss=True)
    found = model(pixels, ids)
    torch.testing.assert_close(found.image, expected.image_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.text, expected.text_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.logits, expected.logits_per_image, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss(found), expected.loss, atol=1e-5, rtol=0)
    loss(found).backward()
    expected.loss.backward()
    # A checkpoint of gradients is read like one of weights, so that the names are mapped once.
    gradients = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    save_tensors(tmp_path / "gradients.safetensors", layout(gradients))
    holder = CLIP(TINY)
    load_checkpoint(tmp_path / "gradients.safetensors", holder)
    for (name, p), (_, wanted) in zip(model.named_parameters(), holder.named_parameters(), strict=True):
        near = 1e-5 * float(wanted.detach().abs().max())
        torch.testing.assert_close(p.grad, wanted.data, atol=near, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_another_image_size_equals_transformers(tmp_path: Path) -> None:
    reference, model = theirs(), CLIP(TINY)
    save_tensors(tmp_path / "weights.safetensors", reference.state_dict())
    load_checkpoint(tmp_path / "weights.safetensors", model)
    pixels = torch.randn(2, 3, 96, 128)
    expected = reference.get_image_features(pixels, interpolate_pos_encoding=True).pooler_output
    torch.testing.assert_close(model.image(pixels), expected, atol=1e-5, rtol=1e-5)


def test_a_checkpoint_leaves_the_pooler_of_frames_alone_and_may_be_narrow(tmp_path: Path) -> None:
    state = {name: value.half() for name, value in openai_layout(theirs().state_dict()).items()}
    save_tensors(tmp_path / "half.safetensors", state)
    model = CLIP(replace(TINY, video="attention"))
    assert model.frames is not None
    before = model.frames.queries.clone()
    load_checkpoint(tmp_path / "half.safetensors", model)
    assert torch.equal(model.frames.queries, before)
    assert model.image.norm_in.weight.dtype == torch.float32
    assert torch.equal(model.image.norm_in.weight, state["visual.ln_pre.weight"].float())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_that_does_not_fit_is_refused(layout: Layout, tmp_path: Path) -> None:
    path, model = tmp_path / "weights.safetensors", CLIP(TINY)
    before = model.image.embed.project.weight.clone()
    whole = layout(theirs().state_dict())
    biases = [name for name in whole if name.startswith(("visual.ln_post", "vision_model.post_layernorm")) and "bias" in name]
    cases = [
        ({name: value for name, value in whole.items() if name not in biases}, r"missing \['image.norm_out.bias'\]"),
        ({**whole, "surplus.weight": torch.ones(1)}, r"unknown \['surplus.weight'\]"),
        ({**whole, biases[0]: torch.ones(7)}, r"wrong shape \['image.norm_out.bias'\].*build the model with the sizes"),
        ({**whole, biases[0]: whole[biases[0]] * float("nan")}, "not finite.*restore it"),
        ({"weight": torch.ones(1)}, "neither OpenAI's nor Hugging Face's names"),
    ]
    for tensors, message in cases:
        save_tensors(path, tensors)
        with pytest.raises(UserError, match=message):
            load_checkpoint(path, model)
    path.write_bytes(b"no weights")
    with pytest.raises(UserError, match="truncated or corrupt"):
        load_checkpoint(path, model)
    with pytest.raises(UserError, match="does not exist"):
        load_checkpoint(tmp_path / "other.safetensors", model)
    assert torch.equal(model.image.embed.project.weight, before), "a refused file changes nothing"


def test_a_hugging_face_block_without_its_keys_is_missing_its_attention(tmp_path: Path) -> None:
    tensors = dict(theirs().state_dict())
    del tensors["text_model.encoder.layers.1.self_attn.k_proj.weight"]
    save_tensors(tmp_path / "weights.safetensors", tensors)
    with pytest.raises(UserError, match=r"missing \['text.blocks.1.attention.qkv.weight'\]"):
        load_checkpoint(tmp_path / "weights.safetensors", CLIP(TINY))


def test_a_text_is_read_at_its_end_token_and_no_further(model: CLIP) -> None:
    _, ids = batch()
    found = model.embed_text(ids)
    other = ids.clone()
    other[0, 4:] = 7
    torch.testing.assert_close(model.embed_text(other), found, atol=1e-6, rtol=0)
    torch.testing.assert_close(model.embed_text(ids[:1, :4]), found[:1], atol=1e-6, rtol=0)
    repeated = torch.where(ids == 0, 63, ids)  # some tokenizers pad with the end token: the first one counts
    torch.testing.assert_close(model.embed_text(repeated), found, atol=1e-6, rtol=0)
    other = ids.clone()
    other[:, 0] = 5
    assert (model.embed_text(other) - found).abs().amax(1).min() > 1e-3, "what stands before the end is read"


def test_the_loss_is_the_mean_of_both_directions() -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.5, 1.0, -1.0], [0.0, 0.0, 3.0]])
    by_hand = 0.0
    for i in range(3):
        by_hand -= float(logits[i, i] - logits[i].exp().sum().log()) / 6
        by_hand -= float(logits[i, i] - logits[:, i].exp().sum().log()) / 6
    assert float(contrastive_loss(logits)) == pytest.approx(by_hand, abs=1e-6)
    assert float(contrastive_loss(logits.T)) == pytest.approx(by_hand, abs=1e-6)
    assert float(contrastive_loss(torch.zeros(4, 4))) == pytest.approx(math.log(4), abs=1e-6)
    assert float(contrastive_loss(torch.ones(1, 1))) == 0
    with pytest.raises(UserError, match="as many images as texts"):
        contrastive_loss(logits[:2])


def test_the_scale_starts_at_one_over_its_temperature_and_never_exceeds_100(model: CLIP) -> None:
    assert float(model.scale.detach()) == pytest.approx(1 / 0.07, rel=1e-5)
    model.logit_scale.data.fill_(9.0)
    assert float(model.scale.detach()) == pytest.approx(100, rel=1e-5)
    model.scale.backward()
    assert float(model.logit_scale.grad) == pytest.approx(100, rel=1e-5), "it can come back"  # type: ignore[arg-type]


def test_frames_are_averaged_or_pooled_in_their_order(model: CLIP) -> None:
    video, ids = batch(3, frames=4)
    found = model.embed_image(video)
    assert found.shape == (3, 32)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(3))
    backward = model.embed_image(video.flip(2))
    frames = torch.stack([model.embed_image(video[:, :, t]) for t in range(4)], dim=1)  # (B, T, E)
    mean = F.normalize(frames.mean(1), dim=-1)
    if model.frames is None:
        torch.testing.assert_close(found, mean, atol=1e-5, rtol=0)
        torch.testing.assert_close(model.embed_image(video[:, :, :1]), frames[:, 0], atol=1e-5, rtol=0)
        torch.testing.assert_close(backward, found, atol=1e-5, rtol=0)
    else:
        assert (backward - found).abs().max() > 1e-3, "a film and its reverse are not the same"
        assert (found - mean).abs().max() > 1e-2
    assert model(video, ids).logits.shape == (3, 3)
    with pytest.raises(UserError, match="rearrange"):
        model.embed_image(video[0, 0])


def test_gradient_reaches_every_parameter(model: CLIP) -> None:
    loss(model(*batch(3, frames=2))).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().sum() > 0, name


def test_batch_equals_singles(model: CLIP) -> None:
    pixels, ids = batch(3, frames=2)
    together = model(pixels, ids)
    singles = [model(p[None], t[None]) for p, t in zip(pixels, ids, strict=True)]
    torch.testing.assert_close(together.image, torch.cat([one.image for one in singles]), atol=1e-5, rtol=0)
    torch.testing.assert_close(together.text, torch.cat([one.text for one in singles]), atol=1e-5, rtol=0)
    torch.testing.assert_close(together.logits.diagonal(), torch.cat([one.logits[0] for one in singles]), atol=1e-4, rtol=0)
    assert model(pixels, ids[:2]).logits.shape == (3, 2)
    with pytest.raises(UserError, match="as many images as texts"):
        loss(model(pixels, ids[:2]))


def test_built_on_meta_then_filled_equals_built_in_place(model: CLIP) -> None:
    with torch.device("meta"):
        late = CLIP(model.config)
    late = late.to_empty(device="cpu")
    for p in late.parameters():
        p.data.fill_(float("nan"))
    torch.manual_seed(3)
    late.init_weights()
    torch.manual_seed(3)
    model.init_weights()
    for (name, a), (_, b) in zip(late.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_standard_deviations_are_the_published_ones() -> None:
    torch.manual_seed(0)
    config = CLIPConfig(embed=64, image_width=128, image_depth=3, vocab=400, text_width=64, text_depth=3)
    model = CLIP(config)
    wanted = {"text.tokens": 0.02, "text.positions": 0.01, "image.embed.positions": 128**-0.5, "image.embed.cls": 128**-0.5}
    for tower, D in (("image", 128), ("text", 64)):
        wanted |= {f"{tower}.blocks.1.attention.qkv": D**-0.5, f"{tower}.blocks.1.attention.out": D**-0.5 * 6**-0.5}
        wanted |= {f"{tower}.blocks.1.mlp.up": (2 * D) ** -0.5, f"{tower}.blocks.1.mlp.down": D**-0.5 * 6**-0.5}
        wanted[f"{tower}.out"] = D**-0.5
    state = model.state_dict()
    for name, std in wanted.items():
        value = state[name] if name in state else state[f"{name}.weight"]
        assert float(value.std()) == pytest.approx(std, rel=0.25 if value.numel() < 1000 else 0.05), name


def test_pixels_are_standardised_as_published() -> None:
    for shape in ((1, 3, 2, 2), (1, 3, 4, 2, 2)):
        white = normalise(torch.ones(shape))
        assert white.shape == shape
        torch.testing.assert_close(white[0, :, 0].flatten(1)[:, 0], (1 - torch.tensor(MEAN)) / torch.tensor(STD))
        mean = (2 * torch.tensor(MEAN) - 1).view(3, *[1] * (len(shape) - 2)).expand(shape)
        torch.testing.assert_close(normalise(mean), torch.zeros(shape), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text_depth": 0}, "at least 1"),
        ({"text_width": 100}, "text_width 100 is not a multiple of the head's width 64; try 128"),
        ({"image": 225}, "try 224"),
        ({"video": "last"}, "mean or attention"),
    ],
)
def test_sizes_that_do_not_fit_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CLIPConfig(**settings)  # type: ignore[arg-type]


def test_a_text_longer_than_the_context_is_refused() -> None:
    with pytest.raises(UserError, match="9 tokens, the context holds 8"):
        CLIP(TINY).embed_text(torch.ones(1, 9, dtype=torch.int64))
