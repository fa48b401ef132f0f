r"""Parsing and comparison with Math-Verify, without its own time limits.

Those use SIGALRM, which works in the main thread only and does not interrupt big-integer arithmetic. Callers must be able
to kill the process: `(10^9)!` and `9^{9^{9^9}}` are computed before they are compared.

An answer that a text marks, and a reference without delimiters, is read as one LaTeX expression. Math-Verify alone searches
such a text as prose and takes the last number: 3 for `3\sqrt{13}`. It also joins neighbouring boxes into a set.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from ._answers import locate

LONGEST = 2000
"""Maximum characters of an answer that is read as one expression."""

_GROUPED = re.compile(
    r"(?<![\d.,])[1-9]\d{0,2}(?:(?:\{,\}|,?(?:\\[!,;: ]|\\thinspace|~)\s?|[\u00a0\u2009\u202f])[0-9]{3})+(?![0-9])"
)
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|textsf|mathrm|mathbf|mbox|hbox)\s*\{([^{}]*)\}")
_DELIMITED = re.compile(r"\$\$(.+)\$\$|\$(.+)\$|\\\((.+)\\\)|\\\[(.+)\\\]", re.DOTALL)
_DELIMITER = re.compile(r"(?<!\\)(?:\$|\\\(|\\\[)")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_UNIT = re.compile(r"(?<=[\d}%)])\s*+[A-Za-z]{3,}+(?:[ -](?!(?:or|and)\b)[A-Za-z]++)*+$")
_MIXED = re.compile(r"(?<![\d./])(\d+) (\d+)/(\d+)(?![\d/])")
_BASED = re.compile(r"-?[0-9][0-9A-Za-z]*_(?:[0-9]+|[a-z]{3,})")
_SEGMENT = re.compile(r"(?<!\\)\$([^$\n]+)\$")
_QUOTED = re.compile(r"(?<!\S)[(\"'“]([-−]?[0-9][0-9.,]*)[)\"'”]")
_ANNOUNCED = re.compile(r"\banswer\s*+(?:is|was|:|=)\s*+:?|^[ \t]*+A:", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True)
class Answer:
    """An answer as text and as Math-Verify parses it."""

    text: str
    values: list[Any] = field(default_factory=list)
    is_text: bool = False
    """True if equal texts alone are equal answers: words, numbers in a given base."""


def judge(
    completion: str, reference: str, answer_after: str | None = None, answer_tag: str | None = None
) -> float | None:
    """Return 1.0 if a completion's answer equals the reference, else 0.0; None if the reference cannot be parsed."""
    gold = _read(reference, answer_after, is_reference=True)
    if gold is None:
        return None
    found = _read(completion, answer_after, answer_tag)
    return float(found is not None and _equal(gold, found))


def final_answer(completion: str, answer_after: str | None = None, answer_tag: str | None = None) -> str | None:
    """Return the answer in a completion as Math-Verify prints it; None if there is none."""
    found = _read(completion, answer_after, answer_tag)
    if found is None:
        return None
    return found.text if found.is_text else str(found.values[0])


def _equal(gold: Answer, found: Answer) -> bool:
    if gold.text == found.text:
        return True
    if gold.is_text or found.is_text:
        return gold.text.casefold() == found.text.casefold()
    return bool(load().verify(gold.values, found.values, timeout_seconds=None))


def _read(text: str, marker: str | None, tag: str | None = None, *, is_reference: bool = False) -> Answer | None:
    place = locate(text, marker, tag)
    content = _currency(_tidy(place.text))
    if place.boxed:
        return _expression(content)
    if not place.stated and not (is_reference and "\n" not in content.strip()):
        return _prose(content)
    delimited = _DELIMITED.fullmatch(content.strip().rstrip("."))
    inner = next((part for part in delimited.groups() if part is not None), "") if delimited else ""
    if inner and not _DELIMITER.search(inner):
        return _expression(inner)
    if _DELIMITER.search(content) or _ANNOUNCED.search(content) or "\n" in content.strip():
        return _prose(content)
    if "\\" not in content and len(_WORD.findall(content)) > 3:
        return _prose(content) if "=" in content or len(re.findall(r"\d+", content)) == 1 else _words(content)
    return _expression(content)


