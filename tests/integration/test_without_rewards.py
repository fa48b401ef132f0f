"""Recipes without rewards: a KL alone moves the policy, and nothing about rewards is logged, saved or shown."""

from __future__ import annotations

import io
import json
import re
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from rich.console import Console

from hf_rlhf.axes import Reference
from hf_rlhf.config.plan import make_plan
from hf_rlhf.config.recipe import resolve
from hf_rlhf.contract.metric import pattern
from hf_rlhf.lab.explain import as_plain, explain
from hf_rlhf.metrics import metrics_of
from hf_rlhf.metrics.console import show_result
from hf_rlhf.metrics.dashboard import dashboard_of
from hf_rlhf.testing import tiny_policy
from tests.helpers import runs


@dataclass(kw_only=True)
class Teacher(Reference):
    """Another model than the policy, with clear preferences."""

    name = "teacher"

    def build(self, policy: Any) -> Any:
        model = tiny_policy(seed=1, dtype=next(policy.parameters()).dtype)[0].eval()
        model.get_output_embeddings().weight.data *= 6
        return model.requires_grad_(False)


ONE_TOKEN = {"use": "generate", "prompts": 4, "num_generations": 64, "max_new_tokens": 1}


def placed(use: str, estimator: str, **more: Any) -> dict[str, Any]:
    """The parts of a recipe that learns from one KL to another model."""
    kl = {"use": use, "beta": 1.0, "estimator": estimator}
    parts = {"kl": [kl], "reference": Teacher(), "advantages": "leave_one_out", "rollout": ONE_TOKEN, "rewards": []}
    return {**parts, "update": {}, **more}


PLACEMENTS = {
    "in_loss": placed("in_loss", "k2"),
    "in_reward": placed("in_reward", "k1"),
    "in_advantage": placed("in_advantage", "k1"),
}


def distance(made: Any) -> torch.Tensor:
    """KL(policy || teacher) of the token after a prompt, mean over all prompts."""
    policy, teacher = made.actor_critic.policy, made.collector.forwards.reference.own
    found = []
    for row in runs.problems(4):
        ids = torch.tensor([made.processing_class(row["prompt"]).input_ids])
        p, q = (model(ids).logits[0, -1].log_softmax(-1) for model in (policy, teacher))
        found.append((p.exp() * (p - q)).sum())
    return torch.stack(found).mean()


@pytest.mark.parametrize("parts", PLACEMENTS.values(), ids=PLACEMENTS)
def test_a_kl_alone_moves_the_policy_to_the_reference(tmp_path, parts):
    settings = {"max_steps": 30, "learning_rate": 0.01, "optim": "adamw_torch"}
    made = runs.trainer(tmp_path, **parts, training=settings, data=runs.problems(4))
    before = distance(made)
    made.train()
    made.close()
    print(before, distance(made))
    assert distance(made) < 0.5 * before


def test_the_step_without_rewards_is_that_of_the_exact_gradient_of_the_kl(tmp_path):
    """Completions of one token: the estimator `exact` sums over the vocabulary, so that no sampling remains."""
    settings = {"max_steps": 1, "learning_rate": 0.1}
    parts = placed("in_loss", "exact")
    made = runs.trainer(tmp_path, **parts, training=settings, data=runs.problems(4), dtype=torch.float64)
    gradient = torch.autograd.grad(distance(made), list(made.actor_critic.policy.parameters()))
    expected = runs.parameters(made) - 0.1 * torch.cat([x.flatten() for x in gradient])
    start = runs.parameters(made)
    made.train()
    made.close()
    torch.testing.assert_close(runs.parameters(made), expected, rtol=0, atol=1e-12)
    assert (expected - start).abs().max() > 1e-4


def test_no_rewards_are_the_bits_of_a_reward_without_signal(tmp_path):
    nothing = {"use": "format", "pattern": "nothing like it"}
    found = [
        runs.parameters(runs.trained(tmp_path / str(i), **placed("in_loss", "k2", rewards=rewards)))
        for i, rewards in enumerate(([], [nothing]))
    ]
    assert torch.equal(*found)


# What is left out

OF_REWARDS = re.compile(r"reward|accuracy|pass@|maj@|score")


def evaluated(folder: Path, **more: Any) -> Any:
    """A trainer after `hf-rlhf train`'s steps: evaluation, training, evaluation, saving."""
    parts = placed("in_loss", "k3", rollout=runs.SAMPLED, **more)
    made = runs.trainer(folder, **parts, data=runs.problems(4), eval_data=runs.problems(2))
    made.evaluate()
    made.train()
    made.evaluate()
    made.save_model()
    made.close()
    return made


