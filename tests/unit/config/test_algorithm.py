"""What a combination of plugins needs, why it is refused, and the plan of one that is not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from hf_rlhf import load_plugin
from hf_rlhf.axes import AdvantageEstimator, RolloutCorrection
from hf_rlhf.config.algorithm import Algorithm
from hf_rlhf.config.plan import arithmetic, make_plan
from tests.helpers import runs
from tests.helpers.environments import ReadsTurns


@dataclass(kw_only=True)
class Ratio(RolloutCorrection):
    """p_old / p_sampler."""

    name: ClassVar[str] = "ratio"

    def __call__(self, old_logps, sampler_logps, mask):
        return (old_logps - sampler_logps).exp() * mask


@dataclass(kw_only=True)
class Taught(AdvantageEstimator):
    """Needs what nothing provides."""

    name: ClassVar[str] = "taught"
    needs: ClassVar[frozenset[str]] = frozenset({"teacher_logps"})

    def __call__(self, scored):
        return scored.mask


def algorithm(**parts: Any) -> Algorithm:
    return runs.recipe(**parts).algorithm()


EXACT = {"use": "exact_match"}
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "gae without a critic": (
        {"advantages": "gae"},
        "advantages=gae needs values and nothing provides them",
        "set critic.use=value_head or critic.use=separate",
    ),
    "a KL without a reference": (
        {"kl": [{"use": "in_reward"}], "reference": "none"},
        "kl.0=in_reward needs ref_logps and nothing provides them",
        "set reference.use=frozen",
    ),
    "turns without an environment": (
        {"advantages": ReadsTurns()},
        "advantages=reads_turns needs states and turns and nothing provides them",
        "set environment=[{use: second_chance}] or another, or choose an estimator without turns",
    ),
    "a correction without the sampler's log-probs": (
        {"rollout_correction": Ratio()},
        "rollout_correction=ratio needs sampler_logps and nothing provides them",
        "set rollout_correction.use=none",
    ),
    "a need that nobody knows": (
        {"advantages": Taught()},
        "advantages=taught needs 'teacher_logps', which this version does not provide",
        "it provides: adapter, advantages, completion_ids, double_backward, entropy, ",
    ),
    "a filter that resamples when the advantages are there": (
        {"rollout": {"use": "generate", "prompts": 4}, "filters": [{"use": "opsm", "resample": 2}]},
        "filters.0=opsm: resample 2 has no meaning here",
        "Set filters.0.resample=0",
    ),
    "no rewards": ({"rewards": []}, "rewards is empty", "rewards=[{use: exact_match}]"),
    "a critic that nothing reads": (
        {"critic": "value_head"},
        "critic=value_head provides values and nothing reads them",
        "set critic.use=none",
    ),
    "a reference that nothing reads": (
        {"reference": "frozen"},
        "reference=frozen provides ref_logps and nothing reads them",
        "set reference.use=none",
    ),
    "groups of one": (
        {"rollout": {**runs.SCRIPTED, "num_generations": 1}},
        "advantages=group_norm compares the completions of a prompt and rollout.num_generations is 1",
        "set rollout.num_generations=2 or more, or choose an estimator without groups",
    ),
    "a filter over groups of one": (
        {
            "rollout": {**runs.SCRIPTED, "num_generations": 1},
            "advantages": "reinforce",
            "filters": [{"use": "zero_variance"}],
        },
        "filters.0=zero_variance compares the completions of a prompt and rollout.num_generations is 1",
        "set rollout.num_generations=2 or more",
    ),
    "mini-batches that do not divide": (
        {"rollout": {**runs.SCRIPTED, "prompts": 6}, "update": {"mini_batches": 4}},
        "rollout.prompts=6 does not split into update.mini_batches=4 equal parts",
        "choose mini_batches from 1, 2, 3, 6, or change rollout.prompts",
    ),
    "two rewards of one name": (
        {"rewards": [EXACT, EXACT]},
        "2 reward sources are called 'exact_match'",
        "give each a `label` of its own",
    ),
    "beta 0 in the loss": (
        {"kl": [{"use": "in_loss", "beta": 0}], "reference": "frozen"},
        "kl.0: beta must be positive, got 0",
        "Set kl.0.beta=0.04",
    ),
    "beta 0 in the reward": (
        {"kl": [{"use": "in_reward", "beta": 0}], "reference": "frozen"},
        "kl.0: beta must be positive, got 0",
        "Set kl.0.beta=0.05",
    ),
    "k1 in the loss": (
        {"kl": [{"use": "monitor"}, {"use": "in_loss", "estimator": "k1"}], "reference": "frozen"},
        "kl.1: k1 in the loss has expected gradient 0",
        "Set kl.1.estimator.use=k2, kl.1.estimator.use=k3 or kl.1.estimator.use=k1_is, or kl.1.use=in_reward",
    ),
    "an entropy of weight 0": (
        {"loss_terms": [{"use": "entropy", "coef": 0}]},
        "loss_terms.0: coef must not be 0",
        "Remove the term with loss_terms=[]",
    ),
    "a critic from a reward model that is not there": (
        {"advantages": "gae", "critic": {"use": "separate", "init": "reward"}},
        "critic: critic.init is 'reward' but no reward source is a model",
        "set critic.init=policy",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_once_with_the_reason_and_the_fix(case):
    parts, reason, fix = REFUSED[case]
    (problem,) = algorithm(**parts).problems()
    assert problem.startswith(reason)
    assert fix in problem


def test_all_refusals_come_at_once():
    parts = {
        "rollout": {"use": "scripted", "prompts": 5, "num_generations": 1},
        "rewards": [EXACT, EXACT],
        "kl": [{"use": "in_loss", "beta": 0, "estimator": "k1"}],
        "reference": "none",
        "advantages": "group_norm",
        "critic": "separate",
        "update": {"mini_batches": 2},
        "loss_terms": [{"use": "entropy", "coef": 0}],
    }
    problems = algorithm(**parts).problems()
    assert len(problems) == 8
    assert len(set(problems)) == 8


def test_a_trainer_raises_with_every_refusal_before_anything_is_loaded(tmp_path):
    with pytest.raises(ValueError, match="this combination is refused") as refused:
        runs.trainer(tmp_path, policy="/nowhere/at/all", advantages="gae", rewards=[EXACT, EXACT])
    assert "critic.use=value_head" in str(refused.value)
    assert "`label` of its own" in str(refused.value)


def test_what_runs_has_no_problems():
    assert algorithm().problems() == []
    assert algorithm(rewards=[EXACT, {**EXACT, "label": "again"}]).problems() == []


def test_labels_are_names_unless_given():
    assert algorithm(rewards=[EXACT, {"use": "length", "label": "short"}]).labels() == ["exact_match", "short"]


def test_nested_plugins_of_one_kind_have_places_of_their_own():
    parts = [{"use": "baseline", "baseline": "ema"}, {"use": "baseline", "baseline": "ema"}]
    paths = [path for path, _ in algorithm(advantages={"use": "mix", "parts": parts, "weights": [1, 1]}).plugins()]
    assert len(set(paths)) == len(paths)
    assert {"advantages.parts.0.baseline", "advantages.parts.1.baseline"} <= set(paths)


def test_nested_plugins_stand_in_their_place():
    chosen = algorithm(kl=[{"use": "in_loss", "estimator": "k2"}], reference="frozen")
    assert ("kl.0.estimator", "k2") in [(path, plugin.name) for path, plugin in chosen.plugins()]
    assert chosen.as_dict()["kl"][0]["estimator"] == {"use": "k2"}
    assert chosen.as_dict()["rollout"] == {
        **runs.SCRIPTED,
        "column": "completions",
        "mask_column": None,
        "logps_column": None,
        "temperature": 1.0,
        "skip_special_tokens": True,
    }


def test_needs_and_provides_are_unions():
    chosen = algorithm(
        kl=[{"use": "in_loss"}], reference="frozen", advantages="gae", critic="value_head", loss_terms=["entropy"]
    )
    assert chosen.needs == {"ref_logps", "values", "old_logps", "entropy"}
    assert {"values", "ref_logps"} <= chosen.provides
    assert "ref_logps" not in algorithm().provides


# Who reads old log-probs


@pytest.mark.parametrize(
    ("parts", "readers"),
    [
        ({"update": {"mini_batches": 1}}, []),
        ({"update": {"mini_batches": 2}}, ["policy_loss (2 optimizer steps per rollout)"]),
        ({"update": {"epochs": 3}}, ["policy_loss (3 optimizer steps per rollout)"]),
        ({"update": {"mini_batches": 2}, "policy_loss": "reinforce"}, []),
        (
            {"update": {"mini_batches": 1}, "kl": [{"use": "in_reward"}], "reference": "frozen"},
            ["kl.in_reward in the reward"],
        ),
        ({"update": {"mini_batches": 1}, "kl": [{"use": "in_loss"}], "reference": "frozen"}, []),
        ({"update": {"mini_batches": 1}, "rollout_correction": Ratio()}, ["rollout_correction"]),
    ],
)
def test_old_log_probs_are_computed_for_their_readers_alone(parts, readers):
    assert algorithm(**parts).readers_of_old_logps == readers


# The plan


def plan(lora: bool = False, **parts: Any) -> Any:
    return make_plan(algorithm(**parts), [], lora=lora)


def test_the_plan_of_rules_alone_skips_all_that_is_not_needed():
    found = plan(update={"mini_batches": 1})
    assert found.models == ["policy: trained"]
    assert found.forwards == ["policy over 16 rows, with gradient (1 per row)"]
    assert found.skipped == [
        "reference model: no KL is measured",
        "critic: advantages=group_norm reads no values",
        "old log-probs: one optimizer step per rollout, so the update's own are the policy's",
        "exact entropy: no plugin asks for it (policy/entropy is estimated from the sampled tokens, unless logging.entropy is "
        "exact)",
        "logits a second time in the backward: the loss is token_level and is differentiated on the tiles of the language-model "
        "head (update.fused_loss)",
        "rows whose advantages are all 0, in the update: they would change nothing",
    ]


def test_the_plan_says_that_the_sampler_notes_old_log_probs():
    found = plan(rollout={"use": "generate", "prompts": 4, "num_generations": 4}, update={"epochs": 2})
    assert not any("old log-probs" in text for text in found.forwards)
    assert (
        "old log-probs: rollout=generate notes them while sampling, for policy_loss (2 optimizer steps per rollout) (in half "
        "precision or under autocast they take a forward over 16 rows)"
    ) in found.skipped


def test_the_plan_of_everything_skips_nothing(tmp_path):
    found = plan(
        lora=True,
        rewards=[{"use": "reward_model", "model": runs.save_classifier(tmp_path)}],
        kl=[{"use": "in_reward"}, {"use": "in_loss", "level": "sequence", "estimator": "k2"}],
        reference="adapter_off",
        advantages="gae",
        critic="separate",
        loss_terms=["entropy"],
        update={"mini_batches": 2, "epochs": 3},
    )
    assert found.skipped == []
    assert found.models == [
        "policy: its adapter is trained, its base is frozen",
        "reference=adapter_off: read by kl.in_reward (k1, token), kl.in_loss (k2, sequence)",
        "critic=separate: advantages=gae reads its values",
        "reward model reward_model: scores the completions",
    ]
    assert found.forwards == [
        "policy over 16 rows, without gradient: old log-probs for kl.in_reward in the reward; "
        "policy_loss (6 optimizer steps per rollout)",
        "reference over 16 rows, without gradient",
        "critic over 16 rows, without gradient: values for advantages=gae",
        "policy over 48 rows, with gradient (3 per row)",
    ]


def test_a_loss_that_reads_no_old_log_probs_is_the_reason_to_skip_them():
    assert "old log-probs: policy_loss=reinforce does not read them" in plan(policy_loss="reinforce").skipped


def test_the_plan_carries_the_remarks_of_the_plugins():
    (remark,) = plan(update={"mini_batches": 1}).remarks
    assert remark.startswith("policy_loss=ppo_clip: epsilon_low 0.2 and epsilon_high 0.2 never bind")
    assert plan(update={"mini_batches": 2}).remarks == []


def test_the_plan_is_plain_data():
    import json

    assert json.loads(json.dumps(plan().as_dict()))["forwards"] == plan().forwards


def test_the_arithmetic_of_batches_comes_out():
    chosen = algorithm(
        rollout={**runs.SCRIPTED, "prompts": 12, "num_generations": 4},
        update={"mini_batches": 3, "epochs": 2, "max_tokens_per_micro_batch": 99},
    )
    table = {quantity: value for quantity, value, _ in arithmetic(chosen, 2, 5)}
    assert table["rows per rollout"] == "48"
    assert table["rows per process"] == "about 24"
    assert table["rows per optimizer step"] == "16"
    assert table["optimizer steps per rollout"] == "6"
    assert table["micro-batch"] == ("at most 99 tokens (update.max_tokens_per_micro_batch)")


def test_more_processes_than_prompts_says_which_number_to_change():
    with pytest.raises(ValueError, match=r"set rollout\.prompts to 8 or more, or start fewer processes"):
        arithmetic(algorithm(), 8, None)


def test_a_plugin_of_ones_own_can_take_part():
    chosen = algorithm(advantages=load_plugin("advantages", "leave_one_out"))
    assert chosen.problems() == []
