"""Documents beside the jobs, and the files that either name, on SQLite and on a real PostgreSQL."""

from __future__ import annotations

from jobs_rig import Clock, claimed, new

from tubelet.serve.jobs import Jobs
from tubelet.serve.records import Asset


def test_documents_belong_to_their_owners(store: Jobs, clock: Clock) -> None:
    store.put("file", "f2", "anna", {"id": "f2", "name": "ü"})
    clock.now += 1
    store.put("file", "f1", "anna", {"id": "f1"})
    store.put("file", "f3", "berta", {"id": "f3"})
    store.put("key", "f1", "anna", {"other": 1})
    clock.now += 1
    store.put("file", "f2", "anna", {"id": "f2", "name": "new"})
    assert store.find("file", "f2", "anna") == store.find("file", "f2", None) == {"id": "f2", "name": "new"}
    assert store.find("file", "f2", "berta") is None
    assert store.find("character", "f2", None) is None
    assert [document["id"] for document in store.all("file", "anna")] == ["f2", "f1"]
    assert len(store.all("file", None)) == 3
    assert not store.drop("file", "f2", "berta")
    assert store.drop("file", "f2", "anna")
    assert not store.drop("file", "f2", "anna")
    assert store.find("key", "f1", "anna") == {"other": 1}


def test_every_asset_that_a_row_names_is_referenced(store: Jobs) -> None:
    names = [character * 64 for character in "123456"]
    store.create({"inputs": [{"role": "video", "asset": names[0]}], "characters": [{"asset": names[1]}]})
    store.heartbeat(claimed(store), preview=Asset(names[2], "preview", "image/webp", 1))
    done = new(store)
    store.finish(claimed(store, "two"), [Asset(names[3], "video", "video/mp4", 1)], {})
    store.put("file", "f", "local", {"asset": names[4], "credentials": names[5]})
    assert store.referenced() == set(names)
    said = f'"asset":"{"a" * 64}", "id": "{"b" * 64}"'
    store.create({"prompt": said, "shots": [{"prompt": "c" * 64}]}, owner="guess")
    store.put("character", "c", "guess", {"name": f"{said} {'d' * 64}"})
    assert store.referenced("guess") == set(), "words name nothing"
    assert store.referenced() == set(names)
    picture, _ = store.create({"inputs": [{"asset": "e" * 64}]}, owner="guess", kind="image")
    assert (store.referenced("guess"), store.referenced("guess", pictures=False)) == ({"e" * 64}, set())
    store.delete(picture.id, None)
    store.delete(done.id, None)
    store.drop("file", "f", None)
    assert store.referenced() == set(names[:3])
