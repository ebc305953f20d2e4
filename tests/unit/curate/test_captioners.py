"""What captioners see, what they say, and that a folder is loaded as it was saved."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tubelet.core.errors import UserError
from tubelet.core.files import read_json, write_json
from tubelet.curate.captioners import (
    INSTRUCTIONS,
    Captioner,
    ChatCaptioner,
    View,
    data_url,
    fitted,
    load_captioner,
    read,
    save_captioner,
    write,
)
from tubelet.media.encode import save
from tubelet.models.coca import CoCa, CoCaConfig
from tubelet.text.bpe import train
from tubelet.text.expand import ChatModel
from tubelet.text.writing import STYLES, Writing

COCA = View(9, 4.0, 64)


def numbered(count: int, height: int = 16, width: int = 24) -> np.ndarray:
    """Frame k is grey of value 8 * k + 8."""
    return np.broadcast_to((8 * np.arange(count) + 8).astype(np.uint8)[:, None, None, None], (count, height, width, 3)).copy()


def numbers(frames: np.ndarray) -> list[int]:
    middle = frames[:, frames.shape[1] // 2, frames.shape[2] // 2].mean(-1)
    return [round((float(value) - 8) / 8) for value in middle]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A captioner of random weights that sees 3 frames a second of 16 x 16 pixels, at most 3."""
    torch.manual_seed(0)
    writing = Writing(train(["a red ball falls", "a blue square slides"] * 4, 280), limit=12)
    model = CoCa(CoCaConfig(32, 2, 1, 32, 1, 32, image=16, patch=8, vocab=writing.size, queries=4, frames=3))
    out = tmp_path_factory.mktemp("captioner")
    save_captioner(out, model, writing, frames=3, fps=3.0)
    return out


@pytest.mark.parametrize(
    ("count", "fps", "view", "places"),
    [
        (17, 8.0, COCA, [0, 2, 4, 6, 8, 10, 12, 14, 16]),
        (9, 4.0, COCA, list(range(9))),
        (5, 8.0, COCA, [0, 2, 4]),
        (4, 2.0, COCA, [0, 0, 1, 1, 2, 2, 3, 3]),
        (1, 8.0, COCA, [0]),
        (90, 8.0, COCA, [5, 15, 25, 35, 45, 55, 65, 75, 85]),
        (18, None, COCA, [1, 3, 5, 7, 9, 11, 13, 15, 17]),
        (3, None, COCA, [0, 1, 2]),
        (17, 8.0, View(4), [2, 6, 10, 14]),
        (2, 8.0, View(4), [0, 1]),
    ],
)
def test_which_frames_are_seen(count: int, fps: float | None, view: View, places: list[int]) -> None:
    assert view.places(count, fps) == places
    assert numbers(fitted(numbered(min(count, 30)), fps, view)) == places or count > 30


def test_pictures_are_padded_to_a_square_or_made_smaller() -> None:
    wide = np.full((1, 20, 40, 3), 200, np.uint8)
    square = fitted(wide, 1.0, View(1, None, 32))
    assert square.shape == (1, 32, 32, 3)
    assert np.array_equal(np.flatnonzero(square[0, :, 16, 0]), np.arange(8, 24)), "nothing is cut off"
    assert View(1).size(480, 640) == (384, 512)
    assert View(1).size(48, 64) == (48, 64)
    assert fitted(np.zeros((2, 600, 1024, 3), np.uint8), None, View(1)).shape == (1, 300, 512, 3)
    assert fitted(wide, 1.0, View(1)).shape == wide.shape
    for wrong in ({"frames": 0}, {"frames": 1, "fps": 0.0}, {"frames": 1, "side": 0}):
        with pytest.raises(UserError, match="at least 1 frame"):
            View(**wrong)


def test_a_film_is_seen_as_its_frames_would_be(tmp_path: Path) -> None:
    for count, fps in ((17, 8.0), (5, 8.0), (30, 5.0)):
        path = save(numbered(count, 32, 32), tmp_path / f"{count}.mp4", fps)
        clip, seconds = read(path, View(9, 4.0, 32))
        assert clip.shape[1:] == (32, 32, 3)
        assert seconds == pytest.approx(count / fps, abs=0.02)
        assert numbers(clip) == View(9, 4.0).places(count, fps)
    assert numbers(read(tmp_path / "17.mp4", View(4))[0]) == [2, 6, 10, 14]
    Image.fromarray(numbered(1)[0]).save(tmp_path / "still.png")
    clip, _ = read(tmp_path / "still.png", View(4))
    assert clip.shape == (1, 16, 24, 3)
    with pytest.raises(UserError, match="cannot read"):
        read(tmp_path / "no.mp4", COCA)


