"""A value as JSON, made inside the sandbox. Runs there beside `sandbox_child`; imports nothing of the package."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

try:  # `json` itself takes as long to import as Python to start
    from _json import encode_basestring_ascii as quoted
except ImportError:
    from json.encoder import py_encode_basestring_ascii as quoted

DEPTH = 100
"""Deepest nesting of a value."""


class NotPlain(Exception):
    """A value that cannot leave the sandbox."""


def encode(value: Any, largest: int) -> str:
    """JSON of a plain value. Raises `NotPlain`: for other types, cycles, and more than `largest` characters.

    None, bool, str, list, float and int up to 63 bits as they are; else an object with one key: "i" an int in hexadecimal,
    "f" inf, -inf or nan, "c" [real, imaginary], "b" bytes in hexadecimal, "t" the items of a tuple, "s" those of a set, "d" the
    [key, value] pairs of a dict. Of an instance of a subclass the plain value that it holds.
    """
    parts: list[str] = []
    left = largest

    def put(text: str) -> None:
        nonlocal left
        left -= len(text)
        if left < 0:
            raise NotPlain("too large a value")
        parts.append(text)

    def items(values: Any, depth: int) -> None:
        put("[")
        for index, item in enumerate(values):
            if index:
                put(",")
            walk(item, depth + 1)
        put("]")

    def tagged(tag: str, values: Any, depth: int) -> None:
        put(f'{{"{tag}":')
        items(values, depth)
        put("}")

    def walk(x: Any, depth: int) -> None:
        if depth > DEPTH:
            raise NotPlain("too deep a value")
        if x is None:
            put("null")
        elif x is True or x is False:
            put("true" if x else "false")
        elif isinstance(x, str):
            put(quoted(str.__str__(x)))
        elif isinstance(x, int):
            put(str(int.__int__(x)) if int.bit_length(x) < 64 else f'{{"i":"{hex(int.__int__(x))}"}}')
        elif isinstance(x, float):
            text = float.__repr__(x)
            put(f'{{"f":"{text}"}}' if text in ("inf", "-inf", "nan") else text)
        elif isinstance(x, complex):
            tagged("c", [complex.real.__get__(x), complex.imag.__get__(x)], depth)
        elif isinstance(x, bytes | bytearray):
            put(f'{{"b":"{bytes(memoryview(x)).hex()}"}}')
        elif isinstance(x, list):
            items(list.__iter__(x), depth)
        elif isinstance(x, tuple):
            tagged("t", tuple.__iter__(x), depth)
        elif isinstance(x, set):
            tagged("s", set.__iter__(x), depth)
        elif isinstance(x, frozenset):
            tagged("s", frozenset.__iter__(x), depth)
        elif isinstance(x, dict):
            pairs(dict.items(x), depth)
        else:
            raise NotPlain(f"not a plain value: {type(x).__name__}")

    def pairs(found: Any, depth: int) -> None:
        put('{"d":[')
        for index, pair in enumerate(found):
            if index:
                put(",")
            items(pair, depth)
        put("]}")

    walk(value, 0)
    return "".join(parts)
