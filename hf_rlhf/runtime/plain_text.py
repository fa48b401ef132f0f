"""Make text from outside plain: completions, exceptions, names of files and packages may hold anything.

Characters that a terminal or a reader of a log might obey are written as escapes: control characters (escape sequences, NUL,
carriage returns), other line ends, directions of text, and halves of surrogate pairs. A line feed starts an indented line, so
that no text can pass for a message of its own.
"""

from __future__ import annotations

import logging
import traceback
from typing import Any

SPACES_AND_JOINERS = "\u00a0\u3000\u200c\u200d"
"""Unprintable by Python's rules, and part of ordinary text in some scripts."""
INDENT = "  "


def escaped(text: str, keep: str = "") -> str:
    """Return the text with unprintable characters, but those in `keep`, as escapes such as `\\x1b`."""
    if text.isprintable():
        return text
    kept = SPACES_AND_JOINERS + keep
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode("ascii") for c in text)


def indented(text: str) -> str:
    """Return the text with every line after the first indented, and otherwise `escaped`."""
    first, *others = escaped(text, "\n\t").split("\n")
    return "\n".join([first, *(line if line.startswith(INDENT) or not line else INDENT + line for line in others)])


def format_traceback(error: BaseException) -> str:
    """Return an exception's traceback as plain text, in Python's form."""
    whole = traceback.TracebackException.from_exception(error)
    errors = [whole]
    for each in errors:
        if notes := getattr(each, "__notes__", None):
            each.__notes__ = [indented(f"{INDENT}{note}") for note in notes]
        errors += [x for x in (each.__cause__, each.__context__, *(each.exceptions or ())) if x is not None]
    parts = [(part.startswith("\n"), part.strip("\n")) for part in whole.format()]
    return "\n".join("\n" * blank + indented(part) for blank, part in parts)


def clean(record: logging.LogRecord) -> bool:
    """Make a log record plain, its traceback included; as a filter, it keeps every record."""
    try:
        record.msg, record.args = indented(record.getMessage()), ()
    except Exception:  # wrong arguments: the handler that prints the record reports them
        return True
    if record.exc_info and record.exc_info[1] and not record.exc_text:
        record.exc_text = format_traceback(record.exc_info[1])
    for name in ("exc_text", "stack_info"):
        if text := getattr(record, name):
            setattr(record, name, INDENT + indented(text))
    return True


class PlainHandler(logging.Handler):
    """Make records plain for the handlers after it; prints them as Python does by itself where there are no others."""

    def emit(self, record: logging.LogRecord) -> None:
        """Clean the record."""
        clean(record)
        last = logging.lastResort
        if last is not None and record.levelno >= last.level and not _others(record.name):
            last.handle(record)


def _others(name: str) -> bool:
    """Return whether another handler gets the records of this logger."""
    logger: logging.Logger | None = logging.getLogger(name)
    while logger is not None:
        if any(not isinstance(handler, PlainHandler) for handler in logger.handlers):
            return True
        logger = logger.parent if logger.propagate else None
    return False


def clean_own_logs() -> None:
    """Make what this package and its plugins log plain, whichever handlers a program has."""
    for name in ("hf_rlhf", "hf_rlhf_plugins"):
        logger = logging.getLogger(name)
        if not any(isinstance(handler, PlainHandler) for handler in logger.handlers):
            logger.addHandler(PlainHandler())


def clean_all_logs() -> None:
    """Make what any library logs without a handler plain too, in a process of our own."""
    if logging.lastResort is not None and clean not in logging.lastResort.filters:
        logging.lastResort.addFilter(clean)


class PlainStream:
    """A text stream that writes to another what is plain. Closing it does nothing."""

    def __init__(self, target: Any, shown_by_rich: Any = None) -> None:
        self._target = target
        self.rich_proxied_file = shown_by_rich or target
        """Stream of a live display of `rich`, which asks `sys.stdout` for it."""

    def write(self, text: str) -> int:
        """Write the text, its lines as they are."""
        self._target.write(escaped(text, "\n\t"))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write the lines."""
        for line in lines:
            self.write(line)

    def close(self) -> None:
        """Do nothing."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)
