"""What a server is told before it starts. Reads `system.json` itself, so that no network is loaded into the API process."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tubelet.core.errors import UserError
from tubelet.core.files import read_json

if TYPE_CHECKING:
    from tubelet.text.expand import Expander

SYSTEM_FILE = "system.json"
SHIPPED = Path(__file__).parents[1] / "weights"
OFFERED_SIZES = ("1280x720", "720x1280", "1792x1024", "1024x1792", "1920x1080", "1080x1920")
"""Width x height, as Sora's clients ask for. A film is made at the system's own area and brought to the size."""
OFFERED_SECONDS = (4, 8, 12, 16, 20)
SORA_NAMES = ("sora-2", "sora-2-pro")
"""What Sora's clients ask for."""
_ALIAS = re.compile(r"([!-<>-~]{1,100})=(.+)")


@dataclass(frozen=True)
class SystemFacts:
    """What the API says of a system: its folder, native (height, width), frames, frames per second, steps and guidance."""

    name: str
    folder: Path
    size: tuple[int, int]
    frames: int
    fps: float
    steps: int
    guidance: float
    created: int = 0
    """Unix seconds; when its `system.json` was written."""
    expander: str | None = None
    """Whose rules rewrite its prompts."""

    @property
    def seconds(self) -> float:
        """Length of a native film."""
        return self.frames / self.fps

    @classmethod
    def read(cls, folder: str | Path) -> SystemFacts:
        """Facts of the system in a folder. Raises UserError when its `system.json` is missing or broken."""
        path = Path(folder) / SYSTEM_FILE
        values = read_json(path)
        try:
            height, width = (int(side) for side in values["size"])
            defaults: Mapping[str, Any] = values["defaults"]
            frames, fps = int(values["frames"]), float(values["fps"])
            steps, guidance = int(defaults["steps"]), float(defaults["guidance"])
            name, created = str(values["name"]), int(path.stat().st_mtime)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} does not state a system ({error}); restore it from its source") from error
        if min(height, width, frames, steps) < 1 or not fps > 0:
            raise UserError(f"{path} states a size, length or rate below 1; restore it from its source")
        return cls(name, Path(folder), (height, width), frames, fps, steps, guidance, created, values.get("expander"))


def shipped() -> list[str]:
    """Names of the systems that come with the package."""
    return sorted(path.parent.name for path in SHIPPED.glob(f"*/{SYSTEM_FILE}"))


RENAME = 'serve one of them, or give one another "name" in its system.json'


def read_systems(names: Iterable[str | Path]) -> dict[str, SystemFacts]:
    """Systems by name, in order; each is a shipped name or a folder. Raises UserError on one that is not there, or twice."""
    found: dict[str, SystemFacts] = {}
    for name in names:
        folder = SHIPPED / name if str(name) in shipped() else Path(name)
        if not (folder / SYSTEM_FILE).is_file():
            raise UserError(f"there is no system {str(name)!r}; shipped are: {', '.join(shipped())}; or give a folder")
        facts = SystemFacts.read(folder)
        if facts.name in found:
            raise UserError(f"two systems are called {facts.name!r}; {RENAME}")
        found[facts.name] = facts
    return found


def read_served(system: str, aliases: Iterable[str]) -> tuple[dict[str, SystemFacts], dict[str, str]]:
    """What a server serves: its systems, the default one first, and the systems' further names.

    `aliases` are written NAME=SYSTEM. SYSTEM is, like `system`, a shipped name or a folder, which is then served, too, or the
    name of one that is. Sora's names are the default system's unless they say otherwise. Raises UserError.
    """
    systems, named = read_systems([system]), dict[str, str]()
    default = next(iter(systems))
    for alias in aliases:
        found = _ALIAS.fullmatch(alias)
        if found is None:
            raise UserError(f"an alias is a name without blanks and a system, like sora-2={default}, got {alias!r}; correct it")
        name, wanted = found.groups()
        if name in named:
            raise UserError(f"the alias {name!r} is given twice; give it once")
        if wanted not in systems:
            ((wanted, facts),) = read_systems([wanted]).items()
            if not facts.folder.samefile(systems.setdefault(wanted, facts).folder):
                raise UserError(f"two systems are called {wanted!r}; {RENAME}")
        named[name] = wanted
    return systems, {name: default for name in SORA_NAMES if name not in systems} | named


def is_loopback(host: str) -> bool:
    """Whether a bind address or host name can only be reached from this machine."""
    name = host.strip("[]").lower()
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def check_binding(host: str, keys: bool) -> None:
    """Raises UserError when a server that asks for no key would listen to other machines."""
    if not keys and not is_loopback(host):
        raise UserError(
            f"without keys the server is for this machine only, and {host} lets others in; add --keys, or listen on 127.0.0.1"
        )


@dataclass(frozen=True)
class Moderation:
    """An endpoint like OpenAI's `/v1/moderations`, asked about the words of every request, and about what was made.

    Raises UserError when it cannot be one.
    """

    url: str
    """Its base, such as http://127.0.0.1:9000/v1."""
    key: str = field(default="", repr=False)
    model: str = ""
    """Empty: the endpoint's own."""
    lenient: bool = False
    """Let requests and films through while it does not answer; otherwise they are refused meanwhile."""
    frames: int = 0
    """How many frames of each film it is shown before anybody else sees it, and whether pictures; 0: only words."""
    patience: float = 5.0
    """Seconds that it may take."""

    def __post_init__(self) -> None:
        if urlsplit(self.url).scheme not in ("http", "https") or not urlsplit(self.url).hostname:
            raise UserError(f"the moderation endpoint must be an http or https address, got {self.url!r}; correct it")
        if not (self.key.isascii() and self.key.isprintable()):
            raise UserError("the moderation endpoint's key must be plain printable characters; copy it again")
        if self.frames < 0:
            raise UserError(f"the moderation endpoint can be shown 0 or more frames, got {self.frames}; correct it")


