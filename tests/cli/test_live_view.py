"""The live view as a person sees it, in a terminal that keeps its screen."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.processes import warm
from tests.helpers.terminals import Terminal, terminal
from tests.helpers.waits import scaled

BAR = re.compile(r"^step .*\d+/\d+", re.MULTILINE)
PHASES = ("importing PyTorch", "evaluation", "rollout", "update", "rewards", "forward", "saving", "loading the model")
TALKS = """
import time


def talks(completions, answer, **kwargs):
    print("said by the reward \\x1b[2J")
    time.sleep(0.3)
    return [float(len(text)) for text in completions]


def fails(completions, answer, **kwargs):
    raise SystemExit(7)
"""


@pytest.fixture
def run(tmp_path: Path, tiny_model_path: Path) -> Any:
    """Words of a short run on a tiny model, with a reward that takes 0.3 s and prints."""
    rows = "".join(json.dumps({"prompt": f"{i}+1=", "answer": str(i + 1)}) + "\n" for i in range(40))
    (tmp_path / "rows.jsonl").write_text(rows)
    (tmp_path / "own.py").write_text(TALKS)

    def words(*more: str, reward: str = "talks", steps: int = 12) -> list[str]:
        own = f'rewards.0={{use: function, function: "{tmp_path}/own.py:{reward}"}}'
        small = ["rollout.prompts=4", "rollout.num_generations=2", "rollout.max_new_tokens=4", "dataset.held_out=4"]
        named = ["--model", str(tiny_model_path), "--dataset", str(tmp_path / "rows.jsonl")]
        where = ["--max-steps", str(steps), "--output-dir", str(tmp_path / "out")]
        return [*warm("hf_rlhf"), "train", "grpo", *named, *where, own, *small, *more]

    return words


def check_screens(seen: Terminal) -> None:
    """Each screen has at most one view, whole and within the width."""
    for screen in seen.screens:
        assert len(BAR.findall(screen)) <= 1, screen
        assert len(re.findall(r"^reward  ", screen, re.MULTILINE)) <= 1, screen
        assert max(map(len, screen.splitlines()), default=0) <= seen.width


@pytest.mark.parametrize("width", [120, 60])
def test_the_quickstart_in_a_terminal(width: int, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "hf_rlhf", "train", "quickstart", "--max-steps", "25", "--output-dir", str(tmp_path)]
    with terminal([*words, "--show-completions", "10"], width, height=60, HF_HUB_OFFLINE="1") as seen:
        assert seen.end(300) == 0
        assert seen.shows_cursor
    check_screens(seen)
    everything = "\n".join(seen.screens)
    assert "importing PyTorch" in seen.screens[1] + seen.screens[2], "it names what it does from the first second"
    phases = [name for name in PHASES if re.search(rf"\b{name}[^,]* \d+(\.\d)? s", everything)]
    assert {"importing PyTorch", "rollout", "update"} <= set(phases), phases
    last = seen.screens[-1]
    for title in ("model", "data", "algorithm", "batch", "memory"):
        assert re.search(rf"^{title} ", everything, re.MULTILINE), everything
    for label in ("reward", "KL to the reference", "length", "entropy", "held-out accuracy"):
        assert re.search(rf"^{label} +[\d.e-]+", last, re.MULTILINE), last
    assert re.search(r"^reward +[\d.]+ +[↑→↓] +[▁▂▃▄▅▆▇█]{15,}", last, re.MULTILINE)
    assert re.search(r"^ *prompt +\d+\+\d+=\n +reference +\d+\n +completion +\d+", everything, re.MULTILINE)
    assert "25 steps in" in last


def test_what_others_print_meanwhile_stands_above_the_view_and_moves_nothing(run: Any) -> None:
    with terminal(run(), width=80) as seen:
        assert seen.end() == 0
    check_screens(seen)
    middle = [screen for screen in seen.screens if "said by the reward" in screen and BAR.search(screen)]
    assert middle
    for screen in middle:
        assert screen.rindex("said by the reward") < screen.index(BAR.search(screen)[0])  # type: ignore[index]
    assert "\\x1b[2J" in middle[-1], "escape sequences are written, not obeyed"
    assert any("rewards 0." in screen for screen in middle)


def test_a_run_has_the_same_bits_with_the_view_and_without(run: Any, tmp_path: Path) -> None:
    with terminal(run("--show-completions", "1", steps=3), width=80) as seen:
        assert seen.end() == 0
    (tmp_path / "out").rename(tmp_path / "seen")
    subprocess.run(run(steps=3), check=True, capture_output=True, timeout=scaled(120))
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("seen", "out")]
    assert weights[0] == weights[1]


def test_ctrl_c_ends_the_run_and_gives_the_terminal_back(run: Any) -> None:
    with terminal(run(steps=500), width=80) as seen:
        seen.wait_for("3/500")
        seen.press("C-c")
        assert seen.end() == 130
        assert seen.shows_cursor
        assert "checkpoint" in seen.screen()
    check_screens(seen)


def test_an_error_in_the_middle_gives_the_terminal_back(run: Any) -> None:
    with terminal(run("rewards.0.on_error=raise", reward="fails"), width=80) as seen:
        assert seen.end() not in (0, 130)
        assert seen.shows_cursor
        assert "error" in seen.screen()


def test_a_refused_run_leaves_only_its_message(run: Any) -> None:
    with terminal(run("rollout.prompts=4000"), width=80) as seen:
        assert seen.end() == 2
        lines = [line for line in seen.screen().splitlines() if line]
        assert lines[0].startswith("error: rollout.prompts=4000"), lines


@pytest.mark.parametrize(
    ("variables", "drawn", "coloured"),
    [({}, True, True), ({"NO_COLOR": "1"}, True, False), ({"TERM": "dumb"}, False, False)],
    ids=["plain", "NO_COLOR", "dumb"],
)
def test_terminals_without_colours_or_without_a_movable_cursor(
    variables: dict[str, str], drawn: bool, coloured: bool, run: Any
) -> None:
    with terminal(run(steps=3), width=60, height=80, **variables) as seen:  # the paths of a run may be long
        assert seen.end() == 0
        assert ("━" in seen.screen()) == drawn
        assert bool(re.search(r"\x1b\[[0-9;]*3[1-7]", seen.screen(colours=True))) == coloured
        assert ("step 3/3  reward" in seen.screen()) != drawn
