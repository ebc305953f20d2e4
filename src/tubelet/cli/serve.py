"""The verbs around the server: start it, work for it, hand out its keys, read what its films say of themselves."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, UseAppendAction, arg

from tubelet.cli.terminal import DEFAULT_SYSTEM, chat_expander, print_json
from tubelet.core.errors import UserError

Folder = Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint="(default: ~/.local/share/tubelet)")]
Address = Annotated[str | None, arg(metavar="URL", help_behavior_hint="(default: TUBELET_STORE, or a file in the folder)")]
File = Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")]
Bucket = Annotated[str | None, arg(metavar="URL", help_behavior_hint="(default: TUBELET_OBJECTS, or the folder)")]
Repeated = UseAppendAction[tuple[str, ...]]
STORE = "TUBELET_STORE"
OBJECTS = "TUBELET_OBJECTS"


@dataclass(frozen=True)
class Serve:
    """Answer Sora's video API on this machine, with the studio at its root. Stop it with Ctrl-C; nothing is lost."""

    system: Annotated[str, arg(metavar="NAME|FOLDER")] = DEFAULT_SYSTEM
    """A shipped system's name, or a folder that holds one. It makes what names no other model."""
    alias: Annotated[Repeated, arg(metavar="NAME=SYSTEM", help_behavior_hint="(repeatable)")] = ()
    """A name under which clients ask for a system, such as sora-2=worlds-64. A system that is only named here is served, too,
    by workers of its own. Without it sora-2 and sora-2-pro are --system."""
    host: str = "127.0.0.1"
    """Where to listen. Anything but this machine needs --keys."""
    port: int = 8000
    """Where to listen; 0 takes a free port."""
    data: Folder = None
    """Where jobs, films and secrets are kept."""
    store: Address = None
    """The job store: sqlite:///FILE or postgresql://USER@HOST/NAME."""
    objects: Bucket = None
    """The home of films and uploads, for workers on several machines: s3://BUCKET/PREFIX, gs://, az:// or file:///FOLDER."""
    device: Annotated[str, arg(metavar="NAME,...")] = "auto"
    """auto, cpu, cuda or mps; a worker is started for each of several, e.g. cuda:0,cuda:1, and for each system."""
    keys: Annotated[bool, arg(help_behavior_hint="")] = False
    """Ask every client for an API key; `tubelet keys` makes them."""
    cap: int = 100
    """Jobs that may wait or run; further ones are refused until there is room."""
    ttl: Annotated[float | None, arg(metavar="SECONDS", help_behavior_hint="(default: until deleted)")] = None
    """How long a finished film is kept."""
    allow_host: Annotated[Repeated, arg(metavar="NAME", help_behavior_hint="(repeatable)")] = ()
    """A further name under which clients reach this server."""
    allow_origin: Annotated[Repeated, arg(metavar="URL", help_behavior_hint="(repeatable)")] = ()
    """A web origin whose pages may use the API, e.g. https://studio.example."""
    fetch_images: Annotated[bool, arg(help_behavior_hint="")] = False
    """Fetch pictures that clients name by address from the internet."""
    certificate: File = None
    """A certificate chain (PEM) to sign films with, instead of one made here."""
    certificate_key: File = None
    """The private key of --certificate."""

    def __call__(self) -> None:
        from tubelet.serve.config import ServeConfig, read_served
        from tubelet.serve.logs import write_to_stderr
        from tubelet.serve.supervisor import serve

        systems, aliases = read_served(self.system, self.alias)
        config = ServeConfig(
            data=_folder(self.data),
            objects=_objects(self.objects),
            systems=systems,
            aliases=aliases,
            host=self.host,
            port=self.port,
            keys=self.keys,
            cap=self.cap,
            hosts=self.allow_host,
            origins=self.allow_origin,
            fetch_images=self.fetch_images,
            expander=chat_expander(),
            moderation=_moderation(),
            ttl=self.ttl,
            certificate=self.certificate,
            certificate_key=self.certificate_key,
        )
        _check_writable(config.data)
        devices = self.device.split(",")
        self._check_workers(devices, config.data)
        write_to_stderr()
        url = _url(self.store, config.data)
        # On the workers' command lines everybody could read the store's password.
        environment = {**os.environ, STORE: url, **({} if config.objects is None else {OBJECTS: config.objects})}

        def announce(address: str) -> None:
            print(f"{', '.join(config.systems)} at {address}, films in {config.objects or config.data}", flush=True)

        commands = [self._worker(facts.folder, device, config.data) for facts in systems.values() for device in devices]
        code = serve(config, url, commands, environment=environment, announce=announce)
        if code:
            print("tubelet: no worker could be started; what it said stands above", file=sys.stderr)
            sys.exit(code)

    def _check_workers(self, devices: Sequence[str], data: Path) -> None:
        """Refuse before any address is announced what every worker would end with."""
        for device in devices:
            if device not in ("auto", "cpu"):  # the others are torch's to find, without which the server does
                from tubelet.runtime.device import choose_device

                choose_device(device)
        if self.certificate is not None or self.certificate_key is not None:
            from tubelet.serve.provenance import Signer

            Signer.open(data / "provenance", self.certificate, self.certificate_key)

    def _worker(self, system: Path, device: str, data: Path) -> Any:
        """The command line of a worker, by the name that it is to have."""
        given = {
            "--system": system,
            "--data": data,
            "--device": device,
            "--ttl": self.ttl,
            "--certificate": self.certificate,
            "--certificate-key": self.certificate_key,
            "--parent": os.getpid(),
        }
        options = [str(part) for name, value in given.items() if value is not None for part in (name, value)]

        def command(name: str) -> Sequence[str]:
            return [sys.executable, "-m", "tubelet", "worker", *options, "--name", name]

        return command


