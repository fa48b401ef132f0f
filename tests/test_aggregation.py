"""Aggregations: the weight of each token in an optimizer step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_rlhf import load_plugin

MASK = torch.tensor([[1.0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.float64)

WEIGHTS = {
    "token_mean": ({}, [1 / 4, 1 / 4]),
    "seq_mean_token_mean": ({}, [1 / 9, 1 / 3]),
    "seq_mean_token_sum": ({}, [1 / 3, 1 / 3]),
    "seq_mean_token_sum_norm": ({"length": 10}, [1 / 30, 1 / 30]),
}
"""Weight of a token of the first row (three tokens) and of the second (one); the empty third row counts in N_u."""


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_have_their_closed_form(name: str):
    settings, per_row = WEIGHTS[name]
    want = torch.tensor([*per_row, 0.0], dtype=torch.float64)[:, None] * MASK
    torch.testing.assert_close(load_plugin("aggregation", name, **settings)(MASK), want)


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_step_without_sampled_tokens_weighs_nothing(name: str):
    assert (load_plugin("aggregation", name)(MASK * 0) == 0).all()


@pytest.mark.parametrize("name", WEIGHTS)
def test_any_split_into_micro_batches_gives_one_gradient(name: str):
    generator = torch.Generator().manual_seed(0)
    mask = (torch.rand(7, 5, generator=generator) > 0.3).double()
    table = torch.randn(7, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = load_plugin("aggregation", name)(mask)
    gradients = []
    for cuts in ([7], [3, 4], [1] * 7):
        for rows in torch.arange(7).split(cuts):
            ((table[rows] ** 2) * weights[rows]).sum().backward()
        gradients.append(table.grad)
        table.grad = None
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-14, atol=0)


def test_a_length_other_than_the_papers_is_remarked_on():
    def remarks(**rollout: Any) -> list[str]:
        algorithm: Any = SimpleNamespace(rollout=SimpleNamespace(**rollout))
        return list(load_plugin("aggregation", "seq_mean_token_sum_norm", length=512).remarks(algorithm))

    assert "length=64" in remarks(max_new_tokens=64)[0]
    assert not remarks(max_new_tokens=512)
    assert not remarks()
