"""Rows of a rollout dealt to processes for the update."""

from __future__ import annotations

import random

import pytest
import torch

from hf_rlhf.training.dealing import deal
from hf_rlhf.training.micro_batches import Batching


def rollout(prompts, size, seed):
    """Prompts and completions of uneven lengths, one group after another."""
    draw = random.Random(seed)
    rows = []
    for i in range(prompts):
        prompt = [i] * draw.randint(80, 200)
        rows += [(prompt, [0] * max(4, min(512, int(draw.lognormvariate(5, 0.75))))) for _ in range(size)]
    return tuple(zip(*rows, strict=True))


@pytest.mark.parametrize(("prompts", "size", "mini_batches"), [(64, 8, 1), (64, 8, 2), (32, 16, 1), (512, 4, 1)])
def test_each_of_8_processes_gets_whole_groups_and_as_many_tokens_in_every_mini_batch(prompts, size, mini_batches):
    for seed in range(5):
        texts = rollout(prompts, size, seed)
        batching = Batching(pad=0, max_rows=8, once=False)
        costs = torch.tensor(batching.tokens(range(prompts * size), *texts), dtype=torch.float64)
        groups = torch.arange(prompts).repeat_interleave(size)
        ranks = deal(groups, costs, mini_batches, 8)
        assert all(len(ranks[groups == group].unique()) == 1 for group in range(prompts))
        for part in torch.arange(prompts).tensor_split(mini_batches):
            of_rank = torch.zeros(8, dtype=torch.float64).index_add(
                0, ranks[torch.isin(groups, part)], costs[torch.isin(groups, part)]
            )
            assert of_rank.max() / of_rank.mean() <= 1.05


@pytest.mark.parametrize(
    ("limits", "counted"),
    [({}, [4, 0, 3, 3]), ({"once": False}, [4, 2, 3, 3]), ({"attention": "padded"}, [4, 4, 5, 3])],
)
def test_tokens_of_a_row_are_those_that_it_adds_to_a_forward(limits, counted):
    prompts = [[1, 2], [1, 2], [1, 2], [3]]
    completions = [[7, 8], [7, 8], [7, 8, 9], [7, 8]]
    assert Batching(pad=0, max_rows=8, **limits).tokens(range(4), prompts, completions) == counted
