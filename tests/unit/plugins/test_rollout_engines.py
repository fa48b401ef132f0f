"""Rollout engines: completions come from the policy's own distribution, or stand where the dataset has them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_rlhf import load_plugin
from hf_rlhf.batch import Prompt
from hf_rlhf.modeling.policy import Policy
from hf_rlhf.runtime.seeding import seeded
from hf_rlhf.testing import tiny_policy


def sharp_policy() -> Policy:
    """A tiny policy whose logits differ much, so that temperature and cuts show."""
    model, tokenizer = tiny_policy(dtype=torch.float64)
    with torch.no_grad():
        model.lm_head.weight.mul_(25)
    return Policy(model=model, tokenizer=tokenizer, device=torch.device("cpu"))


def prompts(policy: Policy, *texts: str, **columns: Any) -> list[Prompt]:
    encode: Any = policy.tokenizer
    return [
        Prompt(ids=encode(text)["input_ids"], prompt=text, columns={k: v[i] for k, v in columns.items()})
        for i, text in enumerate(texts)
    ]


def next_token(policy: Policy, ids: list[int], temperature: float) -> torch.Tensor:
    with torch.no_grad():
        return (policy.model(input_ids=torch.tensor([ids])).logits[0, -1] / temperature).softmax(-1)


@pytest.mark.proves("rollout.generate", how="closed form", tolerance="5 standard errors")
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_generate_draws_from_the_policys_distribution_at_the_temperature(temperature):
    policy, rows = sharp_policy(), 4_000
    engine = load_plugin("rollout", "generate", max_new_tokens=1, temperature=temperature)
    given = prompts(policy, "7", "2+3=")  # the first one is padded
    with torch.no_grad(), seeded("drawn", 0):
        drawn = engine(policy, given, rows).ids
    for i, prompt in enumerate(given):
        p = next_token(policy, prompt.ids, temperature)
        assert 0.05 < p.max() < 0.95, "a distribution that is neither flat nor certain"
        counts = torch.tensor([ids[0] for ids in drawn[rows * i : rows * (i + 1)]]).bincount(minlength=len(p))
        often = rows * p > 20  # where the normal law holds
        error = (counts - rows * p) / (rows * p * (1 - p)).sqrt()
        assert error[often].abs().max() < 5
        rare = 1 - p[often].sum()
        assert abs(counts[~often].sum() - rows * rare) < 5 * (rows * rare * (1 - rare)).sqrt() + 1


@pytest.mark.proves("rollout.generate", how="closed form", tolerance="exact")
def test_greedy_completions_are_the_most_likely_token_each_time():
    policy = sharp_policy()
    given = prompts(policy, "2+3=", "a longer prompt", "x")
    with torch.no_grad(), seeded("drawn", 0):
        found = load_plugin("rollout", "generate", max_new_tokens=7)(policy, given, 2, temperature=0.0)
    for i, prompt in enumerate(given):
        ids = list(prompt.ids)
        for _ in range(7):
            ids.append(int(next_token(policy, ids, 1.0).argmax()))
            if ids[-1] == policy.tokenizer.eos_token_id:
                break
        assert found.ids[2 * i] == found.ids[2 * i + 1] == ids[len(prompt.ids) :]
        assert found.finish_reasons[2 * i] == ("stop" if ids[-1] == policy.tokenizer.eos_token_id else "length")


def test_what_follows_the_end_of_sequence_is_cut_off():
    policy = sharp_policy()
    with torch.no_grad():
        policy.model.lm_head.weight.mul_(0.04)  # nearly uniform: the end comes after about a hundred tokens
        with seeded("drawn", 0):
            found = load_plugin("rollout", "generate", max_new_tokens=60)(policy, prompts(policy, "2+3="), 24)
    end = policy.tokenizer.eos_token_id
    assert {"stop", "length"} == set(found.finish_reasons)
    for ids, reason in zip(found.ids, found.finish_reasons, strict=True):
        assert ids.count(end) == (reason == "stop")
        assert (ids[-1] == end) == (reason == "stop")
        assert len(ids) == 60 or reason == "stop"


@pytest.mark.proves("rollout.scripted", how="closed form", tolerance="exact")
def test_scripted_gives_each_prompt_the_completions_of_its_row():
    policy = sharp_policy()
    texts = {"completions": [["5", "five", "six"], [[7, 8], [9, 1], [4]]]}
    masks = {"masks": [[[1, 1], [1, 0, 0, 1, 1], [1]], [[1, 0], [1, 1], [1]]]}
    logps = {"logps": [[[-0.5, -0.25]] * 3, [[-1.0, -2.0]] * 3]}
    given = prompts(policy, "2+3=", "4+4=", **texts, **masks, **logps)
    encode: Any = policy.tokenizer
    found = load_plugin("rollout", "scripted", mask_column="masks", logps_column="logps")(policy, given, 2)
    end = policy.tokenizer.eos_token_id
    assert found.ids == [[*encode("5")["input_ids"], end], [*encode("five")["input_ids"], end], [7, 8], [9, 1]]
    assert found.masks == [[1, 1], [1, 0, 0, 1, 1], [1, 0], [1, 1]]
    assert found.logps == [[-0.5, -0.25]] * 2 + [[-1.0, -2.0]] * 2
    assert found.finish_reasons == ["stop", "stop", "length", "stop"]
    with pytest.raises(ValueError, match="at least 4 completions per row, got 3"):
        load_plugin("rollout", "scripted")(policy, given, 4)
