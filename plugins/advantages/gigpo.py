"""Group-in-group advantages (GiGPO, arXiv:2505.10978): episodes of a prompt are compared, and turns that begin in the same state.

An environment names the states (`Turn.state`); by default it is the conversation so far, which after the first turn few
episodes share. Departure: a state in which one turn alone begins gives 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import hookimpl
from hf_rlhf.axes import AdvantageEstimator, Fraction, Positive

from ._groups import minus_kl
from ._tokens import given, reward_to_go
from ._turns import TurnEstimator, Turns

if TYPE_CHECKING:
    from torch import Tensor

    from hf_rlhf.batch import Scored


@dataclass(kw_only=True)
class GiGPO(TurnEstimator):
    """A_episode + step_weight A_step, each minus its group's mean, over its group's std.

    A_episode compares returns of the prompt's episodes, A_step the discounted returns from a turn on of those turns of the
    prompt, in any episode, that begin in the same state; 0 if all are equal.
    """

    name = "gigpo"
    needs = frozenset({"groups", "turns", "states"})

    step_weight: Positive = 1.0
    """Weight of A_step."""
    gamma: Fraction = 0.95
    """Discount from one turn to the next in A_step."""

    def in_words(self) -> str:
        spread = "" if self.scale == "none" else ", each over its standard deviation"
        return (
            "return minus its group's mean, plus "
            f"{self.step_weight:g} x the return from each turn on (gamma {self.gamma:g}) minus its mean in the same state{spread}"
        )

    def __call__(self, scored: Scored) -> Tensor:
        turns, rewards = Turns.of(scored, self.name), self.token_rewards(scored)
        states = turns.at_first(given(scored.states, "states", self.name))
        by_turn = turns.sum(rewards)
        to_go = reward_to_go(by_turn, turns.there, self.gamma)
        of_episode = self.of_rows(scored, by_turn.sum(1)).unsqueeze(1)
        of_step = self.of_turns(scored, turns, to_go, states)
        advantages = turns.to_tokens(of_episode + self.step_weight * of_step)
        return advantages if self.order == "kl_first" else minus_kl(advantages, scored)


@hookimpl
def advantages() -> list[type[AdvantageEstimator]]:
    return [GiGPO]