def test_a_folder_is_loaded_as_it_was_saved(folder: Path) -> None:
    captioner: Captioner = load_captioner(folder)
    assert captioner.view == View(3, 3.0, 16)
    assert captioner.source == captioner.identity["captioner"] == "coca"
    random = np.random.RandomState(0)
    clips = [random.randint(0, 256, (length, 16, 16, 3), np.uint8) for length in (3, 1, 3, 2)]
    texts = captioner.write(clips)
    assert [set(one) for one in texts] == [set(STYLES)] * 4
    assert captioner.write(clips) == texts
    loaded = load_captioner(folder)
    for clip, said in zip(clips, texts, strict=True):
        for style in STYLES:
            assert write(loaded.model, loaded.writing, clip[None], style) == [said[style]], "each is captioned as if alone"
    assert captioner.write(clips, ("dense",)) == [{"dense": one["dense"]} for one in texts]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "captioner.json").unlink(), "holds no captioner .*; tubelet train captioner makes one"),
        (lambda f: (f / "captioner.json").write_text("{"), "not valid JSON"),
        (lambda f: write_json(f / "captioner.json", []), "is not a tubelet-captioner-1 captioner"),
        (lambda f: write_json(f / "captioner.json", {"format": "tubelet-captioner-0"}), "is not a tubelet-captioner-1"),
        (lambda f: (f / "captioner.safetensors").unlink(), "missing or is not the one"),
        (lambda f: (f / "captioner.safetensors").write_bytes(b"other"), "missing or is not the one"),
        (lambda f: (f / "tokenizer.json").unlink(), "missing or is not the one"),
        (lambda f: train(["abcabd"] * 99, 400).save(f / "tokenizer.json"), "missing or is not the one"),
        (lambda f: _change(f, "speed", 3), r"captioner.json: CaptionerConfig has no setting 'speed'"),
        (lambda f: _change(f, "fps", -1.0), "at a rate above 0"),
    ],
)
def test_a_damaged_folder_is_one_sentence(folder: Path, tmp_path: Path, damage: Any, says: str) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    damage(tmp_path)
    with pytest.raises(UserError, match=says) as caught:
        load_captioner(tmp_path)
    assert "\n" not in str(caught.value)


def _change(folder: Path, name: str, value: Any) -> None:
    write_json(folder / "captioner.json", {**read_json(folder / "captioner.json"), name: value})


class Endpoint:
    """A chat endpoint on this machine that answers with the number of its questions."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                said = {"choices": [{"message": {"content": f"Caption\n{len(outer.asked)}."}}]}
                answer = json.dumps(said).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def stop(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    made = Endpoint()
    yield made
    made.stop()


def test_a_chat_model_is_shown_a_few_frames(endpoint: Endpoint) -> None:
    captioner: Captioner = ChatCaptioner(ChatModel(endpoint.url, "eyes"))
    assert (captioner.source, captioner.view.frames) == ("eyes", 4)
    clip = numbered(17)
    texts = captioner.write([fitted(clip, 8.0, captioner.view)])
    assert texts == [{"short": "Caption 1.", "dense": "Caption 2."}]
    assert [question["messages"][0]["content"] for question in endpoint.asked] == list(INSTRUCTIONS.values())
    parts = endpoint.asked[0]["messages"][1]["content"]
    assert [part["type"] for part in parts] == ["text"] + ["image_url"] * 4
    shown = [part["image_url"]["url"] for part in parts[1:]]
    assert shown == [data_url(clip[place]) for place in (2, 6, 10, 14)]
    with Image.open(io.BytesIO(base64.b64decode(shown[0].removeprefix("data:image/png;base64,")))) as image:
        assert np.array_equal(np.asarray(image), clip[2]), "a PNG, pixel by pixel"


def test_a_chat_model_that_is_not_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    gone = Endpoint()
    gone.stop()
    with pytest.raises(UserError, match=r"cannot reach the chat endpoint .*; start it"):
        ChatCaptioner(ChatModel(gone.url, "eyes")).write([numbered(1)])
