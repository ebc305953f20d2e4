"""The few words of Prometheus's query language that the alerts of docs/serving.md use, read off two pages of figures.

A vector is a value for each set of labels. `increase` is what a counter has grown by from the first page to the second; a
series that the first page lacks has grown by nothing, as in Prometheus. `X and on() Y` is X where Y has any value.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping

Labels = frozenset[tuple[str, str]]
Vector = dict[Labels, float]
Page = Mapping[str, Vector]

_LINE = re.compile(r"(\w+)(?:\{(.*)\})? (-?[0-9.e+]+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_WORD = re.compile(r'\s*(and on\(\)|/ on\(\)|\w+\{(?:\w+="[^"]*",?)+\}|[\w.]+|[<>=!]=|\S)')
_SIGNS: dict[str, Callable[[float, float], bool]] = {">": operator.gt, "<": operator.lt, "==": operator.eq}


def read(text: str) -> Page:
    """The figures of a page, by name."""
    page: dict[str, Vector] = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            found = _LINE.fullmatch(line)
            assert found is not None, line
            page.setdefault(found[1], {})[frozenset(_LABEL.findall(found[2] or ""))] = float(found[3])
    return page


def value(expression: str, before: Page, after: Page) -> Vector:
    """What an expression gives. An alert fires for each of its values."""
    words = [found[1] for found in _WORD.finditer(expression)]
    query = _Query(words, before, after)
    given = query.both()
    assert not query.words, f"not understood: {query.words}"
    return given


class _Query:
    def __init__(self, words: list[str], before: Page, after: Page) -> None:
        self.words, self.before, self.after = words, before, after

    def both(self) -> Vector:
        left = self.compared()
        while self.words[:1] == ["and on()"]:
            self.words.pop(0)
            right = self.compared()
            left = left if right else {}
        return left

    def compared(self) -> Vector:
        left = self.shared()
        sign, limit = _SIGNS[self.words.pop(0)], float(self.words.pop(0))
        return {labels: number for labels, number in left.items() if sign(number, limit)}

    def shared(self) -> Vector:
        left = self.read()
        if self.words[:1] != ["/ on()"]:
            return left
        self.words.pop(0)
        right = self.read()
        if not left or not right:
            return {}
        ((above,), (below,)) = left.values(), right.values()  # `on()` wants one on either side
        return {frozenset(): above / below} if below else {}

    def read(self) -> Vector:
        if self.words[0] != "increase":
            return self.chosen(self.after)
        assert self.words[1] == "("
        del self.words[:2]
        place = list(self.words)
        after = self.chosen(self.after)
        self.words = place
        before = self.chosen(self.before)
        assert self.words[0] == "["
        assert re.fullmatch(r"\d+[smh]", self.words[1])
        assert self.words[2:4] == ["]", ")"]
        del self.words[:4]
        return {labels: number - before[labels] for labels, number in after.items() if labels in before}

    def chosen(self, page: Page) -> Vector:
        name, _, wanted = self.words.pop(0).partition("{")
        labels = set(_LABEL.findall(wanted))
        return {have: number for have, number in page.get(name, {}).items() if labels <= have}