@dataclass(frozen=True)
class Work:
    """Make the films of a server's queue that are for one system. `tubelet serve` starts one for each device; more may work for
    the same store."""

    system: Annotated[str, arg(metavar="NAME|FOLDER")] = DEFAULT_SYSTEM
    """A shipped system's name, or a folder that holds one."""
    data: Folder = None
    """Where jobs, films and secrets are kept."""
    store: Address = None
    """The job store: sqlite:///FILE or postgresql://USER@HOST/NAME."""
    objects: Bucket = None
    """The server's home of films and uploads: s3://BUCKET/PREFIX, gs://, az:// or file:///FOLDER."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    ttl: Annotated[float | None, arg(metavar="SECONDS", help_behavior_hint="(default: until deleted)")] = None
    """How long a finished film is kept."""
    patience: Annotated[float, arg(metavar="SECONDS")] = 600.0
    """A step that takes longer is taken to hang, and ends the process."""
    sign: Annotated[bool, arg(help_behavior_hint="")] = True
    """Neither sign nor mark the films."""
    certificate: File = None
    """A certificate chain (PEM) to sign films with, instead of one made here."""
    certificate_key: File = None
    """The private key of --certificate."""
    name: Annotated[str, arg(metavar="NAME", help_behavior_hint="(default: drawn)")] = ""
    """What the job store calls this worker."""
    parent: Annotated[int | None, arg(metavar="PID", help_behavior_hint="")] = None
    """A process; when it is gone, the worker stops."""

    def __call__(self) -> None:
        from tubelet.serve.logs import write_to_stderr
        from tubelet.serve.worker import WorkerConfig, run

        if not self.patience > 0:
            raise UserError(f"--patience is a number of seconds above 0, got {self.patience}; raise it")
        data = _folder(self.data)
        _check_writable(data)
        write_to_stderr()
        config = WorkerConfig(
            data=data,
            url=_url(self.store, data),
            objects=_objects(self.objects),
            system=self.system,
            device=self.device,
            name=self.name,
            parent=self.parent,
            patience=self.patience,
            ttl=self.ttl,
            certificate=self.certificate,
            certificate_key=self.certificate_key,
            sign=self.sign,
            moderation=_moderation(),
        )
        if code := run(config, chat_expander()):
            sys.exit(code)


LIMITS = ("rpm", "queued", "running", "daily", "stored")
"""What a key may be limited in."""


@dataclass(frozen=True)
class Keys:
    """Make, list and revoke the API keys of a server that was started with --keys. They hold from the next request on."""

    action: Annotated[Positional[str], arg(metavar="create|list|revoke")] = "list"
    """What to do."""
    which: Annotated[Positional[str], arg(metavar="NAME|ID", help_behavior_hint="")] = ""
    """create: a name for the key, for people. revoke: the key's id, as list shows it."""
    scope: Annotated[
        Repeated, arg(metavar="read|create|admin", help_behavior_hint="(repeatable, default: read and create)")
    ] = ()
    """What a new key may: look at its own films, make and delete them, rule the queue."""
    rpm: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: 60)")] = None
    """Requests of a new key per minute that change something."""
    queued: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: 20)")] = None
    """Jobs of a new key that may wait or run."""
    running: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: 2)")] = None
    """Jobs of a new key that may run at once; its others wait, and other keys' go first."""
    daily: Annotated[float | None, arg(metavar="SECONDS", help_behavior_hint="(default: any)")] = None
    """Seconds of film that a new key may ask for each day."""
    stored: Annotated[float | None, arg(metavar="GB", help_behavior_hint="(default: any)")] = None
    """How much room the films and files of a new key may take."""
    data: Folder = None
    """The server's folder."""
    store: Address = None
    """The server's job store."""
    json: Annotated[bool, arg(help_behavior_hint="")] = False
    """Print JSON."""

    def __call__(self) -> None:
        if self.action not in ("create", "list", "revoke"):
            raise UserError(f"keys cannot {self.action!r}; choose create, list or revoke")
        if (self.action == "list") == bool(self.which):
            wanted = {"create": "a name for the key", "revoke": "the id of a key", "list": "nothing more"}[self.action]
            raise UserError(f"keys {self.action} takes {wanted}; for example tubelet keys create laptop")
        given = {f"--{name}": getattr(self, name) for name in (*LIMITS, "scope") if getattr(self, name) not in (None, ())}
        if given and self.action != "create":
            raise UserError(f"{next(iter(given))} is of a new key; keys {self.action} does not take it, leave it out")
        from tubelet.serve.jobs import Jobs

        data = _folder(self.data)
        _check_writable(data)
        jobs = Jobs.open(_url(self.store, data))
        try:
            getattr(self, f"_{self.action}")(jobs)
        finally:
            jobs.close()

    def _create(self, jobs: Any) -> None:
        from tubelet.serve.auth import issue

        limits: dict[str, Any] = {name: getattr(self, name) for name in LIMITS if getattr(self, name) is not None}
        id, secret = issue(jobs, self.which, self.scope or ("read", "create"), **limits)
        if self.json:
            print_json({"id": id, "name": self.which, "key": secret})
        else:
            print(secret)
            print(f"tubelet: that is key {id}, and it is not shown again", file=sys.stderr)

    def _list(self, jobs: Any) -> None:
        from tubelet.serve.auth import listed

        keys = listed(jobs)
        if self.json:
            print_json(keys)
            return
        for key in keys:
            units = {"rpm": "/min", "queued": " queued", "running": " running", "daily": " s/day", "stored": " GB"}
            limits = [f"{key[name]:g}{unit}" for name, unit in units.items() if key.get(name) is not None]
            print("  ".join([key["id"], key["name"], ",".join(key["scopes"]), *limits]))

    def _revoke(self, jobs: Any) -> None:
        from tubelet.serve.auth import revoke

        if not revoke(jobs, self.which):
            raise UserError(f"there is no key {self.which!r}; tubelet keys list shows their ids")
        if self.json:
            print_json({"id": self.which, "revoked": True})


