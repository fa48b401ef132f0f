"""Tensor code that several advantage estimators share: the scan of GAE and whitening."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def gae_scan(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """A_t = d_t + gamma lam A_{t+1}, d_t = R_t + gamma V_{t+1} - V_t, where t+1 is the next token with m = 1.

    All (N, T); 0 off the mask. Tokens with m = 0 carry what comes after them back unchanged; after the last token the
    value is 0. With values of 0 and lam = 1 this is the discounted reward to go.
    """
    advantages = rewards.new_zeros(rewards.shape)
    later = next_value = rewards.new_zeros(len(rewards))
    sampled = mask > 0
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        later = (delta + gamma * lam * later).where(sampled[:, t], later)
        next_value = values[:, t].where(sampled[:, t], next_value)
        advantages[:, t] = later
    return advantages * mask


def whiten_tokens(x: Tensor, mask: Tensor) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8) over the mask, variance unbiased: (N, T), 0 off the mask, 0 for one token."""
    tokens = mask.sum()
    deviation = (x - (x * mask).sum() / tokens.clamp(min=1)) * mask
    variance = (deviation**2).sum() / (tokens - 1).clamp(min=1)
    return deviation * (variance + 1e-8).rsqrt()
