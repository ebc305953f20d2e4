"""The catalogue: every model and tokenizer by name, built, run on its example inputs and counted without memory (meta device).

A new one is a file in `models/` (or `codecs/`) and one line in `MODELS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tubelet.codecs import image_kl, magvit2
from tubelet.core.errors import UserError
from tubelet.models import (
    c3d,
    clip,
    coca,
    dit,
    glide,
    maskgit,
    navit,
    spacetime,
    super_resolution,
    timesformer,
    unclip,
    unet,
    vdt,
    videopoet,
    vit,
    vivit,
    vtn,
    walt,
)


@dataclass(frozen=True)
class ModelEntry:
    """How to build one model: `build(config)`, and `example(config, batch)`, inputs for `forward` at the size that is counted.

    Both work under `torch.device("meta")`. `stated(config)` says that size in words; `tiny(config)` is a config of the same
    shape for tests.
    """

    config: Any
    build: Callable[[Any], nn.Module]
    example: Callable[..., tuple[Any, ...]]
    tiny: Callable[[Any], Any]
    stated: Callable[[Any], str]


def _room(prefix: str, room: Any, build: Callable[[Any], nn.Module]) -> dict[str, ModelEntry]:
    """An entry for each size of a room."""
    return {
        prefix + size: ModelEntry(config, build, room.example, room.tiny, room.stated) for size, config in room.SIZES.items()
    }


MODELS: Mapping[str, ModelEntry] = {
    **_room("Spacetime-", spacetime, spacetime.Spacetime),
    **_room("ViT-", vit, vit.ViT),
    **_room("C3D-", c3d, c3d.C3D),
    **_room("TimeSformer-", timesformer, timesformer.TimeSformer),
    **_room("VTN-", vtn, vtn.VTN),
    **_room("ViViT-", vivit, vivit.ViViT),
    **_room("NaViT-", navit, navit.NaViT),
    **_room("CLIP-", clip, clip.CLIP),
    **_room("", coca, coca.CoCa),
    **_room("DiT-", dit, dit.DiT),
    **_room("VDT-", vdt, vdt.VDT),
    **_room("", unet, unet.UNet),
    **_room("unCLIP-", unclip, unclip.build),
    **_room("unCLIP-", glide, glide.build),
    **_room("LDM-", image_kl, image_kl.ImageKL),
    **{
        name: ModelEntry(config, magvit2.MAGVIT2, magvit2.example, magvit2.tiny, magvit2.stated)
        for name, config in {"MAGVIT2": magvit2.SIZES["MAGVIT2"], "WALT-tokenizer": magvit2.SIZES["WALT"]}.items()
    },
    **_room("MAGVIT2-", maskgit, maskgit.MaskGIT),
    **_room("WALT-", walt, walt.WALT),
    **_room("VideoPoet-", videopoet, videopoet.VideoPoet),
    **_room("VideoPoet-", super_resolution, super_resolution.SuperResolution),
}


def find(name: str) -> ModelEntry:
    """The entry of that name, in any case. Raises UserError when there is none."""
    entry = {known.lower(): entry for known, entry in MODELS.items()}.get(name.lower())
    if entry is None:
        raise UserError(f"there is no model {name!r}; choose one of {', '.join(MODELS)}")
    return entry


def count(name: str) -> dict[str, int]:
    """Parameters, and multiply-accumulates of one forward at batch 1 on the entry's stated input, of a model by name.

    Counted from the built module on the meta device, so that no figure is written by hand: matrix products and attention;
    element-wise work is not counted. Raises UserError on an unknown name.
    """
    entry = find(name)
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = entry.build(entry.config)
        model(*entry.example(entry.config, 1))
    return {"parameters": sum(p.numel() for p in model.parameters()), "macs": counter.get_total_flops() // 2}
