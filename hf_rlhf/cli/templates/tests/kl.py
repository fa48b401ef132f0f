from __future__ import annotations

import pytest
import torch
from hf_rlhf import load_plugin, load_recipe
from hf_rlhf.testing import Fact, conformance


@pytest.mark.parametrize("fact", conformance(load_plugin("kl", "my_name")), ids=str)
def test_conforms(fact: Fact) -> None:
    fact()


def test_the_budget_is_free() -> None:
    plugin = load_plugin("kl", "my_name", beta=0.5, free=0.1)
    penalty = plugin.reward_penalty(torch.tensor([-1.0, 0.1, 1.1]))
    assert penalty.tolist() == pytest.approx([0.0, 0.0, 0.5])


def test_it_reports_how_far_the_rollout_is_over_its_budget() -> None:
    plugin = load_plugin("kl", "my_name", free=0.25)
    plugin.observe({"kl/rollout/token": 0.5})
    assert plugin.report() == {"over": 0.25}


def test_a_price_of_nothing_is_refused() -> None:
    given = "kl=[{use: my_name, beta: 0}]"
    problems = load_recipe("grpo", [given]).algorithm().problems()
    assert any("set beta=0.05" in problem for problem in problems)
