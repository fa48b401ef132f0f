from __future__ import annotations

import pytest
import torch
from hf_rlhf import load_recipe
from hf_rlhf.testing import Fact, conformance

from hf_rlhf_my_name import MyName


@pytest.mark.parametrize("fact", conformance(MyName()), ids=str)
def test_conforms(fact: Fact) -> None:
    fact()


def test_half_of_the_length_is_divided_out() -> None:
    mask = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]])
    assert MyName(power=0.5)(mask).sum(1).tolist() == pytest.approx([1.0, 0.5])


def test_it_reports_the_weight_of_a_row_of_mean_length() -> None:
    plugin = MyName(power=0.5)
    plugin.observe({"rollout/length/mean": 16.0})
    assert plugin.report() == {"row_weight": 4.0}


@pytest.mark.parametrize("power", [0, 1])
def test_a_power_that_has_a_name_is_refused(power: int) -> None:
    given = ["aggregation.use=my_name", f"aggregation.power={power}"]
    (problem,) = load_recipe("grpo", given).algorithm().problems()
    assert "aggregation.use=seq_mean_token_" in problem
