"""Credentials: what was signed is trusted, every change shows, and nothing needs a network or shows a prompt."""

from __future__ import annotations

import datetime
import errno
import hashlib
import io
import json
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from PIL import Image

from tubelet.core.errors import UserError
from tubelet.media.encode import save
from tubelet.serve import provenance
from tubelet.serve.intake import admit, credentials_in
from tubelet.serve.provenance import Ingredient, Signer, check
from tubelet.serve.records import StorageFull

FACTS = {
    "video": "video_0123456789abcdefghijklmnop",
    "task": "create",
    "system": "worlds-64",
    "digest": "0f" * 32,
    "seed": 123,
    "steps": 20,
    "prompt": "a red ball bounces beside my house",
    "created_at": 1_790_000_000.7,
}
MEDIA = {"video/mp4": ".mp4", "image/png": ".png", "image/jpeg": ".jpg", "image/webp": ".webp"}


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    return Signer.open(tmp_path_factory.mktemp("provenance") / "secrets")


def made(folder: Path, media: str = "video/mp4", seed: int = 0) -> Path:
    """A finished file that nobody has signed."""
    frames = np.random.default_rng(seed).integers(0, 256, (9, 16, 16, 3), dtype=np.uint8).repeat(4, 1).repeat(4, 2)
    path = folder / f"film-{seed}{MEDIA[media]}"
    if media == "video/mp4":
        return save(frames, path, 8.0)
    Image.fromarray(frames[0]).save(path)
    return path


def frames_of(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="yuv420p") for frame in container.decode(video=0)])


def state(path: Path, media: str, root: bytes | None) -> str:
    answer = check(path, media, root)
    assert answer["outcome"] == ("not_found" if answer["validation_state"] == "not_present" else "found")
    return answer["validation_state"]


def with_byte_flipped(path: Path, at: int) -> Path:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    other = path.with_stem(f"{path.stem}-flipped")
    other.write_bytes(data)
    return other


@pytest.mark.parametrize("media", MEDIA)
def test_what_was_signed_is_trusted_under_its_root_alone(signer: Signer, tmp_path: Path, media: str) -> None:
    path = made(tmp_path, media)
    before = path.read_bytes()
    assert state(path, media, signer.root_pem()) == "not_present"
    signer.sign(path, media, FACTS)
    assert path.read_bytes() != before
    assert signer.check(path, media)["validation_state"] == "trusted"
    assert state(path, media, None) == "valid"
    other = Signer.open(tmp_path / "other")
    assert state(path, media, other.root_pem()) == "valid"
    assert [entry for entry in tmp_path.iterdir() if entry.is_file()] == [path]


def test_the_credentials_say_who_with_what_and_when(signer: Signer, tmp_path: Path) -> None:
    path = made(tmp_path)
    signer.sign(path, "video/mp4", FACTS)
    answer = signer.check(path, "video/mp4")
    assert answer["issuer"] == "tubelet (self-made certificate)"
    assert answer["model"] == "worlds-64"
    assert answer["generated_at"] == 1_790_000_000
    assert answer["manifests"] == 1
    assert answer["failures"] == []
    expected = {name: FACTS[name] for name in ("video", "task", "seed", "steps", "system", "digest")}
    assert answer["generation"] == expected | {"prompt_hash": signer.prompt_hash(FACTS["prompt"])}
    json.dumps(answer)


def actions_of(path: Path, media: str = "video/mp4") -> list[dict]:
    import c2pa

    with c2pa.Context() as context, open(path, "rb") as file, c2pa.Reader(media, file, context=context) as reader:
        store = json.loads(reader.json())
    assertions = store["manifests"][store["active_manifest"]]["assertions"]
    return next(assertion["data"]["actions"] for assertion in assertions if assertion["label"] == "c2pa.actions.v2")


def test_machines_read_that_it_is_synthetic(signer: Signer, tmp_path: Path) -> None:
    path = made(tmp_path)
    signer.sign(path, "video/mp4", FACTS)
    (action,) = actions_of(path)
    assert action["action"] == "c2pa.created"
    assert action["digitalSourceType"] == "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
    agent = action["softwareAgent"]
    assert (agent["name"], agent["system"], agent["digest"]) == ("tubelet", "worlds-64", "0f" * 32)


