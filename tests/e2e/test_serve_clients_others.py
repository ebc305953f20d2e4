"""Older and newer versions of the official client and LiteLLM, unmodified, against a real server on a real socket.

`python -m tests.clients` fetches them; where one is absent its test is skipped. Each runs in a Python of its own, which sees
that folder and the standard library and nothing else.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path += [str(Path(__file__).parents[1] / "unit" / "serve"), str(Path(__file__).parents[2])]

from api_rig import Rig, png, serving
from tests.clients import FOLDER, LITELLM, PYTHON, absent

KINDS = ("sync", "async")


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with serving(tmp_path_factory.mktemp("server"), live=True) as rig:
        yield rig


def session(script: str, client: str | None, rig: Rig, kind: str, folder: Path) -> dict[str, Any]:
    """What a session says that it did with a client, the installed one or one of those in folders."""
    (folder / "picture.png").write_bytes(png())
    words = ["-W", "ignore", str(Path(__file__).with_name(script)), str(rig.client.base_url.join("/v1")), "picture.png", kind]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    if client is not None:
        if not (FOLDER / client).exists():
            pytest.skip(absent(client))
        # Without `site` there is no site-packages: what the client lacks is not lent to it by our environment.
        words = ["-S", *words]
        # LiteLLM would fetch its list of prices.
        environment |= {"PYTHONPATH": str(FOLDER / client), "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    words = [sys.executable, *words]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert len(set(told["deleted"])) == 3
    for id in told["deleted"]:
        assert rig.client.get(f"/v1/videos/{id}").status_code == 404, "the client believes that it is gone"
    return told


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version", [*PYTHON, "here"])
def test_other_versions_of_the_client(rig: Rig, version: str, kind: str, tmp_path: Path) -> None:
    client = None if version == "here" else f"openai-{version}"
    told = session("session_openai.py", client, rig, kind, tmp_path)
    assert told["version"] == version or version in ("here", "newest")


@pytest.mark.parametrize("kind", KINDS)
def test_litellm(rig: Rig, kind: str, tmp_path: Path) -> None:
    session("session_litellm.py", LITELLM, rig, kind, tmp_path)
