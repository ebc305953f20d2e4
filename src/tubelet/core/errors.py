"""The one error a user is meant to read."""

from __future__ import annotations

import numbers
from typing import Any


class UserError(ValueError):
    """A wrong input: one clear sentence that ends with the remedy. The command line prints it without a traceback, exits 2."""


def whole(name: str, value: Any) -> int:
    """A whole number of any library as Python's own. Raises UserError, by the value's name, on everything else."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise UserError(f"{name} must be a whole number, got {value!r}; correct it")
    return int(value)
