"""Our recipes against TRL's trainers: the same rollout gives the same loss and the same parameters, and where it does not,
the difference is the one that docs/parity.md states."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache
from importlib.metadata import version

import pytest
import torch

from benchmarks import curves
from tests.helpers import parity
from tests.helpers.parity import CASES, RECIPES, Case, Outcome, apart, of_ours, of_recipe, of_trl
from tests.helpers.paths import ROOT
from tests.helpers.tiers import slow

DOCS = ROOT / "docs" / "parity.md"
ROUND_OFF = 5e-6
"""Of float32, in which TRL keeps rewards and log-probs: relative to an update, absolute in a loss of size 1."""


@cache
def theirs(name: str) -> Outcome:
    return of_trl(CASES[name])


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def agree(case: Case, ours: Outcome, trl: Outcome, tolerance: float = ROUND_OFF) -> None:
    assert len(ours.updates) == len(trl.updates) == case.steps
    assert all(float(update.norm()) > 1e-5 for update in trl.updates)
    assert [apart(a, b) < tolerance for a, b in zip(ours.updates, trl.updates, strict=True)] == [True] * case.steps
    if case.same_loss:
        assert ours.losses == pytest.approx(trl.losses, abs=tolerance)


@pytest.mark.proves(
    "advantages.group_norm",
    "advantages.group_mean",
    "advantages.group_mean_batch_std",
    "advantages.leave_one_out",
    "advantages.gdpo",
    "policy_loss.ppo_clip",
    "policy_loss.dual_clip",
    "policy_loss.cispo",
    "policy_loss.gspo",
    "policy_loss.sapo",
    "policy_loss.vespo",
    "policy_loss.reinforce",
    "aggregation.token_mean",
    "aggregation.seq_mean_token_mean",
    "aggregation.seq_mean_token_sum",
    "aggregation.seq_mean_token_sum_norm",
    "kl.in_loss",
    "kl.in_reward",
    "kl_estimator.k1",
    "kl_estimator.k3",
    "kl_estimator.k3_is",
    "loss_terms.entropy",
    how="parity",
    tolerance="5e-6",
)
@pytest.mark.parametrize("name", CASES)
def test_an_update_is_that_of_trl(name):
    ours = of_ours(CASES[name])
    agree(CASES[name], ours, theirs(name))
    for metric in CASES[name].clips:
        assert ours.logs[-1][f"policy/{metric}"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_another_setting_is_found_out(name):
    wrong = of_ours(CASES[name], **CASES[name].wrong)
    assert apart(wrong.updates[-1], theirs(name).updates[-1]) > 1000 * ROUND_OFF


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_as_it_is_gives_the_update_of_trl(name):
    agree(of_recipe(name), of_ours(of_recipe(name)), of_trl(of_recipe(name)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grpo", "grpo, KL", "rloo", "rloo, clip"])
def test_parity_holds_in_float32(name):
    ours, trl = of_ours(CASES[name], torch.float32), of_trl(CASES[name], torch.float32)
    agree(CASES[name], ours, trl, 1e-5)


# What differs on purpose


def test_the_loss_of_trl_s_rloo_is_0_while_the_ratio_is_1_and_that_of_reinforce_is_not():
    assert abs(theirs("rloo").losses[0]) < ROUND_OFF
    assert abs(theirs("rloo, clip").losses[1]) > 1000 * ROUND_OFF
    assert abs(of_ours(CASES["rloo"]).losses[0]) > 0.1


@pytest.mark.parametrize(("loss", "factor"), [("grpo", 16 / 13), ("dapo", None)])
def test_rows_without_a_score_count_in_trl_s_means_and_not_in_ours(loss, factor):
    case = replace(CASES[loss], rewards=("unscored",), steps=1)
    ours, trl = of_ours(case).updates[0], of_trl(case).updates[0]
    ids = [text for row in parity.rows() for text in row["completions"]]
    scores = parity.unscored(ids)
    assert scores.count(None) == 3
    if factor is None:
        tokens = sum(map(len, ids))
        factor = tokens / sum(len(text) for text, score in zip(ids, scores, strict=True) if score is not None)
    assert apart(ours, trl) > 0.1
    assert apart(ours, factor * trl) < ROUND_OFF


@pytest.mark.parametrize("name", ["grpo", *slow("dapo", "dr_grpo"), "rloo"])
def test_accumulation_changes_neither(name):
    case = replace(CASES[name], steps=1)
    agree(case, of_ours(case), of_trl(accumulated(case)))


def test_accumulation_changes_trl_s_bnpo_which_averages_the_means_of_micro_batches():
    case = replace(CASES["bnpo"], steps=1)
    assert apart(of_ours(case).updates[0], of_trl(case).updates[0]) < ROUND_OFF
    assert apart(of_ours(case).updates[0], of_trl(accumulated(case)).updates[0]) > 1000 * ROUND_OFF


def accumulated(case: Case) -> Case:
    """The same step in two micro-batches."""
    halves = {"per_device_train_batch_size": parity.GROUPS * parity.GROUP // 2, "gradient_accumulation_steps": 2}
    return replace(case, theirs={**case.theirs, **halves})


# Whole runs


def test_the_interval_of_a_difference_is_student_s():
    for level, freedom, t in [(0.975, 1, 12.7062), (0.975, 8, 2.30600), (0.9975, 8, 3.83252)]:
        assert curves.student(level, freedom) == pytest.approx(t, rel=1e-5)
    middle, width = curves.difference([1.0, 2.0, 3.0, 4.0, 5.0], [3.0, 4.0, 5.0, 6.0, 7.0])
    assert middle == -2
    assert width == pytest.approx(2.306, rel=1e-4)  # both variances are 2.5: sqrt(2.5 (1/5 + 1/5)) = 1


def test_the_table_says_which_differences_are_more_than_chance():
    apart_by = {"grpo": 0.0, "rloo": 0.5}
    rows = []
    for name, system, seed in itertools.product(apart_by, ("ours", "trl"), range(5)):
        reward = seed / 100 + (system == "ours") * apart_by[name]
        tenths = curves.parts([reward] * 20)
        rows.append({"algorithm": name, "system": system, "tenths": tenths, "whole": reward})
    grpo, rloo = curves.table(rows).split("## rloo")
    assert (grpo.count("| yes |"), grpo.count("**no**")) == (11, 0)
    assert (rloo.count("| yes |"), rloo.count("**no**")) == (0, 11)


# The documentation


def test_every_case_stands_in_the_documentation():
    text = DOCS.read_text()
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    for name, case in CASES.items():
        (line,) = [line for line in lines if line.startswith(f"| {name} |")]
        for setting, value in case.theirs.items():
            assert f"{setting}={value}" in line.replace("`", "")
    assert [f"`{name}`" for name in RECIPES if f"`{name}`" not in text] == []


def test_the_documentation_says_which_trl_was_compared():
    assert f"TRL {version('trl')}" in DOCS.read_text()
