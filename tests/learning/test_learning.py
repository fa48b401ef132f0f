"""Every recipe learns, and beta controls the KL: run with `make test-learning` (about forty minutes on one core), or one
recipe with `pytest -m learning -k "it_learns and grpo"` (a quarter of a minute for each seed)."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise

import pytest

from benchmarks import fits, learning
from benchmarks.judges import judge

pytestmark = pytest.mark.learning


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_quickstart_rises_from_a_weak_start_to_92_percent(seed, tmp_path):
    command = [sys.executable, "-m", "hf_rlhf", "train", "quickstart", "--seed", str(seed)]
    subprocess.run([*command, "--output-dir", str(tmp_path / "run")], check=True)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert 0.20 <= summary["before"]["accuracy"] <= 0.45
    assert summary["after"]["accuracy"] >= 0.92


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_second_chance_is_learned_by_name_alone(seed, tmp_path):
    command = [sys.executable, "-m", "hf_rlhf", "train", "second_chance", "--seed", str(seed)]
    subprocess.run([*command, "--output-dir", str(tmp_path / "run")], check=True)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["before"]["reward/episode/mean"] <= 0.5
    assert summary["after"]["reward/episode/mean"] >= 0.9


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_calculator_is_used_by_name_alone(seed, tmp_path):
    command = [sys.executable, "-m", "hf_rlhf", "train", "calculator", "--seed", str(seed)]
    subprocess.run([*command, "--output-dir", str(tmp_path / "run")], check=True)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["before"]["accuracy"] < 0.3
    assert summary["after"]["accuracy"] > 0.9


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("name", "start"), [("guessing", 0.65), ("self_play", 0.35)])
def test_games_are_learned_by_name_alone(name, start, seed, tmp_path):
    """Held out are a hidden number in as many guesses as halving needs, and games that a perfect first player wins."""
    command = [sys.executable, "-m", "hf_rlhf", "train", name, "--seed", str(seed)]
    subprocess.run([*command, "--output-dir", str(tmp_path / "run")], check=True)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["before"]["accuracy"] <= start
    assert summary["after"]["accuracy"] >= 0.9


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("name", "before", "after"), [("multi_turn_grpo", 0.6, 0.9), ("tool_ppo", 0.3, 0.9)])
def test_recipes_with_credit_per_turn_learn_by_name_alone(name, before, after, seed, tmp_path):
    command = [sys.executable, "-m", "hf_rlhf", "train", name, "--seed", str(seed)]
    subprocess.run([*command, "--output-dir", str(tmp_path / "run")], check=True)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["before"]["reward/episode/mean"] <= before
    assert summary["after"]["reward/episode/mean"] >= after


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", fits.RECIPES)
def test_it_learns(name, seed):
    row = learning.run(name, seed)
    assert row["right"][1] >= row["right"][0] + fits.MARGIN, f"right answers: {row['right']}"
    if any(reward.get("weight", 1) for reward in fits.fitted(name, seed)["rewards"]):
        assert row["reward"][1] > row["reward"][0], f"what it is rewarded for: {row['reward']}"


DISTILLED = [
    *("--model", "builtin:addition", "--dataset", "builtin:addition", "--max-steps", "40"),
    *("--learning-rate", "4e-4", "--lr-scheduler-type", "linear", "--warmup-steps", "0"),
    *("rollout.prompts=32", "rollout.num_generations=8", "rollout.max_new_tokens=4", "aggregation.length=4"),
    "rewards=[{use: exact_match, column: answer, weight: 0}]",
]
"""The quickstart's model and task, in a quarter of its steps; the reward only measures."""


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize(("name", "least"), [("opd_exact", 0.80), ("opd", 0.75)])
def test_a_teacher_lifts_the_quickstarts_model_in_40_steps_without_a_reward(name, least, seed, tmp_path):
    command = [sys.executable, "-m", "hf_rlhf", "train", name, *DISTILLED, f"reference.path={judge('teacher')}"]
    subprocess.run([*command, "--seed", str(seed), "--output-dir", str(tmp_path / "run")], check=True)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert 0.33 <= summary["before"]["accuracy"] <= 0.43
    assert summary["after"]["accuracy"] >= least


@pytest.mark.parametrize("penalty", learning.PENALTIES)
def test_the_final_kl_falls_with_beta(penalty):
    kls = [learning.run_beta(penalty, beta)["kl"] for beta in learning.BETAS]
    assert all(later < earlier for earlier, later in pairwise(kls)), kls
