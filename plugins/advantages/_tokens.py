"""Token-wise tensor operations shared by several estimators: discounted sums, GAE, whitening.

Rows are processed in chunks that fit the CPU cache, each from inputs to result, so that large tensors are read and
written once. Sums stay in the tensors' own precision, and none uses matrix products, whose precision a user may have
lowered.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

PART = 2**18
"""Elements of one tensor processed at a time on a CPU: 1 MiB in float32."""


def given(x: T | None, field: str, reader: str) -> T:
    """Return `x`, a field of `Scored`. Raises `ValueError` naming the estimator that reads it if it is None."""
    if x is None:
        fix = (
            "give the recipe a critic"
            if field == "values"
            else "the trainer fills it for plugins that declare it in `needs`"
        )
        raise ValueError(f"{reader} needs {field}: Scored.{field} is None; {fix}")
    return x


def reward_to_go(rewards: Tensor, mask: Tensor, gamma: float = 1.0) -> Tensor:
    """Return G_t = R_t + gamma G_{t+1} (N, T), where t+1 is the next token with m = 1; 0 off the mask.

    Tokens with m = 0 neither discount nor contribute.
    """
    import torch

    to_go = torch.empty_like(rewards)
    factor = torch.full((1, 1), gamma, dtype=torch.float64)
    for part, x, room in _parts(rewards):
        m = mask[part]
        on_mask(x.copy_(rewards[part]), m)
        torch.mul(_carried(x, m, factor, room), m, out=to_go[part])
    return to_go


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float | Tensor) -> Tensor:
    """Return A_t = d_t + gamma lam A_{t+1}, d_t = R_t + gamma V_{t+1} - V_t, where t+1 is the next token with m = 1.

    Tensors are (N, T), `lam` is a number or (N,); the result is 0 off the mask. Tokens with m = 0 pass later terms back
    unchanged; the value after the last token is 0. With values of 0 and lam = 1 this is the discounted reward to go.

    With Q_t = (1 - lam) V_t + lam (R_t + gamma Q_{t+1}), which each token passes to the one before it, A_t is
    R_t + gamma Q_{t+1} - V_t: one scan, without a division by lam.
    """
    import torch

    advantages = torch.empty_like(rewards)
    each = torch.full((len(rewards),), lam, dtype=torch.float64) if isinstance(lam, float | int) else lam
    lams = each.unsqueeze(1)
    for part, x, room in _parts(rewards):
        r, v, m, out = rewards[part], values[part], mask[part], advantages[part]
        on_mask(torch.lerp(v, r, lams[part].to(r), out=x), m)
        handed = _carried(x, m, gamma * lams[part], room)
        torch.sub(r, v, out=out)
        out[:, :-1].add_(handed[:, 1:], alpha=gamma)
        on_mask(out, m)
    return advantages


def on_mask(x: Tensor, mask: Tensor) -> Tensor:
    """Zero `x` in place where m = 0, also if it is infinite or NaN there."""
    if x.device.type != "cpu":
        return x.masked_fill_(mask == 0, 0.0)
    x.mul_(mask)  # several times faster on a CPU than filling in
    return x if x.sum().isfinite() else x.masked_fill_(mask == 0, 0.0)


def _parts(like: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield slices of the rows of (N, T), each with two scratch tensors (rows, T), reused because allocation is slow."""
    rows, length = like.shape
    if not like.numel():
        return
    count = min(rows, max(1, PART // length)) if like.device.type == "cpu" else rows
    x, decay = like.new_empty(2, count, length)
    for start in range(0, rows, count):
        part = slice(start, min(start + count, rows))
        yield part, x[: part.stop - start], decay[: part.stop - start]


def _carried(x: Tensor, mask: Tensor, factor: Tensor, room: Tensor) -> Tensor:
    """Return y_t = x_t + d_t y_{t+1} (rows, T), with d = `factor` (rows or 1, 1) on the mask and 1 off it.

    `x` must be 0 off the mask; `factor` may have any dtype. The result is `x` or `room`; both are overwritten.
    """
    import torch

    if x.size(1) == 1:
        return x
    torch.sub(mask[:, 1:], mask[:, :-1], out=room[:, 1:])
    if room[:, 1:].max() <= 0:  # no token after one that is off the mask
        return _doubled(x, factor, room)
    torch.sub(1, mask, out=room).addcmul_(mask, factor.to(mask))
    return _scan(x, room)


def _doubled(x: Tensor, factor: Tensor, room: Tensor) -> Tensor:
    """Return y_t = x_t + factor y_{t+1} (rows, T), in `x` or `room`, by sums over 2, 4, 8, ... tokens."""
    import torch

    span, power = 1, factor.to("cpu", torch.float64)  # repeated squaring in float32 would lose digits
    while span < x.size(1) and power.any():
        torch.addcmul(x[:, :-span], power.to(x), x[:, span:], out=room[:, :-span])
        room[:, -span:] = x[:, -span:]
        x, room = room, x
        power, span = power * power, 2 * span
    return x


def _scan(x: Tensor, decay: Tensor) -> Tensor:
    """Return y_t = x_t + decay_t y_{t+1}, (rows, T) each, T > 0. Overwrites `x`, which it returns, and `decay`.

    Scans about sqrt(T) blocks of time in parallel, then adds the carry into each: about 3 sqrt(T) tensor operations.
    There is no division, so no decay in [0, 1] loses digits.
    """
    import torch

    length = x.size(1)
    steps = math.isqrt(length)
    blocks, edge = length // steps, length - length % steps
    for t in reversed(range(edge, length - 1)):  # the remainder after the last full block
        x[:, t].addcmul_(decay[:, t], x[:, t + 1])
    inside, faded = (a[:, :edge].unflatten(1, (blocks, steps)) for a in (x, decay))
    xs, decays = inside.unbind(2), faded.unbind(2)
    for step in reversed(range(steps - 1)):
        xs[step].addcmul_(decays[step], xs[step + 1])
        decays[step].mul_(decays[step + 1])
    first, through = (a.t().contiguous().unbind() for a in (xs[0], decays[0]))
    behind = x.new_zeros(blocks, len(x))
    if edge < length:
        behind[-1] = x[:, edge]
    enters = behind.unbind()
    for block in reversed(range(blocks - 1)):
        torch.addcmul(first[block + 1], through[block + 1], enters[block + 1], out=enters[block])
    inside.addcmul_(faded, behind.t().unsqueeze(2))
    return x


def whiten_tokens(x: Tensor, mask: Tensor, ddof: int = 1) -> Tensor:
    """Return (x - mean) / sqrt(var + 1e-8) over the mask (N, T); 0 off the mask, exactly 0 if all values are equal.

    Sums deviations from one of the values, so that equal values are detected without rounding error.
    """
    import torch

    white = torch.zeros_like(x)
    if not x.numel():
        return white
    row = mask.sum(1).argmax()
    one = x[row, mask[row].argmax()]
    found = []
    for part, deviation, own in _parts(x):
        torch.sub(x[part], one, out=deviation).mul_(mask[part])
        tokens, span = mask[part].sum(), torch.stack(deviation.aminmax())
        mean = deviation.sum() / tokens.clamp(min=1)
        torch.sub(deviation, mean, out=own).mul_(mask[part])
        found.append(torch.stack([tokens, mean, own.square_().sum(), *span]))
    tokens, means, squares, low, high = torch.stack(found).unbind(1)
    if (low == 0).all() and (high == 0).all():
        return white
    count = tokens.sum()
    mean = (tokens * means).sum() / count
    variance = (squares + tokens * (means - mean) ** 2).sum() / (count - ddof).clamp(min=1)
    for part, _, _ in _parts(x):
        out = torch.sub(x[part], one, out=white[part])
        out.sub_(mean).mul_((variance + 1e-8).rsqrt()).mul_(mask[part])
    return white


def discounted(what: str, gamma: float) -> str:
    """Return `what` in words, with its discount where there is one."""
    return what if gamma == 1 else f"{what} (gamma {gamma:g})"
