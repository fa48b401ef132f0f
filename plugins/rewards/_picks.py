"""Multiple-choice answers: the label that a text picks."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from ._answers import after, boxed

ANNOUNCING = ("answer", "option", "choice", "pick", "choose", "select")
"""Words that announce a pick."""


def pick(text: str, labels: tuple[str, ...], texts: tuple[str, ...], marker: str | None) -> str | None:
    """Return the label that a completion picks, or None. `texts` are those of the choices, if known."""
    marked = after(text, marker)
    answer = boxed(text) if marked is None else marked
    due, start, announced, in_parentheses = _patterns(labels)
    if answer is not None:
        return _label(answer, labels, due) or _by_text(answer, labels, texts)
    said = list(announced.finditer(text))
    if said:
        return _named(said[-1], labels)
    bracketed = in_parentheses.findall(text)
    return (
        _label(text, labels, start)
        or _by_text(text, labels, texts)
        or (_named(bracketed[-1], labels) if bracketed else None)
    )


def meant(reference: Any, labels: tuple[str, ...], texts: tuple[str, ...]) -> str | None:
    """Return the label that a reference denotes."""
    text = str(reference).strip()
    alike = [label for label in labels if label.casefold() == text.strip("().").casefold()]
    if alike:
        return alike[0]
    if text.isdecimal() and int(text) < len(labels):
        return labels[int(text)]
    return next((label for label, own in zip(labels, texts, strict=False) if _plain(own) == _plain(text)), None)


@lru_cache(maxsize=100)
def _patterns(labels: tuple[str, ...]) -> tuple[re.Pattern[str], ...]:
    """Return patterns for a label in an answer slot, at the start of a text, after announcing words, and in parentheses."""
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
    return tuple(map(re.compile, (due, start, announced + due, rf"\(\s*+({one})\s*+\)")))


def _label(text: str, labels: tuple[str, ...], pattern: re.Pattern[str]) -> str | None:
    """Return the label at the start of a text, or a lower-case one that is the whole text."""
    match = pattern.match(text)
    if match is not None:
        return _named(match, labels)
    alone = text.strip(" \t\n().*`\"'$")
    return next((label for label in labels if label.casefold() == alone.casefold()), None)


def _named(found: re.Match[str] | str, labels: tuple[str, ...]) -> str:
    text = found if isinstance(found, str) else next(group for group in found.groups() if group)
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
