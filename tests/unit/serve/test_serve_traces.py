"""What a `traceparent` header may be, and what is made of others: nothing."""

from __future__ import annotations

import pytest

from tubelet.serve.traces import id_of, parent_of

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
GOOD = f"00-{TRACE}-{SPAN}-01"


def test_a_good_one_is_kept() -> None:
    assert parent_of([GOOD]) == GOOD
    assert id_of(parent_of([GOOD])) == TRACE


@pytest.mark.parametrize("later", [f"01-{TRACE}-{SPAN}-01", f"cc-{TRACE}-{SPAN}-01-what the future may be like"])
def test_of_a_later_version_only_what_is_known_is_kept(later: str) -> None:
    assert parent_of([later]) == GOOD


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [GOOD, GOOD],
        [""],
        [f"ff-{TRACE}-{SPAN}-01"],
        [f"00-{'0' * 32}-{SPAN}-01"],
        [f"00-{TRACE}-{'0' * 16}-01"],
        [f"00-{TRACE.upper()}-{SPAN}-01"],
        [f"00-{TRACE}-{SPAN}-01-more"],
        [f"01-{TRACE}-{SPAN}-01more"],
        [f"00-{TRACE}-{SPAN}"],
        [f"00-{TRACE}-{SPAN}-zz"],
        [f" {GOOD}"],
        [f"{GOOD}\n"],
        ["a red ball bounces"],
    ],
)
def test_anything_else_is_no_trace(headers: list[str]) -> None:
    assert parent_of(headers) is None
    assert id_of(parent_of(headers)) is None