def test_the_prompt_is_in_no_file_and_cannot_be_guessed_from_outside(signer: Signer, tmp_path: Path) -> None:
    path = made(tmp_path)
    signer.sign(path, "video/mp4", FACTS)
    data = path.read_bytes()
    prompt = str(FACTS["prompt"])
    assert b"red ball" not in data
    assert signer.prompt_hash(prompt).encode() in data
    assert hashlib.sha256(prompt.encode()).hexdigest().encode() not in data
    assert Signer.open(tmp_path / "other").prompt_hash(prompt) != signer.prompt_hash(prompt)


def test_facts_that_are_missing_are_left_out(signer: Signer, tmp_path: Path) -> None:
    path = made(tmp_path)
    signer.sign(path, "video/mp4", {})
    answer = signer.check(path, "video/mp4")
    assert answer["validation_state"] == "trusted"
    assert answer["generation"] == {}
    assert answer["generated_at"] is None


def test_a_signed_film_shows_the_same_frames(signer: Signer, tmp_path: Path) -> None:
    path = made(tmp_path)
    before = frames_of(path)
    signer.sign(path, "video/mp4", FACTS)
    assert np.array_equal(frames_of(path), before)


@pytest.mark.parametrize("media", MEDIA)
def test_a_flipped_bit_is_seen_in_the_picture_and_in_the_credentials(signer: Signer, tmp_path: Path, media: str) -> None:
    path = made(tmp_path, media)
    signer.sign(path, media, FACTS)
    data = path.read_bytes()
    marker, behind = {
        "video/mp4": (b"mdat", 200),
        "image/png": (b"IDAT", 50),
        "image/jpeg": (b"\xff\xda", 200),
        "image/webp": (b"VP8 ", 100),
    }[media]
    places = {"pixels": data.rindex(marker) + behind}
    places |= {"source type": data.index(b"trainedAlgorithmicMedia") + 3, "seed": data.index(b"seed") + 5}
    places["certificate"] = data.index(b"self-made") + 2
    for name, at in places.items():
        answer = signer.check(with_byte_flipped(path, at), media)
        assert answer["validation_state"] == "invalid", name
        assert answer["failures"], name


@pytest.mark.parametrize("media", MEDIA)
def test_a_cut_file_is_invalid(signer: Signer, tmp_path: Path, media: str) -> None:
    path = made(tmp_path, media)
    signer.sign(path, media, FACTS)
    data = path.read_bytes()
    assert b"jumdc2pa" in data[: len(data) - 30]
    path.write_bytes(data[: len(data) - 30])
    assert state(path, media, signer.root_pem()) == "invalid"


