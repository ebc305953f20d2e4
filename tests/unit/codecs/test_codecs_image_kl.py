"""The autoencoder of latent diffusion: equal to diffusers', a codec like the others frame by frame, and its losses by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tubelet.codecs.image_kl import (
    SIZES,
    ImageKL,
    ImageKLConfig,
    ImageKLLossConfig,
    ImageKLObjective,
    Posterior,
    discriminator_loss,
    example,
    image_kl_loss,
    read_diffusers,
    stated,
    tiny,
)
from tubelet.core.config import from_dict, to_dict
from tubelet.core.errors import UserError
from tubelet.core.weights import load_module, load_tensors, save_module, save_tensors
from tubelet.nn.adversarial import PatchDiscriminator, adaptive_weight, hinge
from tubelet.nn.conv import fold_frames

TINY = tiny(SIZES["KL-f8"])


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clip(frames: int = 3, batch: int = 2, height: int = 16, width: int = 24) -> Tensor:
    return torch.rand(batch, 3, frames, height, width, generator=rng(1)) * 2 - 1


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.fixture
def codec() -> ImageKL:
    torch.manual_seed(0)
    return ImageKL(TINY).eval()


# Counts


def test_the_count_is_the_published_one() -> None:
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        codec = ImageKL(SIZES["KL-f8"])
        out = codec(*example(codec.config))
    assert out.shape == (1, 3, 1, 256, 256)
    assert sum(p.numel() for p in codec.parameters()) == 83_653_863
    assert stated(codec.config) == "3 x 256 x 256 pixels (C, H, W), encoded and decoded"
    top = 256**2 * 9 * 128 * (3 + 128 * 4)  # the first convolution and the two first blocks
    assert counter.get_total_flops() // 2 > 5 * top


def test_sizes_are_those_of_the_released_settings() -> None:
    c = SIZES["KL-f8"]
    assert (c.channels, c.width, c.multipliers, c.blocks, c.scale) == (4, 128, (1, 2, 4, 4), 2, 0.18215)
    with torch.device("meta"):
        codec = ImageKL(c)
    assert (codec.strides.t, codec.strides.h, codec.strides.w) == (1, 8, 8)
    assert len(codec.blocks) == (4 * 2 + 2) + (4 * 3 + 2)


# Parity with diffusers


def reference(**settings: Any) -> Any:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "block_out_channels": (16, 32, 64, 64),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "norm_num_groups": 4,
        "latent_channels": 4,
    }
    return diffusers.AutoencoderKL(**config | settings).eval()


@pytest.fixture(scope="module")
def theirs() -> Any:
    return reference()


@pytest.fixture(scope="module")
def folder(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kl") / "vae"
    theirs.save_pretrained(path)
    return path


def test_equals_diffusers_with_gradients(theirs: Any, folder: Path) -> None:
    ours = read_diffusers(folder)
    assert not ours.training
    assert ours.config == replace(SIZES["KL-f8"], width=16, groups=4)
    x = clip(1, 3)
    a, b = x.clone().requires_grad_(), x[:, :, 0].clone().requires_grad_()
    mine, yours = ours.posterior(a), theirs.encode(b).latent_dist
    close(mine.mean[:, :, 0], yours.mean)
    close(mine.log_variance[:, :, 0], yours.logvar)
    close(mine.divergence()[:, 0], yours.kl())
    close(mine.sample(rng(3))[:, :, 0], yours.sample(rng(3)))
    restored, again = ours.restore(a, rng(3)), theirs.decode(yours.sample(rng(3))).sample
    close(restored[0][:, :, 0], again)
    # The scale enters on the way in and leaves on the way out.
    z = ours.encode(a)
    close(z[:, :, 0], yours.mean * 0.18215)
    close(ours.decode(z)[:, :, 0], theirs.decode(z[:, :, 0] / 0.18215).sample)

    weight = torch.randn(again.shape, generator=rng(4)) / again[0].numel() ** 0.5
    ((restored[0][:, :, 0] * weight).sum() + 1e-2 * mine.divergence().sum()).backward()
    ((again * weight).sum() + 1e-2 * yours.kl().sum()).backward()
    assert a.grad is not None
    assert b.grad is not None
    close(a.grad[:, :, 0], b.grad)
    # Their gradients go through the reader, so that each is compared with the one of the weight it belongs to.
    state = {name: p.grad for name, p in theirs.named_parameters()}
    save_tensors(folder.parent / "gradients" / "diffusion_pytorch_model.safetensors", state)
    (folder.parent / "gradients" / "config.json").write_text((folder / "config.json").read_text())
    gradients = read_diffusers(folder.parent / "gradients")
    for (name, p), (_, g) in zip(ours.named_parameters(), gradients.named_parameters(), strict=True):
        assert p.grad is not None, name
        torch.testing.assert_close(p.grad, g.detach(), atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_older_names_of_the_attention_are_read(folder: Path, tmp_path: Path) -> None:
    tensors = load_tensors(folder / "diffusion_pytorch_model.safetensors")
    older = {}
    for name, value in tensors.items():
        for new, old in ((".to_q.", ".query."), (".to_k.", ".key."), (".to_v.", ".value."), (".to_out.0.", ".proj_attn.")):
            name = name.replace(new, old)
        older[name] = value.half()  # files of half precision are common
    assert any(".proj_attn." in name for name in older)
    save_tensors(tmp_path / "diffusion_pytorch_model.safetensors", older)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    a, b = read_diffusers(folder), read_diffusers(tmp_path)
    assert all(p.dtype == torch.float32 for p in b.parameters())
    torch.testing.assert_close(a.encode(clip()), b.encode(clip()), atol=5e-3, rtol=0)


def test_a_folder_that_does_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    tensors = load_tensors(folder / "diffusion_pytorch_model.safetensors")

    def refused(message: str, settings: dict[str, Any] | None = None, **changed: Tensor) -> None:
        (tmp_path / "config.json").write_text(json.dumps(config | (settings or {})))
        kept = {name: value for name, value in (tensors | changed).items() if value.numel()}
        save_tensors(tmp_path / "diffusion_pytorch_model.safetensors", kept)
        with pytest.raises(UserError, match=message):
            read_diffusers(tmp_path)

    with pytest.raises(UserError, match="does not exist; check"):
        read_diffusers(tmp_path / "none")
    refused("does not describe an AutoencoderKL; give the folder", {"_class_name": "AutoencoderTiny"})
    refused("needs block_out_channels", {"block_out_channels": "all"})
    refused("sets block_out_channels to", {"block_out_channels": [16, 24, 64, 64]})
    refused("sets down_block_types to", {"down_block_types": ["AttnDownEncoderBlock2D"] * 4})
    refused("sets use_quant_conv to False, this codec has True only; take an", {"use_quant_conv": False})
    refused("sets shift_factor to 0.1", {"shift_factor": 0.1})
    refused("layers_per_block|blocks must be int", {"layers_per_block": "two"})
    refused("scale must be positive", {"scaling_factor": 0.0})
    refused(r"missing \['decoder.up_blocks.0.resnets.3.conv1.bias', ", {"layers_per_block": 3})
    refused(r"missing \['quant_conv.bias'\]", **{"quant_conv.bias": torch.empty(0)})
    refused(r"unknown \['ema.decay'\]", **{"ema.decay": torch.ones(1)})
    name = "decoder.mid_block.attentions.0.to_k.weight"
    refused(rf"wrong shape \['{name}'\]", **{name: torch.ones(64, 32)})
    refused(r"not finite \(\['post_quant_conv.bias'\]\)", **{"post_quant_conv.bias": torch.full((4,), torch.nan)})
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"pickle")
    with pytest.raises(UserError, match="truncated or corrupt"):
        read_diffusers(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="does not exist"):
        read_diffusers(tmp_path)


# A codec like the others


@torch.no_grad()
def test_every_frame_is_coded_alone(codec: ImageKL) -> None:
    x = clip(4)
    z = codec.encode(x)
    assert z.shape == (2, 4, 4, 2, 3)
    assert z.dtype == torch.float32
    close(z, torch.cat([codec.encode(frame) for frame in x.split(1, dim=2)], dim=2))
    close(z, torch.cat([codec.encode(one) for one in x.split(1)]))
    y = codec.decode(z)
    assert y.shape == x.shape
    close(y, torch.cat([codec.decode(frame) for frame in z.split(1, dim=2)], dim=2))
    close(torch.cat(list(codec.encode_stream(x.split([1, 3], dim=2))), dim=2), z)
    close(torch.cat(list(codec.decode_stream(z.split([2, 2], dim=2))), dim=2), y)
    close(codec(x), y)
    moved = x.clone()
    moved[:, :, 2] *= -1
    assert (codec.encode(moved) - z).abs().amax((0, 1, 3, 4)).gt(1e-3).tolist() == [False, False, True, False]


@torch.no_grad()
def test_a_sample_in_training_the_mode_in_evaluation(codec: ImageKL) -> None:
    x = clip()
    posterior = codec.posterior(x)
    assert torch.equal(codec.encode_raw(x), posterior.mean)
    torch.manual_seed(5)
    drawn = codec.train().encode_raw(x)
    torch.manual_seed(5)
    close(drawn, posterior.sample())
    assert (drawn - posterior.mean).abs().max() > 0.1
    assert torch.equal(codec.restore(x, rng(2))[0], codec.restore(x, rng(2))[0])
    assert not torch.equal(codec.restore(x, rng(2))[0], codec.restore(x, rng(3))[0])


def test_the_posterior_by_its_formulas() -> None:
    mean = torch.tensor([1.0, -2.0]).view(1, 2, 1, 1, 1).expand(1, 2, 3, 2, 2)
    posterior = Posterior(mean, torch.full_like(mean, math.log(4)))
    # Of one latent: (m^2 + v - 1 - ln v) / 2, with m^2 = 1 and 4, and v = 4.
    one = [(1 + 3 - math.log(4)) / 2, (4 + 3 - math.log(4)) / 2]
    torch.testing.assert_close(posterior.divergence(), torch.full((1, 3), 4 * sum(one)))
    assert Posterior(torch.zeros(1, 2, 1, 2, 2), torch.zeros(1, 2, 1, 2, 2)).divergence().item() == 0
    wide = Posterior(torch.zeros(1, 1, 1, 200, 200), torch.full((1, 1, 1, 200, 200), math.log(4))).sample(rng())
    assert wide.std().item() == pytest.approx(2, rel=0.02)


@torch.no_grad()
def test_the_log_variance_is_clamped(codec: ImageKL) -> None:
    codec.moments.weight.zero_()
    for value, expected in ((-1e3, -30), (1e3, 20)):
        codec.moments.bias[4:] = value
        assert codec.posterior(clip()).log_variance.eq(expected).all()
        assert codec.posterior(clip()).mean.abs().max() < 1, "the mean is not"


@torch.no_grad()
def test_the_scale_is_in_the_statistics_and_saved(codec: ImageKL, tmp_path: Path) -> None:
    x = clip()
    close(codec.encode(x), codec.encode_raw(x) * 0.18215)
    codec.set_statistics(torch.linspace(-1, 1, 4), torch.linspace(0.5, 2, 4))
    save_module(tmp_path / "codec.safetensors", codec)
    again = ImageKL(from_dict(ImageKLConfig, to_dict(TINY))).eval()
    assert again.std.tolist() == pytest.approx([1 / 0.18215] * 4)
    load_module(tmp_path / "codec.safetensors", again)
    assert torch.equal(again.encode(x), codec.encode(x))
    assert torch.equal(again.decode(codec.encode(x)), codec.decode(codec.encode(x)))


def test_built_on_meta_then_filled_equals_built_in_place() -> None:
    with torch.device("meta"):
        late = ImageKL(TINY)
    late = late.to_empty(device="cpu")
    for value in late.state_dict().values():
        value.fill_(float("nan"))
    now = ImageKL(TINY)
    for one in (late, now):
        torch.manual_seed(3)
        one.init_weights()
    for name, value in late.state_dict().items():
        assert torch.equal(value, now.state_dict()[name]), name
        assert value.isfinite().all(), name


def test_gradients_reach_every_parameter(codec: ImageKL) -> None:
    video = (torch.rand(2, 2, 16, 16, 3, generator=rng(2)) * 255).to(torch.uint8)
    losses = ImageKLObjective(ImageKLLossConfig(kl=1.0))(codec, {"video": video}, rng())
    losses["loss"].backward()
    for name, parameter in codec.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_first_and_last_layers_are_named(codec: ImageKL) -> None:
    outer = {id(p) for p in codec.outer_parameters()}
    names = {name for name, p in codec.named_parameters() if id(p) in outer and name.endswith("weight")}
    ends = {f"{side}_{end}.weight" for side in ("encoder", "decoder") for end in ("in", "out")}
    assert names == ends | {"moments.weight", "latents.weight"}
    assert not outer & {id(p) for block in codec.blocks for p in block.parameters()}


@torch.no_grad()
def test_half_precision_is_close(codec: ImageKL) -> None:
    x = clip()
    z = codec.encode(x)
    y = codec.decode(z)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = codec.encode(x), codec.decode(z)
    for a, b in zip(narrow, (z, y), strict=True):
        assert a.dtype == torch.float32
        assert (a - b).abs().mean() < 0.05 * b.std()
    assert (codec.bfloat16().decode(z) - y).abs().mean() < 0.05 * y.std()


# Losses


def test_l1_and_kl_are_sums_over_an_image_and_means_over_images(codec: ImageKL) -> None:
    x = clip(2)
    restored, posterior = codec.restore(x, rng())
    losses = image_kl_loss(codec, x, restored, posterior, ImageKLLossConfig(kl=0.5))
    images = 2 * 2
    close(losses["reconstruction"], (x - restored).abs().sum() / images)
    m, s = posterior.mean, posterior.log_variance
    close(losses["kl"], (m**2 + s.exp() - 1 - s).sum() / 2 / images)
    close(losses["loss"], losses["reconstruction"] + 0.5 * losses["kl"])
    assert losses["kl"] > 4 * 2 * 3 * 0.05, "a mean over latents would be far below"
    twice = image_kl_loss(codec, *(torch.cat([one, one]) for one in (x, restored)), posterior, ImageKLLossConfig(kl=0.5))
    close(twice["loss"], losses["loss"])


def test_the_perceptual_distance_counts_for_every_pixel_value(codec: ImageKL) -> None:
    x = clip(2)
    restored, posterior = codec.restore(x, rng())

    def squared(a: Tensor, b: Tensor) -> Tensor:
        assert a.shape == b.shape == (4, 3, 16, 24)
        return (a - b).square().mean((1, 2, 3))

    plain = image_kl_loss(codec, x, restored, posterior)["reconstruction"]
    seen = image_kl_loss(codec, x, restored, posterior, ImageKLLossConfig(perceptual=0.1), perceptual=squared)
    each = squared(fold_frames(x), fold_frames(restored))
    close(seen["reconstruction"], plain + 0.1 * each.mean() * 3 * 16 * 24)


class Judge(PatchDiscriminator):
    """Small enough for images of 16 pixels."""

    def __init__(self) -> None:
        super().__init__(width=4, layers=1)


def test_the_adversarial_term_joins_at_its_step_with_the_adaptive_weight(codec: ImageKL) -> None:
    torch.manual_seed(0)
    judge, x, config = Judge(), clip(2), ImageKLLossConfig(adversarial=0.5, start=10, kl=1e-3)
    restored, posterior = codec.restore(x, rng())
    last = codec.decoder_out.weight
    early = image_kl_loss(codec, x, restored, posterior, config, discriminator=judge, step=9)
    assert set(early) == {"loss", "reconstruction", "kl"}
    late = image_kl_loss(codec, x, restored, posterior, config, discriminator=judge, step=10)
    made = fold_frames(restored)
    close(late["adversarial"], -judge(made).mean())
    gradients = [
        torch.autograd.grad(v, last, retain_graph=True)[0].norm() for v in (late["reconstruction"], -judge(made).mean())
    ]
    close(late["adaptive_weight"], gradients[0] / (gradients[1] + 1e-4))
    close(late["loss"], early["loss"] + 0.5 * late["adaptive_weight"] * late["adversarial"])
    assert not late["adaptive_weight"].requires_grad
    late["loss"].backward()
    assert all(p.grad is None for p in judge.parameters())
    assert last.grad is not None


def test_the_discriminator_learns_without_the_codec(codec: ImageKL) -> None:
    judge, x = Judge(), clip(2)
    restored, _ = codec.restore(x, rng())
    loss = discriminator_loss(judge, x, restored)
    close(loss, (F.relu(1 - judge(fold_frames(x))).mean() + F.relu(1 + judge(fold_frames(restored))).mean()) / 2)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in judge.parameters())
    assert all(p.grad is None for p in codec.parameters())


def test_hinge_and_adaptive_weight_by_hand() -> None:
    real, made = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    assert hinge(real, made).item() == pytest.approx(((0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3) / 2)
    last = torch.tensor([3.0, 4.0], requires_grad=True)
    weight = adaptive_weight((last * torch.tensor([6.0, 8.0])).sum(), last.sum() * 0.5, last)
    assert weight.item() == pytest.approx(10 / (0.5 * 2**0.5 + 1e-4))
    assert adaptive_weight(last.sum(), last.sum() * 0, last).item() == pytest.approx(1e4), "bounded"


def test_the_discriminator_has_the_released_shape() -> None:
    torch.manual_seed(0)
    judge = PatchDiscriminator()
    # 4x4 kernels: 3-64 with bias, 64-128, 128-256 and 256-512 with batch norms in place of biases, 512-1 with bias.
    convs = 16 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512) + 64 + 1
    assert sum(p.numel() for p in judge.parameters()) == convs + 2 * (128 + 256 + 512) == 2_765_633
    with torch.no_grad():
        x = torch.zeros(2, 3, 80, 80)
        out = judge.eval()(x)
        assert out.shape == (2, 1, 8, 8)
        x[0, :, 0, 0] = 50
        touched = (judge(x) - out)[0, 0].ne(0)
    assert touched[:3, :3].any(), "a patch is 70 pixels wide"
    assert not touched[5:].any()
    assert not touched[:, 5:].any()
    spread = [float(m.weight.detach().std()) for m in judge.modules() if isinstance(m, nn.Conv2d)]
    assert spread == pytest.approx([0.02] * 5, rel=0.1)


# Bad inputs


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 18}, "18 does not divide into 4 groups; try 16"),
        ({"blocks": 0}, "at least 1"),
        ({"multipliers": ()}, "at least 1"),
        ({"scale": 0.0}, "scale must be positive"),
        ({"size": 20}, "multiple of 8, got 20; try 256"),
        ({"chanels": 4}, "no setting 'chanels'"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_dict(ImageKLConfig, to_dict(TINY) | settings)


def test_inputs_that_do_not_fit_are_named(codec: ImageKL) -> None:
    cases: list[tuple[Callable[[], Any], str]] = []
    for call in (codec.encode, codec.posterior):
        cases += [
            (lambda call=call: call(clip(height=12)), "height must be a positive multiple of 8, got 12: try 8 or 16"),
            (lambda call=call: call(clip()[:, :, :0]), "frames must be"),
            (lambda call=call: call(clip()[:, :2]), r"pixels \(B, 3, T, H, W\)"),
            (lambda call=call: call(clip()[:, :, 0]), r"pixels \(B, 3, T, H, W\)"),
        ]
    cases += [
        (lambda: codec.decode(torch.zeros(1, 5, 1, 2, 2)), r"latents \(B, 4, T, h, w\)"),
        (lambda: ImageKLObjective()(codec, {"latents": clip()}, rng()), "trained on 'video', the batch has latents"),
    ]
    for call, message in cases:
        with pytest.raises(UserError, match=message):
            call()
