"""How a command ends that cannot go on: one message, an exit code, and a traceback where it is asked for.

Exit codes: 0 done; 1 it failed on the way; 2 it was refused, with what to mend; 128 + n stopped by signal n.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import TracebackType

from hf_rlhf.registry.discovery import format_error
from hf_rlhf.registry.host import get_host
from hf_rlhf.runtime.errors import UserError

ASKED = "HF_RLHF_TRACEBACK"
KEPT = 20
"""Traceback files that are kept, the newest."""


def wants_traceback() -> bool:
    """Whether --traceback or the environment asks for tracebacks."""
    return os.environ.get(ASKED, "").lower() not in ("", "0", "false", "no")


def report(error: Exception) -> int:
    """Says on stderr what went wrong; the exit code."""
    if wants_traceback():
        traceback.print_exception(error)
        return error.code if isinstance(error, UserError) else 1
    if isinstance(error, UserError):
        print(f"error: {error}", file=sys.stderr)
        return error.code
    lines = [f"error: {format_error(error)}", *(f"  {note}" for note in getattr(error, "__notes__", ()))]
    lines += [f"  raised in {place(error.__traceback__)}"] if error.__traceback__ else []
    file = write(error)
    if file is None:
        traceback.print_exception(error)
    else:
        lines += [f"  traceback: {file} (--traceback prints it instead)"]
    lines += ["  where this looks like a fault of a plugin or of hf_rlhf, report it with what `hf-rlhf env` prints"]
    print("\n".join(lines), file=sys.stderr)
    return 1


def place(trace: TracebackType | None) -> str:
    """Where it was raised: the innermost code of a plugin, with its owner; without any, the innermost of all."""
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


def write(error: Exception) -> Path | None:
    """The file that the traceback was written to; None where no folder can be written to. Older files are removed."""
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    for home in (cache(), Path(tempfile.gettempdir()) / f"hf_rlhf-{os.getuid() if hasattr(os, 'getuid') else 0}"):
        folder = home / "tracebacks"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / name
            file.write_text("".join(traceback.format_exception(error)), encoding="utf-8", errors="backslashreplace")
            for old in sorted(folder.glob("*.txt"))[:-KEPT]:
                old.unlink(missing_ok=True)
        except OSError:
            continue
        return file
    return None


def cache() -> Path:
    """Where files lie that no run owns: $HF_RLHF_CACHE, or ~/.cache/hf_rlhf."""
    return Path(os.environ.get("HF_RLHF_CACHE") or Path.home() / ".cache" / "hf_rlhf").expanduser()
