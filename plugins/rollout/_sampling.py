"""Sampling of tokens from logits, by one uniform number per row, with their log-probs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

BLOCK = 64
"""Number of steps whose uniform numbers are drawn together."""


class Sampler(Protocol):
    """Protocol of samplers, which choose the next token of each row."""

    def __call__(self, logits: Tensor, rows: Tensor, step: int) -> tuple[Tensor, Tensor | None]:
        """Return tokens (B,) and their log-probs (B,), or None if nothing reads them.

        `logits` (B, V) are in float32 or better and may be overwritten; `rows` (B,) are their indices in the rollout; `step`
        is the number of tokens of each row.
        """


class Uniforms:
    """Uniform numbers in [0, 1) by row and step, independent of other rows; draws once from the global generator."""

    def __init__(self, rows: int, device: torch.device):
        self._rows, self._device, self._block = rows, device, -1
        self._seed = int(torch.randint(2**62, ()))

    def __call__(self, step: int) -> Tensor:
        """Return the numbers (rows,) of a step in float64."""
        block, column = divmod(step, BLOCK)
        if block != self._block:
            draw = torch.Generator().manual_seed(self._seed)
            seed = torch.randint(2**62, (block + 1,), generator=draw)[-1]
            draw.manual_seed(int(seed))
            table = torch.rand(self._rows, BLOCK, generator=draw, dtype=torch.float64)
            self._table, self._block = table.T.contiguous().to(self._device), block
        return self._table[column]


class History:
    """Tokens of each row, prompt and completion, for logits processors that read them."""

    def __init__(self, prompts: Sequence[Sequence[int]], steps: int, device: torch.device):
        """Store one prompt per row. Columns before a prompt repeat its first token, so that its set of tokens stays."""
        self._width = max(map(len, prompts))
        padded = [[ids[0]] * (self._width - len(ids)) + list(ids) for ids in prompts]
        self._ids = torch.zeros(len(prompts), self._width + steps, dtype=torch.long, device=device)
        self._ids[:, : self._width] = torch.tensor(padded, device=device)

    def of(self, rows: Tensor, step: int) -> Tensor:
        """Return the tokens so far, (B, tokens)."""
        return self._ids[:, : self._width + step].index_select(0, rows)

    def add(self, rows: Tensor, step: int, tokens: Tensor) -> None:
        self._ids[:, self._width + step].index_copy_(0, rows, tokens)


@dataclass(kw_only=True)
class Penalised:
    """Penalty on the scores of tokens that already occur in a row; without a processor it changes nothing."""

    processor: Any = None
    history: History | None = None

    def __call__(self, logits: Tensor, rows: Tensor, step: int) -> Tensor:
        return logits if self.history is None else self.processor(self.history.of(rows, step), logits)

    def chosen(self, rows: Tensor, step: int, tokens: Tensor) -> Tensor:
        if self.history is not None:
            self.history.add(rows, step, tokens)
        return tokens


@dataclass(kw_only=True)
class Greedy:
    """Sampler that takes the most likely token."""

    penalised: Penalised

    def __call__(self, logits: Tensor, rows: Tensor, step: int) -> tuple[Tensor, None]:
        return self.penalised.chosen(rows, step, self.penalised(logits, rows, step).argmax(-1)), None


@dataclass(kw_only=True)
class Random:
    """Sampler that draws a token at the temperature, from the distribution as truncated by `cuts`.

    The log-probs are those of the full distribution at the temperature, before penalties and truncation.
    """

    uniforms: Uniforms
    temperature: float
    penalised: Penalised
    cuts: Sequence[Any]
    logps: bool

    def __call__(self, logits: Tensor, rows: Tensor, step: int) -> tuple[Tensor, Tensor | None]:
        scores = self.penalised(logits, rows, step)
        changed = scores is not logits or bool(self.cuts)
        if self.temperature != 1:
            scores = scores / self.temperature
        for cut in self.cuts:
            scores = cut(None, scores)
        probs = scores.softmax(-1)
        tokens = inverse_cdf(probs, self.uniforms(step).index_select(0, rows))
        self.penalised.chosen(rows, step, tokens)
        if not self.logps:
            return tokens, None
        if changed:
            probs = (logits / self.temperature).softmax(-1)
        return tokens, probs.gather(1, tokens.unsqueeze(1)).squeeze(1).log()


def inverse_cdf(probs: Tensor, uniform: Tensor) -> Tensor:
    """Sample tokens (B,) from unnormalized probabilities (B, V), given uniform numbers (B,) in [0, 1).

    Returns the first token at which the cumulative sum exceeds `uniform` times the total, never one of probability 0. Adds
    blocks of about sqrt(V) neighbors first, then the neighbors themselves, in float64.
    """
    size = probs.size(1)
    width = _width(size)
    whole = size - size % width
    sums = probs[:, :whole].unflatten(1, (-1, width)).sum(-1)
    if whole < size:
        sums = torch.cat((sums, probs[:, whole:].sum(-1, keepdim=True)), 1)
    block, rest = _first_above(sums, uniform[:, None], relative=True)
    columns = block * width + torch.arange(width, device=probs.device)
    if whole < size:
        inside = columns < size
        near = probs.gather(1, columns.clamp_(max=size - 1)) * inside
    else:
        near = probs.gather(1, columns)
    return (block * width + _first_above(near, rest)[0]).squeeze(1).clamp_(max=size - 1)  # NaN sorts last


def _first_above(sums: Tensor, target: Tensor, relative: bool = False) -> tuple[Tensor, Tensor]:
    """Return the first index (B, 1) at which the cumulative sum of `sums` (B, n) >= 0 exceeds `target` (B, 1), and the
    excess of `target` over the cumulative sum before it. With `relative`, `target` is relative to the total."""
    cumulated = sums.cumsum(1, dtype=torch.float64)
    total = cumulated[:, -1:]
    below = total.nextafter(torch.zeros_like(total))  # rounding could let the target reach the total
    target = torch.minimum(target * total if relative else target, below)
    place = torch.searchsorted(cumulated, target, right=True).clamp_(max=sums.size(1) - 1)  # NaN sorts last
    return place, (target - cumulated.gather(1, place) + sums.gather(1, place)).clamp_(min=0)


@cache
def _width(size: int) -> int:
    """Return the divisor of `size` nearest to its square root within a factor of 4, else a power of two near it."""
    root = max(1, round(size**0.5))
    for width in sorted(range(max(1, root // 4), min(size, 4 * root) + 1), key=lambda w: abs(w - root)):
        if size % width == 0:
            return width
    return root
