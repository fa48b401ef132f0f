"""Output shared by all commands: tables and JSON on stdout, the rest on stderr; examples below a command's help."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import typer

from hf_rlhf.runtime.plain_text import escaped

Json = Annotated[bool, typer.Option("--json", help="Print JSON to stdout, and nothing else there.")]
"""The option `--json`, for commands whose output is data."""
NOISE = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TQDM_DISABLE")
"""Environment variables that turn off the progress bars of libraries."""
quieted: set[str] = set()
"""Those of `NOISE` that this process has set itself."""


def examples(*lines: str) -> str:
    """Return the `epilog` of a command: examples as typed, with a comment after two spaces and `#`."""
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)])


def examples_of(command: Any) -> list[str]:
    """Return the examples of a command, without their comments."""
    lines = (getattr(command, "epilog", None) or "").partition("\n\n")[0].splitlines()
    return [line.partition("  # ")[0].strip() for line in lines if line.startswith("  ")]


def table(header: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
    """Print columns: fitted to a terminal's width below a title, otherwise as plain lines without truncation."""
    if not rows:
        print("none")
        return
    rows = [list(map(escaped, row)) for row in rows]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        drawn: Any = Table(*header, box=None, header_style="bold", pad_edge=False, show_header=title is None)
        drawn.columns[0].no_wrap = True  # names stay whole
        for row in rows:
            drawn.add_row(*map(Text, row))
        Console().print(*([Text(f"\n{title}", style="bold")] if title else []), drawn, sep="\n")
        return
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for line in [header, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def print_json(value: Any) -> None:
    """Print JSON. Numbers that JSON cannot represent become null."""
    text = json.dumps(_finite(value), default=str, ensure_ascii=False, indent=1)
    print("".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and value - value != 0:
        return None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


@contextlib.contextmanager
def output_to_stderr(wanted: bool = True) -> Iterator[None]:
    """Redirect output inside the block, also of child processes, to stderr, so that stdout holds only the result."""
    if not wanted:
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def quiet_off_terminal() -> None:
    """Turn off progress bars of libraries outside a terminal, unless the environment sets them.

    Also silence bitsandbytes, which logs missing CPU kernels to everybody who imports peft.
    """
    logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        quieted.update(name for name in NOISE if name not in os.environ)
        os.environ.update(dict.fromkeys(quieted, "1"))
        warnings.filterwarnings("ignore", message="Cannot enable progress bars")  # as Trainer asks for after a push
