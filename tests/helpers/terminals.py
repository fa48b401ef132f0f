"""A terminal of a given size that keeps its screen (tmux), to look at what a person sees while a command runs."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.helpers.paths import environment
from tests.helpers.waits import scaled

ENDED = re.compile(r"^ended with (\d+)$", re.MULTILINE)


class Terminal:
    """A running tmux session with one command. `screens` are the different ones seen so far."""

    def __init__(self, socket: Path, width: int):
        self.socket, self.width = socket, width
        self.screens: list[str] = []

    def tmux(self, *words: str) -> str:
        """Run a command of tmux and return its output."""
        done = subprocess.run(
            ["tmux", "-S", str(self.socket), "-f", "/dev/null", *words], capture_output=True, text=True
        )
        assert done.returncode == 0, (words, done.stderr)
        return done.stdout

    def screen(self, colours: bool = False) -> str:
        """Return what is on the screen, with its escape sequences if `colours`."""
        return self.tmux("capture-pane", "-p", *(["-e"] if colours else []))

    def look(self) -> str:
        """Return the screen, and keep it if it is new."""
        now = self.screen()
        if not self.screens or now != self.screens[-1]:
            self.screens.append(now)
        return now

    def wait_for(self, text: str, seconds: float = 60.0) -> str:
        """Look until a text is on the screen, and return the screen."""
        return self._until(lambda screen: text in screen, f"no {text!r}", seconds)

    def end(self, seconds: float = 120.0) -> int:
        """Look until the command has ended, and return its exit code."""
        found = ENDED.search(self._until(lambda screen: bool(ENDED.search(screen)), "still running", seconds))
        assert found is not None
        return int(found[1])

    def _until(self, seen, problem: str, seconds: float) -> str:  # type: ignore[no-untyped-def]
        deadline = time.monotonic() + scaled(seconds)
        while not seen(screen := self.look()):
            assert time.monotonic() < deadline, f"{problem} on the screen:\n{screen}"
            time.sleep(0.1)
        return screen

    def press(self, key: str) -> None:
        """Press a key, such as C-c."""
        self.tmux("send-keys", key)

    @property
    def shows_cursor(self) -> bool:
        """True unless a program has hidden the cursor."""
        return self.tmux("display-message", "-p", "#{cursor_flag}").strip() == "1"


@contextmanager
def terminal(words: Sequence[str], width: int = 120, height: int = 45, **variables: str) -> Iterator[Terminal]:
    """Run a command in a terminal. Skips where tmux is missing; in CI (`CI=true`) it must be there."""
    if shutil.which("tmux") is None and not os.environ.get("CI"):
        pytest.skip("no tmux: `make tmux` installs it")
    env = {name: x for name, x in environment().items() if name not in ("COLUMNS", "LINES", "NO_COLOR", "TMUX")}
    with TemporaryDirectory() as folder:
        script = Path(folder) / "run.sh"
        exports = "".join(f"export {name}={shlex.quote(x)}\n" for name, x in variables.items())
        stays = "trap : INT"  # when the command is interrupted
        lines = [exports, stays, shlex.join(words), 'echo "ended with $?"', "exec sleep 600"]
        script.write_text("\n".join(lines))
        made = Terminal(Path(folder) / "tmux", width)
        size = ["-x", str(width), "-y", str(height)]
        start = ["tmux", "-S", str(made.socket), "-f", "/dev/null", "new-session", "-d", *size, "sh", str(script)]
        subprocess.run(start, check=True, env=env)
        try:
            yield made
        finally:
            subprocess.run(["tmux", "-S", str(made.socket), "kill-server"], check=False)
