"""Errors that a user can fix, and suggestions for misspelt names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable


class UserError(Exception):
    """An error whose message says how to fix it; the command line prints it without a traceback."""

    code = 2
    """Exit code of the command: 2 if it was rejected before running, 1 if what ran failed, whose traceback is then printed."""


def root_cause(error: BaseException) -> BaseException:
    """Return the error that was raised first and others from it."""
    while error.__cause__ is not None and error.__cause__.__traceback__ is not None:
        error = error.__cause__
    return error


class CheckpointError(UserError, ValueError):
    """A checkpoint that cannot be written or resumed: incomplete, damaged, or of another run."""


class DiskFull(UserError):
    """There is no space left for a checkpoint."""

    code = 1


class RunExists(UserError):
    """The output folder contains another run, and neither resuming nor overwriting was asked for."""


def did_you_mean(word: object, choices: Iterable[str], key: Callable[[str], str] = str) -> str:
    """Return ` Did you mean 'x', 'y' or 'z'?` with the `near_names`, or nothing if there are none."""
    near = [repr(name) for name in near_names(word, choices, key)]
    return f" Did you mean {' or '.join(filter(None, (', '.join(near[:-1]), near[-1])))}?" if near else ""


def near_names(word: object, choices: Iterable[str], key: Callable[[str], str] = str) -> list[str]:
    """Return up to three choices that `word` may be a misspelling of, the nearest first.

    Near are choices within a Damerau-Levenshtein distance of a third of the longer name's length, at most 3, and those
    that begin or end with the word (`epsilon_low` for `epsilon`) or consist of the same words. Case and punctuation do not
    count. `key` returns the part of a choice to compare.
    """
    from rapidfuzz.distance import DamerauLevenshtein  # on the error path only

    written = _plain(word)
    found = []
    for choice in dict.fromkeys(choices):
        plain = _plain(key(choice))
        distance = DamerauLevenshtein.distance(written, plain)
        inside = len(written) > 3 and (plain.startswith(written) or plain.endswith(f"_{written}"))
        if inside or sorted(written.split("_")) == sorted(plain.split("_")):
            distance = min(distance, 3)
        elif distance > min(3, max(len(written), len(plain)) // 3):
            continue
        found.append((distance, len(plain), choice))
    exact = [entry for entry in found if entry[0] == 0]
    return [choice for *_, choice in sorted(exact or found)[:3]]


def _plain(name: object) -> str:
    return re.sub(r"\W", "_", str(name).lower().replace("+", "_plus"))
