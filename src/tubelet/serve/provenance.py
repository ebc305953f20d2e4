"""Signed credentials (C2PA 2.x) inside every film and picture made here: who made it, with what, from what.

A signer holds a certificate chain and its key. By default each installation has its own: on first use it makes a root, lets
the root sign one certificate, and forgets the root's key, so that nothing on the disk can sign another certificate. An
operator may bring a chain and key instead, e.g. from the C2PA trust list. Nothing here uses a network.
Credentials are the last thing written into a file: any later remux drops them, which is what the mark in the pixels is for.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import hmac
import io
import json
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, cast

from tubelet import __version__
from tubelet.core.errors import UserError
from tubelet.serve import confine
from tubelet.serve.intake import Refused, sniff
from tubelet.serve.store import raise_if_full

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

MEDIA = ("video/mp4", "image/png", "image/jpeg", "image/webp", "image/gif")
"""What can be signed."""
TRAINED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
COMPOSITE = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
ASSERTION = "org.tubelet.generation"
IDENTITY, MARK_KEY = "identity.pem", "mark.key"
ROOT_YEARS, LEAF_YEARS = 40, 30  # without a time stamp, credentials are good for as long as the certificate is

State = Literal["trusted", "valid", "invalid", "not_present"]
_SETTINGS: dict[str, Any] = {
    "version": 1,
    "core": {"allowed_network_hosts": []},
    "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False},
    "builder": {"thumbnail": {"enabled": False}},
}
_PEM = re.compile(rb"-----BEGIN ([A-Z0-9 ]+)-----.+?-----END \1-----\n?", re.DOTALL)


@dataclass(frozen=True)
class Ingredient:
    """A file that another was made from. `credentials` is a C2PA manifest store that stood in it before it was normalised."""

    path: Path
    credentials: bytes | None = None


class Signer:
    """Signs files with one certificate, checks files against its root. Its methods may be called from many threads."""

    def __init__(self, chain: bytes, key: bytes, algorithm: str, mark_key: bytes) -> None:
        """`chain`: PEM certificates, the signing one first, the root last; `key`: its PEM key; `open` makes all of them."""
        self._chain, self._key, self._algorithm = chain, key, algorithm
        self.mark_key = mark_key

    @classmethod
    def open(cls, folder: Path, certificate: Path | None = None, key: Path | None = None) -> Signer:
        """The signer of an installation whose secrets are in `folder` (made where missing, for this user only).

        `certificate` and `key` name an operator's own PEM chain and private key. Raises UserError when they do not fit
        together or cannot sign, or when somebody else could read the folder's secrets.
        """
        folder = Path(folder)
        if (certificate is None) != (key is None):
            raise UserError("a certificate needs its key and a key its certificate; give both or neither")
        mark_key = bytes.fromhex(_secret(folder / MARK_KEY, lambda: secrets.token_hex(32).encode()).decode("ascii"))
        if certificate is None or key is None:
            identity = _secret(folder / IDENTITY, _new_identity)
            blocks = [match.group(0) for match in _PEM.finditer(identity)]
            return cls(b"".join(blocks[1:]), blocks[0], "es256", mark_key)
        chain, secret = _readable(certificate), _readable(key)
        return cls(chain, secret, _algorithm(chain, secret, certificate, key), mark_key)

    def root_pem(self) -> bytes:
        """The certificate that a verifier has to trust: the last of the chain."""
        return [match.group(0) for match in _PEM.finditer(self._chain)][-1]

    def prompt_hash(self, prompt: str) -> str:
        """A keyed hash of a prompt: this installation can confirm a prompt by it, and nobody else can guess one."""
        return hmac.new(self.mark_key, b"prompt\0" + prompt.encode(), hashlib.sha256).hexdigest()

    def sign(self, path: Path, media: str, facts: dict[str, Any], ingredients: Sequence[Path | Ingredient] = ()) -> None:
        """Put credentials into a finished file, in place: the file is the old one or the signed one, never between.

        facts: "video" (its id), "system", "digest" (of the weights), "seed", "steps", "task" as in a job request, "prompt"
        (only its hash is kept), "created_at" (unix seconds); those that are missing are left out.
        ingredients: what it was made from. In the tasks remix, edit and extend the first is the parent, else all are inputs.
        Raises UserError for media that cannot be signed or a file that is damaged, StorageFull when there is no room.
        """
        if media not in MEDIA:
            raise UserError(f"cannot sign {media}; choose one of {', '.join(MEDIA)}")
        path = Path(path)
        signed = self._signed(path, media, facts, [i if isinstance(i, Ingredient) else Ingredient(i) for i in ingredients])
        _replace(path, signed)

    def _signed(self, path: Path, media: str, facts: dict[str, Any], ingredients: Sequence[Ingredient]) -> bytes:
        import c2pa

        edited = facts.get("task") in ("remix", "edit", "extend") and bool(ingredients)
        names = [f"ingredient-{number}" for number in range(len(ingredients))]
        manifest = {
            "claim_generator_info": [{"name": "tubelet", "version": __version__}],
            "title": str(facts.get("video", "")) or path.stem,
            "assertions": [
                {"label": "c2pa.actions.v2", "data": {"actions": _actions(facts, names, edited)}, "created": True},
                {"label": ASSERTION, "data": self._generation(facts), "created": True},
            ],
        }
        settings = {**_SETTINGS, "trust": {"trust_anchors": self.root_pem().decode()}}
        out = io.BytesIO()
        try:
            with (
                c2pa.Context.from_dict(settings) as context,
                c2pa.Signer.from_info(c2pa.C2paSignerInfo(self._algorithm, self._chain, self._key, None)) as signer,
                c2pa.Builder.from_json(json.dumps(manifest), context) as builder,
            ):
                for number, ingredient in enumerate(ingredients):
                    relation = ("parentOf" if number == 0 else "componentOf") if edited else "inputTo"
                    words = {"title": "source", "relationship": relation, "label": names[number], "instance_id": names[number]}
                    _add(builder, context, words, ingredient)
                with open(path, "rb") as source:
                    builder.sign(signer, media, source, out)
        except c2pa.C2paError as error:
            raise UserError(f"{path} could not be signed as {media}; check that it is whole and of that type") from error
        return out.getvalue()

    def _generation(self, facts: dict[str, Any]) -> dict[str, Any]:
        kept = {
            name: facts[name] for name in ("video", "task", "seed", "steps", "system", "digest") if facts.get(name) is not None
        }
        if isinstance(facts.get("prompt"), str):
            kept["prompt_hash"] = self.prompt_hash(facts["prompt"])
        return kept

    def check(self, file: Path | bytes, media: str) -> dict[str, Any]:
        """What the credentials of a file say, and whether they hold; see `check`; only this signer's root is trusted."""
        return check(file, media, self.root_pem())


