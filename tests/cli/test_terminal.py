"""The live progress on a terminal, and output in an encoding that lacks characters: in processes of their own."""

from __future__ import annotations

import os
import re
import struct
import subprocess

import pytest

from tests.helpers.paths import environment
from tests.helpers.processes import warm
from tests.helpers.waits import scaled

PROGRAM = """
from tests.unit.metrics.test_console import run
from hf_rlhf.metrics.console import LiveProgress
from hf_rlhf.metrics.live_view import LiveView, console
out = console()
with LiveView(out) as view:
    run(LiveProgress(view), pause_s=0.4)
print("width", out.width)
"""


def test_on_a_terminal_the_progress_is_drawn_in_place_and_the_cursor_given_back():
    pty = pytest.importorskip("pty")
    import fcntl
    import termios

    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    env = {name: x for name, x in environment().items() if name not in ("COLUMNS", "NO_COLOR")} | {"TERM": "xterm"}
    process = subprocess.Popen([*warm("-c"), PROGRAM], stdout=follower, stderr=follower, env=env)
    os.close(follower)
    seen = b""
    while True:
        try:
            piece = os.read(leader, 65536)
        except OSError:  # Linux: the other side is closed
            break
        if not piece:
            break
        seen += piece
    assert process.wait(timeout=scaled(60)) == 0, seen
    text = seen.decode()
    assert text.rindex("\x1b[?25l") < text.rindex("\x1b[?25h")  # cursor hidden, then shown again
    assert "\x1b[1A" in text or "\x1b[2K" in text  # drawn over, not below
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n")
    assert "3/3" in last
    assert "0.75" in last
    assert "width 80" in last
    assert max(map(len, last.splitlines())) <= 80


def test_output_that_cannot_encode_a_character_gets_it_escaped():
    code = "from hf_rlhf.metrics.live_view import console; console().print('é 日 \\ud83e')"
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run([*warm("-c"), code], env=env, capture_output=True, text=True, timeout=scaled(60))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == r"\xe9 \u65e5 \ud83e"
