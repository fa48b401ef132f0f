"""Expected gradients, exactly: credit per turn. Episodes of up to two turns, of which the environment says one token between.

Three tokens, at most two of them in a turn: 31 episodes. Rewards stand at the end of each turn.
"""

from __future__ import annotations

import itertools
import math
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_rlhf import load_plugin
from hf_rlhf.lab.study import WITNESSES, Verdict
from hf_rlhf.lab.world import World
from tests.helpers.truths import BETA, K1, ascent, close, differs, lab, study, truth

TWO: dict[str, Any] = {"turns": 2, "length": 2, "group": 2}
SMALL: dict[str, Any] = {"turns": 2, "length": 1, "group": 3}
"""Seven episodes."""


def test_the_world_has_episodes_of_one_and_two_turns_whose_rewards_add_up():
    world = World(**{**TWO, "group": 1}, prompts=2)
    assert {tuple(row.unique().tolist()) for row in world.turn} == {(-1, 0), (-1, 0, 1)}
    assert torch.equal(world.turn >= 0, world.mask > 0)
    torch.testing.assert_close(world.token_rewards.sum(1), world.reward)
    assert ((world.token_rewards != 0).sum(1) == world.turn.amax(1) + 1).all()
    for (_, s), turns, anchors in zip(world.sequences, world.turn.tolist(), world.anchor.tolist(), strict=True):
        said = [token for token, turn in zip(s, turns, strict=False) if turn < 0]
        assert {a for a, k in zip(anchors, turns, strict=True) if k == 1} == {1 + token for token in said}
        assert {a for a, k in zip(anchors, turns, strict=True) if k == 0} == {0}


def test_episodes_of_one_turn_are_the_completions_of_the_other_worlds():
    assert World().sequences == World(turns=1).sequences
    assert World(turns=1).anchor.tolist() == [[0 if m else -1 for m in row] for row in World().mask.tolist()]


# Generalized advantage estimation over turns


@pytest.mark.proves("advantages.turn_gae", how="exact enumeration", tolerance="1e-9")
def test_turn_gae_is_exact_with_lambda_1_and_any_values_or_any_lambda_and_exact_values():
    wrong, t = lab(**TWO, values="arbitrary"), truth(lab(**TWO))
    goal = t.reward - BETA * t.kl
    for lam in (0.0, 0.6, 1.0):
        close(ascent(lab(**TWO), {"use": "turn_gae", "lam": lam}, K1), goal)
    close(ascent(wrong, {"use": "turn_gae", "lam": 1.0}, K1), goal)
    differs(ascent(wrong, {"use": "turn_gae", "lam": 0.6}, K1), goal)
    assert study(lab(**TWO), {"use": "turn_gae", "lam": 0.6}).verdict == Verdict.GOAL


@pytest.mark.proves("advantages.turn_gae", how="exact enumeration", tolerance="1e-9")
@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
def test_the_targets_of_the_critic_are_the_values_on_average_at_the_first_tokens_of_turns(lam: float):
    where = lab(**{**TWO, "group": 1})
    world, e = where.world, where.expectation
    scored = e.scored(torch.zeros_like(e.sampler.logps))
    credit = load_plugin("advantages", "turn_gae", lam=lam)(scored)
    n = len(world.sequences)
    turn = scored.turns[:n]
    first = (turn >= 0) & (turn != torch.nn.functional.pad(turn, (1, 0), value=-1)[:, :-1])
    assert torch.equal(credit.value_mask[:n] > 0, first)
    assert not credit.returns[:n][~first].any()
    probability = e.sampler.probability[0]
    for state in world.state[first].unique():
        at = first & (world.state == state)
        rows, columns = at.nonzero(as_tuple=True)
        weight = probability[rows] / probability[rows].sum()
        target, value = credit.returns[:n][rows, columns], scored.values[:n][rows, columns]
        assert value.max() - value.min() < 1e-12
        assert float((weight * target).sum()) == pytest.approx(float(value[0]), abs=1e-9)


def test_with_turns_of_one_token_turn_gae_is_gae():
    where = lab(**SMALL, values="arbitrary")
    penalties = torch.zeros_like(where.expectation.sampler.logps)
    one, other = (
        where.expectation.advantages(load_plugin("advantages", name, lam=0.6, gamma=0.9), penalties)
        for name in ("gae", "turn_gae")
    )
    torch.testing.assert_close(one, other)


# Groups of turns


def enumerated(world: World, policy: int, of_group: Any) -> Tensor:
    """The expected ascent direction (S, V) over all ordered groups, row by row, with `of_group(rows) -> {(row, turn): A}`."""
    table = world.table(policy)
    log_probs = table.log_softmax(1)
    gradient = torch.zeros_like(table)
    logps = (log_probs[world.state, world.token] * world.mask).sum(1)
    for rows in itertools.product(range(len(world.sequences)), repeat=world.group):
        share, credit = math.exp(sum(float(logps[i]) for i in rows)) / world.group, of_group(rows)
        for (place, turn), advantage in credit.items():
            for t in (world.turn[rows[place]] == turn).nonzero().flatten().tolist():
                s, v = world.state[rows[place], t], world.token[rows[place], t]
                gradient[s] -= share * advantage * log_probs[s].exp()
                gradient[s, v] += share * advantage
    return gradient


def by_turn(world: World, row: int) -> list[float]:
    turns = int(world.turn[row].max()) + 1
    return [float(world.token_rewards[row][world.turn[row] == k].sum()) for k in range(turns)]


def compared(values: dict[Any, float], scale: str, eps: float = 1e-4) -> dict[Any, float]:
    """Each less their mean, over the std; 0 if they are equal or one."""
    if len(set(values.values())) < 2:
        return dict.fromkeys(values, 0.0)
    mean = statistics.fmean(values.values())
    std = statistics.stdev(values.values()) + eps if scale == "std" else 1.0
    return {key: (x - mean) / std for key, x in values.items()}


