"""Which addresses the server may be sent to, and what it does there."""

from __future__ import annotations

import datetime
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from anyio import CapacityLimiter
from api_rig import png, serving

from tubelet.serve import outbound
from tubelet.serve.outbound import Outbound, Unreachable, is_public, target

NAMES = {
    "public.example": ["93.184.215.14"],
    "six.example": ["2606:2800:21f:cb07:6820:80da:af6b:8b2c"],
    "private.example": ["10.0.0.7"],
    "mixed.example": ["93.184.215.14", "127.0.0.1"],
    "meta.example": ["169.254.169.254"],
    "local.example": ["::1"],
    "mapped.example": ["::ffff:127.0.0.1"],
    "nothing.example": [],
}


def resolver(host: str, port: int) -> list[str]:
    """A name service of few names; an address is its own."""
    if host in NAMES:
        return NAMES[host]
    try:
        return [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, flags=socket.AI_NUMERICHOST)]
    except OSError as error:
        raise Unreachable("no such name") from error


HOSTILE = [
    "https://127.0.0.1/",
    "https://127.1/",
    "https://127.0.0.1.:443/",
    "https://0/",
    "https://0.0.0.0/",
    "https://2130706433/",
    "https://0x7f000001/",
    "https://0x7f.0.0.1/",
    "https://0177.0.0.1/",
    "https://017700000001/",
    "https://127.0.0.1%2f.public.example/",
    "https://localhost/",
    "https://[::1]/",
    "https://[::]/",
    "https://[::ffff:127.0.0.1]/",
    "https://[::ffff:7f00:1]/",
    "https://[::127.0.0.1]/",
    "https://[64:ff9b::7f00:1]/",
    "https://[2002:7f00:1::]/",
    "https://[2001:0:7f00:1::]/",
    "https://[2001:db8::1]/",
    "https://[fe80::1]/",
    "https://[fe80::1%25eth0]/",
    "https://[fc00::1]/",
    "https://[fd12:3456::1]/",
    "https://[ff02::1]/",
    "https://[100::1]/",
    "https://10.1.2.3/",
    "https://172.16.0.1/",
    "https://192.168.1.1/",
    "https://100.64.0.1/",
    "https://169.254.169.254/latest/meta-data/",
    "https://192.0.0.8/",
    "https://192.0.2.1/",
    "https://198.18.0.1/",
    "https://198.51.100.7/",
    "https://203.0.113.9/",
    "https://224.0.0.1/",
    "https://240.0.0.1/",
    "https://255.255.255.255/",
    "https://private.example/",
    "https://mixed.example/",
    "https://meta.example/",
    "https://local.example/",
    "https://mapped.example/",
    "https://nothing.example/",
    "https://unknown.example/",
    "http://public.example/",
    "https://public.example:80/",
    "https://public.example:22/",
    "https://public.example:65536/",
    "https://public.example:x/",
    "https://user@public.example/",
    "https://user:password@127.0.0.1/",
    "https://public.example@127.0.0.1/",
    "https://public.example\\@127.0.0.1/",
    "https://127.0.0.1\\.public.example/",
    "https:\\\\public.example/",
    "https:/public.example/",
    "https:public.example",
    "//public.example/",
    "public.example",
    "",
    "https://",
    "https:///a",
    "https://.public.example/",
    "https://pub lic.example/",
    "https://public.example/a b",
    "https://public.example/\r\nhost: evil",
    "https://public.example/\x00",
    "https://p\u00fcblic.example/",
    "https://public\u3002example/",
    "https://\u2460\u2461\u2466.0.0.1/",
    "https://-a.example/",
    "https://a..example/",
    "https://" + "a" * 64 + ".example/",
    "https://" + "a." * 140 + "example/",
    "https://public.example/" + "a" * 5000,
    "file:///etc/passwd",
    "ftp://public.example/",
    "gopher://127.0.0.1:6379/_INFO",
    "unix:///var/run/docker.sock",
    "javascript:alert(1)",
    "https+unix://public.example/",
]


def test_hostile_addresses() -> None:
    assert len(HOSTILE) >= 60
    for url in HOSTILE:
        with pytest.raises(Unreachable):
            target(url, resolver=resolver)


def test_good_addresses() -> None:
    for url, address, path in (
        ("https://public.example/a.png?b=c#d", "93.184.215.14", "/a.png?b=c"),
        ("HTTPS://PUBLIC.example:443", "93.184.215.14", "/"),
        ("https://six.example/", NAMES["six.example"][0], "/"),
        ("https://93.184.215.14/", "93.184.215.14", "/"),
        ("https://[2606:2800:21f:cb07:6820:80da:af6b:8b2c]/", NAMES["six.example"][0], "/"),
    ):
        goal = target(url, resolver=resolver)
        assert (goal.address, goal.path, goal.port, goal.tls) == (address, path, 443, True)


