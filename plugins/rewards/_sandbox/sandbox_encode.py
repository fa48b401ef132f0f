"""JSON encoding of values inside the sandbox. Runs there with `sandbox_child`; imports nothing from the package."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

try:  # importing `json` takes as long as starting Python
    from _json import encode_basestring_ascii as quoted
except ImportError:
    from json.encoder import py_encode_basestring_ascii as quoted

DEPTH = 100
"""Maximum nesting of a value."""


class NotPlain(Exception):
    """Error for a value that cannot leave the sandbox."""


def encode(value: Any, largest: int) -> str:
    """Encode a plain value as JSON. Raises `NotPlain` for other types, cycles, and more than `largest` characters.

    None, bool, str, list, float and int up to 63 bits are encoded directly, others as an object with one key: "i" an int in
    hexadecimal, "f" inf, -inf or nan, "c" [real, imaginary], "b" bytes in hexadecimal, "t" the items of a tuple, "s" those
    of a set, "d" the [key, value] pairs of a dict. Instances of subclasses are encoded as their plain value.
    """
    parts: list[str] = []
    left = largest

    def put(text: str) -> None:
        nonlocal left
        left -= len(text)
        if left < 0:
            raise NotPlain("value too large")
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
            raise NotPlain("value nested too deeply")
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
