from __future__ import annotations

import pytest
from hf_rlhf import load_recipe
from hf_rlhf.testing import Fact, conformance

from hf_rlhf_my_name import MyName


@pytest.mark.parametrize("fact", conformance(MyName()), ids=str)
def test_conforms(fact: Fact) -> None:
    fact()


def test_it_brakes_above_the_limit_and_lets_go_below() -> None:
    plugin = MyName(limit=0.1, most=4.0)
    betas = []
    for kl in (0.2, 0.2, 0.2, 0.05, 0.05, 0.05):
        plugin.observe({"kl/rollout/token": kl})
        betas.append(plugin(0.5))
    assert betas == [1.0, 2.0, 2.0, 1.0, 0.5, 0.5]
    assert plugin.report() == {"factor": 1.0}


def test_a_clamp_at_the_limit_is_refused() -> None:
    kl = "kl=[{use: in_reward, clamp: 0.05, controller: {use: my_name, limit: 0.1}}]"
    problems = load_recipe("grpo", [kl]).algorithm().problems()
    assert any("raise clamp" in problem for problem in problems)
