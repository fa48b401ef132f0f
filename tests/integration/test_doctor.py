"""The run doctor on real runs: each pattern in a run that has it, within 20 steps, and not in the same run without the fault."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_rlhf.axes import Finding
from hf_rlhf.cli.runs.run import check
from hf_rlhf.config.recipe import load_recipe
from hf_rlhf.metrics.doctor import as_dict, diagnose
from hf_rlhf.testing import tiny_policy
from hf_rlhf_plugins.rollout.generate import Generate
from tests.helpers import runs
from tests.helpers import sft_runs as sft
from tests.helpers.processes import run_ranks

STEPS = 20
SAMPLED = {**runs.SAMPLED, "prompts": 8}
NEVER = {"use": "regex", "pattern": "\\x07", "label": "never"}
LATE = {"use": "format", "pattern": "[^ -O].*", "label": "late"}
SECOND = {"use": "format", "pattern": ".[ -O].*", "label": "second"}
MONITOR: dict[str, Any] = {"kl": [{"use": "monitor", "estimator": {"use": "k3"}}], "reference": "frozen"}
ADAM = {"optim": "adamw_torch"}
PAYS_LENGTH = {"use": "length", "target": 1, "maximum": 24, "weight": -1.0}
CRITIC = {"advantages": "gae", "critic": {"use": "value_head", "learning_rate": 0.01}}


@dataclasses.dataclass(kw_only=True)
class Apart(Generate):
    """Report log-probs of a sampler that is another policy."""

    name = "apart"

    @property
    def exact_logps(self) -> bool:
        return False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        made = super().__call__(*args, **kwargs)
        logps = [[x - 0.3 for x in row] for row in made.logps or ()]
        return dataclasses.replace(made, logps=logps, exact=False)


def brief() -> Any:
    """A policy that ends a completion at about every third token."""
    model, _ = tiny_policy()
    ids = torch.randint(3, 90, (16, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state.mean((0, 1))
        model.lm_head.weight[1] = 5 * hidden / hidden.square().sum()
    return model


@dataclasses.dataclass(frozen=True)
class Case:
    """A run with a fault, and what mends it."""

    ill: dict[str, Any]
    mended: dict[str, Any]
    training: dict[str, Any] = dataclasses.field(default_factory=dict)
    mended_training: dict[str, Any] = dataclasses.field(default_factory=dict)
    policy: Callable[[], Any] | None = None


CASES = {
    "no_spread": Case({"rewards": [NEVER]}, {"rewards": [runs.FORMAT]}),
    "cut_off": Case({"rollout": SAMPLED}, {"rollout": runs.SCRIPTED}),
    "kl_explodes": Case(MONITOR, MONITOR, {**ADAM, "learning_rate": 0.1}, {"learning_rate": 1e-3}),
    "ratio_explodes": Case(
        {"update": {"mini_batches": 1, "epochs": 4}},
        {"update": {"mini_batches": 1, "epochs": 4}},
        {**ADAM, "learning_rate": 0.06},
        {"learning_rate": 3e-4},
    ),
    "entropy_collapse": Case(
        {"loss_terms": [{"use": "entropy", "coef": -5.0}]},
        {"loss_terms": [{"use": "entropy", "coef": 0.01}]},
        {**ADAM, "learning_rate": 0.05},
    ),
    "length_explodes": Case(
        {"rewards": [PAYS_LENGTH], "rollout": {**SAMPLED, "max_new_tokens": 24}},
        {"rewards": [{**PAYS_LENGTH, "weight": 1.0}], "rollout": {**SAMPLED, "max_new_tokens": 24}},
        {**ADAM, "learning_rate": 2.5e-4},
        policy=brief,
    ),
    "dead_reward": Case({"rewards": [runs.FORMAT, NEVER]}, {"rewards": [runs.FORMAT, SECOND]}),
    "rewards_at_war": Case({"rewards": [runs.FORMAT, LATE]}, {"rewards": [runs.FORMAT, SECOND]}),
    "useless_critic": Case(
        {**CRITIC, "critic": {"use": "value_head", "learning_rate": 3.0}}, CRITIC, {**ADAM, "learning_rate": 1e-3}
    ),
    "sampler_apart": Case(
        {"rollout": Apart(prompts=8, num_generations=4, max_new_tokens=5), "rollout_correction": "truncated"},
        {"rollout": SAMPLED, "rollout_correction": "truncated"},
    ),
    "nothing_moves": Case(MONITOR, MONITOR, {"learning_rate": 1e-10}, {"learning_rate": 0.1}),
    "no_answer": Case(
        {"rollout": SAMPLED, "rewards": [runs.FORMAT, {"use": "exact_match", "weight": 0.1}]},
        {"rollout": runs.SCRIPTED, "rewards": [runs.FORMAT, {"use": "exact_match", "weight": 0.1}]},
    ),
    "out_of_range": Case(
        {"kl": [{"use": "in_loss", "beta": 0.1, "estimator": "k3", "clamp": 1e-9}], "reference": "frozen"},
        {"kl": [{"use": "in_loss", "beta": 0.1, "estimator": "k3", "clamp": 10.0}], "reference": "frozen"},
    ),
}


def found(folder: Path, case: Case, *, mended: bool) -> dict[str, Finding]:
    """Train, and return what the doctor found, by pattern."""
    parts = case.mended if mended else case.ill
    update = {} if "update" in parts else {"update": {"mini_batches": 1}}
    training = {"max_steps": STEPS, **case.training, **(case.mended_training if mended else {})}
    rollout = {} if "rollout" in parts else {"rollout": SAMPLED}
    policy = case.policy() if case.policy else None
    made = runs.trained(
        folder, data=runs.problems(64), policy=policy, training=training, **{**rollout, **update, **parts}
    )
    assert made.state.global_step <= STEPS
    assert sorted(made.doctor.findings, key=lambda x: x.step) == diagnose(folder, made.doctor.declared)
    return {finding.pattern: finding for finding in made.doctor.findings}


@pytest.mark.proves(
    "doctor.dead_reward",
    "doctor.entropy_collapse",
    "doctor.kl_explodes",
    "doctor.length_explodes",
    "doctor.no_answer",
    "doctor.no_spread",
    "doctor.nothing_moves",
    "doctor.out_of_range",
    "doctor.ratio_explodes",
    "doctor.rewards_at_war",
    "doctor.sampler_apart",
    "doctor.cut_off",
    "doctor.useless_critic",
    how="end to end",
    tolerance="found within 20 steps",
)
@pytest.mark.parametrize("pattern", CASES)
def test_a_pattern_is_found_in_a_run_that_has_it_and_not_in_the_mended_one(pattern, tmp_path):
    case = CASES[pattern]
    ill = found(tmp_path / "ill", case, mended=False)
    assert pattern in ill, ill
    assert 0 < ill[pattern].step <= STEPS
    assert ill[pattern].overrides
    assert pattern not in found(tmp_path / "mended", case, mended=True)


# Without rollouts


OFFLINE = {
    "overfits": ["training.learning_rate=0.02"],
    "nothing_moves": ["training.learning_rate=1e-10"],
    "": ["training.learning_rate=1e-4"],
}
"""What is found -> the words of a short supervised run."""
WATCHED = ["training.max_steps=20", "training.eval_strategy=steps", "training.eval_steps=2"]
LEARNED_BY_HEART = [{"prompt": f"{i}?", "completion": chr(ord("A") + i) * 6} for i in range(24)]
"""Rows of which each is its own, and none tells of another."""


@pytest.mark.proves("doctor.overfits", how="end to end", tolerance="found within 20 steps")
@pytest.mark.parametrize("pattern", OFFLINE)
def test_a_run_without_rollouts_is_watched_too(pattern, tmp_path):
    summary = sft.run(tmp_path, *WATCHED, *OFFLINE[pattern], given=LEARNED_BY_HEART)
    assert [x["pattern"] for x in summary["findings"]] == ([pattern] if pattern else [])
    for finding in summary["findings"]:
        again = load_recipe(tmp_path / "out" / "recipe.yaml", finding["overrides"])
        assert check(again, forecast=False)


# Where findings are seen


def flat(folder: Path, steps: int, **training: Any) -> Any:
    """A trainer in whose run there is no spread."""
    settings = {"max_steps": steps, "learning_rate": 1e-3, **training}
    return runs.trainer(folder, rewards=[NEVER], update={"mini_batches": 1}, training=settings)


def test_rewards_that_only_measure_need_no_spread(tmp_path):
    distilled = {"rewards": [{**NEVER, "weight": 0}], "kl": [{"use": "in_loss", "estimator": "exact"}]}
    assert "no_spread" not in found(tmp_path, Case({**distilled, "reference": "frozen"}, {}), mended=False)


def said(caplog: Any) -> list[str]:
    return [x.getMessage().partition(",")[0] for x in caplog.records if x.name.endswith("doctor_callback")]


def test_a_run_in_python_warns_once_of_each_finding_and_its_summary_has_it(tmp_path, caplog):
    made = flat(tmp_path, 8)
    made.train()
    made.save_model(str(tmp_path))
    made.close()
    assert said(caplog) == ["doctor.no_spread"]
    (record,) = (x for x in caplog.records if x.name.endswith("doctor_callback"))
    assert record.levelno == logging.WARNING
    assert "since step 1: 100% of the completions" in record.getMessage()
    assert "rollout.num_generations=8" in record.getMessage()
    (kept,) = json.loads((tmp_path / "summary.json").read_text())["findings"]
    assert (kept["pattern"], kept["step"], kept["metric"]) == ("no_spread", 1, "reward/zero_std_frac")
    assert kept == as_dict(made.doctor.findings[0])


def test_a_resumed_run_repeats_no_finding_and_keeps_those_before(tmp_path, caplog):
    whole = flat(tmp_path, 8, save_strategy="steps", save_steps=6)
    whole.train()
    whole.close()
    found = whole.doctor.findings
    assert said(caplog) == ["doctor.no_spread"]
    caplog.clear()
    again = flat(tmp_path, 8)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    again.close()
    assert said(caplog) == []
    assert again.doctor.findings == found


def test_a_resume_before_a_finding_makes_it_as_the_whole_run_did(tmp_path, caplog):
    whole = flat(tmp_path, 8, save_strategy="steps", save_steps=3)
    whole.train()
    whole.close()
    caplog.clear()
    again = flat(tmp_path, 8)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    again.close()
    assert said(caplog) == ["doctor.no_spread"]
    assert again.doctor.findings == whole.doctor.findings


def test_a_second_run_of_a_trainer_starts_anew(tmp_path, caplog):
    made = flat(tmp_path, 6)
    made.train()
    made.train()
    made.close()
    assert said(caplog) == ["doctor.no_spread"] * 2
    assert len(made.doctor.findings) == 1


def test_a_listener_that_fails_ends_no_run(tmp_path, caplog):
    made = flat(tmp_path, 6)
    made.doctor.listeners.append(lambda finding: 1 / 0)
    made.train()
    made.close()
    assert made.state.global_step == 6
    assert any("DoctorCallback failed; training continues without it" in text for text in caplog.messages)


RANKS = """
import logging, os, sys
from pathlib import Path
logging.basicConfig(level=logging.WARNING, stream=sys.stdout, format="%(name)s %(message)s")
from tests.integration.test_doctor import flat
made = flat(Path(os.environ["DOCTOR_OUT"]), 6)
made.train()
made.close()
print("findings", len(made.doctor.findings))
"""


def test_of_several_processes_the_first_alone_says_it(tmp_path, monkeypatch):
    monkeypatch.setenv("DOCTOR_OUT", str(tmp_path))
    first, second = run_ranks(RANKS)
    assert first.count("doctor.no_spread, since step 1") == 1
    assert "findings 1" in first
    assert "doctor." not in second
    assert "findings 0" in second


def test_the_command_line_says_it_live_once_and_at_the_end(tmp_path, capsys):
    sft.run(tmp_path, *WATCHED, *OFFLINE["overfits"], given=LEARNED_BY_HEART)
    live, _, end = capsys.readouterr().out.partition("findings of the doctor")
    assert live.count("doctor overfits, since step") == 1
    assert re.search(r"\n  try training.max_steps=\d+\n", live)
    (line,) = re.findall(r"hf-rlhf (check .*)", end)
    command, file, *overrides = shlex.split(line)
    assert (command, file) == ("check", str(tmp_path / "out" / "recipe.yaml"))
    assert check(load_recipe(file, overrides), forecast=False)
