"""The only connections that the API process opens: to fetch a picture that a client names, and to deliver webhooks.

A client who may name an address could make the server speak to machines that only the server can reach. So a name is resolved
once, every address behind it must be public, that very address is dialled, and nothing is redirected.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from urllib.parse import urlsplit

Resolver = Callable[[str, int], list[str]]
Dial = Callable[[str, int, float], socket.socket]

_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")
_CLOSED_4 = [
    ipaddress.IPv4Network(net)
    for net in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
        "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/3",
    )
]  # fmt: skip
_OPEN_6 = ipaddress.IPv6Network("2000::/3")
_CLOSED_6 = [ipaddress.IPv6Network(net) for net in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")]
_CHUNK = 64 * 1024
RESOLVING = 5.0
"""Seconds that a name may take to resolve where nothing else is said."""
_LOOKING = threading.BoundedSemaphore(64)
"""Names that are looked up at once: a thread that waits for a name service cannot be called back."""


class Unreachable(Exception):  # noqa: N818  an answer, not a defect
    """The address may not be used, or does not answer as it should. The reason is for the log only: a client who learnt it
    could explore a network with it."""


@dataclass(frozen=True)
class Target:
    """An address that passed: where to connect, and what to ask for."""

    host: str
    port: int
    path: str
    address: str
    tls: bool


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the open internet. Forms that wrap another address inside are not taken as public."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv4Address):
        return not any(ip in net for net in _CLOSED_4)
    return ip.scope_id is None and ip in _OPEN_6 and not any(ip in net for net in _CLOSED_6)


def resolve(host: str, port: int) -> list[str]:
    """All addresses of a name. Raises Unreachable when it has none."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise Unreachable("the name does not resolve") from error
    return [str(entry[4][0]) for entry in found]


def _name(host: str | None) -> str:
    """A host as it may be: an IPv6 address, a plain dotted IPv4 address, or a name whose last label is no number."""
    if not host or len(host) > 253:
        raise Unreachable("no host")
    if ":" in host:
        try:
            return str(ipaddress.IPv6Address(host))
        except ValueError as error:
            raise Unreachable("a broken address") from error
    labels = host.removesuffix(".").split(".")
    if not all(_LABEL.fullmatch(label) for label in labels):
        raise Unreachable("a broken name")
    if labels[-1].isdigit() or labels[-1].startswith("0x"):
        try:
            return str(ipaddress.IPv4Address(host))
        except ValueError as error:
            raise Unreachable("an address in an unusual form") from error
    return host


