"""The one error a user is meant to read."""

from __future__ import annotations


class UserError(ValueError):
    """A wrong input: one clear sentence that ends with the remedy. The command line prints it without a traceback, exits 2."""
