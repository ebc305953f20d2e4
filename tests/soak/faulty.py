"""`tubelet` with faults: `python -m tests.soak.faulty serve ...` is `tubelet serve` whose workers break as prompts say.

A prompt that holds `FAULT=` and one of these words: `memory` (the denoiser wants more than any machine has), `hang` (it never
answers), `poison` (it kills its process), `device` (it says what CUDA says when the card is lost). Behind a comma, the number
of the attempt after which all is well. Workers lose patience after `PATIENCE` seconds; webhooks may go to this machine.
"""

from __future__ import annotations

import functools
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

PATIENCE = 10.0
"""Seconds without a step after which a worker ends itself."""
MODULE = "tests.soak.faulty"
_FAULT = re.compile(r"FAULT=(memory|hang|poison|device)(?:,(\d+))?")


def serve() -> None:
    """Let `tubelet serve` start this program's workers, and tell receivers on this machine."""
    from tubelet.cli import serve as words
    from tubelet.serve import config

    config.ServeConfig = functools.partial(config.ServeConfig, webhooks_to_loopback=True)  # type: ignore[misc, assignment]
    own = words.Serve._worker

    def worker(self: Any, *given: Any) -> Callable[[str], Sequence[str]]:
        command = own(self, *given)
        return lambda name: [MODULE if word == "tubelet" else word for word in command(name)] + ["--patience", str(PATIENCE)]

    words.Serve._worker = worker  # type: ignore[method-assign]


def work() -> None:
    """Let the denoiser of this worker's system break as the prompt says."""
    from torch import Tensor, empty, nn

    from tubelet.serve import worker as room

    wanted: list[str | None] = [None]

    class Faulty(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network, self.config = network, network.config

        def forward(self, *question: Any, **more: Any) -> Tensor:
            match wanted[0]:
                case "memory":
                    return empty(10**15)
                case "hang":
                    time.sleep(10**6)
                case "poison":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "device":
                    raise RuntimeError("CUDA error: device-side assert triggered")
            return self.network(*question, **more)

    own_load, own_render, own_attempt = room.load, room.render, room._Attempt
    attempts, turns = [0], [0]

    def load(*given: Any, **more: Any) -> Any:
        system = own_load(*given, **more)
        return replace(system, engine=replace(system.engine, denoiser=Faulty(system.denoiser)))

    def attempt(worker: Any, claim: Any) -> Any:
        attempts[0], turns[0] = claim.attempt, 0
        return own_attempt(worker, claim)

    def render(system: Any, request: Any, *given: Any, **more: Any) -> Any:
        found = _FAULT.search(str(request.get("prompt")))
        turns[0] += 1
        # Too little memory is tried again within one attempt.
        done = turns[0] if found and found[1] == "memory" else attempts[0]
        wanted[0] = found[1] if found and (found[2] is None or done <= int(found[2])) else None
        return own_render(system, request, *given, **more)

    room.load, room._Attempt, room.render = load, attempt, render  # type: ignore[assignment, misc]


def main() -> None:
    """What `tubelet` does with the same words, broken."""
    from tubelet.cli import main as tubelet

    {"serve": serve, "worker": work}[sys.argv[1]]()
    tubelet()


if __name__ == "__main__":
    main()
