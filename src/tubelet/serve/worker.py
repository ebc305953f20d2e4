"""A worker: one process with one system, which takes jobs from the queue and makes their films, one after the other.

It may die at any moment: what the denoiser answered is in a journal, the job's lease runs out, and the next worker goes on from
there. Asked to stop, it gives its job back and ends. Where a step hangs, it ends itself; the supervisor starts another.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import io
import itertools
import os
import resource
import secrets
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from PIL import Image

from tubelet import __version__
from tubelet.core.errors import UserError
from tubelet.generate.engine import Cancelled
from tubelet.generate.system import System, expander_of, load
from tubelet.serve import logs
from tubelet.serve.changes import CANCELLED
from tubelet.serve.jobs import Jobs
from tubelet.serve.journals import copies_of, tidy
from tubelet.serve.objects import open_assets
from tubelet.serve.records import Asset, Claim, StorageFull, Total
from tubelet.serve.render import Made, Mark, OutOfMemory, Rendered, out_of_memory, render
from tubelet.serve.store import Assets
from tubelet.serve.traces import id_of
from tubelet.text.expand import Expander

if TYPE_CHECKING:
    from tubelet.serve.config import Moderation
    from tubelet.serve.provenance import Ingredient, Signer

T = TypeVar("T")

BEAT = 1.0
"""Seconds between two heartbeats: how soon a cancelled job is known, and how often progress is told."""
POLL = 0.25
"""Seconds between two looks at an empty queue."""
HELLO = 3.0
"""Seconds after which an idle worker says that it is alive."""
TIDY = 60.0
"""Seconds between two looks of an idle worker for journals that nobody needs any more."""
ROOM_PAUSE = 2.0
"""Seconds between two tries where the disk is full."""
HUNG = 75
"""Exit code of a worker whose step hung."""
BROKEN = 76
"""Exit code of a worker whose device no longer computes."""
TOO_MUCH = "The film does not fit into the memory of this server's device; ask for a shorter or smaller one."
FAILED = "The film could not be made; the server's log says why."
EYES_PATIENCE = 600.0
"""Seconds that a film waits for a moderation endpoint that does not answer."""
EYES_PAUSE, EYES_LONGEST = 1.0, 30.0
"""Seconds before it is asked again; twice as many each time."""
UNCHECKED = "This server could not check what it has made; ask again later."


@dataclass(frozen=True)
class WorkerConfig:
    """What a worker is told. `data` is the server's folder, or one of this machine's own, `url` the server's job store."""

    data: Path
    url: str
    system: str
    """A shipped system's name, or a folder that holds one."""
    objects: str | None = None
    """The server's object store, where its files are in one; None: they are in its folder."""
    device: str = "auto"
    name: str = ""
    """What the job store calls this worker; empty: host, process and something drawn."""
    parent: int | None = None
    """The process that started this one: without it the worker stops."""
    patience: float = 600.0
    """Seconds without a step after which the process ends itself."""
    ttl: float | None = None
    """Seconds that a finished film is kept; None: until it is deleted."""
    certificate: Path | None = None
    """An operator's own certificate chain for signing, with `certificate_key`."""
    certificate_key: Path | None = None
    sign: bool = True
    """Sign and mark what is made."""
    moderation: Moderation | None = None
    """Who is shown frames of what was made before it is kept, where it is to be shown any."""


def run(config: WorkerConfig, expander: Expander | None = None) -> int:
    """Load the system and work until asked to stop by SIGTERM or SIGINT, or until the parent is gone. Returns the exit code.

    Raises UserError when the system, the job store or the object store cannot be had.
    """
    stopping = threading.Event()
    with contextlib.ExitStack() as opened:
        for number in (signal.SIGTERM, signal.SIGINT):
            opened.callback(signal.signal, number, signal.signal(number, lambda *_: stopping.set()))
        store = open_assets(config.data, config.objects, check=config.parent is None)  # a server has looked itself
        system = load(config.system, device=config.device)
        check_eyes(config.moderation)
        signer = None
        if config.sign:
            from tubelet.serve.provenance import Signer

            signer = Signer.open(config.data / "provenance", config.certificate, config.certificate_key)
        jobs = Jobs.open(config.url)
        opened.callback(jobs.close)
        return Worker(jobs, store, system, config, signer=signer, expander=expander, stopping=stopping).run()


