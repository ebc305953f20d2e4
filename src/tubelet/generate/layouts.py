"""The layouts of published picture models: DiT and Stable Diffusion 1, as diffusers writes them and as DiT's authors did.

Scalable Diffusion Models with Transformers (Peebles & Xie 2023, 2212.09748) and High-Resolution Image Synthesis with Latent
Diffusion Models (Rombach et al. 2022, 2112.10752). What a folder's JSON says decides what is built; whatever our networks
cannot follow is refused.

A DiT is computed as its authors released it. diffusers' own module is another network in three places, which its folders do
not tell: the exponents of its step waves run to k / 127 instead of k / 128, the norm before its MLP has eps 1e-5 instead of
1e-6, and it has an embedder in every block, which conversion from the released weights makes equal.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from tubelet.core.config import from_dict
from tubelet.core.errors import UserError
from tubelet.core.weights import UNREADABLE, load_tensors
from tubelet.diffusion.objectives import Prediction
from tubelet.diffusion.paths import LDM, Cosine, Spacing, VariancePreserving, VPLinear, spaced_sigmas
from tubelet.generate.folder import quick
from tubelet.generate.foreign import filled_from, refuse_others, told_by, weights_of
from tubelet.models.dit import SIZES, DiT, DiTConfig, load_published
from tubelet.models.unet import UNet, UNetConfig
from tubelet.nn.adaln_zero import sincos_plane
from tubelet.text.clip import EPS, CLIPText, CLIPTextConfig
from tubelet.text.clip_bpe import CLIPTokenizer

WEIGHTS = "diffusion_pytorch_model"


# The chain of noise levels


@dataclass(frozen=True)
class Chain:
    """The discrete steps that a network was trained on, what it predicts, and which of them a sampler visits.

    `spacing` and `offset` (of "leading") choose the steps as diffusers' DDIM does; each leads to the next one, where DDIM there
    goes to t - N / steps, which with "linspace" is another. `to_clean` False ends at the chain's first step, where 3 % of noise
    are left, as Stable Diffusion is sampled.
    """

    path: VariancePreserving
    prediction: Prediction = "eps"
    spacing: Spacing = "leading"
    offset: int = 0
    to_clean: bool = True

    def levels(self, steps: int, shift: float = 1.0) -> Tensor:
        """`(steps + 1,)` noise levels, all of them steps of the chain but a last 0. Raises UserError for more than it has, and
        for a shift, which leads off the steps."""
        if shift != 1:
            raise UserError(
                f"this model knows the steps of its chain only, so they cannot be shifted by {shift}; leave it at 1"
            )
        sigmas = spaced_sigmas(self.path, steps, self.spacing)
        if self.spacing == "leading":
            sigmas[:-1] += min(self.offset / len(self.path), 1 - float(sigmas[0]))
        first = float(self.path.sigma_of_step(torch.tensor(0)))
        if not self.to_clean and float(sigmas[-2]) > first:
            sigmas[-1] = first
        return sigmas


# diffusers' schedulers that are samplers of one discrete chain, and what they take for granted where a file does not say it.
_LEADING: dict[str, Any] = {"timestep_spacing": "leading"}
_LINSPACE: dict[str, Any] = {"timestep_spacing": "linspace"}
_SAMPLERS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {**_LEADING, "clip_sample": True},
    "DDPMScheduler": {**_LEADING, "clip_sample": True},
    "PNDMScheduler": {**_LEADING, "set_alpha_to_one": False},
    "LMSDiscreteScheduler": _LINSPACE,
    "EulerDiscreteScheduler": _LINSPACE,
    "EulerAncestralDiscreteScheduler": _LINSPACE,
    "HeunDiscreteScheduler": _LINSPACE,
    "DPMSolverMultistepScheduler": _LINSPACE,
    "DPMSolverSinglestepScheduler": _LINSPACE,
    "DEISMultistepScheduler": _LINSPACE,
    "UniPCMultistepScheduler": _LINSPACE,
}
_PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "v_prediction": "v", "sample": "x"}
_OFF = ("trained_betas", "rescale_betas_zero_snr", "thresholding", "clip_sample", "use_flow_sigmas")


@dataclass(frozen=True)
class SchedulerConfig:
    """The settings of a scheduler that describe its chain, with diffusers' defaults."""

    num_train_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    prediction_type: str = "epsilon"
    timestep_spacing: Literal["leading", "trailing", "linspace"] = "leading"
    steps_offset: int = 0
    set_alpha_to_one: bool = True


