"""Tensor code by token that several estimators share: discounted sums, GAE, whitening."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


def given(x: T | None, field: str, reader: str) -> T:
    """`x`, a field of `Scored`. Raises `ValueError` naming the estimator that reads it where it is None."""
    if x is None:
        fix = (
            "give the recipe a critic"
            if field == "values"
            else "the core fills it for plugins that declare it in `needs`"
        )
        raise ValueError(f"{reader} needs {field}: Scored.{field} is None; {fix}")
    return x


def reward_to_go(rewards: Tensor, mask: Tensor, gamma: float = 1.0) -> Tensor:
    """G_t = R_t + gamma G_{t+1}, where t+1 is the next token with m = 1: (N, T), 0 off the mask.

    Tokens with m = 0 neither discount nor add.
    """
    x, m = _blocks(rewards), _blocks(mask)
    off = m == 0
    to_go = _scan(x.masked_fill_(off, 0.0), (m * gamma).masked_fill_(off, 1.0))
    return _joined(to_go.mul_(m), rewards)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float | Tensor) -> Tensor:
    """A_t = d_t + gamma lam A_{t+1}, d_t = R_t + gamma V_{t+1} - V_t, where t+1 is the next token with m = 1.

    (N, T) each, `lam` a number or (N,); 0 off the mask. Tokens with m = 0 carry what comes after them back unchanged;
    after the last token the value is 0. With values of 0 and lam = 1 this is the discounted reward to go.
    """
    deltas, v, m = _blocks(rewards), _blocks(values), _blocks(mask)
    off = m == 0
    deltas.sub_(v)
    # the value of this token or, where it is off the mask, of the next one on it
    upcoming = _scan(v.masked_fill_(off, 0.0), off.to(v.dtype))
    deltas.flatten(0, 1)[:-1].add_(upcoming.flatten(0, 1)[1:], alpha=gamma)
    decay = (m * gamma).mul_(lam).masked_fill_(off, 1.0)
    return _joined(_scan(deltas.masked_fill_(off, 0.0), decay).mul_(m), rewards)


def _blocks(x: Tensor) -> Tensor:
    """(N, T) -> a copy (blocks, steps, N) of about sqrt(T) blocks of time, filled up with 0.

    With time first each step of a scan reads and writes memory in one piece. What follows works in place: a new large
    tensor costs more than a sum of two.
    """
    rows, length = x.shape
    steps = max(1, math.isqrt(length))
    copy = x.new_zeros(-(-length // steps), steps, rows)
    copy.view(-1, rows)[:length] = x.t()
    return copy


def _joined(x: Tensor, like: Tensor) -> Tensor:
    """(blocks, steps, N) -> (N, T), in the shape of `like`."""
    return x.view(-1, len(like))[: like.size(1)].t().contiguous()


def _scan(x: Tensor, decay: Tensor) -> Tensor:
    """y_t = x_t + decay_t y_{t+1}; (blocks, steps, N) each. Overwrites `x`, which it returns, and `decay`.

    All blocks are scanned side by side, then what enters each from behind is added: about 2 sqrt(T) steps on tensors.
    Nothing is divided, so no decay from 0 to 1 loses digits.
    """
    blocks, steps, rows = x.shape
    for step in reversed(range(steps - 1)):
        x[:, step].addcmul_(decay[:, step], x[:, step + 1])
        decay[:, step].mul_(decay[:, step + 1])
    behind = x.new_zeros(blocks, rows)
    for block in reversed(range(blocks - 1)):
        behind[block] = x[block + 1, 0] + decay[block + 1, 0] * behind[block + 1]
    return x.addcmul_(decay, behind.unsqueeze(1))


def whiten_tokens(x: Tensor, mask: Tensor, ddof: int = 1) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8) over the mask: (N, T), 0 off the mask, exactly 0 where all are equal."""
    tokens, off = mask.sum(), mask == 0
    flat = x.masked_fill(off, float("-inf")).max() == x.masked_fill(off, float("inf")).min()
    deviation = ((x - (x * mask).sum() / tokens.clamp(min=1)) * mask).masked_fill(flat, 0.0)
    variance = (deviation**2).sum() / (tokens - ddof).clamp(min=1)
    return deviation * (variance + 1e-8).rsqrt()
