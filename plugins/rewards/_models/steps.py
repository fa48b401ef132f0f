"""Steps of a completion: where they end, the text in which a model reads them, and one number for all."""

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
    """A step of a completion in characters: its text is [start, stop), what ends it [stop, end)."""

    start: int
    stop: int
    end: int


class Prepared(NamedTuple):
    """The completion as a model reads it, and for each step the characters [first, last) at whose end it is read."""

    text: str
    places: list[tuple[int, int]]


def by_delimiter(text: str, delimiter: str) -> list[Step]:
    """What lies between delimiters, where it is not white space; nothing need end the last step."""
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
    """Steps as a dataset gives them: the places in characters after each, or their texts, in order.

    Raises `ValueError` where they are neither, or not in the text.
    """
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise ValueError(f"{given!r} is no list; give the place after each step in characters, or the steps' texts")
    steps: list[Step] = []
    for item in given:
        start = steps[-1].end if steps else 0
        if isinstance(item, str):
            found = text.find(item, start) if item.strip() else -1
            if found < 0:
                raise ValueError(
                    f"the completion has no step {item!r} after character {start}; steps are parts of it, in order"
                )
            steps.append(Step(found, found + len(item), found + len(item)))
        elif isinstance(item, int) and not isinstance(item, bool) and start < item <= len(text):
            steps.append(Step(start, item, item))
        else:
            raise ValueError(
                f"{item!r} ends no step: whole numbers, rising from 1 to the completion's {len(text)} characters"
            )
    return steps


def prepared(text: str, steps: Sequence[Step], closing: str, token: str | None, keep: bool) -> Prepared:
    """The completion for the model.

    Without `token` each step is read where its delimiter ends; a last step that none ends is `closing`'s. With it the token
    is put after each step, before its delimiter or, unless `keep`, instead of it, and read there.
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
    """One number for a row's steps; without any the sum is 0 and the others have none."""
    return REDUCE[how](values) if values or how == "sum" else None


def check_token(tokenizer: Any, token: str, asker: str, model: str) -> None:
    """Raises `ValueError` where a tokenizer has no token for it: no model was trained to be read there."""
    places = tokenizer("a" + token, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    blank = len(token) - len(token.lstrip())
    if not places or places[-1][0] > 1 + blank or places[-1][1] != 1 + len(token):
        raise ValueError(
            f"{asker}: {token!r} is no token of the tokenizer of {model!r}, which cuts it up; write the one that the model was "
            "trained to be read at, or leave it out to read steps at the delimiter"
        )
