"""Each field of a request for films or pictures does something in each task that takes it, or is refused, or says why not.

A field is looked for twice: in the request that is stored for a worker, and in what a worker makes of that.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from api_rig import TINY, Rig, clip, png, serving
from PIL import Image

from tubelet.generate.system import System
from tubelet.serve.records import Asset, Claim
from tubelet.serve.render import render
from tubelet.serve.schemas import (
    Asked,
    ImageCreate,
    ImageEdit,
    ImageVariation,
    Shot,
    VideoCreate,
    VideoEdit,
    VideoExtend,
    VideoRemix,
)
from tubelet.text.expand import Expansion


@dataclass(frozen=True)
class Task:
    """A way to ask: where, and with which fields beside words and seed. `<clip>` stands for the id of the file of that name."""

    path: str
    model: type[Asked]
    base: dict[str, Any] = field(default_factory=dict)

    def other(self, name: str) -> Any:
        """Another value of a field than its default or the base's; None where it has none."""
        value = OTHERWISE.get(name)
        if name not in self.base or self.base[name] != value:
            return value
        return {"mode": "connect", "loop": False, "stream": False}.get(name)


FIRST, SECOND, PICTURE, MASK = {"file_id": "<clip>"}, {"file_id": "<other clip>"}, {"file_id": "<a>"}, {"image_url": "<mask>"}
SHOTS = [{"prompt": "a red ball", "seconds": 0.5}, {"prompt": "a blue box", "seconds": 0.5}]
TASKS = {
    "words": Task("/v1/videos", VideoCreate),
    "picture": Task("/v1/videos", VideoCreate, {"input_reference": PICTURE}),
    "shots": Task("/v1/videos", VideoCreate, {"shots": SHOTS}),
    "loop": Task("/v1/videos", VideoCreate, {"loop": True}),
    "connect": Task("/v1/videos", VideoCreate, {"mode": "connect", "video": FIRST, "second_video": SECOND}),
    "blend": Task("/v1/videos", VideoCreate, {"mode": "blend", "video": FIRST, "second_video": SECOND}),
    "remix": Task("/v1/videos/<film>/remix", VideoRemix),
    "edit": Task("/v1/videos/edits", VideoEdit, {"video": FIRST}),
    "extend": Task("/v1/videos/extensions", VideoExtend, {"video": FIRST}),
    "loop of a film": Task("/v1/videos/extensions", VideoExtend, {"video": FIRST, "loop": True}),
    "image": Task("/v1/images/generations", ImageCreate),
    "image, streamed": Task("/v1/images/generations", ImageCreate, {"stream": True}),
    "image edit": Task("/v1/images/edits", ImageEdit, {"image": PICTURE}),
    "image edit, masked": Task("/v1/images/edits", ImageEdit, {"image": PICTURE, "mask": MASK}),
    "variation": Task("/v1/images/variations", ImageVariation, {"image": PICTURE}),
}
OTHERWISE: dict[str, Any] = {
    "prompt": "a blue ring rises",
    "model": "other",
    "seed": 8,
    "steps": 3,
    "guidance": 5.0,
    "expand": False,
    "text": "A green ring lies there.",
    "user": "somebody",
    "seconds": 0.5,
    "size": "64x64",
    "frames": 5,
    "loop": True,
    "input_reference": {"file_id": "<b>"},
    "last_reference": {"file_id": "<b>"},
    "video": SECOND,
    "second_video": FIRST,
    "mode": "blend",
    "strength": 0.9,
    "characters": [{"id": "<character>"}],
    "shots": SHOTS[:1],
    "n": 2,
    "output_format": "webp",
    "response_format": "b64_json",
    "background": "opaque",
    "output_compression": 50,
    "quality": "low",
    "safety_identifier": "somebody",
    "stream": True,
    "partial_images": 2,
    "moderation": "low",
    "style": "vivid",
    "image": {"file_id": "<b>"},
    "mask": MASK,
    "input_fidelity": "high",
}
"""A new field needs a line here."""
SHOT_OTHERWISE = {"prompt": "another thing", "seconds": 1.5, "cut": True}
UNUSED = "Accepted and not used."
"""The description of a field that is there for clients that send it."""
ONE_WAY = "There is one way; clients name it."
LEAVES_NO_TRACE = {
    ("*", "response_format"): ONE_WAY,
    ("*", "background"): ONE_WAY,
    ("image, streamed", "partial_images"): "Looks come as they are made: test_the_official_client_sees_a_picture_become.",
}
"""(task, field), * for any task, and why the stored request is the same with it."""
CHANGES_NOTHING = {
    ("*", "characters"): "No system can use them, and the film says so: test_characters_are_said_to_be_unused.",
    ("shots", "prompt"): "It names the film; each shot has words of its own.",
}
"""(task, field), * for any task, and why the same is made with it, though it is stored."""


