"""Steps of a completion: their boundaries, the text in which a model reads them, and their reduction to one number."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

REDUCE: Mapping[str, Callable[[Sequence[float]], float]] = {
    "sum": math.fsum,
    "mean": fmean,
    "min": min,
    "last": lambda values: values[-1],
    "product": math.prod,
}


class Step(NamedTuple):
    """Step of a completion in characters: its text is [start, stop), its delimiter [stop, end)."""

    start: int
    stop: int
    end: int


class Prepared(NamedTuple):
    """Completion as a model reads it, and for each step the characters [first, last) at whose end it is scored."""

    text: str
    places: list[tuple[int, int]]


def by_delimiter(text: str, delimiter: str) -> list[Step]:
    """Split a text into the nonblank steps between delimiters; the last one needs no delimiter."""
    return list(_split(text, delimiter))


def _split(text: str, delimiter: str) -> Iterator[Step]:
    start = 0
    while start < len(text):
        at = text.find(delimiter, start)
        stop, end = (at, at + len(delimiter)) if at >= 0 else (len(text), len(text))
        if text[start:stop].strip():
            yield Step(start, stop, end)
        start = end


def by_column(text: str, given: Any) -> list[Step]:
    """Read steps from a dataset column: their end positions in characters, or their texts, in order.

    Raises `ValueError` if they are neither, or not in the text.
    """
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise ValueError(f"steps must be a list of end positions in characters, or of texts, got {given!r}")
    steps: list[Step] = []
    for item in given:
        start = steps[-1].end if steps else 0
        if isinstance(item, str):
            found = text.find(item, start) if item.strip() else -1
            if found < 0:
                raise ValueError(
                    f"step {item!r} is not in the completion after character {start}: steps must be parts of it, in order"
                )
            steps.append(Step(found, found + len(item), found + len(item)))
        elif isinstance(item, int) and not isinstance(item, bool) and start < item <= len(text):
            steps.append(Step(start, item, item))
        else:
            raise ValueError(
                f"invalid step end {item!r}: expected increasing integers from 1 to the completion's {len(text)} characters"
            )
    return steps


def prepared(text: str, steps: Sequence[Step], closing: str, token: str | None, keep: bool) -> Prepared:
    """Return the completion as the model reads it.

    Without `token` each step is scored at the end of its delimiter; a last step without one gets `closing`. With it, the
    token is inserted after each step, before its delimiter or, unless `keep`, instead of it, and the step is scored there.
    """
    if token is None:
        if steps and steps[-1].stop == steps[-1].end == len(text):
            closed = steps[-1]._replace(end=len(text) + len(closing))
            return Prepared(text + closing, [(step.start, step.end) for step in (*steps[:-1], closed)])
        return Prepared(text, [(step.start, step.end) for step in steps])
    made, places, done = "", [], 0
    for step in steps:
        made += text[done : step.stop]
        places.append((len(made), len(made) + len(token)))
        made += token
        done = step.stop if keep else step.end
    return Prepared(made + text[done:], places)


def reduced(how: str, values: Sequence[float]) -> float | None:
    """Reduce the values of a row's steps to one number; without steps the sum is 0 and other reductions give None."""
    return REDUCE[how](values) if values or how == "sum" else None


def check_token(tokenizer: Any, token: str, asker: str, model: str) -> None:
    """Check that `token` is a single token of the tokenizer. Raises `ValueError`."""
    places = tokenizer("a" + token, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    blank = len(token) - len(token.lstrip())
    if not places or places[-1][0] > 1 + blank or places[-1][1] != 1 + len(token):
        raise ValueError(
            f"{asker}: {token!r} must be a single token of the tokenizer of {model!r}. Use the one that the model was trained "
            "with, or remove it to score steps at the delimiter"
        )