def check(file: Path | bytes, media: str, root: bytes | None = None) -> dict[str, Any]:
    """Read and verify the credentials of a file, or its bytes, that anybody may have made; in a confined child process.

    Gives "outcome" (found, not_found), "validation_state" (trusted: intact and signed under `root`; valid: intact, signed by
    somebody else; invalid: changed, torn or badly signed; not_present), "issuer", "model", "generated_at" (unix seconds, as
    the signer claims), "generation" (our own assertion), "manifests" (how many, ingredients included), "failures" (C2PA codes).
    Raises Refused when the file takes too long.
    """
    try:
        answer, _ = confine.run(__name__, {"media": media, "root": root.decode() if root else None}, file)
    except confine.ChildFailed as error:
        if error.reason == "timeout":  # says nothing about the file
            raise Refused("timeout") from None
        return _answer("invalid", failures=["unreadable"])
    return answer


def root_of(certificate: Path) -> bytes:
    """The root of an operator's PEM chain, its last certificate. Raises UserError when the file holds none."""
    found = [match.group(0) for match in _PEM.finditer(_readable(certificate)) if match.group(1) == b"CERTIFICATE"]
    if not found:
        raise UserError(f"{certificate} holds no PEM certificate; give the chain that films are signed with")
    return found[-1]


def _answer(state: State, **facts: Any) -> dict[str, Any]:
    empty = {"issuer": None, "model": None, "generated_at": None, "generation": {}, "manifests": 0, "failures": []}
    return {"outcome": "not_found" if state == "not_present" else "found", "validation_state": state, **empty, **facts}


