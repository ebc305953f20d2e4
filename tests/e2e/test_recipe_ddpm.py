"""ddpm in small: two networks, four rows, chains of two lengths; stopped and resumed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tubelet.recipes.ddpm import ROWS
from tubelet.train.pixels import PixelObjective

SETTINGS = (
    "unet.width=8",
    "unet.groups=4",
    "unet.size=16",
    "pictures=6",
    "steps=[2,4]",
    "n=3",
    "bounded=2",
    *(f"train.{one}" for one in ("steps=2", "batch=2", "warmup=0", "precision=fp32", "progress=false")),
)
SMALL = [word for setting in SETTINGS for word in ("--set", setting)]


def test_ddpm_stopped_and_resumed(
    tmp_path: Path, tubelet: Callable, refused: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("train", "ddpm", "--out", tmp_path, *SMALL)
    calls, loss = 0, PixelObjective.__call__

    def interrupted(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 3:  # the hybrid's first step
            os.kill(os.getpid(), signal.SIGINT)
        return loss(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(PixelObjective, "__call__", interrupted)
        assert tubelet(*words).code == 130
    assert not (tmp_path / "table.md").exists()
    assert tubelet(*words).code == 0
    table = json.loads((tmp_path / "table.json").read_text())
    assert list(table) == [*ROWS, "truth"]
    for name in ROWS:
        row = table[name]
        for steps in (2, 4):
            assert row[f"frechet/{steps}"] > 0
            assert np.isfinite(row[f"kid/{steps}"])
            assert row[f"seconds/{steps}"] > 0
            assert (f"bound/{steps}" in row) == ("DDIM" not in name)
            assert row.get(f"bound/{steps}", 1.0) > 0
    assert table["hybrid"]["parameters"] > table["L_simple, beta"]["parameters"]
    assert table["L_simple, beta"]["bound/2"] != table["L_simple, beta tilde"]["bound/2"]
    assert table["truth"]["frechet/2"] == table["truth"]["frechet/4"]
    assert (tmp_path / "sheet.png").exists()
    assert "begun with other settings of 'steps'" in refused(*words, "--set", "steps=[2]")
    assert "kinds are some of" in refused(*words, "--set", 'kinds=["paint"]')
    for steps in ("[]", "[1]", "[1001]"):
        assert "shorter ones from 2 on" in refused(*words, "--set", f"steps={steps}")
