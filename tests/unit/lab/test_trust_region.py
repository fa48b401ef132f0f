"""Theory of the policy gradient by enumeration: performance difference, surrogate, trust region, baselines, Q and A."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_rlhf.lab import World
from hf_rlhf.lab.trust_region import OldPolicy, moves
from hf_rlhf.lab.world import Policies
from hf_rlhf.registry.host import get_host
from tests.helpers.truths import algorithm, ascent, close, lab, truth


def trees(count: int) -> Any:
    """Worlds, an old policy, and a new one some random way off."""
    for seed in range(count):
        world = World(length=2 + seed % 3, tokens=2 + seed % 2, group=1, seed=seed)
        far = world.draw(len(world.states), world.tokens, stream=50)
        yield OldPolicy(world, world.table(0)), far * 10 ** (-3 + 4 * (seed % 10) / 9) / far.norm()


def test_the_difference_in_performance_is_the_old_advantage_along_the_new_policy():
    for old, way in trees(30):
        new = Policies(old.world, old.policy.tables + way)
        gain = new.mean(old.world.reward) - old.policy.mean(old.world.reward)
        assert old.expected_advantage(new, new) == pytest.approx(float(gain), abs=1e-13)
        assert old.expected_advantage(old.policy, old.policy) == pytest.approx(0, abs=1e-13)


def test_the_surrogate_leaves_the_return_within_the_bound_of_the_finite_horizon():
    shares = []
    for old, way in trees(300):
        move = old.move(way, 1.0)
        assert abs(move.gain - move.surrogate) <= move.bound + 1e-14
        assert move.gain >= move.penalized - 1e-14
        shares.append(abs(move.gain - move.surrogate) / move.bound)
    assert 0.3 < max(shares) < 0.4, "docs/lab.md says how loose the bound is"


def test_near_the_old_policy_the_surrogate_is_the_return_and_far_away_it_is_not():
    near, *_, far = moves(World(length=4, group=1))
    assert near.surrogate == pytest.approx(near.gain, rel=1e-2)
    assert near.penalized > 0
    assert abs(far.surrogate - far.gain) > 0.02
    halved = OldPolicy(World(group=1), World(group=1).table(0))
    way = halved.world.draw(*halved.p.shape, stream=51)
    errors = [abs((move := halved.move(way, step)).gain - move.surrogate) for step in (1e-3, 5e-4)]
    assert errors[0] / errors[1] == pytest.approx(4, rel=1e-2), "the first order is equal"


def test_in_text_q_is_the_next_value_after_the_reward_and_gae_at_lambda_0_is_q_less_v():
    """Psi = Q and Psi = A of the policy gradient theorem, in a world where a state and a token give the next state."""
    where = lab(length=3)
    world, e = where.world, where.expectation
    a = algorithm(where, {"use": "gae", "lam": 0.0})
    of_rows = e.advantages(a.advantages, e.kl_penalties(a)).view(len(e.policies.tables), -1, world.length)
    rows = world.rollouts[0].flatten()
    for policy in range(2):
        old = OldPolicy(world, e.policies.tables[policy])
        q_less_v = old.advantages[world.state, world.token] * world.mask
        torch.testing.assert_close(of_rows[policy], q_less_v[rows], rtol=0, atol=1e-12)
    close(ascent(where, {"use": "gae", "lam": 0.0}), truth(where).reward)


def independent() -> list[str]:
    """The baselines of the estimator `baseline`: none sees its own row."""
    return sorted(get_host().names("baseline"))


@pytest.mark.parametrize("baseline", independent())
def test_a_baseline_that_does_not_see_its_own_row_adds_nothing_to_the_gradient(baseline: str):
    """E[grad log p b] = 0: the lemma of the expected gradient of log-probs."""
    where = lab(length=2)
    with_it = ascent(where, {"use": "baseline", "baseline": {"use": baseline}})
    close(with_it, truth(where).reward)
    torch.testing.assert_close(with_it, ascent(where, "reward_to_go"), rtol=0, atol=1e-12)
