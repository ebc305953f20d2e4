"""A toy captioner is trained, then asked about a film and about a data set, by the command line."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tubelet.cli import main
from tubelet.curate.captioners import View
from tubelet.data.schema import Record
from tubelet.data.shards import ShardDataset, ShardWriter
from tubelet.media.encode import save
from tubelet.recipes.worlds import Job, render_one

SMALL = (
    "clips=9", "n=2", "train.steps=1", "train.batch=2", "train.progress=false", "coca.width=32", "coca.heads=2",
    "coca.image_depth=1", "coca.image_hidden=32", "coca.text_depth=1", "coca.text_hidden=32", "coca.queries=4",
    "coca.patch=16", "coca.vocab=323",
)  # fmt: skip


@pytest.fixture(scope="module")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `tubelet train captioner` leaves."""
    folder = tmp_path_factory.mktemp("runs") / "captioner"
    with pytest.raises(SystemExit) as stop:
        main(["train", "captioner", "--out", str(folder), *[f"--set={setting}" for setting in SMALL]])
    assert stop.value.code == 0
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "clips"
    with ShardWriter(folder) as writer:
        for seed in range(5):
            job, video, _, captions = render_one(Job("phys2d", seed, (32, 48), 9, 8.0))
            writer.add(Record(job.key, {"video": torch.from_numpy(video)}, {"captions": captions, "fps": job.fps}))
    return folder


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """A chat endpoint on this machine, configured; yields what it was asked."""
    asked: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append((self.headers["Authorization"], json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            answer = json.dumps({"choices": [{"message": {"content": f"Caption {len(asked)}."}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setenv("TUBELET_CHAT_URL", f"http://127.0.0.1:{server.server_port}/v1")
        monkeypatch.setenv("TUBELET_CHAT_KEY", "secret")
        yield asked
        server.shutdown()
        thread.join()


def test_a_data_set_is_recaptioned(captioner: Path, clips: Path, tmp_path: Path, tubelet: Callable) -> None:
    words = ("curate", "recaption", clips, "--captioner", captioner, "--out", tmp_path / "new")
    said = tubelet(*words, "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out) == {"out": str(tmp_path / "new"), "source": "coca", "records": 5, "skipped": []}
    before = {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()}
    old, new = ShardDataset(clips), ShardDataset(tmp_path / "new")
    assert new.check() == []
    for number in range(5):
        captions = new.facts(number)["captions"]
        assert captions[:3] == old.facts(number)["captions"]
        assert [(one["kind"], one["source"]) for one in captions[3:]] == [("short", "coca"), ("dense", "coca")]
    said = tubelet(*words)
    assert said.out == f"{tmp_path / 'new'}  5 records with short and dense captions by coca\n"
    assert {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()} == before


def test_a_bad_record_ends_the_run_or_is_left_out(
    captioner: Path, clips: Path, tmp_path: Path, tubelet: Callable, refused: Callable
) -> None:
    for path in clips.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    entry = ShardDataset(tmp_path).entries[1]
    bad = bytearray((tmp_path / entry.shard).read_bytes())
    bad[entry.offset + entry.size - 1] ^= 1
    (tmp_path / entry.shard).write_bytes(bad)
    words = ("curate", "recaption", tmp_path, "--captioner", captioner, "--out")
    assert f"record '{entry.key}' in {tmp_path / entry.shard} does not match its hash" in refused(*words, tmp_path / "a")
    said = tubelet(*words, tmp_path / "b", "--bad", "skip", "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out)["skipped"] == [entry.key]
    assert len(ShardDataset(tmp_path / "b")) == 4


def test_a_film_or_picture_is_captioned(captioner: Path, tmp_path: Path, tubelet: Callable) -> None:
    film = save(render_one(Job("phys2d", 3, (48, 80), 17, 8.0))[1], tmp_path / "a.mp4", 8.0)
    said = tubelet("caption", film, "--captioner", captioner, "--json")
    assert said.code == 0, said.err
    told = json.loads(said.out)
    assert set(told) == {"source", "frames", "seconds", "captions"}
    assert (told["source"], told["frames"], told["seconds"]) == ("coca", 9, pytest.approx(17 / 8, abs=0.01))
    assert list(told["captions"]) == ["short", "dense"]
    assert tubelet("caption", film, "--captioner", captioner).out.splitlines() == [
        line for text in told["captions"].values() for line in text.splitlines() or [""]
    ]
    Image.new("RGB", (30, 20), "red").save(tmp_path / "still.png")
    assert json.loads(tubelet("caption", tmp_path / "still.png", "--captioner", captioner, "--json").out)["frames"] == 1


def test_a_chat_model_captions_where_one_is_configured(
    clips: Path, tmp_path: Path, chat: list[Any], tubelet: Callable, monkeypatch: pytest.MonkeyPatch, refused: Callable
) -> None:
    film = save(render_one(Job("phys2d", 3, (32, 32), 5, 8.0))[1], tmp_path / "a.mp4", 8.0)
    assert tubelet("caption", film, "--captioner", "chat:eyes").out == "Caption 1.\nCaption 2.\n"
    key, question = chat[0]
    assert (key, question["model"]) == ("Bearer secret", "eyes")
    assert len(question["messages"][1]["content"]) == 1 + View(4).frames
    said = tubelet("curate", "recaption", clips, "--captioner", "chat:eyes", "--out", tmp_path / "new", "--source", "other")
    assert said.code == 0, said.err
    captions = ShardDataset(tmp_path / "new").facts(0)["captions"][3:]
    assert captions == [
        {"text": "Caption 3.", "kind": "short", "source": "other"},
        {"text": "Caption 4.", "kind": "dense", "source": "other"},
    ]
    monkeypatch.delenv("TUBELET_CHAT_URL")
    assert "chat:eyes needs an endpoint; set TUBELET_CHAT_URL" in refused("caption", film, "--captioner", "chat:eyes")
    assert len(chat) == 12


def test_wrong_inputs_are_one_sentence(captioner: Path, clips: Path, tmp_path: Path, refused: Callable) -> None:
    out = tmp_path / "out"
    recaption = ("curate", "recaption")
    for words, says in (
        (("curate",), "curate is followed by what to do; see tubelet curate import --help or tubelet curate recaption --help"),
        (("curate", "nothing"), "curate is followed by what to do"),
        (recaption, "SHARDS is missing; see tubelet curate recaption --help"),
        ((*recaption, clips, "--captioner", captioner), "--out is missing"),
        ((*recaption, clips, "--out", out), "--captioner is missing"),
        ((*recaption, tmp_path / "no", "--captioner", captioner, "--out", out), "holds no finished data set"),
        ((*recaption, clips, "--captioner", tmp_path, "--out", out), "holds no captioner (captioner.json is missing)"),
        ((*recaption, clips, "--captioner", captioner, "--out", clips), "holds something else already"),
        ((*recaption, clips, "--captioner", captioner, "--out", "/proc/no"), "cannot write"),
        ((*recaption, clips, "--captioner", captioner, "--out", out, "--bad", "ugly"), "must be fail or skip, got 'ugly'"),
        ((*recaption, clips, "--captioner", captioner, "--out", out, "--source", ""), "need the name of their source"),
        ((*recaption, clips, "--captioner", captioner, "--out", out, "--source", "phys2d"), "give the new ones another source"),
        (("caption", tmp_path / "no.mp4", "--captioner", captioner), "cannot read"),
        (("caption", tmp_path, "--captioner", captioner), "is a folder, not a film"),
        (("caption", captioner / "tokenizer.json", "--captioner", captioner), "not a film"),
        (("caption", "--captioner", captioner), "FILE is missing"),
    ):
        assert says in refused(*words), words
    assert not out.exists()
