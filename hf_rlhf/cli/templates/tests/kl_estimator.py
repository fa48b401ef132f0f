from __future__ import annotations

import pytest
import torch
from hf_rlhf import load_recipe
from hf_rlhf.testing import Fact, conformance

from hf_rlhf_my_name import MyName


@pytest.mark.parametrize("fact", conformance(MyName()), ids=str)
def test_conforms(fact: Fact) -> None:
    fact()


def test_its_mean_at_one_half_is_four_squared_hellinger_distances() -> None:
    policy, reference = torch.tensor([0.3, 0.7]), torch.tensor([0.6, 0.4])
    mean = (policy * MyName(alpha=0.5)(policy.log(), reference.log())).sum()
    hellinger = 0.5 * (policy.sqrt() - reference.sqrt()).square().sum()
    assert float(mean) == pytest.approx(4 * float(hellinger))


def test_it_reports_the_room_below_its_bound() -> None:
    plugin = MyName(alpha=0.25)
    plugin.observe({"kl/rollout/token": 1.0})
    assert plugin.report() == {"headroom": 3.0}


def test_a_clamp_above_its_bound_is_refused() -> None:
    kl = "kl=[{use: in_loss, clamp: 9, estimator: my_name}]"
    (problem,) = load_recipe("grpo", [kl]).algorithm().problems()
    assert "leave clamp out" in problem
