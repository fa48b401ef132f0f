"""Every metric is declared: what runs log, and what the core and the plugins say that they log, are the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
from torch import Tensor

from hf_rlhf.axes import AXES, LossTerm
from hf_rlhf.config.algorithm import places
from hf_rlhf.contract.metric import Metric
from hf_rlhf.metrics import CORE, EVALUATION, SECTIONS, Named, declared_by, metrics_of, pattern
from hf_rlhf.registry.host import Host
from hf_rlhf.testing import tiny_policy
from hf_rlhf.training.trainer import RLHFTrainer
from tests.helpers.models import tiny_moe
from tests.helpers.runs import FORMAT, SAMPLED, entries, problems, trained, trainer

NAMED = {"step"}
"""What Trainer adds to an entry of its history."""


def check_declared(made: RLHFTrainer) -> None:
    """Everything that a run logged is declared, and everything that is declared without `optional` was logged."""
    logged = {name for entry in made.state.log_history for name in entry} - NAMED
    declared = metrics_of(made.algorithm)
    patterns = {named.name: pattern(named.name) for named in declared}
    unknown = sorted(name for name in logged if not any(p.fullmatch(name) for p in patterns.values()))
    assert not unknown, f"logged and not declared: {', '.join(unknown)}"
    evaluated = any(name.startswith("eval_") for name in logged)
    missing = [
        named.name
        for named in declared
        if due(named, evaluated) and not any(map(patterns[named.name].fullmatch, logged))
    ]
    assert not missing, f"declared and not logged: {', '.join(missing)}"


def due(named: Named, evaluated: bool) -> bool:
    """Whether a run that ended, and evaluated or not, has logged this."""
    return not named.metric.optional and (named.metric.when != "evaluation" or evaluated)


VERIFIERS = [{"use": "exact_match"}, {"use": "exact_match", "label": "loose", "ignore_case": True}]
EVERYTHING = {
    "training": {"max_steps": 4, "max_grad_norm": 1.0},
    "rewards": [FORMAT, *VERIFIERS],
    "kl": ["in_reward", {"use": "in_loss", "clamp": 1.0}, {"use": "monitor", "level": "sequence"}, "in_advantage"],
    "reference": "frozen",
    "advantages": "gae",
    "critic": "separate",
    "loss_terms": ["entropy", "adaptive_entropy"],
    "filters": [{"use": "zero_variance", "resample": 1}],
    "update": {"mini_batches": 2, "epochs": 2, "ema": 0.9},
    "evaluation": {"num_generations": 4, "ema": True},
}
OTHERS = {
    "plain": {},
    "corrected": {"rollout": SAMPLED, "rollout_correction": "truncated", "policy_loss": "dual_clip"},
    "trpo": {"optimizer": "trpo", "policy_loss": "surrogate"},
    **{
        name: {"policy_loss": name}
        for name in (
            "ppo_clip",
            "cispo",
            "gmpo",
            "dppo_tv",
            "dro",
            "topr",
            "token_entropy",
            "clip_cov",
            "kl_cov",
            "vespo",
            "trpo_penalty",
        )
    },
}


def test_a_run_with_everything_logs_what_is_declared(tmp_path):
    full = trainer(tmp_path, eval_data=problems(3, seed=5), **EVERYTHING)
    full.train()
    full.evaluate()
    full.close()
    check_declared(full)
    logged = {name for entry in full.state.log_history for name in entry}
    assert {"eval_ema/pass@2", "eval_loose/maj@4", "plugin/adaptive_entropy/coef", "kl/in_loss/clamp_frac"} <= logged


def test_a_mixture_of_experts_logs_what_is_declared(tmp_path):
    made = trained(tmp_path, policy=tiny_moe(len(tiny_policy()[1])))
    check_declared(made)
    assert "routing/max_load" in {name for entry in made.state.log_history for name in entry}


@pytest.mark.parametrize("name", OTHERS)
def test_a_run_with_other_choices_logs_what_is_declared(name, tmp_path):
    check_declared(trained(tmp_path, **OTHERS[name]))


def test_a_run_whose_rollouts_are_all_dropped_counts_them(tmp_path):
    same = [{**row, "completions": ["zz"] * 8} for row in problems()]
    dropped = trained(tmp_path, data=same, filters=["zero_variance"])
    logged = {name for entry in dropped.state.log_history for name in entry}
    assert any(entry.get("health/empty_rollout", 0) > 0 for entry in dropped.state.log_history)
    unknown = [
        n
        for n in logged
        if n != "step" and not any(pattern(m.name).fullmatch(n) for m in metrics_of(dropped.algorithm))
    ]
    assert not unknown


@dataclass(kw_only=True)
class Term(LossTerm):
    """A loss term that is called like a baseline."""

    name: ClassVar[str] = "ema"
    metrics: ClassVar[tuple[Metric, ...]] = (Metric("own", "count", "always 1"),)

    def __call__(self, logps: Tensor, mask: Tensor) -> Tensor:
        return -logps

    def report(self) -> dict[str, float]:
        return {"own": 1.0}


def test_a_loss_term_and_a_baseline_of_one_name_log_in_places_of_their_own(tmp_path):
    advantages = {"use": "baseline", "baseline": "ema"}
    kl = ["monitor", {"use": "monitor", "estimator": "k1"}]
    made = trained(tmp_path, advantages=advantages, loss_terms=[Term(), Term()], kl=kl, reference="frozen")
    found = [(area, plugin) for area, _, plugin in places(made.algorithm)]
    areas = [area for area, _ in found]
    assert {"baseline/ema", "plugin/ema", "plugin/ema_2", "kl/monitor", "kl/monitor_2"} <= set(areas)
    assert [plugin for _, plugin in found if isinstance(plugin, Term)] == made.algorithm.loss_terms
    assert [area for area in areas if areas.count(area) > 1] == [
        "rollout",
        "rollout",
    ]  # the engine's and the correction's
    assert {"plugin/ema/loss", "plugin/ema/own", "plugin/ema_2/loss", "plugin/ema_2/own"} <= entries(made)[0].keys()
    check_declared(made)


def plugins() -> list[tuple[str, type]]:
    host = Host(disable="")
    return [(o.axis, host.get(o.axis, f"hf_rlhf/{o.name}")) for o in host.offers() if o.package == "hf_rlhf"]


def test_no_plugin_takes_a_name_of_the_core():
    ours = [pattern(metric.name) for metric in CORE]
    for axis, cls in plugins():
        for name in declared_by(cls, axis):
            shown = name.replace("<label>", cls.name)
            assert not any(p.fullmatch(shown) for p in ours) or "<name>" in name, f"{axis}.{cls.name}: {name}"


def test_every_metric_says_what_it_is():
    declared: list[Metric] = [*CORE, *EVALUATION, *(m for _, cls in plugins() for m in cls.metrics)]
    for metric in declared:
        assert metric.meaning, metric.name
        assert not metric.meaning.endswith("."), metric.name
        assert metric.healthy is None or metric.unhealthy, (
            f"{metric.name} has a healthy range and does not say what is wrong"
        )
        low, high = metric.healthy or (None, None)
        assert low is None or high is None or low < high, metric.name
    assert {metric.section for metric in CORE} == set(SECTIONS)
    assert len({metric.name for metric in CORE}) == len(CORE)
    assert set(AXES) >= {axis for axis, _ in plugins()}
