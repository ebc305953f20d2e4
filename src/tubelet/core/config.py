"""Typed configuration: frozen dataclasses to and from JSON. An unknown or missing key is an error."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from tubelet.core.errors import UserError
from tubelet.core.files import read_json

ConfigT = TypeVar("ConfigT")


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain JSON values, tuples as lists."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        if isinstance(value, Mapping):
            return {str(k): plain(v) for k, v in value.items()}
        return value

    return plain(config)


def from_dict(cls: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
    """Build a dataclass from JSON values. Raises UserError on an unknown or missing key, a wrong type and a number like NaN."""
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise UserError(f"{cls.__name__} has no setting {unknown[0]!r}; leave it out, or choose from {', '.join(fields)}")
    required = [
        n for n, f in fields.items() if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and f.init
    ]
    missing = [n for n in required if n not in values]
    if missing:
        raise UserError(f"{cls.__name__} needs the setting {missing[0]!r}; add it")
    return cls(**{n: _convert(hints[n], v, f"{cls.__name__}.{n}") for n, v in values.items()})


def from_file(cls: type[ConfigT], path: str | Path) -> ConfigT:
    """Build a dataclass from a JSON file. Raises UserError, which names the file, where `read_json` or `from_dict` does."""
    values = read_json(path)
    if not isinstance(values, Mapping):
        raise UserError(f"{path} must hold an object with settings; restore it from its source")
    try:
        return from_dict(cls, values)
    except UserError as error:
        raise UserError(f"{path}: {error}, or restore the file from its source") from error


def with_defaults(config: Any, kept: Any) -> dict[str, Any]:
    """Settings kept beside a run, as JSON values, with those that its version did not know yet at what `config`'s class gives.

    What this version cannot read is returned as it is, what is no object as an empty one: both differ from whatever they are
    compared with.
    """
    if not isinstance(kept, Mapping):
        return {}
    try:
        return to_dict(from_dict(type(config), kept))
    except UserError:
        return dict(kept)


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            raise UserError(f"{where} must be an object with settings, got {value!r}; correct it")
        return from_dict(hint, value)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{where} must be a list, got {value!r}; correct it")
        kinds = [args[0]] * len(value) if len(args) == 2 and args[1] is Ellipsis else list(args)
        if len(kinds) != len(value):
            raise UserError(f"{where} must have {len(kinds)} values, got {len(value)}; correct it")
        return tuple(_convert(k, v, where) for k, v in zip(kinds, value, strict=True))
    if origin is list:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{where} must be a list, got {value!r}; correct it")
        return [_convert(args[0], v, where) for v in value]
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise UserError(f"{where} must be an object, got {value!r}; correct it")
        return {_convert(args[0], k, where): _convert(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if origin is typing.Literal:
        if value not in args:
            raise UserError(f"{where} must be one of {', '.join(map(str, args))}, got {value!r}; choose one of them")
        return value
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        # Python's JSON knows NaN and Infinity, and whole numbers that no float can hold.
        if not (isinstance(value, float) or abs(value) < 2**1023) or not math.isfinite(value):
            raise UserError(f"{where} must be a finite number, got {value!r}; correct it")
        return float(value)
    if isinstance(hint, type) and hint in (int, float, str, bool) and type(value) is not hint:
        raise UserError(f"{where} must be {hint.__name__}, got {value!r}; correct it")
    return value
