"""Turns of episodes as columns (N, K), and groups of turns, shared by several estimators."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from hf_rlhf.axes import Positive
from hf_rlhf.batch import Scored

from ._groups import GroupEstimator, centred
from ._tokens import given, on_mask

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Turns:
    """Turns of N rows, of which the longest has K."""

    mask: Tensor
    turns: Tensor
    """(N, T) int, -1 off the mask."""

    @classmethod
    def of(cls, scored: Scored, reader: str) -> Turns:
        """Return the turns of a rollout. Raises `ValueError` naming `reader` if there are none."""
        return cls(scored.mask, given(scored.turns, "turns", reader))

    @cached_property
    def index(self) -> Tensor:
        """Turn of each token (N, T), 0 off the mask."""
        return self.turns.clamp(min=0)

    @cached_property
    def first(self) -> Tensor:
        """Place of the first sampled token of each turn, (N, K) int; T where the row has no such turn."""
        import torch

        rows, length = self.mask.shape
        places = torch.arange(length, device=self.mask.device).expand(rows, length)
        turns = int(self.turns.max()) + 1 if self.turns.numel() else 0
        none = places.new_full((rows, max(1, turns)), length)
        return none.scatter_reduce(1, self.index, places.masked_fill(self.mask == 0, length), "amin")

    @cached_property
    def there(self) -> Tensor:
        """1 where the row has such a turn, (N, K)."""
        return (self.first < self.mask.size(1)).to(self.mask)

    def sum(self, x: Tensor) -> Tensor:
        """Sum `x` (N, T) over the sampled tokens of each turn, (N, K)."""
        return x.new_zeros(self.first.shape).scatter_add(1, self.index, on_mask(x.clone(), self.mask))

    def at_first(self, x: Tensor) -> Tensor:
        """Return `x` (N, T) at the first sampled token of each turn, (N, K); any number where there is no such turn."""
        return x.gather(1, self.first.clamp(max=self.mask.size(1) - 1))

    def to_first(self, x: Tensor) -> Tensor:
        """Place `x` (N, K) at the first sampled token of each turn: (N, T), 0 elsewhere."""
        return x.new_zeros(len(x), self.mask.size(1) + 1).scatter(1, self.first, x)[:, :-1]

    def to_tokens(self, x: Tensor) -> Tensor:
        """Give each sampled token the number of its turn: (N, K) to (N, T), 0 off the mask."""
        return x.gather(1, self.index) * self.mask


@dataclass(kw_only=True)
class TurnEstimator(GroupEstimator, ABC):
    """Base class: a number for each turn, compared with others of its prompt."""

    needs = frozenset({"groups", "turns"})

    scale: Literal["std", "none"] = "std"
    """`std`: differences from a mean are divided by the standard deviation (ddof 1), `none`: they are not."""
    eps: Positive = 1e-4
    """Added to the standard deviation, so that nearly equal returns are not blown up."""

    def of_rows(self, scored: Scored, returns: Tensor) -> Tensor:
        deviation = centred(scored, returns)
        return deviation if self.scale == "none" else deviation / (scored.group_std(returns) + self.eps)

    def token_rewards(self, scored: Scored) -> Tensor:
        """Return the rewards to compare (N, T), without the KL in them if that is subtracted later."""
        before = self.order == "score_first" and scored.kl_penalties is not None
        return scored.token_rewards + scored.kl_penalties if before else scored.token_rewards  # type: ignore[operator]

    def of_turns(self, scored: Scored, turns: Turns, returns: Tensor, kind: Tensor) -> Tensor:
        """Compare `returns` (N, K) of the turns of a prompt with equal `kind` (N, K) int: (N, K), 0 where there is no turn."""
        row, turn = turns.there.nonzero(as_tuple=True)
        if not len(row):
            return returns * 0
        labels = scored.groups()[0][row] * (kind.max() + 1) + kind[row, turn]
        x = returns[row, turn]
        pairs = Scored(mask=x.new_ones(len(x), 1), token_rewards=x.unsqueeze(1), group_ids=labels)
        return returns.new_zeros(returns.shape).index_put((row, turn), self.of_rows(pairs, x))