def check_eyes(endpoint: Moderation | None) -> None:
    """Raises UserError when a moderation endpoint that is to be shown frames says that it takes none."""
    if endpoint is None or endpoint.frames == 0:
        return
    from tubelet.serve.moderation import Unanswered, flagged, seen

    out = io.BytesIO()
    Image.new("RGB", (64, 64), (128, 128, 128)).save(out, "JPEG")
    try:
        flagged(endpoint, [seen(out.getvalue(), "image/jpeg")])
    except Unanswered as error:
        if error.final:
            raise UserError(
                f"the moderation endpoint takes no pictures ({error}); set TUBELET_MODERATION_FRAMES to 0, or use one that does"
            ) from error


class Worker:
    """The loop: claim, render, sign, put, finish."""

    def __init__(
        self,
        jobs: Jobs,
        store: Assets,
        system: System,
        config: WorkerConfig,
        *,
        signer: Signer | None = None,
        expander: Expander | None = None,
        stopping: threading.Event | None = None,
    ) -> None:
        self.jobs, self.store, self.system, self.config = jobs, store, system, config
        self.signer, self.expander = signer, expander or expander_of(system.config)
        self.name = config.name or f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self.stopping = stopping or threading.Event()
        """Set it to stop: the job goes back to the queue, its journal stays."""
        self._broken = False

    def run(self) -> int:
        """Work until asked to stop. Returns the exit code."""
        self.say("ready", system=self.system.name, device=str(self.system.device))
        hello, tidied, full = -HELLO, -TIDY, False
        while not (self.stopping.is_set() or self.orphaned() or self._broken):
            try:
                if time.monotonic() - hello > HELLO:
                    self.jobs.hello(self.name, self._facts())
                    hello = time.monotonic()
                if time.monotonic() - tidied > TIDY:
                    # A server beside this worker would do so, too; where there is none, nobody else looks into its folder.
                    tidy(self.config.data / "journals", self.jobs)
                    tidied = time.monotonic()
                # A job begun now would only wait for room at its end.
                roomy = self.store.roomy()
                worked = roomy and self.turn()
                full = self.told("no room", full, not roomy)
            except StorageFull:
                worked, full = False, self.told("no room", full, True)
            if not worked:
                self.stopping.wait(ROOM_PAUSE if full else POLL)
        self.say("stopped")
        return BROKEN if self._broken else 0

    def turn(self) -> bool:
        """Take one job, if there is one, and see it to its end. Raises StorageFull when the queue cannot be written."""
        claim = self.jobs.claim(self.name, systems=(self.system.name,))
        if claim is None:
            return False
        _Attempt(self, claim).run()
        return True

    def orphaned(self) -> bool:
        """Whether the process that started this one is gone."""
        return self.config.parent is not None and os.getppid() != self.config.parent

    def end_broken(self) -> None:
        """Stop after this job: the device computes nothing any more, a new process may."""
        self._broken = True

    def say(self, event: str, **facts: Any) -> None:
        """A line of JSON in the log. Facts hold nothing that a person wrote."""
        logs.say(event, worker=self.name, **facts)

    def told(self, event: str, before: bool, now: bool) -> bool:
        """Say when something begins or ends to be so; returns whether it is."""
        if now != before:
            self.say(event if now else f"{event}: over")
        return now

    def _facts(self) -> dict[str, Any]:
        return {
            "system": self.system.name,
            "digest": self.system.digest,
            "device": str(self.system.device),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "version": __version__,
            "memory": _held(self.system.device),
        }


def _held(device: torch.device) -> int:
    """The most bytes that this process has held at once: of a graphics card's memory, or of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024  # Linux tells KiB


class _Unwritten(Exception):  # noqa: N818  what it says is for the log
    """The film was made, but its files were not, for a reason that is not the request's."""


