"""What training never shows: every split beside its twin, truth beside noise."""

from __future__ import annotations

import pytest

from tubelet.core.errors import UserError
from tubelet.evaluate.splits import HELD_OUT, _pools, evaluate_splits
from tubelet.generate.system import System
from tubelet.worlds import WORLDS
from tubelet.worlds.constants import TEST_SEEDS


def test_every_split_has_its_figures_and_its_twin(system: System) -> None:
    figures = evaluate_splits(system, 2, progress=False)
    for name in HELD_OUT:
        own = f"split/{name}"
        assert figures[f"{own}/n"] == 2
        assert figures[f"{own}/caption"] < 0.35 <= figures[f"{own}/caption/floor"], "noise follows no caption"
        assert figures[f"{own}/caption/ceiling"] <= figures[f"{own}/caption/floor"]
        assert 0 <= figures[f"{own}/found"] <= 1
        assert (f"{own}/caption/trained" in figures) == (name != "compose")
    with pytest.raises(UserError, match="n must be at least 1"):
        evaluate_splits(system, 0)


@pytest.mark.parametrize("name", HELD_OUT)
def test_a_split_and_its_twin_share_kinds_and_no_composition(name: str) -> None:
    pools = dict(_pools(name))
    assert len(set(pools.values())) == 1
    mark = {"held_out_pair": "held_out_pair", "held_out_size": "held_out_size"}.get(name)
    for split, kinds in pools.items():
        for place, kind in enumerate(kinds * 2):
            episode = WORLDS["phys2d"].sample(TEST_SEEDS[place], 64, 64, 9, 8.0, kind=kind, split=split)
            assert episode.tags["split"] == split
            if mark is not None:
                assert episode.tags[mark] == (split == name)
