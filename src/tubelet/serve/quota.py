"""How many seconds of film a key may ask for each day, and how many bytes its things may take.

The count of seconds outlives restarts, and the films that are deleted; bytes are those that are there.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tubelet.serve.errors import ApiError

if TYPE_CHECKING:
    from tubelet.serve.jobs import Jobs
    from tubelet.serve.records import Asset
    from tubelet.serve.store import Assets

USAGE = "usage"
DAY = 86400
"""Seconds of a day, which begins at midnight UTC."""
GB = 10**9


def today() -> int:
    """Days since 1970."""
    return int(time.time() // DAY)


def spent(jobs: Jobs, owner: str) -> float:
    """Seconds of film that a key has asked for today."""
    usage = jobs.find(USAGE, owner, owner)
    return float(usage["seconds"]) if usage is not None and usage["day"] == today() else 0.0


def charge(jobs: Jobs, owner: str, seconds: float) -> None:
    """Add to what a key has asked for today."""
    jobs.put(USAGE, owner, owner, {"day": today(), "seconds": spent(jobs, owner) + seconds})


def seconds_of(request: Mapping[str, Any]) -> float:
    """Seconds of film that a job's request makes; none for pictures."""
    if request["task"] == "image":
        return 0.0
    return float(request["seconds"] or (request.get("source") or {}).get("seconds") or 0.0)


def kept(jobs: Jobs, store: Assets, owner: str, new: Sequence[Asset] = ()) -> tuple[int, int]:
    """Bytes of the files that a key's films, uploads and characters name, each once; and of those `new` ones that are not."""
    names = jobs.referenced(owner, pictures=False)
    return store.weigh(names), sum({asset.id: asset.bytes for asset in new if asset.id not in names}.values())


def headers(daily: float, left: float) -> dict[str, str]:
    """What an answer says of the limit."""
    return {
        "x-ratelimit-limit-seconds": f"{daily:g}",
        "x-ratelimit-remaining-seconds": f"{max(0.0, left):g}",
        "x-ratelimit-reset-seconds": f"{DAY - time.time() % DAY:.0f}s",
    }


def exhausted(daily: float, left: float) -> ApiError:
    """HTTP 429, not to be tried again: a key would ask for more than its `daily` seconds, of which some are left."""
    said = f"This key may ask for {daily:g} seconds of film a day, and {max(0.0, left):g} are left; ask for less, or tomorrow."
    return ApiError(429, said, code="insufficient_quota", param="seconds")


def too_full(stored: float, bytes: int) -> ApiError:
    """HTTP 429, not to be tried again: a key's things take `bytes`, or would, of the `stored` GB that they may."""
    said = f"This key may keep {stored:g} GB, and its films and files would take {bytes / GB:.3g}; delete some first."
    return ApiError(429, said, code="insufficient_quota")