class _Refused(Exception):  # noqa: N818  an answer, not a defect
    """The film is not to be kept; `message` is for the client."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code)
        self.code, self.message = code, message


class _Attempt:
    """One claim, from its first step to its end.

    Beside the work run a heartbeat, which tells it when to stop, and a courier, who brings away what others are to see of it.
    """

    def __init__(self, worker: Worker, claim: Claim) -> None:
        self._worker, self._claim, self._job = worker, claim, claim.job
        self._folder = worker.config.data / "journals" / claim.job.id
        self._out = self._folder / f"out-{claim.attempt}"
        self._ended = threading.Event()
        self._lost = self._cancelled = False
        self._progress = 0
        self._copy = copies_of(worker.store).of(claim.job.id, self._folder)
        self._preview: bytes | None = None
        self._ready: Asset | None = None
        """A preview that is in the store, and that the job store has not heard of yet."""
        self._old: list[str] = []
        """Previews that are no longer shown."""
        self._finished = self._forgotten = False
        self._looked = False
        self._written: dict[str, Path] = {}
        self._shown = next((asset for asset in claim.job.outputs if asset.role == "preview"), None)
        self._moved = time.monotonic()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        """Spent on what becomes of the film after it was rendered, by stage."""
        self._counted: Counter[Total] = Counter()
        self._counting = threading.Lock()

    def run(self) -> None:
        """Make the film. Whatever happens, the job is finished, failed, given back or, where it was lost, left alone."""
        beside = [threading.Thread(target=self._beat, name="heartbeat"), threading.Thread(target=self._carry, name="courier")]
        for thread in beside:
            thread.daemon = True
            thread.start()
        begin = time.monotonic()
        try:
            word = self._work()
        finally:
            self._ended.set()
            for thread in beside:
                thread.join()
            self._tell_counted()
            self._clear_previews()
            if self._forgotten:
                with contextlib.suppress(StorageFull):  # tidied later
                    self._copy.forget()
            shutil.rmtree(self._out, ignore_errors=True)
        self._say(word, seconds=round(time.monotonic() - begin, 3))

    def _work(self) -> str:
        """How it ended, in a word."""
        try:
            outputs, result = self._made()
            ttl = self._worker.config.ttl
            expires = None if ttl is None else time.time() + ttl
            if self._insist(lambda: self._worker.jobs.finish(self._claim, outputs, result, expires)):
                self._keep(outputs)
                return self._over("completed")
            self._lost = True
            self._discard(outputs)
            return self._stopped()
        except Cancelled:
            return self._stopped()
        except UserError as error:
            return self._fail("invalid_request", str(error))
        except _Refused as refused:
            return self._fail(refused.code, refused.message)
        except OutOfMemory:
            self._count("out_of_memory")
            return self._fail("out_of_memory", TOO_MUCH)
        except Exception as error:  # noqa: BLE001  whatever it is, the job ends and the worker goes on
            self._log(error)
            if out_of_memory(error):  # while its files were written
                self._count("out_of_memory")
                return self._fail("out_of_memory", TOO_MUCH)
            if _device_is_broken(error):
                # The job is not to blame yet: it stays claimed, its lease runs out, and that counts as a try.
                self._worker.end_broken()
                return "left"
            return self._fail("render_failed", FAILED)

    def _made(self) -> tuple[list[Asset], dict[str, Any]]:
        request = self._job.request
        self._say("started", task=request.get("task"), system=request.get("system"))
        if request.get("watched") and not self._watched:
            self._say("this worker has no moderation endpoint that is shown frames, and the server has one")
            raise _Refused("moderation_unavailable", UNCHECKED)
        if self._claim.attempt > 1:
            noted = self._insist(self._copy.fetch)
            if noted:
                self._say("journal fetched", files=noted)
        try:
            rendered = self._rendered(lean=False)
        except OutOfMemory:
            self._say("once more, with less memory")
            self._count("out_of_memory")
            gc.collect()
            if self._worker.system.device.type == "cuda":
                torch.cuda.empty_cache()
            rendered = self._rendered(lean=True)
        self._progress = 92
        try:
            outputs = self._insist(lambda: self._put(rendered))
        except UserError as error:  # of a file or a certificate on this machine, which the client did not choose
            raise _Unwritten(str(error)) from error
        return outputs, {**rendered.result, "timings": {**rendered.result["timings"], **self._seconds}}

    def _looked_at(self, frames: np.ndarray) -> None:
        with self._timed("look"):
            self._look(frames)

    def _look(self, frames: np.ndarray) -> None:
        """Show some of uint8 `(T, H, W, 3)` to the moderation endpoint.

        Raises _Refused when one is flagged, or cannot be judged and must be.
        """
        endpoint, picture = self._worker.config.moderation, len(frames) == 1
        assert endpoint is not None
        if not picture and self._looked:  # the same film again, since there was no room for it
            return
        shots = len(self._job.request.get("shots") or ())
        bins = np.linspace(0, len(frames), 1 + min(len(frames), max(endpoint.frames, 2 * shots)))
        chance = secrets.SystemRandom()  # nobody can know which
        places = {int(chance.uniform(low, high)) for low, high in itertools.pairwise(bins)}
        for place in sorted(places | {0, len(frames) - 1}):
            out = io.BytesIO()
            Image.fromarray(frames[place]).save(out, "JPEG", quality=90)
            self._ask(endpoint, out.getvalue())
        self._looked = not picture

    def _ask(self, endpoint: Moderation, frame: bytes) -> None:
        from tubelet.serve.moderation import BLOCKED, REJECTED, Unanswered, flagged, seen

        begin, pause = time.monotonic(), EYES_PAUSE
        while True:
            self._check()
            try:
                if flagged(endpoint, [seen(frame, "image/jpeg")]):
                    raise _Refused(BLOCKED, REJECTED)
                return
            except Unanswered as error:
                if endpoint.lenient:
                    self._say("a frame was not looked at", said=str(error))
                    return
                if error.final or time.monotonic() - begin > EYES_PATIENCE:
                    self._say("moderation does not answer", said=str(error))
                    raise _Refused("moderation_unavailable", UNCHECKED) from error
            self._worker.stopping.wait(pause)
            pause = min(2 * pause, EYES_LONGEST)

    def _rendered(self, lean: bool) -> Rendered:
        inputs: dict[str, Path] = {}
        for item in self._job.request.get("inputs") or ():
            path = self._insist(lambda id=item["asset"]: self._fetched(id))
            if path is not None:
                inputs[item["asset"]] = path
        more: dict[str, Any] = {"expander": self._worker.expander, "lean": lean}
        return render(self._worker.system, self._job.request, inputs, self._folder, self._step, self._show, **more)

    def _fetched(self, id: str) -> Path | None:
        """The file of an input; None when it is not there any more."""
        return self._worker.store.fetch(id, self._folder / "inputs")

    def _put(self, rendered: Rendered) -> list[Asset]:
        """Everything that was made, in the store, marked and signed."""
        outputs = []
        look = self._looked_at if self._watched else None
        self._seconds.clear()  # of a try for which there was no room
        with self._timed("encode"):
            files = rendered.write(self._out, self._mark(), self._check, look)
        self._seconds["encode"] -= sum(self._seconds.get(stage, 0.0) for stage in ("mark", "look"))  # these came in between
        for made in files:
            self._sign(made, rendered)
            self._check()
            with self._timed("store"):
                outputs.append(self._worker.store.put(made.path, made.role, made.media))
            self._written[outputs[-1].id] = made.path
        return outputs

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[stage] += time.perf_counter() - begin

    def _mark(self) -> Mark | None:
        signer = self._worker.signer
        if signer is None:
            return None
        from tubelet.serve.mark import embed, payload_of

        def mark(frames: np.ndarray) -> np.ndarray:
            with self._timed("mark"):
                return embed(frames, signer.mark_key, payload_of(self._job.id))

        return mark

    def _sign(self, made: Made, rendered: Rendered) -> None:
        signer = self._worker.signer
        if signer is None:
            return
        request, result = self._job.request, rendered.result
        facts = {
            "video": self._job.id,
            "system": result["system"],
            "digest": result["digest"],
            "seed": result["seed"],
            "steps": result["settings"]["steps"],
            "task": request["task"],
            "prompt": str(request.get("prompt") or ""),
            "created_at": time.time(),
        }
        # The small pictures beside a film speak for it; what it was made from stands in the film itself.
        sources = list(self._ingredients()) if made.role in ("video", "image") else []
        with self._timed("sign"):
            signer.sign(made.path, made.media, facts, sources)
        self._count("signed")

    def _ingredients(self) -> Iterator[Ingredient]:
        from tubelet.serve.provenance import Ingredient

        for item in self._job.request.get("inputs") or ():
            path = self._fetched(item["asset"])
            if path is not None and item["role"] != "mask":  # which says where, and shows nothing
                yield Ingredient(path, self._worker.store.read(item.get("credentials") or ""))

    # What the renderer calls.

    def _step(self, done: int, steps: int) -> None:
        self._count("steps")
        self._progress = 90 * done // steps
        self._check()

    def _check(self) -> None:
        """Raises Cancelled when the film is no longer wanted from this worker."""
        self._moved = time.monotonic()
        if self._lost or self._cancelled or self._worker.stopping.is_set():
            raise Cancelled

    def _show(self, preview: bytes) -> None:
        if not self._watched:  # nobody is to see what was not looked at
            self._preview = preview

    @property
    def _watched(self) -> bool:
        """Whether frames are shown to a moderation endpoint before anybody else sees them."""
        endpoint = self._worker.config.moderation
        return endpoint is not None and endpoint.frames > 0

    def _insist(self, call: Callable[[], T]) -> T:
        """What `call` gives, as soon as there is room for it; the heartbeat goes on meanwhile.

        Raises Cancelled when the film is no longer wanted.
        """
        waiting = False
        while True:
            try:
                return call()
            except StorageFull:
                waiting = self._worker.told("no room", waiting, True)
            self._check()
            self._worker.stopping.wait(ROOM_PAUSE)

    # The end.

    def _stopped(self) -> str:
        """Why the work was given up, and what becomes of the job."""
        if self._lost:
            with contextlib.suppress(StorageFull):
                found = self._worker.jobs.get(self._job.id, None)
                if found is None or found.state in ("completed", "failed"):
                    self._forget()
            return "lost"
        if self._cancelled:
            return self._fail(CANCELLED["code"], CANCELLED["message"])
        with contextlib.suppress(StorageFull):  # whoever goes on computes the rest again
            self._copy.send()
        return "given back" if self._close(lambda: self._worker.jobs.release(self._claim)) else "lost"

    def _fail(self, code: str, message: str) -> str:
        return self._over(code) if self._close(lambda: self._worker.jobs.fail(self._claim, code, message)) else "lost"

    def _close(self, call: Callable[[], bool]) -> bool:
        """Whether the last word on the job was heard. Without room it waits, but does not hold up a stop."""
        since = time.monotonic()
        while not self._lost:
            with contextlib.suppress(StorageFull):
                return call()
            self._moved = time.monotonic()
            if self._worker.stopping.is_set() and self._moved - since > 2 * ROOM_PAUSE:
                return False
            self._ended.wait(ROOM_PAUSE)
        return False

    def _keep(self, outputs: list[Asset]) -> None:
        """See that the files of a finished film are there: until now no row named them, and whoever deleted a film of the very
        same bytes may have taken them."""
        for asset in outputs:
            while True:
                try:
                    if self._worker.store.size(asset.id) is None:
                        self._worker.store.put(self._written[asset.id], asset.role, asset.media)
                    break
                except StorageFull:
                    self._moved = time.monotonic()
                    if self._worker.stopping.wait(ROOM_PAUSE):
                        return
                except OSError as error:
                    self._log(error)
                    return

    def _over(self, word: str) -> str:
        """The job has ended: nothing but its outputs stays."""
        self._forget()
        self._finished = True
        return word

    def _forget(self) -> None:
        self._forgotten = True
        shutil.rmtree(self._folder, ignore_errors=True)

    def _discard(self, outputs: list[Asset]) -> None:
        """Take back what nobody waits for any more, unless another job made the very same. The sweeper would, in an hour."""
        with contextlib.suppress(StorageFull, OSError):
            named = self._worker.jobs.referenced()
            for asset in outputs:
                if asset.id not in named:
                    self._worker.store.remove(asset.id)

    # The heartbeat.

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            if self._worker.orphaned():
                self._worker.stopping.set()
            if time.monotonic() - self._moved > self._worker.config.patience:
                self._say("hung")
                faulthandler.dump_traceback(all_threads=True)
                os._exit(HUNG)
            try:
                self._tell()
            except StorageFull:
                self._say("heartbeat not heard")  # the next one may be; if none is, the lease runs out
            except Exception as error:  # noqa: BLE001  without this thread nobody would watch over the work
                self._log(error)

    def _tell(self) -> None:
        asset = self._ready
        with self._uncounted() as counted:
            more: dict[str, Any] = {"progress": self._progress, "preview": asset, "counted": counted}
            answer = self._worker.jobs.heartbeat(self._claim, **more)
        if asset is not None and not answer.lost:
            before, self._shown, self._ready = self._shown, asset, None
            if before is not None and before.id != asset.id:
                self._old.append(before.id)
        self._lost, self._cancelled = self._lost or answer.lost, self._cancelled or answer.cancelled

    # The courier.

    def _carry(self) -> None:
        """Bring to the store what others are to see of the work: a heartbeat must not wait for a store that hangs."""
        while not (self._ended.wait(BEAT) or self._lost):
            try:
                self._remove_old()
                if self._preview is not None and self._ready is None:
                    preview, self._preview = self._preview, None
                    self._ready = self._worker.store.put(preview, "preview", "image/jpeg")
                self._copy.send()
            except StorageFull:
                pass  # the next time, perhaps
            except Exception as error:  # noqa: BLE001  a film does not depend on what is seen of it
                self._log(error)
        if self._lost:
            self._discard_untold()

    def _remove_old(self) -> None:
        """Remove the previews that newer ones have replaced."""
        while self._old:
            self._worker.store.remove(self._old.pop())

    def _discard_untold(self) -> None:
        """Remove the preview that no row will ever name: the job may have been deleted since it was put."""
        untold, self._ready = self._ready, None
        if untold is not None:
            self._discard([untold])

    def _clear_previews(self) -> None:
        """What is left to be done when neither heart nor courier is at work any more."""
        if self._finished and self._shown is not None:
            self._old.append(self._shown.id)
        with contextlib.suppress(StorageFull, OSError):  # the sweeper takes what stays
            self._discard_untold()
            self._remove_old()

    # What is counted.

    def _count(self, total: Total) -> None:
        with self._counting:
            self._counted[total] += 1

    @contextlib.contextmanager
    def _uncounted(self) -> Iterator[Counter[Total]]:
        """What the totals do not have yet. They have it after the block, unless that raises."""
        with self._counting:
            taken, self._counted = self._counted, Counter()
        try:
            yield taken
        except BaseException:
            with self._counting:
                self._counted += taken
            raise

    def _tell_counted(self) -> None:
        """Tell the rest; without room it is lost, for the job has ended."""
        with contextlib.suppress(StorageFull), self._uncounted() as counted:
            if counted:
                self._worker.jobs.count(counted)

    # The log.

    def _say(self, event: str, **facts: Any) -> None:
        job = self._job
        come = {"request_id": job.request_id, "trace_id": id_of(job.traceparent)}
        self._worker.say(event, job=job.id, attempt=self._claim.attempt, **come, **facts)

    def _log(self, error: BaseException) -> None:
        """Where it happened and of what kind it was. What it said only where that cannot hold a person's words."""
        said = str(error) if isinstance(error, (RuntimeError, OSError, _Unwritten)) else ""
        stack = [line.strip().split("\n")[0] for line in traceback.format_tb(error.__traceback__)]
        self._say("error", kind=type(error).__name__, said=said, stack=stack)


def _device_is_broken(error: BaseException | None) -> bool:
    """Whether the device refused to compute: after that it does so for good, in this process."""
    accelerator: Any = getattr(torch, "AcceleratorError", ())
    while error is not None:
        if isinstance(error, accelerator) or (isinstance(error, RuntimeError) and "CUDA error" in str(error)):
            return True
        error = error.__cause__
    return False
