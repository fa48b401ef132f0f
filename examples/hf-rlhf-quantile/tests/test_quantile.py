"""The paper's gate, its quantile against NumPy's, and the contract of every estimator."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hf_rlhf_quantile.quantile import Quantile

from hf_rlhf import load_recipe
from hf_rlhf.batch import Scored
from hf_rlhf.testing import conformance


def given(*groups: list[float]) -> Scored:
    """One token per row, with these returns."""
    returns = torch.tensor([x for group in groups for x in group])
    ids = torch.tensor([g for g, group in enumerate(groups) for _ in group])
    return Scored(mask=torch.ones(len(ids), 1), token_rewards=returns.unsqueeze(1), group_ids=ids)


@pytest.mark.parametrize("fact", conformance(Quantile()), ids=str)
def test_conforms(fact):
    fact()


@pytest.mark.parametrize("right", range(1, 10))
def test_the_rare_right_rows_learn_or_the_rare_wrong_ones(right):
    advantages = Quantile(k=0.4)(given([1.0] * right + [0.0] * (10 - right))).advantages.squeeze(1)
    hard = right <= 6
    assert (advantages[:right] > 0).tolist() == [hard] * right
    assert (advantages[right:] < 0).tolist() == [not hard] * (10 - right)
    assert (advantages == 0).sum() == (10 - right if hard else right)


@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_a_group_that_is_all_right_or_all_wrong_learns_nothing(reward):
    assert (Quantile()(given([reward] * 4)).advantages == 0).all()


@pytest.mark.parametrize("k", [0.0, 0.1, 0.25, 0.4, 0.5, 0.6, 0.7, 0.9, 1.0])
@pytest.mark.parametrize("size", [1, 2, 5, 8, 10])
def test_the_baseline_is_the_inverse_of_the_distribution_function(k, size):
    returns = torch.randn(size, generator=torch.Generator().manual_seed(size)).tolist()
    baseline = np.quantile(np.array(returns, dtype=np.float32), k, method="inverted_cdf")
    scale = given(returns).group_std(torch.tensor(returns)) + 1e-4
    expected = (torch.tensor(returns) - float(baseline)) / scale
    torch.testing.assert_close(Quantile(k=k)(given(returns)).advantages.squeeze(1), expected)


def test_the_share_of_rows_that_do_not_learn_is_reported():
    credit = Quantile(k=0.5)(given([0.0, 0.0, 0.0, 1.0], [1.0, 1.0]))
    assert credit.metrics["zero_frac"].mean() == pytest.approx(5 / 6)


def test_the_recipe_makes_an_algorithm_without_problems():
    assert load_recipe("qae").algorithm().problems() == []
