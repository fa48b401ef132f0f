"""What a person at the terminal sees: the live progress, its plain form, and the tables at 80 columns."""

from __future__ import annotations

import io
import time
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from hf_rlhf.cli.runs.run import check
from hf_rlhf.config.recipe import load_recipe
from hf_rlhf.metrics.console import LiveProgress, _short, show_plan, show_result
from hf_rlhf.metrics.live_view import LiveView, number

LOGS = {
    "loss": 0.1,
    "reward/total/mean": 0.25,
    "kl/ref": 2.4e-7,
    "rollout/length/mean": 12.5,
    "policy/entropy": 1.75,
    "perf/tokens_per_s": 1234.5,
}


def state(step: int, steps: int = 3, main: bool = True) -> Any:
    return SimpleNamespace(global_step=step, max_steps=steps, is_world_process_zero=main)


def plain(width: int = 80) -> Console:
    return Console(file=io.StringIO(), width=width, highlight=False)


def run(progress: LiveProgress, main: bool = True, pause_s: float = 0.0) -> None:
    """An evaluation, three steps, an evaluation."""
    progress.on_log(None, state(0, 0, main), None, logs={"eval_reward/total/mean": 0.1})
    progress.on_train_begin(None, state(0, main=main), None)
    for step in (1, 2, 3):
        progress.on_step_end(None, state(step, main=main), None)
        progress.on_log(None, state(step, main=main), None, logs={**LOGS, "reward/total/mean": step / 4})
        time.sleep(pause_s)
    progress.on_log(None, state(3, main=main), None, logs={"train_runtime": 1.0})
    progress.on_train_end(None, state(3, main=main), None)


def test_off_a_terminal_a_line_says_the_step_and_the_newest_numbers_in_one_order():
    out = plain()
    run(LiveProgress(LiveView(out), every_s=0.0))
    text = "reward {}  KL to the reference 2e-07  length 12.5  entropy 1.75  held-out reward 0.1  tokens/s 1,234"
    expected = [f"step {i}/3  " + text.format(reward) for i, reward in ((1, "0.25"), (2, "0.5"), (3, "0.75"))]
    assert out.file.getvalue().splitlines() == expected


def test_lines_come_every_few_seconds_and_at_the_last_step():
    out = plain()
    run(LiveProgress(LiveView(out), every_s=1e9))
    assert [line.split()[1] for line in out.file.getvalue().splitlines()] == ["3/3"]


def test_other_processes_say_nothing():
    out = plain()
    run(LiveProgress(LiveView(out), every_s=0.0), main=False)
    assert out.file.getvalue() == ""


def test_the_plan_is_readable_at_80_columns():
    out = plain(80)
    show_plan(check(load_recipe("quickstart", ["update.max_tokens_per_micro_batch=8192"])), out)
    text = out.file.getvalue()
    assert "…" not in text
    for word in ("group_norm", "rollout.num_generations", "optimizer steps per rollout", "TRL num_generations"):
        assert word in text
    assert "at most 8192 tokens (update.max_tokens_per_micro_batch)" in text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80


SUMMARY = {
    "before": {"reward/total/mean": 0.3, "accuracy": 0.3, "rollout/length/mean": 3.0},
    "after": {"reward/total/mean": 0.5, "accuracy": 0.95, "rollout/length/mean": 2.9, "maj@4": 1.0},
    "steps": 160,
    "seconds": 61.2,
    "output_dir": "outputs/quickstart",
}


def sample(prompt: Any, completion: str, reward: float) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, "reward": reward}


def test_the_result_shows_before_beside_after_with_accuracy_first():
    out = plain()
    samples = {"before": [sample("37+58=", "94", 0.0)], "after": [sample("37+58=", "95", 1.0)]}
    show_result(SUMMARY, samples, out, next_steps=[("hf-rlhf show kl in_loss", "its settings")])
    lines = [line.split() for line in out.file.getvalue().splitlines()]
    assert [line for line in lines if line][:5] == [
        ["held-out", "prompts"],
        ["before", "after"],
        ["accuracy", "0.3", "0.95"],
        ["maj@4", "-", "1"],
        ["reward/total/mean", "0.3", "0.5"],
    ]
    assert ["37+58=", "94", "0", "95", "1"] in lines
    assert lines[-3:] == [["next:"], ["hf-rlhf", "show", "kl", "in_loss"], ["its", "settings"]]


def test_the_result_says_nothing_twice_and_no_error_that_did_not_occur():
    before = {"accuracy": 0.5, "reward/total/mean": 0.5, "reward/exact_match/mean": 0.5, "reward/length/mean": 0.0}
    before |= {"health/reward_error": 0, "health/reward_timeout": 0, "rollout/truncated_frac": 0.0}
    after = {
        **before,
        "accuracy": 0.9,
        "reward/total/mean": 0.9,
        "reward/exact_match/mean": 0.9,
        "health/reward_timeout": 3,
    }
    out = plain()
    show_result({**SUMMARY, "before": before, "after": after}, {}, out)
    shown = [line.split()[0] for line in out.file.getvalue().splitlines() if line.startswith("  ")]
    names = ["accuracy", "reward/length/mean", "health/reward_timeout", "rollout/truncated_frac"]
    assert [name for name in shown if name in before] == names


def test_the_result_is_readable_at_80_columns_whatever_the_texts():
    out = plain(80)
    chat = [{"role": "user", "content": "a question that goes on and on " * 9}]
    odd = "half a pair \ud83e, \x1b[31mred\x07, 日本語, " + "x" * 300
    show_result(SUMMARY, {"before": [sample(chat, odd, -0.001)], "after": [sample(chat, "", 12345.0)]}, out)
    text = out.file.getvalue()
    text.encode()
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "12,345" in text
    assert max(len(line.rstrip()) for line in text.splitlines() if "hf-rlhf" not in line) <= 80


def test_a_run_without_held_out_prompts_shows_where_everything_is():
    out = plain()
    show_result({**SUMMARY, "before": None, "after": None}, {}, out)
    text = out.file.getvalue()
    assert "held-out" not in text
    assert "160 steps in 61 s. In outputs/quickstart:" in text


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (0.0, "0"),
        (1.0, "1"),
        (0.03125, "0.0312"),
        (12.49, "12.5"),
        (1840.4, "1,840"),
        (-2.4e-7, "-2e-07"),
        (-0.5, "-0.5"),
    ],
)
def test_numbers_have_three_digits(x, text):
    assert number(x) == text


def test_texts_are_one_line_of_limited_length():
    assert _short("a\n b\t c") == "a b c"
    assert _short("x" * 100, 10) == "x" * 7 + "..."
