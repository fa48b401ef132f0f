from __future__ import annotations

import pytest
import torch
from hf_rlhf import load_recipe
from hf_rlhf.batch import Scored
from hf_rlhf.testing import Fact, conformance

from hf_rlhf_my_name import MyName


@pytest.mark.parametrize("fact", conformance(MyName()), ids=str)
def test_conforms(fact: Fact) -> None:
    fact()


def test_prompts_that_have_become_easy_are_dropped() -> None:
    plugin = MyName(margin=0.25, memory=0.0)
    returns = torch.tensor([[1.0], [1.0], [0.0], [1.0]])
    given = Scored(mask=torch.ones(4, 1), token_rewards=returns, group_ids=torch.tensor([0, 0, 1, 1]))
    assert plugin(given).tolist() == [True, True, True, True]
    plugin.observe({"reward/total/mean": 0.5})
    assert plugin(given).tolist() == [False, False, True, True]
    assert plugin.report() == {"centre": 0.5}


def test_one_prompt_per_step_is_refused() -> None:
    given = "filters=[{use: my_name}]"
    settings = ["rollout.prompts=2", "update.mini_batches=2"]
    (problem,) = load_recipe("grpo", [given, *settings]).algorithm().problems()
    assert "set resample=2" in problem