def test_a_remux_takes_the_credentials_away(signer: Signer, tmp_path: Path) -> None:
    path, copy = made(tmp_path), tmp_path / "copy.mp4"
    signer.sign(path, "video/mp4", FACTS)
    with av.open(str(path)) as source, av.open(str(copy), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    assert np.array_equal(frames_of(copy), frames_of(path))
    assert state(copy, "video/mp4", signer.root_pem()) == "not_present"


def test_bytes_that_are_no_media_have_no_credentials(tmp_path: Path) -> None:
    path = tmp_path / "no.mp4"
    for data in (b"", b"text", os.urandom(1000), b"\x00\x00\x00\x18ftypisom" + os.urandom(500)):
        path.write_bytes(data)
        assert state(path, "video/mp4", None) == "not_present"
    path.write_bytes(b"\x00\x00\x00\x18ftypisom" + b"jumdc2pa" * 10)
    assert state(path, "video/mp4", None) == "invalid"


@pytest.mark.parametrize("task", ["remix", "extend", "edit"])
def test_a_chain_of_two_parents_is_kept(signer: Signer, tmp_path: Path, task: str) -> None:
    first, second, third = (made(tmp_path, seed=number) for number in range(3))
    signer.sign(first, "video/mp4", FACTS)
    signer.sign(second, "video/mp4", FACTS | {"task": task, "video": "second"}, [first])
    signer.sign(third, "video/mp4", FACTS | {"task": task, "video": "third"}, [second])
    answer = signer.check(third, "video/mp4")
    assert answer["validation_state"] == "trusted"
    assert answer["manifests"] == 3
    assert answer["generation"]["video"] == "third"
    opened, edited = actions_of(third)
    assert (opened["action"], edited["action"]) == ("c2pa.opened", "c2pa.edited")
    kind = "trainedAlgorithmicMedia" if task == "remix" else "compositeWithTrainedAlgorithmicMedia"
    assert edited["digitalSourceType"].endswith(f"/{kind}")
    assert len(opened["parameters"]["ingredients"]) == 1
    at = third.read_bytes().rindex(b"second")
    assert signer.check(with_byte_flipped(third, at), "video/mp4")["validation_state"] == "invalid"


def ingredients_of(path: Path, media: str = "video/mp4") -> list[dict]:
    import c2pa

    with c2pa.Context() as context, open(path, "rb") as file, c2pa.Reader(media, file, context=context) as reader:
        store = json.loads(reader.json())
    return store["manifests"][store["active_manifest"]].get("ingredients", [])


def test_two_films_joined_and_a_picture_that_began_a_film(signer: Signer, tmp_path: Path) -> None:
    first, second, joined, begun = (made(tmp_path, seed=number) for number in range(4))
    picture = made(tmp_path, "image/png")
    signer.sign(joined, "video/mp4", FACTS | {"task": "edit"}, [first, second])
    assert [found["relationship"] for found in ingredients_of(joined)] == ["parentOf", "componentOf"]
    assert [action["action"] for action in actions_of(joined)] == ["c2pa.opened", "c2pa.edited", "c2pa.placed"]
    signer.sign(begun, "video/mp4", FACTS, [picture])
    (used,) = ingredients_of(begun)
    assert (used["relationship"], used["format"]) == ("inputTo", "image/png")
    assert [action["action"] for action in actions_of(begun)] == ["c2pa.created"]
    for path in (joined, begun):
        assert signer.check(path, "video/mp4")["validation_state"] == "trusted"


@pytest.mark.parametrize("media", MEDIA)
def test_credentials_of_an_upload_outlive_its_normalisation(signer: Signer, tmp_path: Path, media: str) -> None:
    upload, film = made(tmp_path, media), made(tmp_path, seed=5)
    signer.sign(upload, media, FACTS | {"video": "uploaded"})
    admitted = admit(upload.read_bytes())
    assert admitted.credentials == credentials_in(upload.read_bytes(), media)
    assert admitted.credentials is not None
    assert b"jumdc2pa" not in admitted.data
    kept = tmp_path / "kept"
    kept.write_bytes(admitted.data)
    signer.sign(film, "video/mp4", FACTS | {"task": "edit"}, [Ingredient(kept, admitted.credentials)])
    answer = signer.check(film, "video/mp4")
    assert (answer["validation_state"], answer["manifests"]) == ("trusted", 2)
    assert b"uploaded" in film.read_bytes()


@pytest.mark.parametrize("media", MEDIA)
def test_large_credentials_are_found_whole(signer: Signer, tmp_path: Path, media: str) -> None:
    """JPEG cuts them into segments of 64 KB."""
    import c2pa

    note = {"label": "org.example.note", "data": {"text": "x" * 150_000}, "created": True}
    manifest = json.dumps({"claim_generator_info": [{"name": "stranger"}], "assertions": [note]})
    out = io.BytesIO()
    with (
        c2pa.Context() as context,
        c2pa.Signer.from_info(c2pa.C2paSignerInfo("es256", signer._chain, signer._key, None)) as native,
        c2pa.Builder.from_json(manifest, context) as builder,
        open(made(tmp_path, media), "rb") as source,
    ):
        builder.set_intent(c2pa.C2paBuilderIntent.CREATE, c2pa.C2paDigitalSourceType.DIGITAL_CREATION)
        store = builder.sign(native, media, source, out)
    assert len(store) > 150_000
    assert credentials_in(out.getvalue(), media) == store


@pytest.mark.parametrize("credentials", [b"", b"noise", os.urandom(5000), b"\0\0\0\x10jumb" + bytes(100)])
def test_broken_credentials_of_an_upload_do_not_stop_a_film(signer: Signer, tmp_path: Path, credentials: bytes) -> None:
    source, film = made(tmp_path), made(tmp_path, seed=1)
    signer.sign(film, "video/mp4", FACTS | {"task": "edit"}, [Ingredient(source, credentials)])
    answer = signer.check(film, "video/mp4")
    assert (answer["validation_state"], answer["manifests"]) == ("trusted", 1)


# --- keys --------------------------------------------------------------------------------------------------------------------


def test_an_installation_keeps_its_identity_to_itself(tmp_path: Path) -> None:
    folder = tmp_path / "provenance"
    first, again = Signer.open(folder), Signer.open(folder)
    assert first.root_pem() == again.root_pem()
    assert first.mark_key == again.mark_key
    assert len(first.mark_key) == 32
    assert folder.stat().st_mode & 0o077 == 0
    assert {path.name for path in folder.iterdir()} == {"identity.pem", "mark.key"}
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in folder.iterdir())
    assert Signer.open(tmp_path / "other").root_pem() != first.root_pem()
    (folder / "identity.pem").chmod(0o640)
    with pytest.raises(UserError, match="chmod 600"):
        Signer.open(folder)


