"""Reward that the environment gave: of the episode, or of each turn."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import hookimpl
from hf_rlhf.axes import RewardSource
from hf_rlhf.batch import Rollouts, TokenScores

if TYPE_CHECKING:
    from hf_rlhf.axes import Algorithm


@dataclass(kw_only=True)
class FromEpisode(RewardSource):
    """The number of the episode for the row's agent, or one at the end of each of its turns.

    The reward of a turn that does not train counts for the turn before that does.
    """

    name = "episode"
    verifier = True

    def check(self, algorithm: Algorithm) -> Iterable[str]:
        """Yield an error for a recipe without an environment."""
        if not algorithm.environment:
            yield (
                "reads what an environment says of its episodes, and the recipe has none: write environment=second_chance, or "
                "leave it out"
            )

    def __call__(self, rollouts: Rollouts) -> list[float | TokenScores | None]:
        names = ("episode/reward", "episode/turn_rewards", "episode/turn_ends")
        columns = zip(rollouts.masks, *map(rollouts.column, names), strict=True)
        return [reward if turns is None else _placed(mask, turns, ends) for mask, reward, turns, ends in columns]


def _placed(mask: list[int], turns: list[float], ends: list[int]) -> TokenScores:
    values = [0.0] * len(mask)
    for end, reward in zip(ends, turns, strict=True):
        trained = next((place for place in range(end, -1, -1) if mask[place]), end)
        values[trained] += reward
    return TokenScores(values)


@hookimpl
def rewards() -> list[type[RewardSource]]:
    return [FromEpisode]
