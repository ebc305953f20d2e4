"""The description of the API: FastAPI's own, with the bodies that the routes read by hand and the error object.

`python -m tubelet.serve.openapi docs/openapi.json` writes the page that the tests compare with.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, cast

from fastapi import APIRouter, FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from tubelet import __version__
from tubelet.serve import answers, schemas
from tubelet.serve.requests import Upload

_REF = "#/components/schemas/{model}"
_TITLE = "tubelet"
_UNASKED = (schemas.Asked, schemas.Making, schemas.Depicting, schemas.Described)
"""What bodies have in common; no operation takes it."""
_SAID = "Films from words, pictures and films, on the wire that Sora's clients speak."


def operations(kind: str) -> APIRouter:
    """A router for the operations on one kind of thing, each called by its function's name."""
    return APIRouter(tags=[kind], generate_unique_id_function=lambda route: route.name)


def takes(model: type[BaseModel]) -> dict[str, Any]:
    """For a route's `openapi_extra`: its body is `model`, as JSON or as a form; as a form only when it must hold a file."""
    schema = {"schema": {"$ref": _REF.format(model=model.__name__)}}
    file = any(field.annotation is Upload for field in model.model_fields.values())
    kinds = ("multipart/form-data",) if file else ("application/json", "multipart/form-data")
    return {"requestBody": {"required": True, "content": dict.fromkeys(kinds, schema)}}


def describe(app: FastAPI) -> dict[str, Any]:
    """The whole description, as JSON values in a fixed order."""
    spec = get_openapi(title=_TITLE, version=__version__, summary=_SAID, routes=app.routes)
    bodies = [
        kind
        for kind in vars(schemas).values()
        if isinstance(kind, type) and issubclass(kind, schemas.Asked) and kind not in _UNASKED
    ]
    _, asked = models_json_schema([(kind, "validation") for kind in [*bodies, answers.Error]], ref_template=_REF)
    components = spec.setdefault("components", {}).setdefault("schemas", {})
    components.update(asked.get("$defs", {}))
    for name in ("HTTPValidationError", "ValidationError"):
        components.pop(name, None)
    problem = {"description": "Error", "content": {"application/json": {"schema": {"$ref": _REF.format(model="Error")}}}}
    for path in spec["paths"].values():
        for operation in path.values():
            responses = operation.setdefault("responses", {})
            responses.pop("422", None)
            responses["default"] = problem
    spec["components"]["schemas"] = dict(sorted(components.items()))
    spec["components"]["securitySchemes"] = {
        "key": {"type": "http", "scheme": "bearer", "description": "Where keys are asked for."}
    }
    spec["security"] = [{}, {"key": []}]
    return spec


def page(app: FastAPI) -> str:
    """The description as it stands on file."""
    return json.dumps(app.openapi(), indent=1) + "\n"


def _write(path: Path) -> None:
    from tubelet.serve.app import create_app
    from tubelet.serve.config import ServeConfig, read_systems, shipped

    nothing = cast(Any, None)  # the description needs neither jobs nor files
    config = ServeConfig(data=Path(), systems=read_systems(shipped()))
    path.write_text(page(create_app(nothing, nothing, config)), encoding="utf-8")


if __name__ == "__main__":
    _write(Path(sys.argv[1]))
