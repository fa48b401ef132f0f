from __future__ import annotations

import pytest
import torch
from hf_rlhf import load_recipe
from hf_rlhf.testing import Fact, conformance

from hf_rlhf_my_name import MyName


@pytest.mark.parametrize("fact", conformance(MyName()), ids=str)
def test_conforms(fact: Fact) -> None:
    fact()


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_it_is_lowest_at_one_plus_or_minus_epsilon(advantage: float) -> None:
    ratio = torch.tensor([[1 + 0.2 * advantage]])
    logps = ratio.log().requires_grad_()
    one = torch.ones(1, 1)
    loss, metrics = MyName(epsilon=0.2)(logps, torch.zeros(1, 1), advantage * one, one)
    (slope,) = torch.autograd.grad(loss.sum(), logps)
    assert float(slope) == pytest.approx(0.0, abs=1e-6)
    assert float(metrics["move"]) == pytest.approx(0.2)


def test_a_single_step_per_rollout_is_refused() -> None:
    given = "policy_loss={use: my_name}"
    problems = load_recipe("grpo", [given, "update.mini_batches=1"]).algorithm().problems()
    assert any("set update.mini_batches=2" in problem for problem in problems)
