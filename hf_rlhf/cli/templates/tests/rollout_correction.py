from __future__ import annotations

import math

import pytest
import torch
from hf_rlhf import load_recipe
from hf_rlhf.testing import Fact, conformance

from hf_rlhf_my_name import MyName


@pytest.mark.parametrize("fact", conformance(MyName()), ids=str)
def test_conforms(fact: Fact) -> None:
    fact()


def test_tokens_that_differ_by_more_than_the_factor_are_left_out() -> None:
    trainer = torch.tensor([[0.5, 0.5, 0.5]]).log()
    sampler = torch.tensor([[0.5, 0.2, 0.9]]).log()
    assert MyName(factor=2.0)(trainer, sampler, torch.ones(1, 3)).tolist() == [[1.0, 0.0, 1.0]]


def test_it_reports_the_gap_in_parts_of_its_factor() -> None:
    plugin = MyName(factor=math.e)
    plugin.observe({"rollout/logp_gap/mean": 0.25})
    assert plugin.report() == {"gap_of_factor": 0.25}


def test_a_sampler_that_is_exact_is_refused() -> None:
    given = "rollout_correction.use=my_name"
    (problem,) = load_recipe("grpo", [given]).algorithm().problems()
    assert "set rollout_correction.use=none" in problem
