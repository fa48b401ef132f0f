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
    encoder = _Encoder(largest)
    encoder.walk(value, 0)
    return "".join(encoder.parts)


class _Encoder:
    """The text of a value so far, and the characters that are left for the rest."""

    def __init__(self, largest: int) -> None:
        self.parts: list[str] = []
        self.left = largest

    def put(self, text: str) -> None:
        self.left -= len(text)
        if self.left < 0:
            raise NotPlain("value too large")
        self.parts.append(text)

    def walk(self, x: Any, depth: int) -> None:
        if depth > DEPTH:
            raise NotPlain("value nested too deeply")
        if isinstance(x, list):
            self.items(list.__iter__(x), depth)
        elif isinstance(x, tuple):
            self.tagged("t", tuple.__iter__(x), depth)
        elif isinstance(x, set):
            self.tagged("s", set.__iter__(x), depth)
        elif isinstance(x, frozenset):
            self.tagged("s", frozenset.__iter__(x), depth)
        elif isinstance(x, dict):
            self.pairs(dict.items(x), depth)
        elif isinstance(x, complex):
            self.tagged("c", [complex.real.__get__(x), complex.imag.__get__(x)], depth)
        else:
            self.put(_scalar(x))

    def items(self, values: Any, depth: int) -> None:
        self.put("[")
        for index, item in enumerate(values):
            if index:
                self.put(",")
            self.walk(item, depth + 1)
        self.put("]")

    def tagged(self, tag: str, values: Any, depth: int) -> None:
        self.put(f'{{"{tag}":')
        self.items(values, depth)
        self.put("}")

    def pairs(self, found: Any, depth: int) -> None:
        self.put('{"d":[')
        for index, pair in enumerate(found):
            if index:
                self.put(",")
            self.items(pair, depth)
        self.put("]}")


def _scalar(x: Any) -> str:
    """Encode a value without items. Raises `NotPlain` for other types."""
    if x is None:
        return "null"
    if x is True or x is False:
        return "true" if x else "false"
    if isinstance(x, str):
        return quoted(str.__str__(x))
    if isinstance(x, int):
        return str(int.__int__(x)) if int.bit_length(x) < 64 else f'{{"i":"{hex(int.__int__(x))}"}}'
    if isinstance(x, float):
        text = float.__repr__(x)
        return f'{{"f":"{text}"}}' if text in ("inf", "-inf", "nan") else text
    if isinstance(x, bytes | bytearray):
        return f'{{"b":"{bytes(memoryview(x)).hex()}"}}'
    raise NotPlain(f"not a plain value: {type(x).__name__}")
