from __future__ import annotations

import pytest
import torch
from hf_rlhf import load_recipe
from hf_rlhf.batch import Scored
from hf_rlhf.testing import Fact, conformance, scored

from hf_rlhf_my_name import MyName


@pytest.mark.parametrize("fact", conformance(MyName()), ids=str)
def test_conforms(fact: Fact) -> None:
    fact()


def test_the_best_of_four_against_the_rest() -> None:
    returns = torch.tensor([[1.0], [3.0], [2.0], [0.0]])
    given = Scored(mask=torch.ones(4, 1), token_rewards=returns, group_ids=torch.zeros(4, dtype=torch.long))
    worth = MyName(k=1)(given).advantages.flatten()
    assert worth.tolist() == pytest.approx([-1 / 3, 1.0, -1 / 3, -1 / 3])


@pytest.mark.parametrize("k", [1, 2])
def test_a_group_sums_to_nothing(k: int) -> None:
    given = scored(group_sizes=(4, 3), length=1)
    worth = MyName(k=k)(given).advantages.flatten()
    assert float(worth[:4].sum()) == pytest.approx(0.0, abs=1e-9)
    assert float(worth[4:].sum()) == pytest.approx(0.0, abs=1e-9)


def test_ties_at_the_border_are_counted() -> None:
    returns = torch.tensor([[1.0], [1.0], [0.0], [0.0]])
    given = Scored(mask=torch.ones(4, 1), token_rewards=returns, group_ids=torch.zeros(4, dtype=torch.long))
    tied = MyName(k=1)(given).metrics["tied_frac"]
    assert torch.as_tensor(tied).tolist() == [1.0, 1.0, 0.0, 0.0]


def test_more_best_than_completions_are_refused() -> None:
    given = "advantages={use: my_name, k: 99}"
    (problem,) = load_recipe("grpo", [given]).algorithm().problems()
    assert "set advantages.k below" in problem
