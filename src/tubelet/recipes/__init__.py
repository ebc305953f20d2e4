"""Recipes: a run is a typed Python function that returns its whole configuration; `tubelet train NAME` runs it.

Adding a recipe is a file and a line of RECIPES. Settings may be overridden one by one (`--set denoise.steps=100`); an unknown
key is an error.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tubelet.core.errors import UserError

RECIPES: dict[str, str] = {
    "smoke": "tubelet.recipes.smoke",
    "worlds-64": "tubelet.recipes.worlds_64",
}
"""Name -> module with `recipe() -> config`, whose config has `.run(folder)`. Imported when asked for."""


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Any:
    """A recipe's configuration. Raises UserError on an unknown recipe or setting."""
    from tubelet.core.config import from_dict, to_dict

    if name not in RECIPES:
        raise UserError(f"there is no recipe {name!r}; there are {', '.join(RECIPES)}")
    config = importlib.import_module(RECIPES[name]).recipe()
    values = to_dict(config)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"--set takes key=value, got {override!r}; for example --set denoise.steps=100")
        place: Any = values
        *path, last = key.split(".")
        for part in path:
            place = place.get(part) if isinstance(place, dict) else None
        if not isinstance(place, dict) or last not in place:
            raise UserError(f"recipe {name} has no setting {key!r}; its settings are {', '.join(values)}")
        try:
            place[last] = json.loads(text)
        except json.JSONDecodeError:
            place[last] = text
    return from_dict(type(config), values)


def run(name: str, folder: Path, overrides: Sequence[str] = ()) -> None:
    """Run a recipe in a folder, or go on where it stopped."""
    load_recipe(name, overrides).run(folder)
