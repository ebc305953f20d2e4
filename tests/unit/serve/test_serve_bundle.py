"""The studio's bundle: whole, small, and built from the sources beside it."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[3]
SOURCES = REPOSITORY / "studio"
BUNDLE = REPOSITORY / "src" / "tubelet" / "serve" / "studio"


def test_page_of_the_bundle_names_its_own_files_only() -> None:
    page = (BUNDLE / "index.html").read_text()
    named = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert any(name.endswith(".js") for name in named)
    assert any(name.endswith(".css") for name in named)
    for name in named:
        assert re.fullmatch(r"\./assets/[\w-]+-[\w-]{8}\.(js|css|svg)", name), name
        assert (BUNDLE / name).is_file(), name
    assert {path.name for path in (BUNDLE / "assets").iterdir()} == {Path(name).name for name in named}


def test_bundle_obeys_the_content_policy() -> None:
    page = (BUNDLE / "index.html").read_text()
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", page)
    for path in (BUNDLE / "assets").glob("*.js"):
        assert not re.search(r"\beval\(|\bnew Function\b|\bimport\(", path.read_text()), path


def test_bundle_is_small() -> None:
    scripts = sum(len(gzip.compress(path.read_bytes())) for path in (BUNDLE / "assets").glob("*.js"))
    assert 10_000 < scripts < 150_000


def test_bundle_was_built_from_these_sources() -> None:
    built = json.loads((BUNDLE / "sources.json").read_text())
    single = ["index.html", "package.json", "package-lock.json", "svelte.config.js", "tsconfig.json", "vite.config.ts"]
    paths = [SOURCES / name for name in single] + [path for path in (SOURCES / "src").rglob("*") if path.is_file()]
    now = {path.relative_to(SOURCES).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    assert built == now, "the bundle is stale: run npm ci && npm run build in studio/"
