from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tubelet.core.errors import UserError
from tubelet.core.types import Video
from tubelet.evaluate import report
from tubelet.evaluate.laws import LAWS
from tubelet.text.human_prompts import HUMAN_PROMPTS
from tubelet.worlds import WORLDS
from tubelet.worlds.constants import TEST_SEEDS


class Same(nn.Module):
    """A codec that loses nothing."""

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents


class Film:
    def __init__(self, clip: np.ndarray) -> None:
        self.video = Video.from_uint8(clip, 8.0)


class Oracle:
    """A system that films every prompt truly, or, where `blind`, shows an empty wall."""

    def __init__(self, blind: bool = False) -> None:
        self.codec, self.blind, self.asked = Same(), blind, 0
        self.known = {}
        for split in report.SPLITS:
            for kinds in {law.kinds for law in LAWS.values()} | {report.KINDS}:
                for case in report.make_cases(kinds, 2, split):
                    self.known[case.text] = case.truth

    def generate_batch(self, prompts: Any, seeds: Any, **settings: Any) -> list[Film]:
        assert len(prompts) == len(seeds)
        self.asked += len(prompts)
        empty = np.full((17, 64, 64, 3), 235, np.uint8)
        return [Film(empty if self.blind else self.known[prompt]) for prompt in prompts]


def test_an_oracle_scores_full_and_every_name_is_there():
    oracle, shown = Oracle(), []
    figures = report.evaluate_system(oracle, n=2, samples=2, show=lambda *film: shown.append(film), progress=False)
    names = [f"caption/{facet}" for facet in ("colour", "shape", "size", "direction", "event")] + [f"law/{law}" for law in LAWS]
    for name in names:
        for split in ("in", "held_out"):
            assert figures[f"{name}/{split}"] == figures[f"{name}/{split}/floor"] == figures[f"{name}/{split}/ceiling"] == 1.0
            assert f"{name}/{split}/chance" in figures
            assert figures[f"{name}/{split}/n"] <= (4 if name == "law/steady" else 2)
            if name.startswith("law/"):
                assert figures[f"{name}/{split}/evaluable"] == 1.0
                assert figures[f"{name}/{split}/control"] <= 0.5
    for kind in report.KINDS[:2]:
        assert figures[f"kind/{kind}/in"] == figures[f"kind/{kind}/held_out/floor"] == figures[f"kind/{kind}/in/n"] == 1.0
    assert figures["codec/psnr"] == figures["codec/psnr_foreground"] == 100.0
    assert figures["codec/law/gravity"] == figures["codec/caption/shape"] == 1.0
    for name in ("codec/psnr", "codec/psnr_foreground"):
        assert {f"{name}/{beside}" for beside in ("floor", "ceiling", "chance", "n")} <= set(figures)
    assert all(isinstance(value, float) for value in figures.values())
    # Captions, flights, slides, collisions, panels, paint and food; steadiness is judged on flights and slides.
    assert oracle.asked == 2 * 2 * 2 * 7
    assert len(shown) == 2 * 2 * 2
    assert all(np.array_equal(film, oracle.known[text]) for film, text in shown)


def test_codec_figures_count_the_films_that_name_them():
    figures = report.truth_figures(2, ("in",), codec=Same())
    # Two prompts: one facet is named by both of them, a kind by one, and steadiness is judged on slides beside.
    assert figures["codec/caption/event/n"] == 2.0
    assert figures["codec/kind/slide/n"] == figures["codec/kind/fall/n"] == 1.0
    assert figures["codec/law/steady/n"] == 4.0


def test_untrackable_films_count_as_failures():
    figures = report.evaluate_system(Oracle(blind=True), n=2, samples=1, splits=("in",), progress=False)
    generated = [k for k in figures if k.count("/") == 2 and k.endswith("/in")]
    assert len(generated) == 5 + len(LAWS) + 2, "facets, laws and the kinds of two prompts"
    assert all(figures[k] == 0.0 for k in generated)
    assert all(figures[f"law/{law}/in/evaluable"] == 0.0 for law in LAWS)
    assert figures["law/gravity/in/floor"] == 1.0


def test_clips_and_law_cards():
    episodes = [WORLDS["phys2d"].sample(TEST_SEEDS[i], kind=kind) for i, kind in enumerate(("slide", "fall", "collision"))]
    clips, wanted = [e.video for e in episodes], [e.tags["scene"] for e in episodes]
    figures = report.evaluate_clips(clips, wanted)
    assert figures["caption/colour"] == 1.0
    assert figures["caption/colour/n"] == 3
    assert figures["kind/collision"] == figures["kind/collision/n"] == 1.0
    assert figures["law/steady/n"] == 2
    assert report.law_card(clips, wanted)["momentum"] == (1.0, 1.0, 1)
    assert "paint" not in report.law_card(clips, wanted)
    with pytest.raises(UserError, match="one caption per clip"):
        report.evaluate_clips(clips, wanted[:2])


def test_splits_hold_out_and_styles_differ():
    held = report.make_cases(("slide",), 8, "held_out")
    plain = report.make_cases(("slide",), 8)
    assert all(c.seed in TEST_SEEDS for c in held + plain)
    assert {c.text for c in held}.isdisjoint(c.text for c in plain)
    human = report.make_cases(("slide",), 8, style="human")
    assert [c.seed for c in human] == [c.seed for c in plain]
    assert all(len(c.wanted["objects"][0]) <= 3 for c in human)
    dense = report.make_cases(("slide",), 8, style="dense")
    assert np.mean([len(c.text) for c in dense]) > np.mean([len(c.text) for c in plain])
    moved = report.make_cases(("slide",), 8, seed=1000)
    assert {c.seed for c in moved}.isdisjoint(c.seed for c in plain)


def test_human_prompts():
    class Painter(Oracle):
        def __init__(self) -> None:
            self.codec = Same()
            self.known = {
                p.text: WORLDS[p.world].sample(TEST_SEEDS[5], kind=p.kind, wish=report.scene_of(p)).video for p in HUMAN_PROMPTS
            }
            self.blind, self.asked = False, 0

    shown = []
    figures = report.evaluate_human(Painter(), samples=1, show=lambda _, text: shown.append(text), progress=False)
    assert figures["human/all/n"] == 30
    assert figures["human/all"] >= 0.85
    assert figures["human/colour"] >= 0.9
    assert shown == [prompt.text for prompt in HUMAN_PROMPTS]
    with pytest.raises(UserError, match="samples"):
        report.evaluate_human(Painter(), samples=0)


def test_the_table_has_a_row_for_each_name():
    text = report.table(
        {
            "law/gravity/in": 0.5,
            "law/gravity/in/floor": 1.0,
            "law/gravity/in/n": 200.0,
            "law/gravity/in/control/no_gravity": 0.25,
        }
    )
    rows = text.splitlines()
    assert len(rows) == 2
    assert rows[1].split() == ["law/gravity/in", "0.500", "1.000", "200"]
    assert report.table({}).split()[0] == "value"


@pytest.mark.parametrize(("n", "samples"), [(0, 4), (2, 0), (-1, 1)])
def test_bad_counts_are_refused(n, samples):
    with pytest.raises(UserError, match="at least 1"):
        report.evaluate_system(Oracle.__new__(Oracle), n=n, samples=samples)


def test_unknown_splits_and_styles_are_refused():
    with pytest.raises(UserError, match="split"):
        report.make_cases(("slide",), 1, "sideways")
    with pytest.raises(UserError, match="style"):
        report.make_cases(("slide",), 1, style="haiku")