def test_the_certificate_is_what_c2pa_asks_for_and_the_root_key_is_gone(tmp_path: Path) -> None:
    signer = Signer.open(tmp_path / "provenance")
    identity = (tmp_path / "provenance" / "identity.pem").read_bytes()
    assert identity.count(b"PRIVATE KEY-----") == 2  # one key, its two marks
    key = serialization.load_pem_private_key(identity, None)
    leaf, root = x509.load_pem_x509_certificates(identity)
    assert signer.root_pem() == root.public_bytes(serialization.Encoding.PEM)
    leaf.verify_directly_issued_by(root)
    assert key.public_key() == leaf.public_key() != root.public_key()
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert key.curve.name == "secp256r1"
    usage = leaf.extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical
    assert usage.value.digital_signature
    assert not usage.value.key_cert_sign
    assert list(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [ExtendedKeyUsageOID.EMAIL_PROTECTION]
    assert leaf.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
    assert leaf.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier)
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert root.extensions.get_extension_for_class(x509.BasicConstraints).value == x509.BasicConstraints(True, 0)
    assert leaf.not_valid_after_utc > datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=20 * 365)


def test_many_that_start_at_once_share_one_identity(tmp_path: Path) -> None:
    barrier, found = threading.Barrier(8), []

    def start() -> None:
        barrier.wait()
        signer = Signer.open(tmp_path / "provenance")
        found.append((signer.root_pem(), signer.mark_key))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    assert sorted(os.listdir(tmp_path / "provenance")) == ["identity.pem", "mark.key"]