def test_loopback_only_when_told_so() -> None:
    for url in ("http://127.0.0.1:8080/hook", "http://[::1]:8080/", "https://local.example:9/"):
        with pytest.raises(Unreachable):
            target(url, resolver=resolver)
        assert target(url, loopback=True, resolver=resolver).address in ("127.0.0.1", "::1")
    for url in ("http://10.0.0.7:8080/", "http://public.example/", "https://mixed.example/", "http://169.254.169.254/"):
        with pytest.raises(Unreachable):
            target(url, loopback=True, resolver=resolver)


def test_what_is_public() -> None:
    for address in ("93.184.215.14", "8.8.8.8", "2606:4700:4700::1111"):
        assert is_public(address)
    for address in ("", "localhost", "1.2.3", "::ffff:8.8.8.8", "2001:db8::1", "2606:4700::1%eth0", "127.0.0.1"):
        assert not is_public(address)


class Site:
    """A server on this machine that answers every connection with the same bytes."""

    def __init__(self, answer: Callable[[socket.socket], None], context: ssl.SSLContext | None = None) -> None:
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen()
        self.seen: list[bytes] = []
        self.answer, self.context = answer, context
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                line, _ = self.listener.accept()
            except OSError:
                return
            try:
                line.settimeout(10)
                if self.context is not None:
                    line = self.context.wrap_socket(line, server_side=True)
                head = b""
                while b"\r\n\r\n" not in head and (piece := line.recv(4096)):
                    head += piece
                self.seen.append(head)
                self.answer(line)
            except OSError:
                pass
            finally:
                line.close()

    def outbound(self, trusted: ssl.SSLContext | None = None) -> Outbound:
        """Reaches this site whatever address it is told: the check of the address has happened by then."""
        host, port = self.listener.getsockname()
        dialled = lambda address, _port, timeout: self.note(address, socket.create_connection((host, port), timeout))  # noqa: E731
        self.addresses: list[str] = []
        return Outbound(resolver=resolver, dial=dialled, context=trusted)

    def note(self, address: str, line: socket.socket) -> socket.socket:
        self.addresses.append(address)
        return line


def said(*pieces: bytes, wait: float = 0.0) -> Callable[[socket.socket], None]:
    def answer(line: socket.socket) -> None:
        for piece in pieces:
            line.sendall(piece)
            time.sleep(wait)

    return answer


