"""Comparison of a sandbox's answers with the expected values, in the parent process.

Answers are untrusted JSON: they are parsed within limits into numbers, texts and lists only, and compared piece by piece
with the expected value, whose size bounds the work. Neither the program's `==` nor a pickle is ever run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

KEY_PARTS = 1000
"""Maximum numbers and texts in a key of a dict or an item of a set."""


class _Different(Exception):
    """Signal that an answer differs from the expected value."""


def equal_value(text: str, expected: Any, tolerance: float, *, json_types: bool) -> bool:
    """Return True if JSON of `sandbox_encode.encode` is the expected plain value.

    Like Python's ==, except that floats are equal within `tolerance`, relative and absolute, and nan equals nan. With
    `json_types` the expected value was JSON, which has no tuples, so that a list matches a tuple too.
    """
    try:
        given = json.loads(text, parse_constant=_refuse)
        _compare(given, expected, tolerance, json_types)
    except (_Different, ValueError, TypeError, OverflowError, RecursionError):
        return False
    return True


def equal_text(given: str, expected: str) -> bool:
    """Return True if two texts are equal except for trailing whitespace on lines and empty lines at the end."""
    return _lines(given) == _lines(expected)


def _lines(text: str) -> list[str]:
    lines = [line.rstrip() for line in text.split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _refuse(text: str) -> Any:
    raise _Different


def _compare(given: Any, expected: Any, tolerance: float, json_types: bool) -> None:
    """Raise `_Different` if the values differ."""
    if isinstance(expected, list | tuple):
        tag, items = _opened(given)
        due = ("list", "t") if json_types else ("list",) if isinstance(expected, list) else ("t",)
        _same(tag in due and len(items) == len(expected))
        for one, other in zip(items, expected, strict=True):
            _compare(one, other, tolerance, json_types)
    elif isinstance(expected, set | frozenset):
        tag, items = _opened(given)
        _same(tag == "s" and len(items) == len(expected))
        _same({_key(item) for item in _known(items, expected)} == expected)
    elif isinstance(expected, dict):
        tag, pairs = _opened(given)
        _same(tag == "d" and len(pairs) == len(expected))
        found = {_key(key): value for key, value in _known_pairs(pairs, expected)}
        _same(found.keys() == expected.keys())
        for key, value in expected.items():
            _compare(found[key], value, tolerance, json_types)
    else:
        _same(_equal_scalar(_scalar(given), expected, tolerance))


def _same(holds: bool) -> None:
    if not holds:
        raise _Different


def _opened(given: Any) -> tuple[str, Sequence[Any]]:
    """Return the tag and the items of an answer; "list" for a list."""
    if isinstance(given, list):
        return "list", given
    if isinstance(given, dict) and len(given) == 1:
        ((tag, items),) = given.items()
        if isinstance(items, list):
            return tag, items
    raise _Different


def _known(items: Iterable[Any], expected: set[Any] | frozenset[Any]) -> Iterable[Any]:
    """Yield the items and raise at the first unexpected one, so that no set grows from untrusted keys."""
    for item in items:
        _same(_key(item) in expected)
        yield item


def _known_pairs(pairs: Iterable[Any], expected: dict[Any, Any]) -> Iterable[tuple[Any, Any]]:
    for pair in pairs:
        _same(isinstance(pair, list) and len(pair) == 2 and _key(pair[0]) in expected)
        yield pair[0], pair[1]


def _key(given: Any) -> Any:
    """Decode a hashable value: a scalar, or a tuple or frozenset of such."""
    left = KEY_PARTS

    def made(part: Any) -> Any:
        nonlocal left
        left -= 1
        _same(left >= 0)
        if isinstance(part, dict) and part.keys() <= {"t", "s"}:
            tag, items = _opened(part)
            return tuple(map(made, items)) if tag == "t" else frozenset(map(made, items))
        return _scalar(part)

    return made(given)


def _scalar(given: Any) -> Any:
    """Decode None, a bool, a number, a text or bytes. Raises `_Different` for anything else."""
    if given is None or isinstance(given, bool | int | float | str):
        return given
    match given:
        case {"i": str(digits), **rest} if not rest:
            return int(digits, 16)
        case {"f": "inf" | "-inf" | "nan" as name, **rest} if not rest:
            return float(name)
        case {"b": str(digits), **rest} if not rest:
            return bytes.fromhex(digits)
        case {"c": [real, imaginary], **rest} if not rest:
            return complex(_scalar(real), _scalar(imaginary))
    raise _Different


def _equal_scalar(given: Any, expected: Any, tolerance: float) -> bool:
    if not all(isinstance(x, int | float | complex) for x in (given, expected)):
        return bool(given == expected)
    if isinstance(given, complex) or isinstance(expected, complex):
        parts = ((given.real, expected.real), (given.imag, expected.imag))
        return all(_equal_scalar(a, b, tolerance) for a, b in parts)
    if not (isinstance(given, float) or isinstance(expected, float)):
        return bool(given == expected)
    if math.isnan(given) or math.isnan(expected):
        return math.isnan(given) and math.isnan(expected)
    return math.isclose(given, expected, rel_tol=tolerance, abs_tol=tolerance)
