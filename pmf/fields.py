"""Configurations: checks of their values by the declared types, and configurations from JSON."""

from __future__ import annotations

import numbers
import operator
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor

from pmf.errors import InputError, require

Config = TypeVar("Config")
LARGEST = 2**63
LARGEST_FLOAT = 3.4e38


def check_fields(config: Any, prefix: str = "") -> None:
    """Check every value of a dataclass against its declared type; floats must be finite, and integers below 2^63.

    Numbers of other packages become Python's, which JSON can store, and lists tuples. `prefix` precedes the names in
    messages. Errors: `InputError` names the first value that does not fit.
    """
    hints = get_type_hints(type(config))
    for field in fields(config):
        given = getattr(config, field.name)
        plain = _plain(f"{prefix}{field.name}", hints[field.name], given)
        if plain is not given:
            object.__setattr__(config, field.name, plain)  # also of a frozen one


def _plain(name: str, hint: Any, value: Any) -> Any:
    """The value in Python's own types. Errors: `InputError` unless it fits the hint."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, types.UnionType):
        return None if value is None else _plain(name, next(part for part in parts if part is not type(None)), value)
    if kind is Literal:
        listed = ", ".join(map(str, parts))
        require(value in parts, lambda: f"{name}: expected one of {listed}, got {value!r}")
    elif kind is tuple:
        several = isinstance(value, (tuple, list)) and (... in parts or len(value) == len(parts))
        wanted = "several values" if ... in parts else f"{len(parts)} values"
        require(several, lambda: f"{name}: expected {wanted}, got {value!r}")
        plain = tuple([_plain(name, parts[0], part) for part in value])
        return value if type(value) is tuple and all(map(operator.is_, value, plain)) else plain
    elif hint in _KINDS:
        good, wanted = _KINDS[hint]
        require(good(value), lambda: f"{name}: expected {wanted}, got {value!r}")
        if hint in (int, float) and type(value) not in (int, float):
            return hint(value)
    elif isinstance(hint, type):
        require(isinstance(value, hint), lambda: f"{name}: expected {hint.__name__}, got {value!r:.80}")
    return value


def check_values(hint: Any, **values: Any) -> None:
    """Check arguments against one declared type, by the rules of `check_fields`; other classes take their instances.

    Errors: `InputError` names the first that does not fit.
    """
    for name, value in values.items():
        _plain(name, hint, value)


def is_finite(value: Any) -> bool:
    """Whether a value is a real number (neither a bool nor a text) that is finite in float32, as tensors hold it."""
    try:
        return not isinstance(value, (bool, str, bytes)) and abs(float(value)) <= LARGEST_FLOAT
    except (TypeError, ValueError, OverflowError):
        return False


def is_integer(value: Any) -> bool:
    """Whether a value is an integer (not a bool) of at most 64 bits."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and abs(int(value)) < LARGEST


def checked_number(owner: str, name: str, value: Any, least: float = -LARGEST_FLOAT) -> float:
    """An argument of the function or class `owner`, which must be a finite number of at least `least`.

    Ops check every call so: the first test is the fast one. Errors: `InputError`.
    """
    if (type(value) is float or type(value) is int) and least <= value <= LARGEST_FLOAT:
        return value
    if isinstance(value, (torch.SymFloat, torch.SymInt)) or (isinstance(value, Tensor) and value.ndim == 0):
        return value  # type: ignore[return-value]  # unread: tracers would specialise the graph, a GPU would wait
    if isinstance(value, Tensor) or not is_finite(value) or value < least:
        wanted = "a finite number" if least == -LARGEST_FLOAT else f"a finite number of at least {least:g}"
        raise InputError(f"{owner}: {name} must be {wanted}, got {value!r:.80}")
    return float(value)


def checked_integer(owner: str, name: str, value: Any, least: int = 1) -> int:
    """As `checked_number`, an integer."""
    if (type(value) is int or isinstance(value, torch.SymInt)) and least <= value < LARGEST:
        return value  # type: ignore[return-value]
    if not is_integer(value) or value < least:
        raise InputError(f"{owner}: {name} must be an integer of at least {least}, got {value!r:.80}")
    return int(value)


def check_flags(owner: str, **flags: Any) -> None:
    """Errors: `InputError` on an argument of `owner` that is neither True nor False."""
    for name, value in flags.items():
        if type(value) is not bool and not isinstance(value, np.bool_):
            raise InputError(f"{owner}: {name} must be True or False, got {value!r:.80}")


_KINDS: dict[Any, Any] = {
    float: (is_finite, "a finite number of float32"),
    int: (is_integer, "an integer below 2^63"),
    bool: (lambda value: isinstance(value, bool), "true or false"),
    str: (lambda value: isinstance(value, str), "a text"),
    Path: (lambda value: isinstance(value, Path), "a path"),
}


def from_json(kind: type[Config], values: Any) -> Config:
    """Build a dataclass, nested ones included, from its JSON.

    Errors: `ValueError` on an unknown field, an empty object or anything else than an object, and those of the class.
    """
    if not isinstance(values, Mapping) or not values:
        raise ValueError(f"expected the fields of {kind.__name__}, got {values!r:.80}")
    hints = get_type_hints(kind)
    unknown = ", ".join(sorted(set(values) - {field.name for field in fields(kind)}))  # type: ignore[arg-type]
    if unknown:
        raise ValueError(f"{kind.__name__} has no field {unknown} here: a newer version of pixel-meanflow wrote it")
    return kind(**{name: _value(hints[name], value) for name, value in values.items()})


def _value(hint: Any, value: Any) -> Any:
    if isinstance(hint, type) and is_dataclass(hint):
        return from_json(hint, value)
    if isinstance(value, list):
        return tuple(value)
    return Path(value) if isinstance(value, str) and Path in (hint, *get_args(hint)) else value
