"""The journals that workers keep while they make films: what becomes of those that stay behind."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tubelet.serve.jobs import Jobs


def tidy(folder: Path, jobs: Jobs) -> int:
    """Remove the journals of jobs that have ended or are gone; returns how many. Raises StorageFull when it cannot ask."""
    removed = 0
    for path in list(folder.iterdir()) if folder.is_dir() else ():
        job = jobs.get(path.name, None)
        if job is None or job.state in ("completed", "failed"):
            shutil.rmtree(path, ignore_errors=True)
            removed += 1
    return removed
