from __future__ import annotations

import pytest
import torch

from hf_rlhf import load_plugin, load_recipe
from hf_rlhf.batch import Rollouts, Scored


def test_keyword_gives_the_share_of_words_that_occur():
    texts = ["Because it rains, therefore I stay", "because", "no reason"]
    rollouts = Rollouts(
        prompts=["why?"] * 3,
        completions=texts,
        prompt_ids=[[1]] * 3,
        completion_ids=[[2]] * 3,
        masks=[[1]] * 3,
        finish_reasons=["stop"] * 3,
    )
    assert load_plugin("rewards", "keyword", words=["because", "therefore"])(rollouts) == [1.0, 0.5, 0.0]


@pytest.mark.parametrize("outlier", [5.0, 5000.0])
def test_an_outlier_moves_no_other_advantage(outlier):
    mask = torch.ones(5, 2)
    rewards = torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, outlier], [0.0, 7.0], [0.0, 9.0]])
    scored = Scored(mask=mask, token_rewards=rewards, group_ids=torch.tensor([0, 0, 0, 1, 1]))
    advantages = load_plugin("advantages", "group_median")(scored)
    assert advantages[:, 0].tolist() == [-1.0, 0.0, outlier - 2.0, 0.0, 2.0]
    assert torch.equal(advantages[:, 0], advantages[:, 1])


def test_the_recipe_makes_an_algorithm_without_problems():
    assert load_recipe("explain").algorithm().problems() == []