@pytest.fixture(scope="module")
def contexts(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A certificate for public.example, and a context that trusts it."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, "public.example")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("public.example")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = tmp_path_factory.mktemp("tls") / "site.pem"
    plain = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    pem.write_bytes(plain + certificate.public_bytes(serialization.Encoding.PEM))
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(pem)
    return server, ssl.create_default_context(cafile=pem)


OK = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nbytes"


def test_a_picture_is_fetched_from_the_pinned_address(contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    site = Site(said(OK), contexts[0])
    outbound = site.outbound(contexts[1])
    assert outbound.fetch("https://public.example/a.png", limit=5) == b"bytes"
    assert site.addresses == ["93.184.215.14"]
    assert site.seen[0].startswith(b"GET /a.png HTTP/1.1\r\n")
    assert b"public.example" in site.seen[0]


def test_a_certificate_of_another_name_is_refused(contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    site = Site(said(OK), contexts[0])
    with pytest.raises(Unreachable):
        site.outbound(contexts[1]).fetch("https://six.example/a.png", limit=5)
    with pytest.raises(Unreachable):
        site.outbound().fetch("https://public.example/a.png", limit=5)
    assert site.seen == []


ANSWERS = [
    b"HTTP/1.1 302 Found\r\nlocation: https://public.example/b\r\n\r\n",
    b"HTTP/1.1 404 No\r\ncontent-length: 0\r\n\r\n",
    b"HTTP/1.1 204 No\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nbytes!",
    b"HTTP/1.1 200 OK\r\n\r\nmore than five bytes",
    b"HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\nbytes",
    b"HTTP/1.1 200 OK\r\nx: " + b"a" * 100_000 + b"\r\n\r\n",
    b"nonsense\r\n\r\n",
    b"",
]


@pytest.mark.parametrize("answer", ANSWERS, ids=range(len(ANSWERS)))
def test_other_answers_are_no_pictures(answer: bytes, contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    site = Site(said(answer), contexts[0])
    with pytest.raises(Unreachable):
        site.outbound(contexts[1]).fetch("https://public.example/a.png", limit=5)
    assert len(site.seen) == 1, "one question, no redirect followed"


def test_dripping_answers_are_cut(contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    """Each byte comes in time, the whole does not."""
    for pieces in ([b"HTTP/1.1 200 OK\r\n", *[b"x"] * 100], [b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n", *[b"x"] * 100]):
        site = Site(said(*pieces, wait=0.1), contexts[0])
        begin = time.monotonic()
        with pytest.raises(Unreachable):
            site.outbound(contexts[1]).fetch("https://public.example/a.png", limit=1000, timeout=0.5)
        assert time.monotonic() - begin < 5


def test_a_refused_connection_is_an_answer() -> None:
    def closed(_address: str, _port: int, _timeout: float) -> socket.socket:
        raise ConnectionRefusedError

    with pytest.raises(Unreachable):
        Outbound(resolver=resolver, dial=closed).fetch("https://public.example/", limit=5)


def test_a_name_that_does_not_resolve_in_time_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    done, places = threading.Event(), threading.BoundedSemaphore(4)
    monkeypatch.setattr(outbound, "_LOOKING", places)

    def slow(host: str, port: int) -> list[str]:
        done.wait(20)
        return resolver(host, port)

    begin = time.monotonic()
    with pytest.raises(Unreachable):
        target("https://public.example/", resolver=slow, timeout=0.1)
    with pytest.raises(Unreachable):
        Outbound(resolver=slow).fetch("https://public.example/", limit=5, timeout=0.1)
    assert time.monotonic() - begin < 5
    for _ in range(2):
        with pytest.raises(Unreachable):
            target("https://public.example/", resolver=slow, timeout=0.1)
    with pytest.raises(Unreachable, match="too many"):
        target("https://public.example/", resolver=resolver, timeout=0.1)
    done.set()
    assert target("https://public.example/", resolver=resolver, timeout=10).address == "93.184.215.14"
    assert all(places.acquire(timeout=10) for _ in range(4)), "each place is given back"


def test_the_time_for_a_name_is_taken_from_the_whole() -> None:
    seen: list[float] = []

    def slow(host: str, port: int) -> list[str]:
        time.sleep(0.3)
        return resolver(host, port)

    def dialled(_address: str, _port: int, timeout: float) -> socket.socket:
        seen.append(timeout)
        raise ConnectionRefusedError

    with pytest.raises(Unreachable):
        Outbound(resolver=slow, dial=dialled).fetch("https://public.example/", limit=5, timeout=10.0)
    assert 0 < seen[0] <= 9.7


def test_what_a_name_service_says_is_not_lost() -> None:
    def broken(_host: str, _port: int) -> list[str]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        target("https://public.example/", resolver=broken)
    with pytest.raises(Unreachable, match="does not resolve"):
        target("https://nothing.example/", resolver=resolver)


@pytest.mark.parametrize("way", ["check", "test", "fetch"])
def test_waits_for_other_servers_use_no_thread_of_those_that_read_or_decode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """One thread reads and one decodes, and while another server keeps all waiting both are free."""
    gate, inside = threading.Event(), threading.Semaphore(0)

    def slow(_resolver: object, host: str, port: int, _timeout: float) -> list[str]:
        inside.release()
        gate.wait(20)
        return resolver(host, port)

    with serving(tmp_path, working=False, fetch_images=True) as rig:
        room = rig.app.state.service
        room.readers, room.decoders = CapacityLimiter(1), CapacityLimiter(1)
        room.outbound = Outbound(resolver=resolver)
        hook = {"name": "n", "url": "https://public.example/", "event_types": ["video.failed"]}
        made = rig.client.post("/v1/webhook_endpoints", json=hook).json()["id"]
        monkeypatch.setattr(outbound, "_resolved", slow)
        path, body = {
            "check": ("/v1/webhook_endpoints", hook),
            "test": (f"/v1/webhook_endpoints/{made}/test", {"event_type": "video.failed"}),
            "fetch": ("/v1/videos", {"prompt": "p", "input_reference": {"image_url": "https://public.example/a.png"}}),
        }[way]
        asked = [body if way == "test" else body | ({"seed": n} if way == "fetch" else {"name": f"n{n}"}) for n in range(3)]
        threads = [threading.Thread(target=rig.client.post, args=(path,), kwargs={"json": fields}) for fields in asked]
        for thread in threads:
            thread.start()
        try:
            for _ in threads:
                assert inside.acquire(timeout=10), "all three wait at once"
            picture = {"prompt": (None, "q"), "input_reference": ("a.png", png())}
            assert rig.client.post("/v1/videos", files=picture).status_code == 200
            assert rig.client.get("/v1/queue").status_code == 200
        finally:
            gate.set()
            for thread in threads:
                thread.join(20)


@pytest.fixture
def fetching(tmp_path: Path) -> Iterator[object]:
    with serving(tmp_path, working=False, fetch_images=True) as rig:
        yield rig


def test_the_client_learns_nothing(fetching: object, contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    rig = fetching
    picture = png()
    good = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(picture) + picture
    site = Site(said(good), contexts[0])
    rig.app.state.service.outbound = site.outbound(contexts[1])  # type: ignore[attr-defined]

    def ask(url: str) -> tuple[int, dict[str, str]]:
        answer = rig.client.post("/v1/videos", json={"prompt": "p", "input_reference": {"image_url": url}})  # type: ignore[attr-defined]
        return answer.status_code, answer.json().get("error")

    assert ask("https://public.example/a.png")[0] == 200
    answers = [
        ask(url) for url in ("https://10.0.0.7/", "https://unknown.example/", "https://six.example/", "http://public.example/")
    ]
    assert all(answer == answers[0] for answer in answers), "one answer for all, whatever is behind it"
    assert answers[0][0] == 400
    assert answers[0][1]["code"] == "image_url_unreachable"
