"""Errors that a user can fix, and suggestions for misspelt names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """An error whose message says all that is needed to mend it; the command line prints it without a traceback."""

    code = 2
    """The command's exit code."""


def did_you_mean(word: object, choices: Iterable[str]) -> str:
    """` Did you mean 'x'?`, or nothing where no choice is near."""
    near = difflib.get_close_matches(str(word), list(choices), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
