"""Pictures changed, varied, and shown while they become."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from api_rig import Rig, png, serving, until
from PIL import Image


def address(picture: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture).decode()}"


DATA = address(png())


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with serving(tmp_path_factory.mktemp("server")) as rig:
        yield rig


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Rig]:
    with serving(tmp_path, live=True) as rig:
        yield rig


def mask(size: tuple[int, int] = (24, 16)) -> bytes:
    """The left half is to be made anew."""
    picture = Image.new("RGBA", size, (0, 0, 0, 255))
    picture.paste((0, 0, 0, 0), (0, 0, size[0] // 2, size[1]))
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


def newest(rig: Rig) -> dict[str, Any]:
    """The request of the newest picture."""
    return rig.jobs.page(None, kind="image").jobs[0].request


def stored(rig: Rig, request: dict[str, Any], role: str) -> Image.Image:
    (entry,) = [entry for entry in request["inputs"] if entry["role"] == role]
    path = rig.store.path(entry["asset"])
    assert path is not None
    return Image.open(path)


def test_a_picture_is_changed_where_the_mask_is_transparent(rig: Rig) -> None:
    files = {"image": ("a.png", png()), "mask": ("m.png", mask()), "prompt": (None, "a blue ball"), "n": (None, "2")}
    answer = rig.client.post("/v1/images/edits", files=files)
    assert answer.status_code == 200, answer.text
    said = answer.json()
    assert [base64.b64decode(image["b64_json"])[:9] for image in said["data"]] == [b"picture 0", b"picture 1"]
    assert said["size"] == "24x16", "as large as the picture"
    request = newest(rig)
    assert (request["task"], request["prompt"], request["n"], request["size"]) == ("image", "a blue ball", 2, [16, 24])
    kept = stored(rig, request, "mask").convert("L")
    assert kept.size == (24, 16)
    assert [kept.getpixel((x, 8)) for x in (0, 11, 12, 23)] == [0, 0, 255, 255], "white stays"
    assert stored(rig, request, "reference").size == (24, 16)


def test_a_picture_is_changed_all_over(rig: Rig) -> None:
    fields = {"image": [{"image_url": DATA}], "prompt": "snow", "strength": 0.3, "size": "64x32", "seed": 7}
    answer = rig.client.post("/v1/images/edits", json=fields)
    assert answer.status_code == 200, answer.text
    assert (answer.json()["size"], answer.json()["seed"]) == ("64x32", 7)
    request = newest(rig)
    assert (request["strength"], request["size"], request["seed"]) == (0.3, [32, 64], 7)
    assert [entry["role"] for entry in request["inputs"]] == ["reference"]


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"mask": {"image_url": DATA}}, "mask", "no_transparency"),
        ({"mask": {"image_url": address(mask((16, 16)))}}, "mask", "invalid_value"),
        ({"mask": {"file_id": f"file_{'0' * 26}"}}, "mask", "invalid_value"),
        ({"mask": {"image_url": DATA}, "strength": 0.5}, "strength", "invalid_value"),
        ({"strength": 0}, "strength", "invalid_value"),
        ({"image": {"image_url": address(png(size=(4000, 2000)))}}, "size", "invalid_value"),
        ({"image": {"image_url": "data:image/png;base64,YmFk"}}, "image", "unsupported_media"),
    ],
)
def test_edits_that_cannot_be(rig: Rig, fields: dict[str, Any], param: str, code: str) -> None:
    answer = rig.client.post("/v1/images/edits", json={"image": {"image_url": DATA}, "prompt": "p", **fields})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, code), answer.text
    assert answer.json()["error"]["param"] == param


def test_variations_have_no_words(rig: Rig) -> None:
    answer = rig.client.post("/v1/images/variations", files={"image": ("a.png", png()), "n": (None, "3")})
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["data"]) == 3
    request = newest(rig)
    assert (request["prompt"], request["expand"], request["n"]) == ("", False, 3)


def events(text: str) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for block in text.split("\n\n"):
        if block and not block.startswith(":"):
            kind, data = block.split("\n")
            found.append((kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def test_a_stream_ends_with_the_picture(rig: Rig) -> None:
    answer = rig.client.post("/v1/images/generations", json={"prompt": "a ball", "stream": True, "output_format": "webp"})
    assert answer.headers["content-type"].startswith("text/event-stream")
    ((kind, said),) = events(answer.text)
    assert kind == said["type"] == "image_generation.completed"
    assert base64.b64decode(said["b64_json"]).startswith(b"picture 0")
    assert (said["output_format"], said["size"], said["background"]) == ("webp", "64x32", "opaque")


def test_a_stream_says_what_went_wrong(rig: Rig) -> None:
    answer = rig.client.post("/v1/images/generations", json={"prompt": "fail out_of_memory", "stream": True})
    ((kind, said),) = events(answer.text)
    assert (kind, said["error"]["code"]) == ("error", "out_of_memory")


def test_what_the_system_refuses_is_the_wishs_fault(rig: Rig) -> None:
    answer = rig.client.post("/v1/images/generations", json={"prompt": "fail invalid_request"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request")


def test_the_official_client_sees_a_picture_become(live: Rig) -> None:
    live.worker.held.set()
    url = str(live.client.base_url.join("/v1"))
    with openai.OpenAI(api_key="sk-x", base_url=url) as client:
        stream = client.images.generate(prompt="a ball", model="sora-2", stream=True, partial_images=2)
        first = next(stream)
        assert first.type == "image_generation.partial_image"
        assert (first.partial_image_index, first.output_format) == (0, "jpeg")
        assert base64.b64decode(first.b64_json).startswith(b"preview")
        live.worker.held.clear()
        (last,) = list(stream)
        assert last.type == "image_generation.completed"
        assert base64.b64decode(last.b64_json).startswith(b"picture 0")
        edited = client.images.edit(image=("a.png", png()), mask=("m.png", mask()), prompt="p", stream=True, model="sora-2")
        assert [event.type for event in edited] == ["image_edit.completed"]
        whole = client.images.edit(image=[("a.png", png())], prompt="p", model="sora-2")
        assert whole.data is not None
        assert whole.data[0].b64_json
        varied = client.images.create_variation(image=("a.png", png()), n=2, size="512x512")
        assert len(varied.data or []) == 2
        failing = client.images.generate(prompt="fail render_failed", stream=True, model="sora-2")
        with pytest.raises(openai.APIError) as caught:
            list(failing)
        assert caught.value.code == "render_failed"


def test_a_client_that_leaves_a_stream_takes_its_job_along(live: Rig) -> None:
    live.worker.held.set()
    wish = {"prompt": "a ball", "stream": True, "partial_images": 1}
    with live.client.stream("POST", "/v1/images/generations", json=wish) as answer:
        assert next(answer.iter_lines()) == "event: image_generation.partial_image"
    until(lambda: live.jobs.page(None, kind="image").jobs[0].error, lambda error: (error or {}).get("code") == "cancelled")
