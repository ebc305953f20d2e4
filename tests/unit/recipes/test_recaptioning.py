"""The recaptioning experiment: its blends, what it needs, and what captions are worth."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tubelet.core.errors import UserError
from tubelet.curate.degrade import Rates, alt_text
from tubelet.data.schema import Record
from tubelet.data.shards import ShardDataset, ShardWriter
from tubelet.recipes import load_recipe
from tubelet.recipes.recaptioning import Recaptioning, name_of, worth
from tubelet.recipes.worlds import Job, render_one


def test_the_papers_blends_are_the_rows() -> None:
    experiment = load_recipe("recaptioning")
    assert [name_of(share) for share in experiment.blends] == [
        "degraded", "recaptioned-065", "recaptioned-080", "recaptioned-095", "recaptioned-100"
    ]  # fmt: skip
    assert (experiment.written, replace(experiment, captioner="world").written) == ("dense@captioner", "dense")


@pytest.mark.parametrize("blends", [(), (0.5, 0.5), (0.5, 0.501), (-0.1,), (1.1,), (float("nan"),)])
def test_blends_are_different_shares(blends: tuple[float, ...]) -> None:
    with pytest.raises(UserError, match="blends are different shares"):
        Recaptioning(blends=blends)


def test_what_is_missing_is_named_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no system"):
        Recaptioning(whole=str(tmp_path / "no")).run(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="clips and n must be at least 1"):
        Recaptioning(n=0)


def test_the_worth_of_captions(tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        for number in range(90):
            job, _, _, captions = render_one(Job("phys2d", number, (16, 16), 2, 8.0))
            bare = Record(job.key, {"latent": torch.zeros(1, 1, 1, 1)}, {"captions": captions})
            alt = alt_text(bare, Rates(0.5, 0.0, 0.0, 0.1))
            writer.add(Record(bare.key, bare.tensors, {"captions": [*captions, alt]}))
    figures = worth(ShardDataset(tmp_path), ("alt", "dense@phys2d"))
    for facet in ("colour", "shape", "size", "direction", "event"):
        assert figures[f"dense@phys2d/{facet}"] == 1.0
        assert 0.1 < figures[f"alt/{facet}"] < 0.6
    assert figures["dense@phys2d/words"] > 30 > figures["alt/words"]
