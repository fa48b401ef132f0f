from __future__ import annotations

import pytest
from hf_rlhf import load_recipe
from hf_rlhf.testing import Fact, conformance, tiny_policy

from hf_rlhf_my_name import MyName


@pytest.mark.parametrize("fact", conformance(MyName()), ids=str)
def test_conforms(fact: Fact) -> None:
    fact()


def test_it_is_copied_ever_more_rarely() -> None:
    policy, _ = tiny_policy()
    plugin = MyName(first=2)
    model = plugin.build(policy)
    copied = []
    for step in range(1, 17):
        plugin.move(model, policy, step)
        if plugin.report() == {"age": 0.0}:
            copied.append(step)
    assert copied == [2, 4, 8, 16]


def test_a_copy_within_a_rollout_is_refused() -> None:
    given = "reference={use: my_name, first: 3}"
    settings = ["kl=[{use: in_loss, estimator: k3}]", "update.mini_batches=2"]
    (problem,) = load_recipe("grpo", [given, *settings]).algorithm().problems()
    assert "a multiple of 2" in problem
