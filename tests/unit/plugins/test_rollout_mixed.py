"""The engine that takes a share of its completions from the dataset: which rows, which tokens, and what it refuses."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import pytest
import torch

from hf_rlhf import load_plugin
from hf_rlhf.batch import Prompt
from hf_rlhf.modeling.policy import Policy
from hf_rlhf.runtime.seeding import seeded
from hf_rlhf.testing import tiny_policy
from tests.helpers import runs

GIVEN = [7, 8, 9, 1]


def drawn(rows: int = 4, group: int = 1, given: Any = None, seed: int = 0, **settings: Any) -> Any:
    model, tokenizer = tiny_policy()
    policy = Policy(model=model, tokenizer=tokenizer, device=torch.device("cpu"))
    prompts = [Prompt(ids=[5, 6], prompt="", columns={"completion": given or GIVEN}) for _ in range(rows)]
    engine = load_plugin("rollout", "mixed", **{"max_new_tokens": 6, **settings})
    with seeded(seed, "mixed"), torch.no_grad():
        return engine(policy, prompts, group)


def share(completions: Any) -> float:
    return fmean(ids != GIVEN for ids in completions.ids)


@pytest.mark.parametrize(("rows", "wanted"), [(4, 0.5), (4, 0.25), (4, 0.0), (4, 1.0), (3, 2 / 3)])
def test_the_share_of_the_prompts_is_sampled(rows: int, wanted: float):
    assert share(drawn(rows, share=wanted)) == pytest.approx(wanted)


def test_a_share_of_no_whole_number_of_prompts_holds_in_the_mean_and_any_prompt_may_be_the_one():
    many = [drawn(2, share=0.25, seed=seed) for seed in range(60)]
    assert {share(x) for x in many} == {0.0, 0.5}
    assert fmean(share(x) for x in many) == pytest.approx(0.25, abs=0.08)
    assert {i for x in many for i, ids in enumerate(x.ids) if ids != GIVEN} == {0, 1}


def test_rows_of_a_prompt_stay_together():
    found = drawn(4, group=3, share=0.5)
    whose = [[ids == GIVEN for ids in found.ids[i : i + 3]] for i in range(0, 12, 3)]
    assert sorted(map(sum, whose)) == [0, 0, 3, 3]
    assert len(found.finish_reasons) == 12


def test_a_call_that_names_a_temperature_samples_every_completion():
    model, tokenizer = tiny_policy()
    policy = Policy(model=model, tokenizer=tokenizer, device=torch.device("cpu"))
    prompts = [Prompt(ids=[5, 6], prompt="", columns={"completion": GIVEN})] * 4
    engine, plain = (load_plugin("rollout", x, max_new_tokens=6) for x in ("mixed", "generate"))
    for temperature in (0.0, 1.0):
        with seeded(0, "one"), torch.no_grad():
            found = engine(policy, prompts, 2, temperature=temperature)
        with seeded(0, "one"), torch.no_grad():
            assert found.ids == plain(policy, prompts, 2, temperature=temperature).ids


def test_a_text_ends_with_the_end_of_sequence_and_a_long_one_is_cut():
    _, tokenizer = tiny_policy()
    (ids,) = drawn(1, given="12", share=0.0).ids
    assert ids == [*tokenizer("12", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    cut = drawn(1, given=[7] * 9, share=0.0)
    assert (cut.ids, cut.finish_reasons) == ([[7] * 6], ["length"])


@pytest.mark.parametrize("given", [{"a": 1}, [[1, 2]], ["12"]])
def test_a_column_of_something_else_is_refused_by_name(given: Any):
    with pytest.raises(ValueError, match=r"rollout\.column='completion' must hold a text or a list of token ids"):
        drawn(1, given=given, share=0.0)


def problems(**changes: Any) -> list[str]:
    parts = {**runs.DISTILLED, **changes}
    return [text for text in runs.recipe(**parts).algorithm().problems() if "rollout=mixed" in text]


def kl(**settings: Any) -> dict[str, Any]:
    return {"kl": [{"use": "in_loss", "estimator": "jsd", **settings}]}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"rewards": [runs.FORMAT]}, "rewards.0.weight=0"),
        (kl(use="monitor"), "no KL in the loss learns from the dataset's completions"),
        (kl(estimator="k3"), "kl.0.estimator=k3 takes tokens for samples"),
        (kl(use="monitor", estimator="k1"), "kl.0.estimator=k1 takes tokens for samples"),
        (kl(use="in_advantage", estimator="k1"), "kl.0=in_advantage credits sampled tokens"),
        (kl(use="in_reward", estimator="exact"), "kl.0=in_reward credits sampled tokens"),
        (kl(controller="adaptive"), "kl.0.controller=adaptive reads the KL of sampled tokens"),
        ({"critic": "value_head", "advantages": "gae"}, "critic=value_head would learn"),
        ({"advantages": {"use": "baseline", "baseline": {"use": "constant", "value": 0.5}}}, "advantages=baseline"),
        ({"environment": ["second_chance"]}, "environment.0=second_chance plays its episodes"),
        ({"policy_loss": "dro"}, "policy_loss=dro has a gradient without an advantage"),
    ],
)
def test_what_takes_the_datasets_tokens_for_samples_is_refused(changes: dict[str, Any], text: str):
    assert text in "\n".join(problems(**changes))


def test_what_does_not_is_accepted():
    assert problems() == problems(rewards=[{**runs.FORMAT, "weight": 0}]) == problems(**kl(estimator="forward")) == []
    (missing, *_) = runs.recipe(**{**runs.DISTILLED, "rollout_correction": "truncated"}).algorithm().problems()
    assert "sampler_logps" in missing