def operator(folder: Path, key, *, days: int = 30) -> tuple[Path, Path, bytes]:
    """A chain of three as a certification authority would give it, its key, and the root."""
    now = datetime.datetime.now(datetime.UTC)
    names = [
        x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Example Films"), x509.NameAttribute(NameOID.COMMON_NAME, n)])
        for n in "rms"
    ]
    keys = [ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1()), key]
    chain = []
    for place in range(3):
        above = max(0, place - 1)
        usage = [place == 2, False, False, False, False, place < 2, place < 2, False, False]
        builder = (
            x509.CertificateBuilder()
            .subject_name(names[place])
            .issuer_name(names[above])
            .public_key(keys[place].public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=60))
            .not_valid_after(now + datetime.timedelta(days=days if place == 2 else 30))
            .add_extension(x509.BasicConstraints(place < 2, None), critical=True)
            .add_extension(x509.KeyUsage(*usage), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(keys[place].public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(keys[above].public_key()), critical=False)
        )
        if place == 2:
            builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False)
        chain.append(builder.sign(keys[above], hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    certificate, secret = folder / "chain.pem", folder / "key.pem"
    certificate.write_bytes(b"".join(reversed(chain)))
    secret.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return certificate, secret, chain[0]


@pytest.mark.parametrize(
    "make",
    [
        lambda: ec.generate_private_key(ec.SECP256R1()),
        lambda: ec.generate_private_key(ec.SECP384R1()),
        lambda: ed25519.Ed25519PrivateKey.generate(),
        lambda: rsa.generate_private_key(65537, 2048),
    ],
)
def test_an_operator_signs_with_their_own_certificate(tmp_path: Path, make: Callable) -> None:
    certificate, key, root = operator(tmp_path, make())
    signer = Signer.open(tmp_path / "provenance", certificate, key)
    assert signer.root_pem() == root
    assert not (tmp_path / "provenance" / "identity.pem").exists()
    path = made(tmp_path)
    signer.sign(path, "video/mp4", FACTS)
    answer = signer.check(path, "video/mp4")
    assert (answer["validation_state"], answer["issuer"]) == ("trusted", "Example Films")
    assert state(path, "video/mp4", None) == "valid"


def test_certificates_that_cannot_sign_are_refused_in_words(tmp_path: Path) -> None:
    certificate, key, _ = operator(tmp_path, ec.generate_private_key(ec.SECP256R1()))
    folder = tmp_path / "provenance"
    with pytest.raises(UserError, match="both or neither"):
        Signer.open(folder, certificate)
    with pytest.raises(UserError, match="cannot read"):
        Signer.open(folder, tmp_path / "no.pem", key)
    with pytest.raises(UserError, match="no PEM certificate"):
        Signer.open(folder, key, key)
    with pytest.raises(UserError, match="no PEM private key"):
        Signer.open(folder, certificate, certificate)
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(UserError, match="does not belong"):
        Signer.open(folder, certificate, operator(other, ec.generate_private_key(ec.SECP256R1()))[1])
    with pytest.raises(UserError, match="not valid today"):
        Signer.open(folder, *operator(other, ec.generate_private_key(ec.SECP256R1()), days=-1)[:2])
    with pytest.raises(UserError, match="no key that C2PA knows"):
        Signer.open(folder, *operator(other, ec.generate_private_key(ec.SECP256K1()))[:2])


# --- files and networks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_unsigned_file_whole(
    signer: Signer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = made(tmp_path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(StorageFull):
        signer.sign(path, "video/mp4", FACTS)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    signer.sign(path, "video/mp4", FACTS)
    assert signer.check(path, "video/mp4")["validation_state"] == "trusted"


def test_signing_keeps_the_rights_of_the_file(signer: Signer, tmp_path: Path) -> None:
    path = made(tmp_path)
    path.chmod(0o640)
    signer.sign(path, "video/mp4", FACTS)
    assert path.stat().st_mode & 0o777 == 0o640


def test_what_cannot_be_signed_is_said(signer: Signer, tmp_path: Path) -> None:
    path = tmp_path / "torn.mp4"
    path.write_bytes(made(tmp_path).read_bytes()[:100])
    with pytest.raises(UserError, match="could not be signed"):
        signer.sign(path, "video/mp4", FACTS)
    with pytest.raises(UserError, match="cannot sign text/plain"):
        signer.sign(path, "text/plain", FACTS)
    assert path.stat().st_size == 100


def test_no_network_is_used(signer: Signer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials may name a URL where they are kept: reading such a file must not reach there, from this process either."""
    import c2pa

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a socket was made")

    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        path = made(tmp_path, "image/jpeg")
        out = io.BytesIO()
        manifest = json.dumps({"claim_generator_info": [{"name": "stranger"}]})
        with (
            c2pa.Context() as context,
            c2pa.Signer.from_info(c2pa.C2paSignerInfo("es256", signer._chain, signer._key, None)) as native,
            c2pa.Builder.from_json(manifest, context) as builder,
            open(path, "rb") as source,
        ):
            builder.set_intent(c2pa.C2paBuilderIntent.CREATE, c2pa.C2paDigitalSourceType.DIGITAL_CREATION)
            builder.set_no_embed()
            builder.set_remote_url(f"http://127.0.0.1:{server.getsockname()[1]}/manifest.c2pa")
            builder.sign(native, "image/jpeg", source, out)
        path.write_bytes(out.getvalue())
        assert b"manifest.c2pa" in out.getvalue()
        monkeypatch.setattr(socket, "socket", forbidden)
        told, _ = provenance._work({"media": "image/jpeg", "root": None}, io.BytesIO(out.getvalue()))
        assert told["validation_state"] == "not_present"
        assert signer.check(path, "image/jpeg")["validation_state"] == "not_present"
        film = made(tmp_path)
        signer.sign(film, "video/mp4", FACTS | {"task": "edit"}, [path])
        assert signer.check(film, "video/mp4")["validation_state"] == "trusted"
        with pytest.raises(BlockingIOError):
            server.accept()