def _tidy(text: str) -> str:
    """Join the digits of grouped numbers such as `10,\\!080`, and drop spacing commands."""
    text = _GROUPED.sub(lambda match: re.sub("[^0-9]", "", match.group()), text)
    return text.replace("\\!", "").replace("~", " ").replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")


def _currency(text: str) -> str:
    r"""Drop `\$`, and each `$` that delimits no mathematics: `$5 and $10`, as in Pandoc's rules."""
    text = re.sub(r"(?<!\\)\\\$", "", text)
    pieces = re.split(r"((?<![\\$])\$(?!\$)|\n)", text)
    result, open_at = [pieces[0]], None
    for mark, piece in zip(pieces[1::2], pieces[2::2], strict=True):
        if mark == "$" and open_at is not None and _is_math("".join(result[open_at + 1 :]), piece):
            result.append("$")
            open_at = None
        else:
            if open_at is not None:
                result[open_at] = ""
            open_at = len(result) if mark == "$" else None
            result.append(mark)
        result.append(piece)
    if open_at is not None:
        result[open_at] = ""
    return "".join(result)


def _is_math(content: str, following: str) -> bool:
    if not content.strip() or following[:1].isdigit() or content[0].isspace() != content[-1].isspace():
        return False
    return not re.search(r"[A-Za-z]{4,}", _COMMAND.sub(" ", _TEXT.sub(" ", content)))


def _words(content: str) -> Answer | None:
    """Return an answer that is words, such as `\\text{Monday}` or Monday; None if the content is something else."""
    plain = " ".join(_TEXT.sub(r"\1", content).split()).strip("*. ")
    if re.fullmatch(r"\([A-Za-z]\)", plain):
        return Answer(plain[1], is_text=True)
    if not re.fullmatch(r"[^\W\d_]+(?:(?:[, ]+|['’-])[^\W\d_]+)*", plain):
        return None
    wrapped = plain != content.strip("*. \n\t")
    return Answer(plain, is_text=True) if wrapped or max(map(len, re.split("[, '’-]+", plain))) > 3 else None


def _based(content: str) -> Answer | None:
    """Return a number in a stated base such as 25_6, which is not 25; None if the content is something else."""
    plain = re.sub(r"[{}\s]", "", _TEXT.sub(r"\1", content))
    return Answer(plain, is_text=True) if _BASED.fullmatch(plain) else None


def _expression(content: str) -> Answer | None:
    """Return the answer in a content that is one expression; None if it cannot be parsed."""
    content = content.strip("*` \n\t").rstrip(".*` \n\t")
    whole = _TEXT.fullmatch(content)
    if whole is not None and any(map(str.isdigit, whole[1])):
        content = whole[1].strip()
    if not content or len(content) > LONGEST or content.endswith("?"):
        return None
    as_text = _words(content) or _based(content)
    if as_text is not None:
        return as_text
    content = _MIXED.sub(r"\1\\frac{\2}{\3}", _UNIT.sub("", content))
    content = re.sub(r"(?<![\\A-Za-z])(pi|ln|log|sin|cos|tan)(?![A-Za-z])", r"\\\1 ", content)
    values = load().parse(rf"\boxed{{{content}}}", parsing_timeout=None)
    return Answer("".join(content.split()), values) if values else None


def _prose(text: str) -> Answer | None:
    """Return the last expression or number in a text, or the one after its last "answer is"."""
    ends = [match.end() for match in _ANNOUNCED.finditer(text)]
    if ends:
        said = text[ends[-1] :].strip().partition("\n")[0]
        counts = re.match(r"[A-Za-z]{2,}\s.*\d", said)  # as in "therefore 6"
        if said and not counts and not _DELIMITER.search(said) and len(_WORD.findall(said)) <= 2:
            return _expression(re.split(r"[.,;](?=\s)", said)[0])
        text = f"answer: {said}" if said else text
    else:
        text = re.sub("answer", "result", text, flags=re.IGNORECASE)
    text = _QUOTED.sub(r" \1 ", text)
    delimited = _SEGMENT.findall(text)
    if delimited and (words := _words(delimited[-1]) or _based(delimited[-1])):
        return words
    values = load().parse(text, parsing_timeout=None)
    return Answer(str(values[-1]), values) if values else None


@cache
def load() -> Any:
    """Import the library, without its warning that time limits are off."""
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return math_verify
