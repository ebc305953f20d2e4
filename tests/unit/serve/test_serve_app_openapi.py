"""The description of the API is the one on file, says what is asked and answered, and covers what clients call."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from api_rig import config_of
from fastapi import FastAPI

from tubelet.serve.app import create_app
from tubelet.serve.openapi import page

FROZEN = Path(__file__).parents[3] / "docs" / "openapi.json"
WIRE = """
POST /v1/videos
GET /v1/videos
GET /v1/videos/{video_id}
DELETE /v1/videos/{video_id}
GET /v1/videos/{video_id}/content
POST /v1/videos/{video_id}/remix
POST /v1/videos/edits
POST /v1/videos/extensions
POST /v1/videos/characters
GET /v1/videos/characters/{character_id}
POST /v1/images/generations
POST /v1/images/edits
POST /v1/images/variations
POST /v1/files
GET /v1/files
GET /v1/files/{file_id}
GET /v1/files/{file_id}/content
DELETE /v1/files/{file_id}
GET /v1/models
GET /v1/models/{model}
POST /v1/content_provenance_checks
POST /v1/webhook_endpoints
GET /v1/webhook_endpoints
GET /v1/webhook_endpoints/{webhook_endpoint_id}
POST /v1/webhook_endpoints/{webhook_endpoint_id}
DELETE /v1/webhook_endpoints/{webhook_endpoint_id}
POST /v1/webhook_endpoints/{webhook_endpoint_id}/rotate_secret
POST /v1/webhook_endpoints/{webhook_endpoint_id}/test
GET /v1/webhook_event_types
""".strip().splitlines()


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> FastAPI:
    nothing: Any = None  # the description needs neither jobs nor files
    return create_app(nothing, nothing, config_of(tmp_path_factory.mktemp("api")))


@pytest.fixture(scope="module")
def spec(app: FastAPI) -> dict[str, Any]:
    return app.openapi()


def test_the_description_is_the_one_on_file(app: FastAPI) -> None:
    now, frozen = page(app), FROZEN.read_text(encoding="utf-8")
    assert frozen == now, "the wire has changed; if that is meant: python -m tubelet.serve.openapi docs/openapi.json"


def test_everything_that_clients_call_is_there(spec: dict[str, Any]) -> None:
    described = {f"{method.upper()} {path}" for path, operations in spec["paths"].items() for method in operations}
    assert set(WIRE) <= described


def test_each_operation_is_described(spec: dict[str, Any]) -> None:
    names = set()
    for path, operations in spec["paths"].items():
        for method, operation in operations.items():
            assert operation["description"], (method, path)
            assert operation["responses"]["default"]["content"]["application/json"]["schema"]["$ref"].endswith("/Error")
            assert "422" not in operation["responses"]
            names.add(operation["operationId"])
    assert len(names) == sum(len(operations) for operations in spec["paths"].values())
    text = json.dumps(spec)
    for name in re.findall(r"#/components/schemas/(\w+)", text):
        assert name in spec["components"]["schemas"], name
    body = spec["paths"]["/v1/videos"]["post"]["requestBody"]["content"]
    assert set(body) == {"application/json", "multipart/form-data"}
    fields = spec["components"]["schemas"]["VideoCreate"]["properties"]
    assert {"prompt", "model", "seconds", "size", "input_reference", "seed", "mode"} <= set(fields)
    assert any(choice.get("format") == "binary" for choice in fields["input_reference"]["anyOf"])
    assert spec["components"]["schemas"]["VideoCreate"]["required"] == ["prompt"]
