"""Turns of episodes as numbers of each token, which estimators read."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection

from hf_rlhf.batch import Rollouts


def turn_columns(rollouts: Rollouts, needs: Collection[str]) -> dict[str, list[list[int]]]:
    """Return `turns` and `states` of the tokens of each row, those of `needs`; tokens off the mask count to the turn after them.

    States are numbered within a group, in the order in which its rows and turns name them.
    """
    if not {"turns", "states"} & set(needs):
        return {}
    ends = rollouts.columns["episode/turn_ends"]
    turns = [
        [bisect_left(own, i) for i in range(len(ids))] for own, ids in zip(ends, rollouts.completion_ids, strict=True)
    ]
    found = {"turns": turns}
    if "states" in needs:
        known: dict[int, dict[str, int]] = {}
        numbers = []
        for group, states in zip(rollouts.group_ids, rollouts.columns["episode/turn_states"], strict=True):
            own = known.setdefault(group, {})
            numbers.append([own.setdefault(state, len(own)) for state in states])
        found["states"] = [[row[turn] if row else 0 for turn in own] for row, own in zip(numbers, turns, strict=True)]
    return {name: x for name, x in found.items() if name in needs}
