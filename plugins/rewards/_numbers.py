r"""Exact parsing of numbers in prose.

Supported: signs, also U+2212; thousands separators, LaTeX's included (`{,}`, `\!`, `\,`, `~`); scientific notation (`3e5`,
`3.2 × 10^5`, `3\times 10^{5}`); integer powers; fractions (`3/4`, `\frac{3}{4}`) and mixed numbers (`1 1/2`). A currency
sign may precede and any unit may follow. Digits inside a word (`H2O`) or an exponent (`m^2`) do not count as numbers, nor
does anything above 400 characters or digits.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from typing import Literal

DecimalMark = Literal[".", ","]

LONGEST = 400
"""Maximum characters of a number, digits of a power and size of an exponent, which bounds the time of arithmetic."""

MINUS = ("-", "−")


class Reader:
    """Parser of numbers in texts; with `percent_is_hundredth` 50% is 1/2, otherwise 50 with a unit."""

    def __init__(self, decimal_mark: DecimalMark, percent_is_hundredth: bool) -> None:
        self.percent_is_hundredth = percent_is_hundredth
        other = "," if decimal_mark == "." else r"\."
        self._mark = re.compile(r"\{?" + re.escape(decimal_mark) + r"\}?")
        spaces = r"\\[!,;: ]|\\thinspace[ ]|~|[\u00a0\u2009\u202f']"
        self._separator = re.compile(rf"(?:\{{{other}\}}|{other})(?:(?:\\[!,;:]|~)[ ]?)?|{spaces}")
        self._pattern = re.compile(_pattern(self._mark.pattern, self._separator.pattern), re.VERBOSE)

    def first(self, text: str) -> Fraction | None:
        """Return the first number in a text, or None."""
        match = self._pattern.search(text)
        return None if match is None else self._value(match)

    def only(self, text: str) -> Fraction | None:
        """Return the number in a text with exactly one, else None."""
        matches = list(self._pattern.finditer(text[: 4 * LONGEST]))
        return self._value(matches[0]) if len(matches) == 1 else None

    def last(self, text: str) -> Fraction | None:
        """Return the last number in a text, searching only the end of the last line with a digit."""
        digit = max(map(text.rfind, "0123456789"))
        line = text.rfind("\n", 0, max(0, digit)) + 1
        matches = list(self._pattern.finditer(text, max(line, digit - 2 * LONGEST), digit + 12))
        return self._value(matches[-1]) if matches else None

    def _value(self, match: re.Match[str]) -> Fraction | None:
        found = match.groupdict()
        if match.end() - match.start() > LONGEST:
            return None
        try:
            if found["number"]:
                value = self._scaled(found)
            else:
                above = self._plain(found["over"] or found["over_digit"] or found["numerator"])
                below = self._plain(found["under"] or found["under_digit"] or found["denominator"])
                value = (-above if found["over_sign"] in MINUS else above) / below
                value += int(found["whole"] or found["latex_whole"] or 0)
        except (ZeroDivisionError, OverflowError):
            return None
        if found["percent"] and self.percent_is_hundredth:
            value /= 100
        return -value if found["sign"] in MINUS or found["inner_sign"] in MINUS else value

    def _plain(self, text: str) -> Fraction:
        if text.isdecimal():
            return Fraction(int(text))
        return Fraction(self._mark.sub(".", self._separator.sub("", text)))

    def _scaled(self, found: dict[str, str | None]) -> Fraction:
        """Return a power, or a number times a power of ten. Raises `OverflowError` if it has too many digits."""
        number = found["number"] or ""
        value = self._plain(number)
        power, ten = (_exponent(found, *names) for names in (("power", "power_bare"), ("e", "ten", "ten_bare")))
        if abs(ten or 0) > LONGEST or abs(power or 0) * len(number) > LONGEST:
            raise OverflowError
        value = value if power is None else value**power
        return value if ten is None else value * Fraction(10) ** ten


def _exponent(found: dict[str, str | None], *names: str) -> int | None:
    digits = next((found[name] for name in names if found[name]), None)
    return None if digits is None else int(digits.replace("−", "-"))


def _pattern(mark: str, separator: str) -> str:
    """Return a verbose regular expression for a number, which contains no line break."""
    groups = rf"[0-9]{{1,3}} (?: (?:{separator}) [0-9]{{3}} )+ (?![0-9])"
    plain = rf"(?: (?: {groups} | [0-9]+ ) (?: {mark} [0-9]+ )? | (?<![0-9]) {mark} [0-9]+ )"
    gap = r"[ \t]?"

    def braced(name: str, content: str, digits: tuple[str, str], sign: str = "") -> str:
        """Match `{content}`, or `digits` without braces."""
        return rf"(?: \{{{gap} {sign} (?P<{name}>{content}) {gap}\}} | (?P<{name}_{digits[0]}>{digits[1]}) )"

    def exponent(name: str) -> str:
        return rf"(?: \^ {gap} | \*\* )" + braced(name, "[-+−]?[0-9]+", ("bare", "[-+−]?[0-9]+"))

    sign = r"(?: (?<![\w)\]}]) [-+−] )?"
    over = braced("over", plain, ("digit", "[0-9]"), "(?P<over_sign>[-+−]?)")
    under = braced("under", plain, ("digit", "[0-9]"))
    scale = (
        rf"[eE] (?P<e>[-+]?[0-9]+) (?!\w) | {exponent('power')} "
        rf"| {gap} (?: \\times | \\cdot | [×·*xX] ) {gap} 10 {gap} {exponent('ten')}"
    )
    return rf"""
        (?=[-+−\\{{$€£¥₹0-9.,]) (?<![\w^]) (?<!\^\{{) (?<!\^[-+−])
        (?P<sign>{sign}) (?: \\? [$€£¥₹] {gap} )? (?P<inner_sign>{sign})
        (?: (?: (?P<latex_whole>[0-9]+) {gap} )? \\[dt]?frac {gap} {over} {gap} {under}
          | (?: (?P<whole>[0-9]+) [ \t] )? (?<!/) (?P<numerator>{plain}) {gap} / {gap} (?P<denominator>{plain})
            (?! {gap} / | [0-9] )
          | (?P<number>{plain}) (?: {scale} )? )
        (?P<percent> {gap} \\?% | [ \t] percent\b )?
    """


@lru_cache
def reader(decimal_mark: DecimalMark, percent_is_hundredth: bool) -> Reader:
    """Return the cached reader for these settings."""
    return Reader(decimal_mark, percent_is_hundredth)
