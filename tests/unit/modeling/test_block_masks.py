"""Block masks of packed rows for FlexAttention, made from spans."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils._python_dispatch import TorchDispatchMode

from hf_rlhf.modeling.packing import FlexPacked


def rows_of(tokens: int, longest: int) -> FlexPacked:
    """Packed groups of eight completions, of so many tokens or a few more."""
    draw = random.Random(0)
    prompts: list[list[int]] = []
    completions: list[list[int]] = []
    while sum(map(len, completions)) < tokens:
        prompt = [len(prompts), *[1] * draw.randint(100, 200)]
        for _ in range(8):
            prompts.append(prompt)
            completions.append([draw.randrange(9) for _ in range(draw.randint(longest // 6, longest))])
    return FlexPacked(prompts, completions, [len(ids) for ids in completions], torch.device("cpu"), nested=True)


@pytest.mark.parametrize("window", [None, 60, 300])
def test_a_block_mask_from_spans_is_that_of_pairs_of_tokens(window):
    layout = rows_of(1500, 300)
    found: Any = layout._block_mask(window)
    tokens = layout.input_ids.size(1)
    due = create_block_mask(found.mask_mod, None, None, tokens, tokens, device="cpu")
    assert found.shape == due.shape
    assert not (due.to_dense() > found.to_dense()).any(), "every block with a pair is looked at"
    assert torch.equal(found.full_kv_num_blocks, due.full_kv_num_blocks)
    if window is None:
        assert torch.equal(found.to_dense(), due.to_dense())
    draws = torch.randn(3, 1, 2, tokens, 4, dtype=torch.float64)
    assert torch.equal(*(flex_attention(*draws, block_mask=mask) for mask in (found, due)))


class Made(TorchDispatchMode):
    """Adds up the bytes of every tensor that is made."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.bytes += found.nbytes if isinstance(found, torch.Tensor) else 0
        return found


def test_a_block_mask_of_32768_tokens_takes_less_than_50_mb_to_make():
    layout = rows_of(32768, 1200)
    with Made() as made:
        layout._block_mask(None)
    assert 0 < made.bytes < 50e6
