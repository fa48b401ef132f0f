"""Group-normalized advantages of single turns (after MT-GRPO, arXiv:2505.11821).

Departures: a turn is credited with all rewards from it on, of which the outcome is the last, in place of its own reward and
a weighted outcome; and turns of any number are compared, with those rows of the group that have one.

Without the std the expected gradient is the policy gradient in which the part of turn k counts 1 - (1 - (1 - q)^G) / (G q)
times, q the share of episodes that have a turn k: less than GRPO's 1 - 1/G for turns that few episodes reach.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import hookimpl
from hf_rlhf.axes import AdvantageEstimator

from ._groups import minus_kl
from ._tokens import reward_to_go
from ._turns import TurnEstimator, Turns

if TYPE_CHECKING:
    from torch import Tensor

    from hf_rlhf.batch import Scored


@dataclass(kw_only=True)
class TurnGroupNorm(TurnEstimator):
    """A_k = (R_k - mean) / (std + eps) on every token of turn k, R_k = sum_{j >= k} r_j, over rows of the group with a turn k.

    Exactly 0 if all R_k of the group are equal or one row has a turn k. With one turn per episode this is group_norm.
    """

    name = "turn_group_norm"

    def in_words(self) -> str:
        spread = "" if self.scale == "none" else ", over their standard deviation"
        return f"rewards from each turn on minus the group's mean at that turn{spread}"

    def __call__(self, scored: Scored) -> Tensor:
        turns = Turns.of(scored, self.name)
        returns = reward_to_go(turns.sum(self.token_rewards(scored)), turns.there)
        numbers = turns.there.new_ones(returns.shape).cumsum(1).long()
        advantages = turns.to_tokens(self.of_turns(scored, turns, returns, numbers))
        return advantages if self.order == "kl_first" else minus_kl(advantages, scored)


@hookimpl
def advantages() -> list[type[AdvantageEstimator]]:
    return [TurnGroupNorm]
