"""Multiple-choice answers: the label that a text picks."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from ._answers import locate

ANNOUNCING = ("answer", "option", "choice", "pick", "choose", "select")
"""Words that announce a pick."""


def pick(
    text: str, labels: tuple[str, ...], texts: tuple[str, ...], marker: str | None, tag: str | None = None
) -> str | None:
    """Return the label that a completion picks, or None. `texts` are those of the choices, if known."""
    place = locate(text, marker, tag)
    text = place.text
    due, start, announced, in_parentheses, several = _patterns(labels)
    open_picks = [match.span() for match in several.finditer(text)]

    def single(match: re.Match[str]) -> str | None:
        """Return the label that was matched; None if it is one of several, as in "C or D"."""
        place = next(match.start(group) for group in range(1, len(match.groups()) + 1) if match.group(group))
        return None if any(low <= place < high for low, high in open_picks) else _named(match, labels)

    opening = (due if place.stated else start).match(text)
    said = list(announced.finditer(text))
    if said and not (place.stated and opening):
        return single(said[-1])
    if opening:
        return single(opening)
    found = _alone(text, labels) or _by_text(text, labels, texts)
    if found or place.stated:
        return found
    bracketed = list(in_parentheses.finditer(text))
    return single(bracketed[-1]) if bracketed else None


def meant(reference: Any, labels: tuple[str, ...], texts: tuple[str, ...]) -> str | None:
    """Return the label that a reference denotes."""
    text = (locate(reference).text if isinstance(reference, str) else str(reference)).strip()
    alike = [label for label in labels if label.casefold() == text.strip("().").casefold()]
    if alike:
        return alike[0]
    if text.isdecimal() and int(text) < len(labels):
        return labels[int(text)]
    return next((label for label, own in zip(labels, texts, strict=False) if _plain(own) == _plain(text)), None)


@lru_cache(maxsize=100)
def _patterns(labels: tuple[str, ...]) -> tuple[re.Pattern[str], ...]:
    """Return patterns for a label: in an answer slot, at the start, after announcing words, in parentheses; and for several."""
    one = "|".join(map(re.escape, labels))
    wrap = r"(?:\\(?:text|textbf|mathrm|mathbf)\{|[*_`\"'$\s])*+"
    bracketed = rf"\(\s*+((?i:{one}))\s*+\)|\[\s*+((?i:{one}))\s*+\]"
    verb = r"(?:is|was|because|since|as|and|which|given|due)\b"
    article = rf"(?<=[AI])\s+(?!{verb})[a-z]"
    due = rf"{wrap}(?:{bracketed}|({one})(?![^\W_])(?!{article}))"
    start = rf"{wrap}(?:{bracketed}|({one})(?=[.):,\]}}*_`\"'$]|\s*$|\s*\n|\s+{verb}))"
    words = "|".join(form for word in ANNOUNCING for form in (word, word.capitalize(), word.upper()))
    verbs = r"(?i:\s++(?:is|was|(?:would|must|should)\s++be)\b)?[\s:=]*+"
    announced = rf"(?:{words}){verbs}"
    any_label = rf"(?:\(\s*+(?i:{one})\s*+\)|\[\s*+(?i:{one})\s*+\]|(?:{one}))"
    joint = r"[*_`\"'$}\s]*+(?:,?\s*+(?:\\text\{\s*+)?\b(?:or|and)\b\s*+\}?|[,/&])"
    several = rf"(?<![^\W_]){any_label}(?:{joint}{wrap}{any_label}(?![^\W_])(?!{article}))+"
    return tuple(map(re.compile, (due, start, announced + due, rf"\(\s*+({one})\s*+\)", several)))


def _alone(text: str, labels: tuple[str, ...]) -> str | None:
    """Return the label that is the whole text, in upper or lower case."""
    alone = text.strip(" \t\n().*`\"'$")
    return next((label for label in labels if label.casefold() == alone.casefold()), None)


def _named(found: re.Match[str], labels: tuple[str, ...]) -> str:
    text = next(group for group in found.groups() if group)
    return next(label for label in labels if label.casefold() == text.casefold())


def _by_text(text: str, labels: tuple[str, ...], texts: tuple[str, ...]) -> str | None:
    """Return the label of the choice that equals a text, or else of the only one contained in it."""
    if not texts:
        return None
    plain = _plain(text)
    same = [label for label, own in zip(labels, texts, strict=False) if _plain(own) == plain]
    if not same:
        words = f" {plain} "
        same = [label for label, own in zip(labels, texts, strict=False) if f" {_plain(own)} " in words]
    return same[0] if len(same) == 1 else None


def _plain(text: str) -> str:
    """Return only the words and numbers of a text, in lower case."""
    return " ".join(re.findall(r"[^\W_]+(?:[.,][0-9]+)*", text.casefold()))
