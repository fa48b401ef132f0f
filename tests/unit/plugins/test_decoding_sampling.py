"""Tokens are drawn with their probabilities, by a number that depends on their row and step alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from hf_rlhf import load_plugin
from hf_rlhf.runtime.seeding import seeded
from hf_rlhf_plugins.rollout._sampling import BLOCK, History, Uniforms, inverse_cdf
from tests.helpers.decoding import policy_of, prompts_of, tiny

CPU = torch.device("cpu")


@pytest.mark.proves("rollout.generate", how="exact enumeration", tolerance="one part in 4000")
@pytest.mark.parametrize("size", [1, 2, 5, 64, 97, 1000, 4096])
def test_a_grid_of_uniform_numbers_gives_each_token_its_share(size):
    torch.manual_seed(0)
    probs = (3 * torch.randn(size)).softmax(0)
    probs[torch.rand(size) < 0.3] = 0
    probs[size // 2] = 1.0
    points = 4000
    grid = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    counts = inverse_cdf(probs.expand(points, -1), grid).bincount(minlength=size)
    share = (probs / probs.sum()).double()
    assert (counts / points - share).abs().max() <= 1 / points + 1e-6
    assert counts[probs == 0].sum() == 0


@pytest.mark.parametrize("size", [7, 97, 4096])
def test_no_token_of_probability_0_at_the_ends_of_the_interval(size):
    ends = torch.tensor([0.0, 2.0**-60, 1 - 2.0**-53], dtype=torch.float64)
    for first, last in ((size // 3, size // 3), (1, size - 2), (0, size - 1)):
        probs = torch.zeros(size)
        probs[first : last + 1] = 0.1
        assert inverse_cdf(probs.expand(3, -1), ends).tolist() == [first, first, last]


def test_a_rare_token_is_not_lost_in_a_large_vocabulary():
    probs = torch.full((1, 151_936), 1e-9, dtype=torch.float32)
    probs[0, 100_000] = 1.0
    total = 1 + 151_935e-9
    for token in (0, 99_999, 150_000):
        before = token * 1e-9 if token < 100_000 else 1 + (token - 1) * 1e-9
        drawn = inverse_cdf(probs, torch.tensor([(before + 0.5e-9) / total], dtype=torch.float64))
        assert abs(int(drawn) - token) <= 100, "float32 sums of blocks move a border by rounding"


def test_uniform_numbers_depend_on_row_and_step_alone():
    tables = []
    for rows, steps in ((3, range(2 * BLOCK + 2)), (5, [2 * BLOCK + 1, 7, BLOCK, 0])):
        torch.manual_seed(4)
        uniforms = Uniforms(rows, CPU)
        tables.append({step: uniforms(step) for step in steps})
    for step, numbers in tables[1].items():
        assert torch.equal(tables[0][step], numbers[:3])
    everything = torch.stack(list(tables[0].values()))
    assert everything.unique().numel() == everything.numel()
    assert everything.min() >= 0
    assert everything.max() < 1
    assert abs(everything.mean() - 0.5) < 5 / math.sqrt(12 * everything.numel())


CUTS: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "whole": ({}, []),
    "top_k": ({"top_k": 7}, [TopKLogitsWarper(7)]),
    "top_p": ({"top_p": 0.7}, [TopPLogitsWarper(0.7)]),
    "min_p": ({"min_p": 0.1}, [MinPLogitsWarper(0.1)]),
    "all": ({"top_k": 20, "top_p": 0.9, "min_p": 0.05}, [*map(TopKLogitsWarper, [20]), TopPLogitsWarper(0.9)]),
}
CUTS["all"][1].append(MinPLogitsWarper(0.05))


@pytest.mark.proves("rollout.generate", how="closed form", tolerance="chi-square, p > 1e-5")
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_frequencies_are_the_probabilities(cut, temperature):
    settings, warpers = CUTS[cut]
    policy, (prompt,), rows = policy_of(tiny("qwen2")), prompts_of(6), 6000
    engine = load_plugin("rollout", "generate", max_new_tokens=1, temperature=temperature, **settings)
    with seeded("drawn", 1):
        found = engine(policy, [prompt], rows)
    with torch.no_grad():
        scores = policy.model(input_ids=torch.tensor([prompt.ids])).logits[:, -1] / temperature
    whole = scores.log_softmax(-1)[0]
    for warper in warpers:
        scores = warper(None, scores)
    p = scores.softmax(-1)[0].double()
    tokens = torch.tensor([ids[0] for ids in found.ids])
    counts = tokens.bincount(minlength=len(p)).double()
    assert counts[p == 0].sum() == 0
    often = rows * p >= 5
    table = torch.cat((counts[often], counts[~often].sum()[None])), torch.cat((p[often], p[~often].sum()[None]))
    kept = rows * table[1] > 1
    chi = ((table[0] - rows * table[1]).square() / (rows * table[1]))[kept].sum()
    degrees = max(1, int(kept.sum()) - 1)
    normal = ((chi / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / math.sqrt(
        2 / (9 * degrees)
    )  # Wilson and Hilferty
    assert normal < 4.3
    torch.testing.assert_close(torch.tensor([row[0] for row in found.logps]), whole[tokens], rtol=0, atol=1e-5)


def test_the_second_token_has_its_conditional_probabilities():
    policy, (prompt,), rows = policy_of(tiny("gpt2")), prompts_of(6), 4000
    engine = load_plugin("rollout", "generate", max_new_tokens=2)
    with seeded("drawn", 2):
        found = engine(policy, [prompt], rows)
    pairs = [ids for ids in found.ids if len(ids) == 2]
    first = max({ids[0] for ids in pairs}, key=[ids[0] for ids in pairs].count)
    second = torch.tensor([ids[1] for ids in pairs if ids[0] == first])
    with torch.no_grad():
        p = (policy.model(input_ids=torch.tensor([[*prompt.ids, first]])).logits[0, -1]).softmax(-1)
    n = len(second)
    often = n * p > 10
    error = (second.bincount(minlength=len(p)) - n * p) / (n * p * (1 - p)).sqrt()
    assert often.sum() >= 3
    assert error[often].abs().max() < 4.5


def test_a_repetition_penalty_sees_the_tokens_of_the_row_and_no_padding():
    policy, prompts = policy_of(tiny("qwen3")), prompts_of(3, 9, 5)
    engine = load_plugin("rollout", "generate", max_new_tokens=12, repetition_penalty=2.5)
    together = engine(policy, prompts, 1, temperature=0.0)
    for prompt, ids in zip(prompts, together.ids, strict=True):
        row = list(prompt.ids)
        for token in ids:
            with torch.no_grad():
                scores = policy.model(input_ids=torch.tensor([row])).logits[0, -1]
            held = torch.tensor(sorted(set(row)))
            scores[held] = torch.where(scores[held] < 0, scores[held] * 2.5, scores[held] / 2.5)
            assert token == int(scores.argmax())
            row.append(token)
    plain = load_plugin("rollout", "generate", max_new_tokens=12)(policy, prompts, 1, temperature=0.0)
    assert plain.ids != together.ids


def test_log_probs_are_of_the_distribution_before_penalties():
    policy, (prompt,) = policy_of(tiny("qwen3")), prompts_of(9)
    engine = load_plugin("rollout", "generate", max_new_tokens=1, repetition_penalty=3.0, temperature=2.0)
    with seeded("drawn", 0):
        found = engine(policy, [prompt], 5)
    with torch.no_grad():
        due = (policy.model(input_ids=torch.tensor([prompt.ids])).logits[0, -1] / 2.0).log_softmax(-1)
    for ids, logps in zip(found.ids, found.logps, strict=True):
        assert logps[0] == pytest.approx(float(due[ids[0]]), abs=1e-5)


def test_histories_hold_a_set_of_tokens():
    history = History([[4, 5], [6, 7, 8, 7]], 2, CPU)
    history.add(torch.tensor([1, 0]), 0, torch.tensor([9, 3]))
    seen = history.of(torch.tensor([0, 1]), 1)
    assert [set(row) for row in seen.tolist()] == [{3, 4, 5}, {6, 7, 8, 9}]
