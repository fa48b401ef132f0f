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


TRAINER = """
from tests.helpers.runs import problems, recipe, tiny_policy
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import ProgressCallback
from hf_rlhf import RLHFTrainer

class Fails(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if WHAT == "fails" and state.global_step == 3:
            raise RuntimeError("boom")

model, tokenizer = tiny_policy()
options = {"max_steps": 6, "use_cpu": True, "report_to": "none", "logging_steps": 1, "save_strategy": "no"}
args = TrainingArguments(FOLDER, disable_tqdm=WHAT == "quiet", **options)
given = {"train_dataset": problems(), "processing_class": tokenizer, "callbacks": [Fails()]}
made = RLHFTrainer(model, recipe(), args, **given)
if WHAT == "removed":
    made.remove_callback(ProgressCallback)
try:
    made.train()
except RuntimeError as error:
    print("ended by", error)
made.close()
"""


def seen_on_a_terminal(program: str) -> str:
    """What a program writes on a terminal of 80 columns."""
    pty = pytest.importorskip("pty")
    import fcntl
    import termios

    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    env = {name: x for name, x in environment().items() if name not in ("COLUMNS", "NO_COLOR")} | {"TERM": "xterm"}
    process = subprocess.Popen([*warm("-c"), program], stdout=follower, stderr=follower, env=env)
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
    return seen.decode()


def plain(text: str) -> str:
    """The text without what moves the cursor."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n")


@pytest.mark.parametrize("what", ["drawn", "fails", "quiet", "removed"])
def test_a_trainer_made_in_python_has_the_live_view_in_place_of_trainer_s_bar(what, tmp_path):
    text = seen_on_a_terminal(f"WHAT, FOLDER = {what!r}, {str(tmp_path)!r}\n{TRAINER}")
    last = plain(text)
    assert bool(re.search(r"^reward +0\.", last, re.MULTILINE)) == (what in ("drawn", "fails"))
    assert ("6/6" in last) == (what == "drawn")
    assert ("'policy/loss'" in last) == (what == "quiet")
    assert ("ended by boom" in last) == (what == "fails")
    if what in ("drawn", "fails"):
        assert text.rindex("\x1b[?25l") < text.rindex("\x1b[?25h")


def test_on_a_terminal_the_progress_is_drawn_in_place_and_the_cursor_given_back():
    text = seen_on_a_terminal(PROGRAM)
    assert text.rindex("\x1b[?25l") < text.rindex("\x1b[?25h")  # cursor hidden, then shown again
    assert "\x1b[1A" in text or "\x1b[2K" in text  # drawn over, not below
    last = plain(text)
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