def _resolved(resolver: Resolver, host: str, port: int, timeout: float) -> list[str]:
    """What `resolver` finds within `timeout` seconds. Raises Unreachable."""
    until = time.monotonic() + timeout
    if not _LOOKING.acquire(timeout=timeout):
        raise Unreachable("too many names are looked up")
    found: Future[list[str]] = Future()

    def look() -> None:
        try:
            found.set_result(resolver(host, port))
        except Exception as error:  # noqa: BLE001  who waits for it is told
            found.set_exception(error)
        finally:
            _LOOKING.release()

    thread = threading.Thread(target=look, name="resolver", daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        _LOOKING.release()
        raise Unreachable("no thread to look a name up") from error
    try:
        return found.result(max(0.0, until - time.monotonic()))
    except TimeoutError as error:
        raise Unreachable("the name service does not answer") from error


def target(url: str, *, loopback: bool = False, resolver: Resolver | None = None, timeout: float = RESOLVING) -> Target:
    """Check an address and resolve its name, once, within `timeout` seconds. Raises Unreachable.

    Only https on port 443 to public addresses passes. `loopback`: http(s) on any port passes, too, when all of the name's
    addresses are this machine's own.
    """
    if len(url) > 4096 or not url.isascii() or not url.isprintable() or any(sign in url for sign in ' \\"<>^`{|}'):
        raise Unreachable("an address with signs that do not belong there")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise Unreachable("a broken address") from error
    if parts.scheme not in ("http", "https") or "@" in parts.netloc or not url.lower().startswith(f"{parts.scheme}://"):
        raise Unreachable("not an https address")
    host = _name(parts.hostname)
    tls = parts.scheme == "https"
    port = (443 if tls else 80) if port is None else port
    addresses = _resolved(resolver or resolve, host, port, timeout)
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    if not addresses:
        raise Unreachable("the name does not resolve")
    if loopback and all(_is_own(address) for address in addresses):
        return Target(host, port, path, addresses[0], tls)
    if not tls or port != 443 or not all(is_public(address) for address in addresses):
        raise Unreachable("not a public https address")
    return Target(host, port, path, addresses[0], tls)


def _is_own(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def dial(address: str, port: int, timeout: float) -> socket.socket:
    """A connection to one address; no name is resolved."""
    return socket.create_connection((address, port), timeout=timeout)


@dataclass(frozen=True)
class Outbound:
    """How addresses are reached. `loopback`: also this machine's own, for trying webhooks out."""

    loopback: bool = False
    resolver: Resolver = field(default=resolve)
    dial: Dial = field(default=dial)
    context: ssl.SSLContext | None = None

    def fetch(self, url: str, *, limit: int, timeout: float = 10.0) -> bytes:
        """The bytes at an address: at most `limit`, within `timeout` seconds in all. Raises Unreachable."""
        with self._asked("GET", url, None, {"accept": "image/*"}, timeout) as answer:
            if answer.status != 200:
                raise Unreachable(f"status {answer.status}")
            said = answer.headers.get("content-length", "0")
            if not said.isdigit() or int(said) > limit:
                raise Unreachable("too large")
            data = bytearray()
            while chunk := answer.read1(_CHUNK):
                data += chunk
                if len(data) > limit:
                    raise Unreachable("too large")
            return bytes(data)

    def post(self, url: str, body: bytes, headers: Mapping[str, str], *, timeout: float = 5.0) -> int:
        """Deliver a body; the status of the answer, whose text nobody reads. Raises Unreachable."""
        with self._asked("POST", url, body, headers, timeout) as answer:
            return answer.status

    @contextlib.contextmanager
    def _asked(
        self, method: str, url: str, body: bytes | None, headers: Mapping[str, str], timeout: float
    ) -> Iterator[http.client.HTTPResponse]:
        """One exchange. A timer ends it: a socket's own timeout begins anew with every byte that drips in."""
        until = time.monotonic() + timeout
        goal = target(url, loopback=self.loopback, resolver=self.resolver, timeout=timeout)
        late = threading.Event()
        connection = http.client.HTTPConnection(goal.host, goal.port)
        plain: socket.socket | None = None
        timer: threading.Timer | None = None
        try:
            plain = self.dial(goal.address, goal.port, max(0.01, until - time.monotonic()))

            def hang_up(line: socket.socket = plain) -> None:
                late.set()
                with contextlib.suppress(OSError):
                    line.shutdown(socket.SHUT_RDWR)

            line = plain
            if goal.tls:
                context = self.context or ssl.create_default_context()
                line = context.wrap_socket(plain, server_hostname=goal.host, do_handshake_on_connect=False)
            timer = threading.Timer(max(0.0, until - time.monotonic()), hang_up, (line,))
            timer.daemon = True
            timer.start()
            if isinstance(line, ssl.SSLSocket):
                line.do_handshake()
            connection.sock = line
            connection.request(method, goal.path, body, {**headers, "user-agent": "tubelet", "accept-encoding": "identity"})
            with connection.getresponse() as answer:
                yield answer
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise Unreachable(f"no proper answer ({type(error).__name__})") from error
        finally:
            if timer is not None:
                timer.cancel()
            connection.close()
            if plain is not None:
                plain.close()
        if late.is_set():
            raise Unreachable("too slow")