def _actions(facts: dict[str, Any], names: list[str], edited: bool) -> list[dict[str, Any]]:
    """C2PA 2.2, 18.15: a new asset begins with `created`, one with a parent with `opened`; further sources are `placed`."""
    agent = {"name": "tubelet", "version": __version__}
    agent |= {name: str(facts[name]) for name in ("system", "digest") if facts.get(name) is not None}
    # An extension keeps frames of its source as they are, and an edit parts of them; a remix is painted anew all over.
    composite = edited and facts.get("task") != "remix"
    made: dict[str, Any] = {"digitalSourceType": COMPOSITE if composite else TRAINED, "softwareAgent": agent}
    if facts.get("created_at") is not None:
        made["when"] = (
            datetime.datetime.fromtimestamp(int(facts["created_at"]), datetime.UTC).isoformat().replace("+00:00", "Z")
        )
    if not edited:
        return [{"action": "c2pa.created", **made, **({"parameters": {"ingredientIds": names}} if names else {})}]
    actions = [{"action": "c2pa.opened", "parameters": {"ingredientIds": names[:1]}}, {"action": "c2pa.edited", **made}]
    if names[1:]:
        actions.append({"action": "c2pa.placed", "parameters": {"ingredientIds": names[1:]}})
    return actions


def _add(builder: Any, context: Any, words: dict[str, str], ingredient: Ingredient) -> None:
    """Name what a film was made from, with the credentials that it carried; broken ones must not stop the film."""
    import c2pa

    with open(ingredient.path, "rb") as source:
        media = sniff(source.read(64)) or "application/octet-stream"
        if ingredient.credentials is not None:
            with contextlib.suppress(c2pa.C2paError, ValueError, KeyError):
                source.seek(0)
                # The bytes they were bound to are gone, so the verdict holds a mismatch; who signed what can still be read.
                with c2pa.Reader(media, source, ingredient.credentials, context) as reader:
                    told = {"active_manifest": json.loads(reader.json())["active_manifest"]}
                    told["validation_results"] = reader.get_validation_results()
                reference = f"{words['label']}.c2pa"
                builder.add_resource(reference, io.BytesIO(ingredient.credentials))
                told["manifest_data"] = {"format": "application/c2pa", "identifier": reference}
                source.seek(0)
                builder.add_ingredient(json.dumps({**words, **told}), media, source)
                return
        source.seek(0)
        builder.add_ingredient(json.dumps(words), media, source)


