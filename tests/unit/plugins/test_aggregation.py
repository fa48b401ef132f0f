"""Aggregations: the weight of each token in an optimizer step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_rlhf import load_plugin

MASK = torch.tensor([[1.0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.float64)

GROUPS = torch.tensor([4, 2, 4])

WEIGHTS = {
    "token_mean": ({}, [1 / 4, 1 / 4]),
    "seq_mean_token_mean": ({}, [1 / 9, 1 / 3]),
    "seq_mean_token_sum": ({}, [1 / 3, 1 / 3]),
    "seq_mean_token_sum_norm": ({"length": 10}, [1 / 30, 1 / 30]),
    "prompt_mean": ({}, [1 / 6, 1 / 2]),
}
"""Weight of a token of the first row (three tokens) and of the second (one); the empty third row counts in N_u. The first
and the third are of one prompt."""


def weights_of(name: str, mask: torch.Tensor, group_ids: torch.Tensor, **settings: Any) -> torch.Tensor:
    aggregation = load_plugin("aggregation", name, **settings)
    return aggregation(mask, **({"group_ids": group_ids} if "group_ids" in aggregation.needs else {}))


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.proves(
    "aggregation.token_mean",
    "aggregation.seq_mean_token_mean",
    "aggregation.seq_mean_token_sum",
    "aggregation.seq_mean_token_sum_norm",
    "aggregation.prompt_mean",
    how="closed form",
    tolerance="1e-12",
)
def test_weights_have_their_closed_form(name: str):
    settings, per_row = WEIGHTS[name]
    want = torch.tensor([*per_row, 0.0], dtype=torch.float64)[:, None] * MASK
    torch.testing.assert_close(weights_of(name, MASK, GROUPS, **settings), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_step_without_sampled_tokens_weighs_nothing(name: str):
    assert (weights_of(name, MASK * 0, GROUPS) == 0).all()
    assert weights_of(name, MASK[:0], GROUPS[:0]).shape == (0, 4)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.proves(
    "aggregation.token_mean",
    "aggregation.seq_mean_token_mean",
    "aggregation.seq_mean_token_sum",
    "aggregation.seq_mean_token_sum_norm",
    "aggregation.prompt_mean",
    how="invariance",
    tolerance="1e-14",
)
def test_any_split_into_micro_batches_gives_one_gradient(name: str):
    generator = torch.Generator().manual_seed(0)
    mask = (torch.rand(7, 5, generator=generator) > 0.3).double()
    table = torch.randn(7, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = weights_of(name, mask, torch.tensor([1, 1, 5, 5, 5, 2, 2]))
    gradients = []
    for cuts in ([7], [3, 4], [1] * 7):
        for rows in torch.arange(7).split(cuts):
            ((table[rows] ** 2) * weights[rows]).sum().backward()
        gradients.append(table.grad)
        table.grad = None
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-14, atol=0)


def test_every_prompt_weighs_alike_however_long_and_many_its_completions():
    generator = torch.Generator().manual_seed(0)
    mask = (torch.rand(9, 6, generator=generator) > 0.4).double()
    group_ids = torch.tensor([7, 3, 7, 7, 3, 9, 7, 9, 9])
    weights = weights_of("prompt_mean", mask, group_ids)
    for group in (3, 7, 9):
        mine = weights[group_ids == group]
        torch.testing.assert_close(mine.sum().item(), 1 / 3)
        assert len(mine[mine > 0].unique()) == 1


def test_with_one_row_per_prompt_the_prompt_mean_is_the_sequence_mean():
    rows = torch.tensor([8, 1, 5])
    torch.testing.assert_close(
        weights_of("prompt_mean", MASK, rows), weights_of("seq_mean_token_mean", MASK, rows), rtol=1e-12, atol=0
    )


def test_a_length_other_than_the_papers_is_remarked_on():
    def remarks(**rollout: Any) -> list[str]:
        algorithm: Any = SimpleNamespace(rollout=SimpleNamespace(**rollout))
        return list(load_plugin("aggregation", "seq_mean_token_sum_norm", length=512).remarks(algorithm))

    assert "length=64" in remarks(max_new_tokens=64)[0]
    assert not remarks(max_new_tokens=512)
    assert not remarks()