def read_chain(folder: Path) -> Chain:
    """The chain in `scheduler_config.json`. Which sampler diffusers would use does not matter: the engine has its own.

    Raises UserError for another kind of scheduler, another table of betas, and for clipping, which is for pixels.
    """
    path = folder / "scheduler_config.json"
    told = told_by(path, _SAMPLERS)
    told = {**_SAMPLERS[told["_class_name"]], **told}
    for key in _OFF:
        if told.get(key):
            raise UserError(f"{path} sets {key} to {told[key]!r}, which is not sampled here; take a checkpoint without it")
    try:
        s = from_dict(SchedulerConfig, {key: told[key] for key in SchedulerConfig.__dataclass_fields__ if key in told})
    except UserError as error:
        raise UserError(f"{path} is wrong: {error}") from error
    if s.num_train_timesteps < 2 or s.steps_offset < 0 or not 0 < s.beta_start <= s.beta_end < 1:
        raise UserError(f"{path} has steps or betas that no chain can have; restore it from its source")
    if s.prediction_type not in _PREDICTIONS:
        known = ", ".join(_PREDICTIONS)
        raise UserError(f"{path} predicts {s.prediction_type!r}, only {known} are known here; take another checkpoint")
    chain: VariancePreserving
    if s.beta_schedule == "linear":
        chain = VPLinear(s.num_train_timesteps, s.beta_start, s.beta_end)
    elif s.beta_schedule == "scaled_linear":
        chain = LDM(s.num_train_timesteps, s.beta_start, s.beta_end)
    elif s.beta_schedule == "squaredcos_cap_v2":
        chain = Cosine(s.num_train_timesteps)
    else:
        raise UserError(
            f"{path} has the betas {s.beta_schedule!r}; only linear, scaled_linear and squaredcos_cap_v2 are known here, "
            "take a checkpoint that was trained with one of them"
        )
    return Chain(chain, _PREDICTIONS[s.prediction_type], s.timestep_spacing, s.steps_offset, s.set_alpha_to_one)


# Stable Diffusion's U-Net

_UNET_SIZES = {
    "in_channels": "channels",
    "layers_per_block": "blocks",
    "attention_head_dim": "heads",  # a misnomer there: in version 1 it is how many
    "cross_attention_dim": "context",
    "norm_num_groups": "groups",
    "sample_size": "size",
}
_UNET_FIXED = {
    "act_fn": "silu",
    "addition_embed_type_num_heads": 64,
    "attention_type": "default",
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-5,
    "resnet_out_scale_factor": 1.0,
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
    "transformer_layers_per_block": 1,
}
_UNET_READ = (*_UNET_SIZES, "out_channels", "block_out_channels", "down_block_types", "up_block_types", "dropout")
# Applied in this order to a parameter's name.
_UNET_NAMES = (
    (r"^step_in\.", "time_embedding.linear_1."),
    (r"^step_out\.", "time_embedding.linear_2."),
    (r"^norm_out\.", "conv_norm_out."),
    (r"^middle\.(\d+)\.block\.", r"mid_block.resnets.\1."),
    (r"^middle\.(\d+)\.attention\.", r"mid_block.attentions.\1."),
    (r"^(down|up)\.(\d+)\.cells\.(\d+)\.block\.", r"\1_blocks.\2.resnets.\3."),
    (r"^(down|up)\.(\d+)\.cells\.(\d+)\.attention\.", r"\1_blocks.\2.attentions.\3."),
    (r"^(down|up)\.(\d+)\.resample\.", r"\1_blocks.\2.\1samplers.0."),
    (r"(resnets\.\d+\.(?:norm|conv))_in\.", r"\g<1>1."),
    (r"(resnets\.\d+\.(?:norm|conv))_out\.", r"\g<1>2."),
    (r"(resnets\.\d+)\.step\.", r"\1.time_emb_proj."),
    (r"(resnets\.\d+)\.skip\.", r"\1.conv_shortcut."),
    (r"(attentions\.\d+)\.into\.", r"\1.proj_in."),
    (r"(attentions\.\d+)\.out\.", r"\1.proj_out."),
    (r"\.attention_norm\.", ".transformer_blocks.0.norm1."),
    (r"\.cross_norm\.", ".transformer_blocks.0.norm2."),
    (r"\.mlp_norm\.", ".transformer_blocks.0.norm3."),
    (r"\.attention\.", ".transformer_blocks.0.attn1."),
    (r"\.cross\.", ".transformer_blocks.0.attn2."),
    (r"\.mlp\.up\.", ".transformer_blocks.0.ff.net.0.proj."),
    (r"\.mlp\.down\.", ".transformer_blocks.0.ff.net.2."),
    (r"\.(attn\d)\.out\.", r".\1.to_out.0."),
)


