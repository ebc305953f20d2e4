"""A journal of what the denoiser answered, so that a film that was interrupted goes on where it stopped.

A film is made by code that draws its randomness from seeds; all that costs time is the denoiser. With its answers kept,
making the film again runs through the same code, is given the kept answers at once, and computes from the first missing one
on. No solver, task or window knows about it, and what comes out is the film that would have been made without the stop.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tubelet.core.types import Condition
from tubelet.core.weights import UNREADABLE
from tubelet.generate.system import System

FLUSH = 4
"""Answers after which the disk is made to hold them. A killed process loses none, a power cut at most so many."""
_TEMPORARY = ".part"


class Recorded(nn.Module):
    """A denoiser that keeps its answers in `folder`, a file each, and gives those that are there before it computes again.

    An answer is given again only if it is whole and was given to the same question: `digest` (whatever names the networks and
    the wish, such as a hash over both) and every number that went in. At the first that is missing, torn or another's, the
    rest of the folder is dropped and computing begins. A folder that cannot be written any more ends the journal, not the
    film. One process at a time records into a folder.
    """

    def __init__(self, network: nn.Module, folder: Path, digest: str, flush: int = FLUSH) -> None:
        super().__init__()
        # What else such a network says, the engine would not hear through this one.
        assert not any(getattr(network, name, False) for name in ("begin", "takes_given", "learned_variances"))
        self.network = network
        self.config: Any = network.config
        self.replayed = 0
        """Answers that came from the folder."""
        self._folder, self._digest, self._flush = folder, digest, max(1, flush)
        self._asked = 0
        self._loose: list[Path] = []
        self._replaying, self._recording = True, True
        with self._or_stop():
            folder.mkdir(parents=True, exist_ok=True)
            for torn in folder.glob(f"*{_TEMPORARY}"):
                torn.unlink(missing_ok=True)

    def forward(self, z: Tensor, sigma: Tensor, condition: Condition, positions: Tensor | None = None) -> Tensor:
        """What the network answers, `(B, C, T, H, W)`."""
        places = [] if positions is None else [positions]
        question = [z, sigma, condition.states, condition.mask, *places]
        return self._answer(question, lambda: [self.network(z, sigma, condition, *places)])[0]

    def forward_packed(
        self,
        z: Sequence[Tensor],
        sigma: Sequence[Tensor],
        condition: Condition,
        positions: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """What the network answers to samples of any sizes, `(C, T, H, W)` each."""
        network: Any = self.network
        more = {} if positions is None else {"positions": positions}
        question = [*z, *sigma, condition.states, condition.mask, *(positions or ())]
        return self._answer(question, lambda: network.forward_packed(z, sigma, condition, **more))

    def _answer(self, question: Sequence[Tensor], compute: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
        # A question's hash costs a thousandth of its answer, and no answer can be given to a question that it does not fit.
        key = f"{self._digest} {_hash(question)}"
        number, self._asked = self._asked, self._asked + 1
        if self._replaying:
            answers = self._read(number, key)
            if answers is not None:
                self.replayed += 1
                return [answer.to(question[0].device) for answer in answers]
            self._replaying = False
            self._drop(number)
        # Kept answers are contiguous when they are read: computed ones must be too, or later layers may round differently.
        answers = [answer.contiguous() for answer in compute()]
        self._write(number, key, answers)
        return answers

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:06d}.safetensors"

    def _read(self, number: int, key: str) -> list[Tensor] | None:
        try:
            with safe_open(self._path(number), framework="pt") as file:
                said = file.metadata() or {}
                answers = [file.get_tensor(name) for name in sorted(file.keys())]
        except (*UNREADABLE, RuntimeError):
            return None
        return answers if answers and said == {"question": key, "answer": _hash(answers)} else None

    def _write(self, number: int, key: str, answers: Sequence[Tensor]) -> None:
        if not self._recording:
            return
        path = self._path(number)
        temporary = path.with_suffix(f".{os.getpid()}{_TEMPORARY}")
        tensors = {f"{place:06d}": answer.detach().cpu() for place, answer in enumerate(answers)}
        with self._or_stop():
            save_file(tensors, temporary, {"question": key, "answer": _hash(answers)})
            os.replace(temporary, path)
            self._loose.append(path)
            if len(self._loose) >= self._flush:
                _sync([*self._loose, self._folder])
                self._loose = []
        if not self._recording:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _drop(self, number: int) -> None:
        with self._or_stop():
            for path in self._folder.glob("*.safetensors"):
                if not path.stem.isdecimal() or int(path.stem) >= number:
                    path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _or_stop(self) -> Iterator[None]:
        """No journal is worth a film: where it cannot be written (a full disk), the film is made without."""
        try:
            yield
        except (OSError, SafetensorError):
            self._recording = False


def recorded(system: System, folder: Path, digest: str) -> tuple[System, Recorded]:
    """The system with a journal of its denoiser in `folder`, for one film; `digest` names the film that is wanted."""
    kind = f"{system.digest} {system.dtype} {system.device.type}"
    network = Recorded(system.denoiser, folder, hashlib.sha256(f"{kind} {digest}".encode()).hexdigest())
    return replace(system, engine=replace(system.engine, denoiser=network)), network


def _hash(tensors: Iterable[Tensor]) -> str:
    """sha256 over kinds, shapes and bytes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _sync(paths: Iterable[Path]) -> None:
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
