"""Rule-based counting of sentences."""

from __future__ import annotations

import re

ABBREVIATIONS = frozenset(
    (
        "mr",
        "mrs",
        "ms",
        "messrs",
        "dr",
        "prof",
        "st",
        "mt",
        "sr",
        "jr",
        "rev",
        "hon",
        "gen",
        "col",
        "capt",
        "lt",
        "sgt",
        "gov",
        "sen",
        "rep",
        "pres",
        "vs",
        "etc",
        "inc",
        "ltd",
        "corp",
        "co",
        "dept",
        "est",
        "vol",
        "e.g",
        "i.e",
        "a.m",
        "p.m",
        "u.s",
        "u.k",
        "u.n",
        "d.c",
        "ph.d",
        "cf",
        "al",
        "jan",
        "feb",
        "mar",
        "apr",
        "jun",
        "jul",
        "aug",
        "sep",
        "sept",
        "oct",
        "nov",
        "dec",
    )
)
"""Abbreviations, without their last period, that do not end a sentence."""

_STOP = re.compile(r"""([^\s"'()\[\]]{0,40}?)([.!?]+)["')\]”’*_]*+(?=\s|$)(?=\s*+(["'(\[“‘*_]*+\w?))""")
_INITIAL = re.compile(r"[A-Za-z]")


def count_sentences(text: str) -> int:
    """Count sentences, which end with a period, question or exclamation mark, or with the text.

    A period after an abbreviation or an initial, or before a lower-case letter, does not end a sentence; several periods
    end one before a capital.
    """
    ends = [stop for stop in _STOP.finditer(text) if _ends(stop)]
    rest = text[ends[-1].start(3) :] if ends else text
    return len(ends) + any(map(str.isalnum, rest))


def _ends(stop: re.Match[str]) -> bool:
    word, mark, following = stop.groups()
    if "!" in mark or "?" in mark or not following:
        return True
    if len(mark) > 1:
        return following[-1].isupper()
    return not (following[-1].islower() or word.lower() in ABBREVIATIONS or _INITIAL.fullmatch(word))