@dataclass(frozen=True)
class ServeConfig:
    """Settings of the API process. Raises UserError when they contradict each other.

    `data` holds everything that the server keeps, but for what `objects` does. `default` is the system of a request that names
    no model. `aliases` are other names of systems; a request by alias gets Sora's defaults (720x1280, 4 s), one by a system's
    own name the system's.
    """

    data: Path
    systems: Mapping[str, SystemFacts]
    objects: str | None = None
    """The address of an object store that holds films, uploads and copies of journals; None: `data` does."""
    default: str = ""
    """Empty: the first of `systems`."""
    aliases: Mapping[str, str] | None = None
    """None: `sora-2` and `sora-2-pro` are the default system."""
    host: str = "127.0.0.1"
    port: int = 8000
    keys: bool = False
    """Every request needs a key. Without keys the server is for this machine only."""
    cap: int = 100
    """Jobs that may be queued or running; the next one is refused until there is room."""
    hosts: tuple[str, ...] = ()
    """Further names under which this server may be reached (the `Host` header), without port."""
    origins: tuple[str, ...] = ()
    """Web origins, such as `https://studio.example`, whose pages may use this API from a browser."""
    fetch_images: bool = False
    """Fetch `image_url` from the internet. Data URLs and uploaded files work without."""
    webhooks_to_loopback: bool = False
    """Let webhooks go to http addresses on this machine: for trying them out."""
    expander: Expander | None = None
    """The chat model that rewrites prompts, the same one that the workers have; None: the rules of each system."""
    moderation: Moderation | None = None
    """Who is asked whether words may become a film; None: nobody."""
    ttl: float | None = None
    """Seconds that a finished film is kept; None: until it is deleted."""
    certificate: Path | None = None
    """An operator's own certificate chain (PEM) for signing, with `certificate_key`; None: the installation makes its own."""
    certificate_key: Path | None = None
    upload_limit: int = 128 * 2**20
    """Bytes of a whole request."""
    media_limit: int = 100 * 2**20
    """Bytes of one picture or clip."""
    connections: int = 2000
    """Open connections; who comes then is told to come again. Fewer where the system does not allow so many open files."""
    head_patience: float = 20.0
    """Seconds that a new connection may be silent, and that the head of a request may take from its first byte on."""
    request_patience: float = 60.0
    """Seconds that the body of a request may take, and one more for every `slowest` bytes of it that have come."""
    slowest: int = 16 * 2**10
    """Bytes a second of the slowest line on which a long upload comes through."""
    body_patience: float = 30.0
    """Seconds without a byte after which an upload is given up."""
    unread_patience: float = 600.0
    """Seconds without anything being read of an answer after which its connection is closed."""
    poll: float = 0.25
    """Seconds between two looks at the event log while somebody listens."""
    studio: Path = field(default=Path(__file__).parent / "studio")

    def __post_init__(self) -> None:
        if not self.systems:
            raise UserError("a server needs at least one system; name one, such as worlds-64")
        object.__setattr__(self, "default", self.default or next(iter(self.systems)))
        if self.aliases is None:
            object.__setattr__(self, "aliases", dict.fromkeys(SORA_NAMES, self.default))
        for name in (self.default, *self.named.values()):
            if name not in self.systems:
                raise UserError(f"there is no system {name!r} to serve; choose one of {', '.join(self.systems)}")
        clash = sorted(set(self.named) & set(self.systems))
        if clash:
            raise UserError(f"{clash[0]!r} is both a system and an alias; drop the alias")
        if self.cap < 1:
            raise UserError(f"the queue must hold at least 1 job, got {self.cap}; raise the cap")
        if self.ttl is not None and not self.ttl > 0:
            raise UserError(f"films must be kept longer than 0 seconds, got {self.ttl}; raise it or leave it out")
        for origin in self.origins:
            if not origin.startswith(("http://", "https://")) or origin.endswith("/") or origin.count("/") != 2:
                raise UserError(f"an origin is a scheme and a host such as https://studio.example, got {origin!r}; correct it")
        check_binding(self.host, self.keys)

    @property
    def named(self) -> Mapping[str, str]:
        """The aliases."""
        return self.aliases or {}

    @property
    def allowed_hosts(self) -> frozenset[str] | None:
        """Names that a `Host` header may have, lower case, without port; None: any.

        Without keys this keeps a web page from reaching the server under a name of its own that resolves to this machine. With
        keys such a page could not do anything, and a name behind a proxy is often not known here.
        """
        if self.keys and not self.hosts:
            return None
        own = {"localhost", "127.0.0.1", "::1", self.host.strip("[]").lower()}
        return frozenset(own | {host.lower() for host in self.hosts})

    def system(self, model: str) -> SystemFacts | None:
        """The system behind a model's name, its own or an alias."""
        return self.systems.get(self.named.get(model, model))
