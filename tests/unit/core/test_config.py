"""Typed settings from JSON: numbers are finite wherever they stand."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import pytest

from tubelet.core.config import from_dict, to_dict, with_defaults
from tubelet.core.errors import UserError


@dataclass(frozen=True)
class Inner:
    rate: float = 1.0


@dataclass(frozen=True)
class Settings:
    rate: float | None = 1.0
    pair: tuple[float, float] = (0.0, 1.0)
    shares: dict[str, float] = field(default_factory=dict)
    inner: Inner = field(default_factory=Inner)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1" + "0" * 400])
@pytest.mark.parametrize(
    ("text", "where"),
    [
        ('{"rate": NUMBER}', "Settings.rate"),
        ('{"pair": [0, NUMBER]}', "Settings.pair"),
        ('{"shares": {"a": NUMBER}}', "Settings.shares.a"),
        ('{"inner": {"rate": NUMBER}}', "Inner.rate"),
    ],
)
def test_numbers_that_are_not_finite_are_refused_wherever_they_stand(number: str, text: str, where: str) -> None:
    with pytest.raises(UserError, match=f"{where} must be a finite number"):
        from_dict(Settings, json.loads(text.replace("NUMBER", number)))


def test_whole_numbers_may_stand_for_others() -> None:
    made = from_dict(Settings, json.loads('{"rate": 3, "pair": [0, -2]}'))
    assert made == Settings(3.0, (0.0, -2.0))
    assert isinstance(made.rate, float)


def test_settings_of_an_earlier_version_are_filled_in() -> None:
    settings = Settings(rate=2.0, inner=Inner(rate=1.0))
    assert with_defaults(settings, {"rate": 2.0, "pair": [0.0, 1.0], "inner": {}}) == to_dict(settings)
    assert with_defaults(settings, {"rate": 3.0}) != to_dict(settings)
    assert with_defaults(settings, {"rate": 2.0, "gone": 1}) == {"rate": 2.0, "gone": 1}  # a setting that no longer exists
    assert with_defaults(settings, ["rate"]) == {}
