from __future__ import annotations

import pytest
import torch
from hf_rlhf import load_recipe
from hf_rlhf.testing import Fact, conformance, tiny_policy

from hf_rlhf_my_name import MyName


@pytest.mark.parametrize("fact", conformance(MyName()), ids=str)
def test_conforms(fact: Fact) -> None:
    fact()


def test_it_reports_how_far_its_values_are_apart() -> None:
    policy, _ = tiny_policy()
    given = "critic={use: my_name, learning_rate: 0.01}"
    algorithm = load_recipe("ppo", [given]).algorithm()
    plugin = algorithm.critic
    assert plugin.report() == {}
    table = plugin.build(policy, algorithm)
    assert table is not None
    assert plugin.report() == {"spread": 0.0}
    with torch.no_grad():
        next(table.parameters())[0] = 1.0
    assert plugin.report()["spread"] > 0


def test_the_learning_rate_of_the_policy_is_refused() -> None:
    given = "critic={use: my_name}"
    (problem,) = load_recipe("ppo", [given]).algorithm().problems()
    assert "set critic.learning_rate" in problem