@dataclass(frozen=True)
class Provenance:
    """Read what a film or picture says of where it comes from: its signed credentials, and the invisible mark in its pixels."""

    file: Annotated[Positional[Path], arg(metavar="FILE")]
    """A film or picture: mp4, png, jpg or webp."""
    data: Folder = None
    """The folder of the server whose root is trusted and whose mark is looked for."""
    certificate: File = None
    """An operator's certificate chain (PEM) whose root is trusted instead."""
    json: Annotated[bool, arg(help_behavior_hint="")] = False
    """Print JSON."""

    def __call__(self) -> None:
        from tubelet.serve import intake
        from tubelet.serve.provenance import Signer, check, root_of

        try:
            data = self.file.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {self.file}: {error.strerror or error}; check the name") from error
        media = intake.sniff(data[:64])
        if media is None:
            raise UserError(f"{self.file} is neither a film nor a picture that can be signed; give an mp4, png, jpg or webp")
        secrets = _folder(self.data) / "provenance"
        # Looking must not make an installation where there is none.
        signer = Signer.open(secrets) if secrets.is_dir() else None
        root = None if signer is None else signer.root_pem()
        said = check(self.file, media, root if self.certificate is None else root_of(self.certificate))
        mark, unread = (None, None) if signer is None else _mark(data, signer.mark_key)
        answer = {"credentials": said, "mark": mark, "mark_unread": unread}
        if self.json:
            print_json(answer)
            return
        state = {
            "trusted": f"signed here ({said['issuer']})",
            "valid": f"signed by somebody else ({said['issuer']}), and unchanged since",
            "invalid": "its credentials do not hold: it was changed, torn or badly signed",
            "not_present": "no credentials",
        }
        print(f"credentials: {state[said['validation_state']]}")
        for name in ("model", "generated_at"):
            if said.get(name) is not None:
                print(f"{name.replace('_', ' ')}: {said[name]}")
        found = f"could not be looked for ({unread})" if unread else "none found" if mark is None else "made here"
        print(f"mark: {'not looked for' if signer is None else found}")