def read_unet(folder: Path, device: torch.device, dtype: torch.dtype) -> UNet:
    """The U-Net of a Stable Diffusion 1 folder. Its `config.size` is the side of the latents that it was trained on.

    Raises UserError when a file is missing or broken, or the network is of another shape than version 1's.
    """
    path = folder / "config.json"
    told = told_by(path, ("UNet2DConditionModel",))
    refuse_others(path, told, _UNET_READ, _UNET_FIXED)
    widths, down, up = (told.get(key) for key in ("block_out_channels", "down_block_types", "up_block_types"))
    kinds = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
    if (
        not isinstance(widths, list)
        or not isinstance(down, list)
        or not widths
        or not all(type(w) is int and w > 0 and w % widths[0] == 0 for w in widths)
        or len(down) != len(widths)
        or not all(kind in kinds for kind in down)
        or up != [kind.replace("Down", "Up") for kind in reversed(down)]
    ):
        raise UserError(
            f"{path} describes levels of another kind than Stable Diffusion 1's ({down}, widths {widths}); "
            "take a checkpoint of version 1"
        )
    lacking = sorted({*_UNET_SIZES, "out_channels"} - told.keys())
    if lacking:
        raise UserError(f"{path} lacks {lacking[0]}; restore it from its source")
    if told["out_channels"] != told["in_channels"]:
        raise UserError(
            f"{path} takes {told['in_channels']} channels and gives {told['out_channels']}; "
            "take a checkpoint of text to image, not of inpainting"
        )
    sizes: dict[str, Any] = {ours: told[theirs] for theirs, ours in _UNET_SIZES.items()}
    sizes["multipliers"] = [w // widths[0] for w in widths]
    sizes["attention"] = [k for k, kind in enumerate(down) if kinds[kind]]
    network = _built(path, UNetConfig, {"width": widths[0], "dropout": 0.0, **sizes}, UNet)
    file = weights_of(folder, WEIGHTS)
    return filled_from(network, load_tensors(file), _unet_names, file, device, dtype)


def _unet_names(name: str) -> list[str]:
    return _split(_renamed(name, _UNET_NAMES))


def _renamed(name: str, names: Sequence[tuple[str, str]]) -> str:
    for ours, theirs in names:
        name = re.sub(ours, theirs, name)
    return name


def _split(name: str) -> list[str]:
    """One linear here, several there: queries, keys and values."""
    for joined, letters in ((".qkv.", "qkv"), (".kv.", "kv"), (".q.", "q")):
        if joined in name:
            return [name.replace(joined, f".to_{one}.") for one in letters]
    return [name]


# CLIP's text tower

_TEXT_SIZES = {
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "intermediate_size": "hidden",
    "vocab_size": "vocab",
    "max_position_embeddings": "context",
}
_TEXT_NAMES = (
    (r"^tokens\.", "embeddings.token_embedding."),
    (r"^positions$", "embeddings.position_embedding.weight"),
    (r"^norm\.", "final_layer_norm."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.attention_norm\.", ".layer_norm1."),
    (r"\.mlp_norm\.", ".layer_norm2."),
    (r"\.mlp\.up\.", ".mlp.fc1."),
    (r"\.mlp\.down\.", ".mlp.fc2."),
    (r"\.attention\.out\.", ".self_attn.out_proj."),
)


def read_text(text_encoder: Path, tokenizer: Path, device: torch.device) -> CLIPText:
    """The text tower of a Stable Diffusion 1 folder with its tokenizer, float32.

    Raises UserError when a file is missing or broken, or the tower is of another kind than version 1's.
    """
    path = text_encoder / "config.json"
    told = told_by(path, ("clip_text_model",), key="model_type")
    for key, value in {"hidden_act": "quick_gelu", "layer_norm_eps": EPS}.items():
        if told.get(key, value) != value:
            raise UserError(
                f"{path} sets {key} to {told[key]!r}, only {value!r} can be followed; take a checkpoint of version 1"
            )
    words = CLIPTokenizer.read(tokenizer)
    sizes = {ours: told[theirs] for theirs, ours in _TEXT_SIZES.items() if theirs in told}
    tower = _built(path, CLIPTextConfig, sizes, lambda config: CLIPText(config, words))
    file = weights_of(text_encoder, "model")
    found = {
        name.removeprefix("text_model."): value
        for name, value in load_tensors(file).items()
        if not name.endswith("position_ids")  # a counter that older files carry
    }
    return filled_from(tower, found, _text_names, file, device, torch.float32)


def _text_names(name: str) -> list[str]:
    if ".attention.qkv." in name:
        parts = [name.replace(".attention.qkv.", f".self_attn.{one}_proj.") for one in "qkv"]
        return [_renamed(part, _TEXT_NAMES) for part in parts]
    return [_renamed(name, _TEXT_NAMES)]


# DiT

_DIT_NUMBERS = ("num_attention_heads", "attention_head_dim", "num_layers", "in_channels", "patch_size")
_DIT_NUMBERS = (*_DIT_NUMBERS, "sample_size", "num_embeds_ada_norm")
_DIT_READ = (*_DIT_NUMBERS, "out_channels", "dropout", "norm_num_groups", "upcast_attention")
_DIT_FIXED = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_type": "ada_norm_zero",
    "norm_eps": 1e-5,  # see the head of this file
}
_EMBEDDER = "transformer_blocks.0.norm1.emb."
_DIT_NAMES = (
    (r"^patch_in\.", "pos_embed.proj."),
    (r"^timestep\.up\.", f"{_EMBEDDER}timestep_embedder.linear_1."),
    (r"^timestep\.down\.", f"{_EMBEDDER}timestep_embedder.linear_2."),
    (r"^labels\.", f"{_EMBEDDER}class_embedder.embedding_table."),
    (r"^head_adaln\.out\.", "proj_out_1."),
    (r"^head\.", "proj_out_2."),
    (r"^blocks\.", "transformer_blocks."),
    (r"\.adaln\.out\.", ".norm1.linear."),
    (r"\.attention\.out\.", ".attn1.to_out.0."),
    (r"\.attention\.qkv\.", ".attn1.qkv."),
    (r"\.mlp\.up\.", ".ff.net.0.proj."),
    (r"\.mlp\.down\.", ".ff.net.2."),
)


def read_dit(folder: Path, device: torch.device, dtype: torch.dtype) -> tuple[DiT, int]:
    """The DiT of a `transformer` folder, and the side of the latents that it was trained on.

    Raises UserError when a file is missing or broken, the network is of another shape, or its blocks have embedders of their
    own, as a DiT that was trained by diffusers has.
    """
    path = folder / "config.json"
    told = told_by(path, ("DiTTransformer2DModel", "Transformer2DModel"))
    refuse_others(path, told, _DIT_READ, _DIT_FIXED)
    numbers: list[int] = []
    for key in _DIT_NUMBERS:
        value = told.get(key)
        if type(value) is not int or value < 1:
            raise UserError(f"{path} needs {key}, a whole number from 1 on, got {value!r}; restore it from its source")
        numbers.append(value)
    heads, head, depth, channels, patch, side, classes = numbers
    out = told.get("out_channels") or channels
    if out not in (channels, 2 * channels):
        raise UserError(f"{path} gives {out} channels, a DiT {channels} or {2 * channels}; restore it from its source")
    sizes = {"width": heads * head, "depth": depth, "heads": heads, "patch": patch, "in_channels": channels}
    network = _built(path, DiTConfig, {**sizes, "classes": classes, "learn_sigma": out != channels}, DiT)
    file = weights_of(folder, WEIGHTS)
    found = load_tensors(file)
    _one_embedder(found, file)
    places = found.pop("pos_embed.pos_embed", None)  # a table that older files carry
    grid = side // patch
    if places is not None:
        own = sincos_plane(heads * head, grid, grid)[None]  # (1, L, D)
        if places.shape != own.shape or not torch.allclose(places.float(), own, atol=1e-2):
            raise UserError(f"{file} was trained with other positions than DiT's sin-cos table; load it with its own code")
    return filled_from(network, found, _dit_names, file, device, dtype), side


def _one_embedder(found: dict[str, Tensor], file: Path) -> None:
    """Drop the copies of the embedder that blocks after the first have. Raises UserError when they are no copies."""
    for name in list(found):
        first = re.sub(r"^transformer_blocks\.\d+\.norm1\.emb\.", _EMBEDDER, name)
        if first == name:
            continue
        if first not in found or not torch.equal(found.pop(name), found[first]):
            raise UserError(
                f"{file} has an embedder of its own in every block ({name}), the published DiT one for all; "
                "take a checkpoint that was converted from the published weights"
            )


def _dit_names(name: str) -> list[str]:
    return _split(_renamed(name, _DIT_NAMES))


def read_dit_file(path: Path) -> tuple[DiT, int]:
    """The DiT in one safetensors file with the names that its authors publish, and the side of its latents; float32.

    Such a file says its sizes by its shapes, all but the number of heads, which the table of published sizes knows.
    Raises UserError when the file is broken or of another layout.
    """
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  not a mapping
    except UNREADABLE as error:
        raise UserError(f"{path} is truncated or corrupt ({error}); restore it from its source") from error
    kernel, head, table, places = (
        shapes.get(name, ())
        for name in ("x_embedder.proj.weight", "final_layer.linear.weight", "y_embedder.embedding_table.weight", "pos_embed")
    )
    if (len(kernel), len(head), len(table), len(places)) != (4, 2, 2, 3):
        raise UserError(f"{path} has not the names of a published DiT; give such a file, or a folder with model_index.json")
    width, channels, patch, _ = kernel
    depth = len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})
    heads = next((c.heads for c in SIZES.values() if (c.width, c.depth) == (width, depth)), None)
    if heads is None:
        raise UserError(
            f"{path} has {depth} blocks of width {width}, which is no published DiT, so its number of heads is unknown; "
            "give a folder with model_index.json"
        )
    sizes = {"width": width, "depth": depth, "heads": heads, "patch": patch, "in_channels": channels}
    sizes |= {"classes": table[0] - 1, "learn_sigma": head[0] == 2 * channels * patch**2}
    network = DiT(from_dict(DiTConfig, sizes))
    load_published(path, network)
    return network.requires_grad_(False).eval(), patch * round(places[1] ** 0.5)


def _built(path: Path, config: type[Any], sizes: dict[str, Any], build: Any) -> Any:
    try:
        return quick(lambda: build(from_dict(config, sizes)))
    except UserError as error:
        raise UserError(f"{path} is wrong: {error}") from error


def names_of_classes(path: Path, told: dict[str, Any], classes: int) -> Mapping[int, Sequence[str]]:
    """The names of every class in `id2label` of a `model_index.json`, which separates them by commas; {} without it.

    Raises UserError when it is broken or names a class that the network does not have.
    """
    said = told.get("id2label") or {}
    if not isinstance(said, dict) or not all(isinstance(value, str) and key.isdecimal() for key, value in said.items()):
        raise UserError(f"id2label in {path} must map class numbers to names; restore it from its source")
    names = {int(key): [name.strip() for name in value.split(",") if name.strip()] for key, value in said.items()}
    if names and max(names) >= classes:
        raise UserError(f"id2label in {path} names class {max(names)}, the model has {classes}; take both from one source")
    return names
