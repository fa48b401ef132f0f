"""Whitened token rewards (TRL's `whiten_rewards`): their deviation becomes 1 over the rollout, their mean stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_rlhf import load_plugin
from hf_rlhf.batch import Scored


def scored(rewards: Tensor, mask: Tensor, values: Tensor) -> Scored:
    return Scored(mask=mask, token_rewards=rewards, values=values, group_ids=torch.arange(len(mask)))


def batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    rewards, values = (torch.randn(6, 7, generator=draw, dtype=torch.float64) for _ in range(2))
    mask = (torch.rand(6, 7, generator=draw) < 0.7).double()
    mask[:, 0] = 1
    return (3 * rewards + 2) * mask, mask, values


@pytest.mark.proves("advantages.gae", how="closed form", tolerance="1e-9")
@pytest.mark.parametrize("ddof", [0, 1])
def test_whitened_rewards_keep_their_mean_and_have_variance_1(ddof: int):
    rewards, mask, values = batch()
    on = rewards[mask > 0]
    want = torch.zeros_like(rewards)
    want[mask > 0] = (on - on.mean()) * torch.rsqrt(on.var(correction=ddof) + 1e-8) + on.mean()
    assert want[mask > 0].mean().item() == pytest.approx(on.mean().item())
    gae: dict[str, Any] = {"gamma": 0.9, "lam": 0.8}
    whitened = load_plugin("advantages", "gae", whiten_rewards=True, ddof=ddof, **gae)(scored(rewards, mask, values))
    by_hand = load_plugin("advantages", "gae", **gae)(scored(want, mask, values))
    torch.testing.assert_close(whitened.advantages, by_hand.advantages, rtol=0, atol=1e-9)
    torch.testing.assert_close(whitened.returns, by_hand.returns, rtol=0, atol=1e-9)


def test_equal_rewards_stay_as_they_are():
    _, mask, values = batch()
    equal = 0.2 * mask
    plain, whitened = (
        load_plugin("advantages", "gae", whiten_rewards=x)(scored(equal, mask, values)) for x in (False, True)
    )
    torch.testing.assert_close(whitened.advantages, plain.advantages, rtol=0, atol=1e-12)
    torch.testing.assert_close(whitened.returns, plain.returns, rtol=0, atol=1e-12)


def test_it_looks_across_groups_and_ddof_then_counts():
    algorithm: Any = None
    assert load_plugin("advantages", "gae", whiten_rewards=True).across_groups
    assert not load_plugin("advantages", "gae").across_groups
    assert not list(load_plugin("advantages", "gae", whiten_rewards=True, ddof=0).remarks(algorithm))
    assert list(load_plugin("advantages", "gae", ddof=0).remarks(algorithm))
