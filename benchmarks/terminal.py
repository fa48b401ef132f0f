"""Picture of the quickstart in a terminal.

`python -m benchmarks.terminal [--columns 96] [--rows 36]`: run it in tmux and draw docs/pictures/terminal.svg of its
screen after 80 steps or a few more, without fonts from elsewhere.
"""

from __future__ import annotations

import argparse
import io
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FILE = Path(__file__).parents[1] / "docs" / "pictures" / "terminal.svg"
AT = re.compile(r"\b[89]\d/160\b")
"""Step at which the picture is taken."""


def screen(columns: int, rows: int, seconds: float = 600.0) -> str:
    """Run the quickstart and return a screen in the middle of it, with its escape sequences."""
    with tempfile.TemporaryDirectory() as folder:
        tmux = ["tmux", "-S", f"{folder}/tmux", "-f", "/dev/null"]
        command = [sys.executable, "-m", "hf_rlhf", "train", "quickstart", "--show-completions", "25"]
        command += ["--output-dir", f"{folder}/quickstart"]
        subprocess.run([*tmux, "new-session", "-d", "-x", str(columns), "-y", str(rows), *command], check=True)
        deadline = time.monotonic() + seconds
        try:
            while time.monotonic() < deadline:
                shot = subprocess.run([*tmux, "capture-pane", "-p", "-e"], check=True, capture_output=True, text=True)
                if AT.search(re.sub(r"\x1b\[[\d;]*m", "", shot.stdout)):
                    return shot.stdout
                time.sleep(0.2)
        finally:
            subprocess.run([*tmux, "kill-server"], check=False)
    raise TimeoutError(f"the quickstart did not come to step 80 within {seconds:.0f} s")


def picture(shot: str, columns: int, file: Path) -> None:
    """Draw a screen."""
    from rich.console import Console
    from rich.text import Text

    out = Console(record=True, width=columns, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    out.print(Text.from_ansi(shot.rstrip("\n")))
    svg = out.export_svg(title="hf-rlhf train quickstart --show-completions 25", unique_id="terminal")
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL).replace(
        "Fira Code", "DejaVu Sans Mono, Menlo, Consolas"
    )
    file.write_text(svg)


def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--columns", type=int, default=96)
    parser.add_argument("--rows", type=int, default=36)
    options = parser.parse_args()
    picture(screen(options.columns, options.rows), options.columns, FILE)


if __name__ == "__main__":
    main()