def _replace(path: Path, data: bytes) -> None:
    handle, name = -1, ""
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with open(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), stat.S_IMODE(path.stat().st_mode))
            os.fsync(file.fileno())
        os.replace(name, path)
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise_if_full(error)
        raise


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _secret(path: Path, make: Callable[[], bytes]) -> bytes:
    """The bytes of a secret file, made when it is missing. Of several processes that start at once, one makes it for all."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not path.exists():
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # 0600 from the start
        try:
            with open(handle, "wb") as file:
                file.write(make())
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(FileExistsError):
                os.link(name, path)
            _sync_folder(path.parent)
        finally:
            os.unlink(name)
    if path.stat().st_mode & 0o077:
        raise UserError(f"{path} can be read by other users; take that right away (chmod 600 {path}) or make a new one")
    return path.read_bytes()


def _readable(path: Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; check the name and its rights") from error


def _new_identity() -> bytes:
    """PEM: a fresh signing key, its certificate, and the root that signed it; the root's own key is not kept."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID

    root_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    # Two installations must not share a name, or their roots would be taken for one another.
    install = secrets.token_hex(4)
    root_name, name = _name(f"tubelet root {install}"), _name(f"tubelet {install}")
    bits = dict.fromkeys(
        (
            "digital_signature",
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "key_cert_sign",
            "crl_sign",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    root = (
        _certificate(root_name, root_name, root_key.public_key(), ROOT_YEARS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.KeyUsage(**(bits | {"key_cert_sign": True, "crl_sign": True})), critical=True)
        .sign(root_key, hashes.SHA256())
    )
    leaf = (
        _certificate(name, root_name, key.public_key(), LEAF_YEARS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(**(bits | {"digital_signature": True})), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key.public_key()), critical=False)
        .sign(root_key, hashes.SHA256())
    )
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return secret + b"".join(c.public_bytes(serialization.Encoding.PEM) for c in (leaf, root))


def _name(common: str) -> x509.Name:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    # The organisation is what readers show as the issuer.
    organisation = x509.NameAttribute(NameOID.ORGANIZATION_NAME, "tubelet (self-made certificate)")
    return x509.Name([organisation, x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _certificate(subject: x509.Name, issuer: x509.Name, public: Any, years: int) -> x509.CertificateBuilder:
    from cryptography import x509

    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))  # clocks of other machines may be slow
        .not_valid_after(now + datetime.timedelta(days=365 * years))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _algorithm(chain: bytes, secret: bytes, certificate: Path, key: Path) -> str:
    """The C2PA name of the signature that an operator's key makes. Raises UserError when chain and key cannot sign."""
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization

    try:
        leaf = x509.load_pem_x509_certificates(chain)[0]
    except ValueError as error:
        raise UserError(f"{certificate} holds no PEM certificate; give the chain, the signing certificate first") from error
    try:
        private = serialization.load_pem_private_key(secret, None)
    except (ValueError, TypeError) as error:
        raise UserError(f"{key} is no PEM private key without a password; export it so, for this user alone") from error
    if private.public_key() != leaf.public_key():
        raise UserError(f"{key} does not belong to the first certificate of {certificate}; give the signing certificate first")
    if not leaf.not_valid_before_utc <= datetime.datetime.now(datetime.UTC) <= leaf.not_valid_after_utc:
        raise UserError(f"{certificate} is not valid today; renew it")
    algorithm = _algorithm_of(private)
    if algorithm is None:
        raise UserError(
            f"{key} is no key that C2PA knows; make one for EC P-256, P-384 or P-521, for Ed25519, or for RSA with 2048 bits"
        )
    return algorithm


def _algorithm_of(private: PrivateKeyTypes) -> str | None:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    if isinstance(private, ec.EllipticCurvePrivateKey):
        return {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}.get(private.curve.name)
    if isinstance(private, ed25519.Ed25519PrivateKey):
        return "ed25519"
    return "ps256" if isinstance(private, rsa.RSAPrivateKey) and private.key_size >= 2048 else None


# --- the child ---------------------------------------------------------------------------------------------------------------


def _prepare(request: dict[str, Any]) -> None:
    import c2pa

    c2pa.sdk_version()


def _work(request: dict[str, Any], file: BinaryIO) -> tuple[dict[str, Any], Sequence[bytes]]:
    import c2pa

    settings = dict(_SETTINGS)
    if request["root"]:
        settings["trust"] = {"trust_anchors": request["root"]}
    try:
        with c2pa.Context.from_dict(settings) as context, c2pa.Reader(request["media"], file, context=context) as reader:
            return _told(json.loads(reader.json())), ()
    except c2pa.C2paError as error:
        file.seek(0)
        # A torn file cannot be searched: whether it once had credentials shows by the name of their outermost box.
        torn = not str(error).startswith("ManifestNotFound") and b"jumdc2pa" in file.read()
        return (_answer("invalid", failures=["unreadable"]) if torn else _answer("not_present")), ()


def _told(store: dict[str, Any]) -> dict[str, Any]:
    manifest = store["manifests"][store["active_manifest"]]
    assertions = {assertion["label"]: assertion["data"] for assertion in manifest.get("assertions", [])}
    made = [a for a in assertions.get("c2pa.actions.v2", {}).get("actions", []) if a.get("softwareAgent")]
    agent = made[0]["softwareAgent"] if made else {}
    generated_at = None
    with contextlib.suppress(IndexError, KeyError, ValueError, TypeError):
        generated_at = int(datetime.datetime.fromisoformat(made[0]["when"]).timestamp())
    results = store.get("validation_results", {}).get("activeManifest", {})
    state = cast(State, str(store.get("validation_state", "Invalid")).lower())
    return _answer(
        state,
        issuer=manifest.get("signature_info", {}).get("issuer"),
        model=(agent.get("system") or agent.get("name")) if isinstance(agent, dict) else str(agent),
        generated_at=generated_at,
        generation=assertions.get(ASSERTION, {}),
        manifests=len(store["manifests"]),
        failures=[failure["code"] for failure in results.get("failure", [])],
    )


if __name__ == "__main__":
    confine.serve(_work, prepare=_prepare, threads=True)