class Rules:
    """Rewrites each prompt."""

    def expand(self, prompt: str) -> Expansion:
        return Expansion(prompt, f"{prompt} on a pale floor", "rules")


@dataclass(frozen=True)
class Told:
    """An answer: its status and type, the param of a refusal, and the request that was stored."""

    status: int
    media: str
    param: str | None
    request: dict[str, Any]


Tell = Callable[..., Told]
Make = Callable[[dict[str, Any]], tuple[Any, ...]]


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """A server with two systems, and a worker whose films can be read."""
    systems = {"tiny": TINY, "other": replace(TINY, name="other")}
    with serving(tmp_path_factory.mktemp("server"), working=False, systems=systems) as rig:
        plain, film = rig.worker.files, clip()

        def files(claim: Claim) -> list[Asset]:
            image = claim.job.request["task"] == "image"
            return plain(claim) if image else [rig.store.put(film, "video", "video/mp4")]

        rig.worker.files = files  # type: ignore[method-assign]
        rig.worker.start()
        yield rig


def turned(film: bytes) -> bytes:
    """A clip upside down."""
    import av

    out = io.BytesIO()
    with av.open(io.BytesIO(film)) as source, av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for frame in source.decode(video=0):
            picture = frame.to_ndarray(format="rgb24")[::-1].copy()
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return out.getvalue()


def half_a_mask() -> str:
    """The left half is to be made anew."""
    picture, out = Image.new("RGBA", (24, 16), (0, 0, 0, 255)), io.BytesIO()
    picture.paste((0, 0, 0, 0), (0, 0, 12, 16))
    picture.save(out, "PNG")
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"


@pytest.fixture(scope="module")
def ids(rig: Rig) -> dict[str, str]:
    """What stands for each word in angle brackets."""
    data = {"clip": clip(), "other clip": turned(clip()), "a": png(), "b": png((30, 30, 200))}
    sent = {name: rig.client.post("/v1/files", files={"file": (name, content)}) for name, content in data.items()}
    found = {name: answer.json()["id"] for name, answer in sent.items()}
    mia = rig.client.post("/v1/videos/characters", json={"name": "Mia", "video": {"file_id": found["clip"]}}).json()
    return found | {"character": mia["id"], "film": rig.film()["id"], "mask": half_a_mask()}


@pytest.fixture(scope="module")
def tell(rig: Rig, ids: dict[str, str]) -> Tell:
    """`tell(task, **fields)`: what comes of a request with these fields beside the task's; asked once."""

    @cache
    def asked(name: str, more: str) -> Told:
        task = TASKS[name]
        words = {"prompt": "a red ball falls"} if "prompt" in task.model.model_fields else {}
        text = json.dumps([task.path, {**words, "seed": 7, **task.base, **json.loads(more)}])
        for word, id in ids.items():
            text = text.replace(f"<{word}>", id)
        path, body = json.loads(text)
        answer = rig.client.post(path, json=body)
        media = answer.headers["content-type"]
        if answer.status_code != 200:
            return Told(answer.status_code, media, answer.json()["error"]["param"], {})
        (newest,) = rig.jobs.page(None, kind="image" if "images" in path else "video", limit=1).jobs
        return Told(200, media, None, newest.request)

    return lambda task, **fields: asked(task, json.dumps(fields))


