"""Errors that a user can fix, and suggestions for misspelt names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """An error whose message says how to fix it; the command line prints it without a traceback."""

    code = 2
    """Exit code of the command."""


def did_you_mean(word: object, choices: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?`, or nothing if no choice is close."""
    near = difflib.get_close_matches(str(word), list(choices), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
