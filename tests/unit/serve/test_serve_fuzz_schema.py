"""The server against its own description: requests drawn from it, and ones that break it, get the answers it declares."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
from api_rig import Rig, serving
from hypothesis import HealthCheck, given, settings
from hypothesis.stateful import run_state_machine_as_test
from schemathesis import GenerationMode

from tubelet.serve import animated
from tubelet.serve.outbound import Outbound

DESCRIPTION = Path(__file__).parents[3] / "docs" / "openapi.json"
SCHEMA = schemathesis.openapi.from_path(DESCRIPTION).exclude(operation_id="watch_videos")
"""All but the stream that does not end while the server runs."""
SCHEMA.config.checks.positive_data_acceptance.enabled = False  # no schema says which bytes are a picture
OPERATIONS: dict[str, Any] = {
    str(operation.definition.raw["operationId"]): operation for operation in (made.ok() for made in SCHEMA.get_all_operations())
}
BREAKABLE = [name for name, operation in OPERATIONS.items() if operation.body or operation.query]
"""Those that take more than an id."""
BOUNDED = settings(
    max_examples=12,
    stateful_step_count=8,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:

    async def made(room: object, job: object, film: Path, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"a picture of " + film.name.encode())

    with pytest.MonkeyPatch.context() as patch, serving(tmp_path_factory.mktemp("server"), live=True, cap=100_000) as rig:
        patch.setattr(animated, "_made", made)  # the fake worker's films are none
        rig.app.state.service.outbound = Outbound(resolver=lambda _host, _port: [])
        yield rig


def go_on(rig: Rig) -> None:
    """A paused queue would make no more pictures, and a worker that is not heard of counts as gone."""
    rig.jobs.pause(False)
    rig.jobs.hello("fake", {"device": "cpu", "system": "tiny"})


@pytest.mark.parametrize(
    ("name", "mode"),
    [(name, GenerationMode.POSITIVE) for name in OPERATIONS] + [(name, GenerationMode.NEGATIVE) for name in BREAKABLE],
)
def test_an_operation_answers_as_described(rig: Rig, name: str, mode: GenerationMode) -> None:
    with requests.Session() as session:

        @BOUNDED
        @given(case=OPERATIONS[name].as_strategy(generation_mode=mode))
        def holds(case: Any) -> None:
            case.call_and_validate(base_url=str(rig.client.base_url), session=session)
            go_on(rig)

        holds()


def test_films_answer_as_described_whatever_is_done_to_them(rig: Rig) -> None:
    """What one operation answers is what the next one is asked with."""
    seen: collections.Counter[str] = collections.Counter()
    with requests.Session() as session:

        class Machine(SCHEMA.include(tag="videos").as_state_machine()):  # type: ignore[misc]
            def before_call(self, case: Any) -> None:
                if isinstance(case.body, dict) and "prompt" in case.body:
                    # Models, files and films that are named come into being by chance only.
                    kept = ("prompt", "seconds", "size", "seed")
                    case.body = {"prompt": "a ball"} | {name: case.body[name] for name in kept if name in case.body}

            def get_call_kwargs(self, case: Any) -> dict[str, Any]:
                return {"base_url": str(rig.client.base_url), "session": session}

            def after_call(self, response: Any, case: Any) -> None:
                go_on(rig)
                if response.status_code == 200:
                    seen[str(case.operation.definition.raw["operationId"])] += 1

        run_state_machine_as_test(Machine, settings=settings(BOUNDED, max_examples=20))
    assert {"create_video", "get_video"} <= set(seen), "films were made, and found by their ids"
