"""Traces (W3C Trace Context): which request of another system a job came from, so that log lines here can be joined to it."""

from __future__ import annotations

import re
from collections.abc import Sequence

_PARENT = re.compile(r"(?!ff)([0-9a-f]{2})-((?!0{32})[0-9a-f]{32})-((?!0{16})[0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


def parent_of(headers: Sequence[str]) -> str | None:
    """What the `traceparent` headers of a request say, in the form of version 00; None where there is not one good one.

    Nothing but hexadecimal numbers of fixed length comes through. A later version may say more behind these.
    """
    found = _PARENT.fullmatch(headers[0]) if len(headers) == 1 else None
    if found is None or (found[1] == "00" and found[5] is not None):
        return None
    return f"00-{found[2]}-{found[3]}-{found[4]}"


def id_of(parent: str | None) -> str | None:
    """The trace's id, 32 hexadecimal digits."""
    return None if parent is None else parent.split("-")[1]