def _mark(data: bytes, key: bytes) -> tuple[dict[str, Any] | None, str | None]:
    """The invisible mark of the server that has this key, and why it could not be looked for."""
    from tubelet.serve import intake, mark

    try:
        found = mark.detect_luma(intake.mean_luma(data), key)
    except intake.Refused as refused:
        return None, refused.code
    return (None if found is None else {"payload": found.payload, "score": found.score}), None


def _folder(asked: Path | None) -> Path:
    """The server's folder. By default the user's own for programs' data, and not one beside where the command was called: films
    are to be found again from anywhere."""
    if asked is not None:
        return asked.absolute()
    home = os.environ.get("XDG_DATA_HOME")
    return (Path(home) if home else Path.home() / ".local" / "share") / "tubelet"


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write in {folder}: {error.strerror or error}; choose another folder with --data") from error


def _url(store: str | None, data: Path) -> str:
    return store or os.environ.get(STORE) or f"sqlite:///{data / 'tubelet.db'}"


def _objects(asked: str | None) -> str | None:
    return asked or os.environ.get(OBJECTS) or None


def _moderation() -> Any:
    """Who is asked about the words of requests, where the environment names an endpoint (TUBELET_MODERATION_URL, with _KEY,
    _MODEL, _LENIENT=1 to let requests through while it does not answer, and _FRAMES=3 to show it so many of each film)."""
    from tubelet.serve.config import Moderation

    said = {name: os.environ.get(f"TUBELET_MODERATION_{name}", "") for name in ("URL", "KEY", "MODEL", "LENIENT", "FRAMES")}
    frames = said["FRAMES"] or "0"
    if not said["URL"]:
        if frames != "0":
            raise UserError("TUBELET_MODERATION_FRAMES needs TUBELET_MODERATION_URL; say where the endpoint is")
        return None
    if not frames.isdecimal():
        raise UserError(f"TUBELET_MODERATION_FRAMES is a number of frames, got {frames!r}; correct it")
    return Moderation(said["URL"], said["KEY"], said["MODEL"], said["LENIENT"] == "1", int(frames))
