from __future__ import annotations

import pytest
import torch
from hf_rlhf import load_recipe
from hf_rlhf.testing import Fact, conformance

from hf_rlhf_my_name import MyName


@pytest.mark.parametrize("fact", conformance(MyName()), ids=str)
def test_conforms(fact: Fact) -> None:
    fact()


def test_only_tokens_below_the_floor_cost() -> None:
    mask = torch.tensor([[1.0, 1.0, 0.0]])
    entropy = torch.tensor([[0.1, 0.9, 0.0]])
    cost = MyName(coef=0.5, floor=0.3)(torch.zeros(1, 3), mask, entropy=entropy)
    assert cost.flatten().tolist() == pytest.approx([0.1, 0.0, 0.0])


def test_it_reports_the_gap_to_the_floor() -> None:
    plugin = MyName(floor=0.5)
    assert plugin.report() == {}
    plugin.observe({"policy/entropy": 0.25})
    assert plugin.report() == {"gap": 0.25}


def test_a_term_that_adds_nothing_is_refused() -> None:
    given = "loss_terms=[{use: my_name, coef: 0}]"
    (problem,) = load_recipe("grpo", [given]).algorithm().problems()
    assert "leave the term out" in problem