def test_nothing_about_rewards_is_logged_saved_or_shown(tmp_path):
    made = evaluated(
        tmp_path,
        evaluation={"num_generations": 4, "ema": True},
        update={"ema": 0.9},
        logging={"metric_aliases": "trl"},
    )
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [name for line in lines for name in line if OF_REWARDS.search(name)] == []
    assert {"kl/in_loss/k3", "eval_rollout/length/mean", "eval_ema/rollout/length/mean"} <= set().union(*lines)
    columns = set(pandas.read_parquet(tmp_path / "completions").columns)
    assert columns == {"step", "prompt", "completion", "finish_reason", "advantage", "tokens"}
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["after"].keys() == summary["before"].keys()
    assert not [name for name in summary["after"] if OF_REWARDS.search(name)]
    out = Console(file=io.StringIO(), width=200)
    show_result(summary, {"before": made.samples, "after": made.samples}, out)
    printed = out.file.getvalue().replace(str(tmp_path), "FOLDER")
    assert "rollout/length/mean" in printed
    assert "reward" not in printed


def test_what_is_logged_without_rewards_is_what_is_declared(tmp_path):
    made = evaluated(tmp_path)
    logged = {name for entry in made.state.log_history for name in entry} - {"step"}
    declared = metrics_of(made.algorithm)
    missing = {x.name for x in declared if not x.metric.optional} - logged
    assert missing == set()
    assert all(any(pattern(x.name).fullmatch(name) for x in declared) for name in logged)
    assert not [x.name for x in declared if OF_REWARDS.search(x.name)]


def test_a_dashboard_without_rewards_has_no_panel_of_them():
    raw = {**runs.BASE, "kl": [{"use": "in_loss"}], "reference": "frozen", "rewards": [], "dataset": {"held_out": 8}}
    shown = dashboard_of(resolve(raw, name="distil"))
    assert [name for name in shown.metrics if OF_REWARDS.search(name)] == []
    assert "Rewards" not in [section.name for section in shown.sections]
    assert {"train/kl/in_loss/k3", "eval/rollout/length/mean"} <= shown.metrics


def test_a_run_without_rewards_resumes_bit_identically(tmp_path):
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    parts = placed("in_loss", "k3", rollout=runs.SAMPLED, update={"mini_batches": 2})
    whole = runs.trained(tmp_path, **parts, training=saving)
    again = runs.trainer(tmp_path, **parts, training=saving)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    again.close()
    assert torch.equal(runs.parameters(whole), runs.parameters(again))


# Where they are accepted


def left_out(raw: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in raw.items() if name != "rewards"}


@pytest.mark.parametrize("empty", [lambda raw: {**raw, "rewards": []}, left_out], ids=["an empty list", "left out"])
@pytest.mark.parametrize("use", ["in_loss", "in_reward", "in_advantage"])
def test_a_recipe_without_rewards_is_accepted_where_a_kl_enters_the_gradient(use, empty):
    recipe = resolve(empty({**runs.BASE, "kl": [{"use": "monitor"}, {"use": use}], "reference": "frozen"}))
    assert recipe.algorithm().problems() == []
    assert resolve(recipe.raw).raw == recipe.raw
    plan = make_plan(recipe.algorithm(), [])
    assert any("rewards" in line for line in plan.skipped)
    assert any(f"kl.{use}" in line and "towards the reference" in line for line in plan.remarks)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no KL": ({"kl": [], "reference": "none"}, "no KL enters the gradient: nothing to learn"),
    "a KL that is only logged": (
        {"kl": [{"use": "monitor"}]},
        "no KL enters the gradient, as kl.0=monitor is only logged",
    ),
    "an entropy bonus alone": (
        {"kl": [], "reference": "none", "loss_terms": [{"use": "entropy"}]},
        "no KL enters the gradient",
    ),
    "a filter of scores": ({"filters": [{"use": "zero_variance"}]}, "filters.0=zero_variance needs scores"),
    "an estimator of scores": ({"advantages": "gdpo"}, "advantages=gdpo needs scores"),
    "an estimator of pairs": ({"advantages": "online_dpo"}, "advantages=online_dpo needs scores"),
    "greedy completions": ({"advantages": "remax"}, "advantages=remax needs greedy"),
    "a greedy baseline": (
        {"advantages": {"use": "baseline", "baseline": "greedy"}},
        "advantages.baseline=greedy needs greedy",
    ),
    "a term of the total": ({"loss_terms": [{"use": "positive_nll"}]}, "loss_terms.0=positive_nll needs total_score"),
}


@pytest.mark.parametrize(("changes", "said"), REFUSED.values(), ids=REFUSED)
def test_what_has_nothing_to_learn_without_rewards_is_refused(changes, said):
    raw = {**runs.BASE, "kl": [{"use": "in_loss"}], "reference": "frozen", "rewards": [], **changes}
    (problem,) = resolve(raw).algorithm().problems()
    assert said in problem
    assert "rewards=[{use: exact_match}]" in problem


def test_explain_shows_no_score_without_rewards():
    words = ["rewards=[]", "kl=[{use: in_loss}]"]
    (found,) = as_plain(["quickstart"], words)["recipes"]
    assert all("score" not in row for row in found["rows"])
    assert found["terms"]["kl/in_loss/loss"] > 0 == found["terms"]["policy/loss"]
    with redirect_stdout(io.StringIO()) as printed:
        explain(["quickstart"], words)
    assert "score" not in printed.getvalue()
