"""Generalized advantage estimation (arXiv:1506.02438) in which a turn is one action.

Departures: every token of a turn has the turn's advantage, and the critic learns at the first sampled token of each turn
alone, from the tokens before the turn. Rewards within a turn count by their sum, at its end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import hookimpl
from hf_rlhf.axes import AdvantageEstimator, Fraction
from hf_rlhf.batch import Credit

from ._tokens import gae, given
from ._turns import Turns

if TYPE_CHECKING:
    from hf_rlhf.batch import Scored


@dataclass(kw_only=True)
class TurnGAE(AdvantageEstimator):
    """A_k = d_k + gamma lam A_{k+1}, d_k = r_k + gamma V_{k+1} - V_k, V_k at the first token of turn k; V is 0 past the last.

    The critic's targets are A_k + V_k. With gamma = lam = 1 any critic leaves the gradient unbiased. With turns of one token
    this is gae.
    """

    name = "turn_gae"
    words = "GAE over turns (gamma {gamma:g}, lambda {lam:g})"
    needs = frozenset({"values", "turns"})

    gamma: Fraction = 1.0
    """Discount from one turn to the next."""
    lam: Fraction = 0.95
    """Weight of later TD errors: 0 gives the one-step error, 1 the return minus the value."""

    def __call__(self, scored: Scored) -> Credit:
        turns = Turns.of(scored, self.name)
        values = turns.at_first(given(scored.values, "values", self.name))
        found = gae(turns.sum(scored.token_rewards), values, turns.there, self.gamma, self.lam)
        return Credit(
            advantages=turns.to_tokens(found),
            returns=turns.to_first(found + values),
            value_mask=turns.to_first(turns.there),
        )


@hookimpl
def advantages() -> list[type[AdvantageEstimator]]:
    return [TurnGAE]