@pytest.fixture(scope="module")
def make(rig: Rig, system: System, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """`make(request)`: what a worker makes of it: facts, and last the films' pixels; made once."""
    folder = tmp_path_factory.mktemp("inputs")

    @cache
    def made(text: str) -> tuple[Any, ...]:
        request = json.loads(text)
        inputs = {item["asset"]: rig.store.fetch(item["asset"], folder) for item in request["inputs"]}
        rendered = render(system, request, inputs, None, lambda *_: None, lambda _: None, expander=Rules())
        stands = [None if path is None else Path(path).name for path in (rendered.before, rendered.after)]
        films = [one.video.pixels[:, :, rendered.fresh] for one in rendered.clips]
        around = None if rendered.around is None else [path.name for path in rendered.around]
        return request["system"], rendered.format, rendered.canvas, rendered.result["frames"], stands, around, films

    return lambda request: made(json.dumps(request, sort_keys=True))


def same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Whether the same was made."""
    (*facts, films), (*others, pictures) = one, other
    return facts == others and len(films) == len(pictures) and all(map(torch.equal, films, pictures))


def excuse(table: dict[tuple[str, str], str], task: str, name: str) -> str | None:
    return table.get((task, name)) or table.get(("*", name))


CASES = [
    (task, name)
    for task, way in TASKS.items()
    for name in way.model.model_fields
    if name not in way.base or way.other(name) is not None
]
"""Each field of each task, but for those without which it would be no such task."""


@pytest.mark.parametrize(("task", "name"), CASES)
def test_each_field_leaves_its_trace_or_is_refused(tell: Tell, task: str, name: str) -> None:
    plain, more = tell(task), tell(task, **{name: TASKS[task].other(name)})
    assert plain.status == 200, f"the task itself is refused for {plain.param}"
    if more.status != 200:
        assert more.status == 400
        assert more.param == name or more.param in TASKS[task].base
        assert (task, name) not in LEAVES_NO_TRACE, "it is refused by now: no exception any more"
        return
    unused = TASKS[task].model.model_fields[name].description == UNUSED
    reason = UNUSED if unused else excuse(LEAVES_NO_TRACE, task, name)
    traceless = (plain.media, plain.request) == (more.media, more.request)
    assert traceless == (reason is not None), reason or f"{name} is taken and dropped"


@pytest.mark.parametrize(("task", "name"), CASES)
def test_each_stored_field_changes_what_is_made(tell: Tell, make: Make, task: str, name: str) -> None:
    plain, more = tell(task), tell(task, **{name: TASKS[task].other(name)})
    if more.status != 200 or more.request == plain.request:  # the test above says whether it may be so
        assert (task, name) not in CHANGES_NOTHING, "it is not even stored: no exception any more"
        return
    reason = excuse(CHANGES_NOTHING, task, name)
    assert same(make(plain.request), make(more.request)) == (reason is not None), reason or f"{name} is stored and not read"


@pytest.mark.parametrize("name", Shot.model_fields)
def test_each_field_of_a_shot_is_stored_and_changes_the_film(tell: Tell, make: Make, name: str) -> None:
    plain, more = tell("shots"), tell("shots", shots=[SHOTS[0], {**SHOTS[1], name: SHOT_OTHERWISE[name]}])
    assert more.request["shots"][1][name] == SHOT_OTHERWISE[name] != plain.request["shots"][1][name]
    assert not same(make(plain.request), make(more.request))


def test_each_exception_is_of_a_field_that_is_there() -> None:
    for task, name in (*LEAVES_NO_TRACE, *CHANGES_NOTHING):
        assert any(name in way.model.model_fields for key, way in TASKS.items() if task in ("*", key)), (task, name)
