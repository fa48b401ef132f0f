"""`logging.metric_aliases: trl`: the names under which TRL logs, and its numbers of the same rollout."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hf_rlhf.config.sections import Logging
from hf_rlhf.metrics import aliased, metrics_of, pattern
from hf_rlhf.metrics.aliases import MADE, RENAMED
from tests.helpers.parity import CASES, of_ours, of_trl
from tests.helpers.runs import SAMPLED, problems, recipe, trainer

ALIASED = {"metric_aliases": "trl", "entropy": "exact"}
OF_TRAINER = {"loss", "grad_norm", "learning_rate", "epoch", "step"}
WITHOUT_COUNTERPART = {
    *("num_tokens", "clip_ratio/low_min", "clip_ratio/high_max"),
    *(f"completions/{stat}_terminated_length" for stat in ("min", "mean", "max")),
}
"""What TRL logs and hf_rlhf.metrics.aliases says has no counterpart."""


@pytest.fixture(scope="module")
def logged():
    """What both log of one scripted rollout and its updates."""
    case = replace(CASES["grpo, KL"], rewards=("score", "length"))
    weights = {"reward_weights": [1.0, 0.5]}
    theirs = of_trl(replace(case, theirs={**case.theirs, **weights}))
    ours = of_ours(replace(case, theirs={**case.theirs, **weights}), logging=ALIASED)
    return ours.logs, theirs.logs


def test_every_name_that_trl_logs_is_there(logged):
    ours, theirs = ({name for entry in logs for name in entry} - OF_TRAINER for logs in logged)
    assert theirs - ours == WITHOUT_COUNTERPART
    assert {"reward", "kl", "clip_ratio/region_mean", "rewards/length/mean", "step_time"} <= ours & theirs


def test_the_numbers_are_those_of_trl(logged):
    for mine, other in zip(*logged, strict=True):
        for name in mine.keys() & other.keys() - OF_TRAINER - {"step_time", "policy_loss"}:
            assert mine[name] == pytest.approx(other[name], rel=1e-5, abs=1e-7), name
    assert logged[0][-1]["kl"] > 0


def test_aliases_are_declared_and_stand_beside_our_own_names(tmp_path):
    made = trainer(
        tmp_path,
        eval_data=problems(3, seed=5),
        logging=ALIASED,
        rollout=SAMPLED,
        rollout_correction="truncated",
        policy_loss="ppo_clip",
        kl=[{"use": "in_reward", "estimator": "k1"}],
        reference="frozen",
        loss_terms=["adaptive_entropy"],
    )
    made.train()
    before = made.evaluate()
    made.close()
    logged = {name for entry in made.state.log_history for name in entry}
    declared = metrics_of(made.algorithm, Logging(**ALIASED))
    assert not [n for n in logged - {"step"} if not any(pattern(d.name).fullmatch(n) for d in declared)]
    assert not [d.name for d in declared if not d.metric.optional and not any(map(pattern(d.name).fullmatch, logged))]
    named = {theirs.replace("<label>", "early") for _, theirs in RENAMED} | set(MADE)
    assert named <= logged
    assert {"eval_reward", "eval_rewards/early/mean", "eval_completions/mean_length"} <= logged
    assert "eval_reward" not in before  # what is returned has one name for each number
    others = [entry for entry in made.state.log_history if entry.keys() & {"eval_runtime", "train_runtime"}]
    assert len(others) == 2
    assert not [name for entry in others for name in entry.keys() & MADE.keys()]
    assert all(entry["step_time"] > 0 for entry in made.state.log_history if "loss" in entry)


@pytest.mark.parametrize(
    ("entropy", "terms", "there"), [("sampled", [], False), ("exact", [], True), ("sampled", ["entropy"], True)]
)
def test_entropy_has_the_name_of_trl_only_where_it_is_exact(entropy, terms, there):
    algorithm, logging = recipe(loss_terms=terms).algorithm(), Logging(metric_aliases="trl", entropy=entropy)
    found = aliased({"loss": 0.0, "policy/entropy": 1.5, "policy/loss": 0.5}, {}, algorithm, logging)
    assert found == {"policy_loss": 0.5, **({"entropy": 1.5} if there else {})}
    assert ("entropy" in {named.name for named in metrics_of(algorithm, logging)}) is there


def test_each_alias_stands_for_one_metric_that_is_declared():
    assert len({ours for ours, _ in RENAMED}) == len({theirs for _, theirs in RENAMED}) == len(RENAMED)
