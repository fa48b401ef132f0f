"""Error reporting and exit codes: one message on stderr, and a traceback on request.

Exit codes: 0 success; 1 unexpected failure; 2 rejected before running, with how to fix it; 128 + n stopped by signal n.
"""

from __future__ import annotations

import os
import sys
import textwrap
from pathlib import Path
from types import TracebackType

from hf_rlhf.registry.discovery import format_error
from hf_rlhf.registry.host import get_host
from hf_rlhf.runtime.cache import cache_folder
from hf_rlhf.runtime.errors import UserError, root_cause
from hf_rlhf.runtime.plain_text import format_traceback, indented

ASKED = "HF_RLHF_TRACEBACK"


def wants_traceback() -> bool:
    """Return whether --traceback or the environment asks for tracebacks."""
    return os.environ.get(ASKED, "").lower() not in ("", "0", "false", "no")


def report(error: Exception) -> int:
    """Print the error to stderr and return the exit code."""
    if wants_traceback():
        print(format_traceback(error), file=sys.stderr)
        return error.code if isinstance(error, UserError) else 1
    if isinstance(error, UserError):
        lines = [f"error: {error}", *(textwrap.indent(note, "  ") for note in getattr(error, "__notes__", ()))]
        if error.code == 1 and error.__cause__ is not None:
            lines.append(textwrap.indent(format_traceback(root_cause(error)), "  "))
        print(indented("\n".join(lines)), file=sys.stderr)
        return error.code
    lines = [f"error: {format_error(error)}", *getattr(error, "__notes__", ())]
    lines += [f"  raised in {place(error.__traceback__)}"] if error.__traceback__ else []
    try:
        lines += [f"  traceback: {write(error)} (--traceback prints it instead)"]
    except OSError:
        print(format_traceback(error), file=sys.stderr)
    lines += ["  if this looks like a bug in a plugin or in hf_rlhf, report it with the output of `hf-rlhf env`"]
    print(indented("\n".join(lines)), file=sys.stderr)
    return 1


def place(trace: TracebackType | None) -> str:
    """Return where the error was raised: the innermost frame of a plugin, with its owner; otherwise the innermost frame."""
    offers = {offer.module: offer for offer in get_host().offers() if offer.module}
    found = innermost = ""
    while trace is not None:
        code = trace.tb_frame.f_code
        innermost = f"{code.co_filename}, line {trace.tb_lineno}, {code.co_name}"
        offer = offers.get(trace.tb_frame.f_globals.get("__name__", ""))
        if offer:
            found = f"{innermost}: {offer.axis}.{offer.name} of {offer.source}"
        trace = trace.tb_next
    return found or innermost


def write(error: Exception) -> Path:
    """Write the traceback to the cache folder, over that of the last error, and return the file."""
    file = cache_folder() / "last_traceback.txt"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(format_traceback(error) + "\n", encoding="utf-8")
    return file