def to_go(world: World, row: int, gamma: float) -> list[float]:
    rewards = by_turn(world, row)
    return [sum(gamma ** (j - k) * r for j, r in enumerate(rewards) if j >= k) for k in range(len(rewards))]


@pytest.mark.proves("advantages.turn_group_norm", how="exact enumeration", tolerance="1e-9")
@pytest.mark.parametrize("scale", ["std", "none"])
def test_turn_group_norm_compares_the_rewards_from_a_turn_on_with_rows_that_have_that_turn(scale: str):
    where = lab(**SMALL)

    def of_group(rows: tuple[int, ...]) -> dict[Any, float]:
        known = {(i, k): x for i, row in enumerate(rows) for k, x in enumerate(to_go(where.world, row, 1.0))}
        found: dict[Any, float] = {}
        for turn in (0, 1):
            found |= compared({key: x for key, x in known.items() if key[1] == turn}, scale)
        return found

    want = torch.stack([enumerated(where.world, policy, of_group) for policy in range(WITNESSES)])
    close(ascent(where, {"use": "turn_group_norm", "scale": scale}), want)


@pytest.mark.proves("advantages.gigpo", how="exact enumeration", tolerance="1e-9")
@pytest.mark.parametrize(("scale", "gamma", "weight"), [("std", 0.95, 1.0), ("none", 0.5, 2.0)])
def test_gigpo_adds_to_the_episodes_what_turns_from_the_same_state_were_worth(scale: str, gamma: float, weight: float):
    where = lab(**SMALL)
    world = where.world

    def of_group(rows: tuple[int, ...]) -> dict[Any, float]:
        keys = {(i, k): row for i, row in enumerate(rows) for k in range(len(by_turn(world, row)))}
        state = {key: int(world.anchor[row][world.turn[row] == key[1]][0]) for key, row in keys.items()}
        known = {key: to_go(world, row, gamma)[key[1]] for key, row in keys.items()}
        episodes = compared({i: sum(by_turn(world, row)) for i, row in enumerate(rows)}, scale)
        steps: dict[Any, float] = {}
        for each in set(state.values()):
            steps |= compared({key: x for key, x in known.items() if state[key] == each}, scale)
        return {key: episodes[key[0]] + weight * steps[key] for key in keys}

    want = torch.stack([enumerated(world, policy, of_group) for policy in range(WITNESSES)])
    close(ascent(where, {"use": "gigpo", "scale": scale, "gamma": gamma, "step_weight": weight}), want)


@pytest.mark.proves("advantages.turn_group_norm", how="exact enumeration", tolerance="1e-9")
@pytest.mark.parametrize("group", [2, 3])
def test_without_the_std_a_turn_counts_by_how_many_rows_of_the_group_have_it(group: int):
    where = lab(**{**TWO, "group": group})
    t, world = truth(where), where.world
    p = t.now.probability.detach()
    goal = torch.zeros_like(t.reward)
    for turn in (0, 1):
        own = world.turn == turn
        rewards = (world.token_rewards * (world.turn >= turn)).sum(1)
        q = (p * own.any(1)).sum(1)
        factor = 1 - (1 - (1 - q) ** group) / (group * q)
        part = t.gradient((p * rewards * (t.now.logps * own).sum(2)).sum(1))
        goal = goal + factor[:, None, None] * part
    close(ascent(where, {"use": "turn_group_norm", "scale": "none"}), goal)
    differs(goal, (1 - 1 / group) * t.reward)


@pytest.mark.parametrize("prompts", [1, 2])
def test_the_lab_names_what_they_climb_without_the_std(prompts: int):
    where = lab(**{**SMALL, "group": 2}, prompts=prompts)
    one = study(where, {"use": "turn_group_norm", "scale": "none"})
    assert one.objective == "grad of R_k - mean of group's R_k, turn by turn"
    both = study(where, {"use": "gigpo", "scale": "none", "gamma": 0.5, "step_weight": 2.0})
    assert both.objective == "grad of r - mean of group's r + 2 (R_k - mean of state's R_k), gamma 0.5"
    assert {one.verdict, both.verdict} == {Verdict.FIXED}
    assert study(where, "turn_group_norm").objective == "none"


def test_in_episodes_of_one_turn_they_are_group_norm():
    close(ascent(lab(), "turn_group_norm"), ascent(lab(), "group_norm"))
    close(
        ascent(lab(), {"use": "turn_group_norm", "order": "score_first"}, K1),
        ascent(lab(), {"use": "group_norm", "order": "score_first"}, K1),
    )
    close(ascent(lab(), {"use": "gigpo", "step_weight": 0.5}), 1.5 * ascent(lab(), "group_norm"))


# Tokens of a group that are compared by how many were sampled before them


@pytest.mark.proves("advantages.optimal_token_baseline", how="exact enumeration", tolerance="1e-9")
def test_the_optimal_token_baseline_is_exact_for_both_alignments_and_they_differ():
    settings = {"use": "optimal_token_baseline", "leave_one_out": True}
    t = truth(lab(**TWO))
    for align in ("position", "sampled"):
        close(ascent(lab(**TWO), {**settings, "align": align}, K1), t.reward - BETA * t.kl)
    biased = [
        ascent(lab(**TWO), {"use": "optimal_token_baseline", "align": align}) for align in ("position", "sampled")
    ]
    differs(*biased)
    variances = [study(lab(**TWO), {**settings, "align": align}).variance for align in ("position", "sampled")]
    assert variances[0] != pytest.approx(variances[1], rel=0.01)
