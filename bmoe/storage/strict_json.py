"""Strict reading of JSON that others wrote: small readers, composed into the shape that is allowed.

A reader takes (JSON value, its JSON path) and returns our value, or raises ManifestError naming the path, what was
expected and what came. Standard library only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from bmoe.protocol.errors import ManifestError

Read = Callable[[Any, str], Any]


def parse_json(data: bytes, cap: int) -> Any:
    """The JSON value in at most `cap` bytes of UTF-8: no key twice, no NaN, no endless number or nesting."""
    if len(data) > cap:
        raise ManifestError(f"$: expected at most {cap} bytes, got {len(data)}")
    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_int=_short_int,
            parse_constant=_no_constant,
        )
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ManifestError(f"$: expected UTF-8 JSON, got {type(error).__name__}: {str(error)[:200]}") from None


def wrong(path: str, expected: str, value: object) -> ManifestError:
    """The error that names a place in the file, what was expected there, and what was found."""
    shown = repr(value)
    return ManifestError(f"{path}: expected {expected}, got {shown if len(shown) <= 80 else shown[:80] + '...'}")


def integer(low: int, high: int) -> Read:
    """Reads an int within low..high; a bool is none."""

    def read(value: Any, path: str) -> int:
        if type(value) is not int or not low <= value <= high:  # a bool is an int to isinstance
            raise wrong(path, f"an integer {low}..{high}", value)
        return value

    return read


def text(pattern: re.Pattern[str], what: str) -> Read:
    """Reads a string that the pattern matches in whole."""

    def read(value: Any, path: str) -> str:
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise wrong(path, what, value)
        return value

    return read


def one_of(*choices: object) -> Read:
    """Reads one of these values, of the same type."""

    def read(value: Any, path: str) -> Any:
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            raise wrong(path, f"one of {', '.join(map(repr, choices))}", value)
        return value

    return read


def list_of(each: Read, low: int, high: int) -> Read:
    """Reads a list of low..high items as a tuple."""

    def read(value: Any, path: str) -> tuple[Any, ...]:
        if not isinstance(value, list) or not low <= len(value) <= high:
            shown = f"a list of {len(value)}" if isinstance(value, list) else value
            raise wrong(path, f"a list of {low}..{high}", shown)
        return tuple(each(item, f"{path}[{index}]") for index, item in enumerate(value))

    return read


def or_null(each: Read) -> Read:
    """Reads null as None."""
    return lambda value, path: None if value is None else each(value, path)


def object_of(make: Callable[..., Any], fields: dict[str, Read], optional: Sequence[str] = ()) -> Read:
    """A reader of an object with exactly these fields, each read by its own reader, handed to `make` by name."""

    def read(value: Any, path: str) -> Any:
        if not isinstance(value, dict):
            raise wrong(path, "an object", value)
        for key in value:
            if key not in fields:
                raise wrong(path, f"only the keys {', '.join(fields)}", key)
        for key in fields:
            if key not in value and key not in optional:
                raise wrong(f"{path}.{key}", "a value", "no such key")
        return make(**{key: fields[key](value[key], f"{path}.{key}") for key in value})

    return read


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key is given twice in one object")
    return value


def _short_int(digits: str) -> int:
    if len(digits) > 20:  # converting a megabyte of digits takes seconds
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _no_constant(word: str) -> float:
    raise ValueError(f"{word} is not a JSON number")
