"""Where nobody watches there are no colours, boxes, progress bars or cut lines; in a terminal there are, within its width."""

from __future__ import annotations

import os
import re
import struct
import subprocess

import pytest

from tests.helpers.processes import warm
from tests.helpers.waits import scaled

DRAWN = re.compile("[\x1b\r\u2500-\u259f…]")
"""Escapes, carriage returns, boxes, bars, and what stands for a cut."""


def piped(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    for name in ("NO_COLOR", "FORCE_COLOR"):
        env.pop(name, None) if name not in environment else None
    return subprocess.run([*warm("hf_rlhf"), *words], env=env, capture_output=True, text=True, timeout=scaled(300))


def in_terminal(*words: str, width: int = 80, **environment: str) -> str:
    """What a terminal of this width gets."""
    pty = pytest.importorskip("pty")
    import fcntl
    import termios

    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    left_out = ("COLUMNS", "NO_COLOR", "FORCE_COLOR")
    env = {name: x for name, x in os.environ.items() if name not in left_out} | {"TERM": "xterm", **environment}
    process = subprocess.Popen([*warm("hf_rlhf"), *words], stdout=follower, stderr=follower, stdin=follower, env=env)
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
    os.close(leader)
    return seen.decode()


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["train", "--help"],
        ["plugins"],
        ["recipes"],
        ["show", "advantages", "group_norm"],
        ["check", "grpo"],
    ],
    ids=" ".join,
)
def test_piped_output_is_plain_and_nothing_is_cut_at_the_width_of_a_terminal(words):
    done = piped(*words, COLUMNS="40")
    assert (done.returncode, done.stderr) == (0, "")
    assert not DRAWN.search(done.stdout)
    whole = {
        "check": "epsilon_high 0.2 never bind, because the ratio stays 1 with one optimizer step per rollout",
        "recipes": "group's mean, over its group's standard deviation; k3 KL in the loss.",
        "show": "denominator",
        "train": "--resume_from_checkpoint",
    }
    if words[0] in whole and "show" not in words:
        assert whole[words[0]] in done.stdout


def test_a_run_in_a_pipe_draws_nothing_and_says_nothing_on_stderr(tmp_path, tiny_model_path):
    rows = "".join(f'{{"prompt": "{i}+1=", "answer": "{i + 1}"}}\n' for i in range(40))
    (tmp_path / "rows.jsonl").write_text(rows)
    words = [
        "train",
        "rlvr",
        "--model",
        str(tiny_model_path),
        "--dataset",
        str(tmp_path / "rows.jsonl"),
        "--max-steps",
        "1",
    ]
    words += ["rollout.prompts=4", "rollout.num_generations=2", "rollout.max_new_tokens=4", "dataset.held_out=4"]
    done = piped(*words, "--output-dir", str(tmp_path / "out"), HF_HOME=str(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert not DRAWN.search(done.stdout.replace("...", ""))
    assert "step 1/1" in done.stdout


def test_a_terminal_gets_a_table_that_fits():
    text = in_terminal("recipes", width=60)
    assert "\x1b[1m" in text
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "")
    assert max(map(len, plain.splitlines())) <= 60
    assert "reinforce_plus_plus_baseline" in plain


@pytest.mark.parametrize(("variables", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)], ids=["plain", "NO_COLOR"])
def test_no_color_is_honoured_in_a_terminal(variables, coloured):
    text = in_terminal("explain", "grpo", "rloo", width=200, **variables)
    assert bool(re.search(r"\x1b\[[0-9;]*3[0-9]m", text)) is coloured


def test_help_in_a_terminal_is_no_wider_than_it():
    text = in_terminal("train", "--help", width=70)
    examples = text.partition("Examples:")[2]
    assert max(map(len, text.partition("Examples:")[0].replace("\r", "").splitlines())) <= 70
    assert "--resume_from_checkpoint" in text
    assert "hf-rlhf train quickstart --max-steps 20" in examples
