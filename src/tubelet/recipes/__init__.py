"""Recipes: a run is a typed Python function that returns its whole configuration; `tubelet train NAME` runs it.

Adding a recipe is a file and a line of RECIPES. Settings may be overridden one by one (`--set denoise.steps=100`); an unknown
key is an error, and so is one that the run sets itself (`GIVEN` of its class).
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tubelet.core.errors import UserError

RECIPES: dict[str, str] = {
    "autoencoders": "tubelet.recipes.autoencoders",
    "captioner": "tubelet.recipes.captioner",
    "cascade": "tubelet.recipes.cascade",
    "codec-table": "tubelet.recipes.codec_table",
    "ddpm": "tubelet.recipes.ddpm",
    "events": "tubelet.recipes.events",
    "language-tasks": "tubelet.recipes.language_tasks",
    "native-sizes": "tubelet.recipes.native_sizes",
    "navit-sizes": "tubelet.recipes.navit_sizes",
    "footage": "tubelet.recipes.footage",
    "recaptioning": "tubelet.recipes.recaptioning",
    "retrieval": "tubelet.recipes.retrieval",
    "scaling": "tubelet.recipes.scaling",
    "smoke": "tubelet.recipes.smoke",
    "sound": "tubelet.recipes.sound",
    "text-encoders": "tubelet.recipes.text_encoders",
    "token-models": "tubelet.recipes.token_models",
    "tokenizers": "tubelet.recipes.tokenizers",
    "unclip": "tubelet.recipes.unclip",
    "unet-or-dit": "tubelet.recipes.unet_or_dit",
    "vdt-conditioning": "tubelet.recipes.vdt_conditioning",
    "vdt-tasks": "tubelet.recipes.vdt_tasks",
    "walt-ablations": "tubelet.recipes.walt_ablations",
    "walt-long": "tubelet.recipes.walt_long",
    "worlds-64": "tubelet.recipes.worlds_64",
    "worlds-64-all": "tubelet.recipes.worlds_64_all",
    "worlds-64-decoder": "tubelet.recipes.worlds_64_decoder",
    "worlds-64-gpu": "tubelet.recipes.worlds_64_gpu",
    "worlds-64-large": "tubelet.recipes.worlds_64_large",
    "worlds-64-long": "tubelet.recipes.worlds_64_long",
    "worlds-64-sizes": "tubelet.recipes.worlds_64_sizes",
    "worlds-64-tasks": "tubelet.recipes.worlds_64_tasks",
}
"""Name -> module with `recipe() -> config`, whose config has `.run(folder)`. Imported when asked for."""


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Any:
    """A recipe's configuration; an override is `place.key=value`, the value JSON or a plain word.

    Raises UserError on an unknown recipe or setting, one that the run sets itself, and a value of the wrong kind or range.
    """
    from tubelet.core.config import from_dict, to_dict

    if name not in RECIPES:
        raise UserError(f"there is no recipe {name!r}; choose one of {', '.join(RECIPES)}")
    config = importlib.import_module(RECIPES[name]).recipe()
    values = to_dict(config)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"--set takes key=value, got {override!r}; for example --set denoise.steps=100")
        if key in getattr(config, "GIVEN", ()):
            raise UserError(f"{key} of recipe {name} follows from its other settings and its rows; leave it out")
        _place(name, values, key, text)
    return from_dict(type(config), values)


def _place(name: str, values: dict[str, Any], key: str, text: str) -> None:
    """Put one override where its key says."""
    place: Any = values
    parts = key.split(".")
    for depth, part in enumerate(parts):
        if not isinstance(place, dict):
            raise UserError(f"{'.'.join(parts[:depth])} of recipe {name} is a plain value; set it as a whole")
        if part not in place:
            where = " ".join(["recipe", name, ".".join(parts[:depth])]).strip()
            raise UserError(f"{where} has no setting {part!r}; choose one of {', '.join(place)}")
        if depth < len(parts) - 1:
            place = place[part]
    try:
        place[parts[-1]] = json.loads(text)
    except json.JSONDecodeError:
        place[parts[-1]] = text


def run(name: str, folder: Path, overrides: Sequence[str] = ()) -> bool:
    """Run a recipe in a folder, or go on where it stopped. False when it was stopped before its end.

    Raises UserError as `load_recipe`, when the folder holds another run or another process runs there, and when it cannot be
    written.
    """
    from tubelet.core.files import held

    recipe = load_recipe(name, overrides)
    with held(folder):
        return recipe.run(folder) != folder
