"""Filters, loss terms, rollout correction and the plugins that do nothing."""

from __future__ import annotations

from math import nan
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_rlhf import load_plugin
from hf_rlhf.batch import Scored
from hf_rlhf.testing import scored, tiny_policy


def sources(weights: dict[str, float] | None = None, **scores: list[float]) -> Scored:
    """Four rows in two groups, returns all different, these scores."""
    token_rewards = torch.arange(4.0)[:, None]
    return Scored(
        mask=torch.ones(4, 1),
        token_rewards=token_rewards,
        group_ids=torch.tensor([0, 0, 1, 1]),
        scores={name: torch.tensor(values) for name, values in scores.items()} or None,
        weights=weights,
    )


def kept(batch: Scored) -> list[bool]:
    return load_plugin("filters", "zero_variance")(batch).tolist()


def test_groups_of_equal_scores_are_dropped_whatever_their_returns():
    assert kept(sources(correct=[0.2, 0.2, 1.0, 0.0])) == [False, False, True, True]


def test_what_is_compared_is_the_weighted_total():
    batch = sources({"a": 1.0, "b": 2.0}, a=[2.0, 0.0, 1.0, 0.0], b=[0.0, 1.0, 0.0, 0.0])
    assert kept(batch) == [False, False, True, True]


def test_a_source_that_does_not_apply_adds_nothing():
    assert kept(sources(a=[1.0, 1.0, 1.0, 1.0], b=[nan, 0.0, nan, 0.5])) == [False, False, True, True]


def test_without_scores_the_returns_are_compared():
    assert kept(sources()) == [True] * 4


def test_a_group_of_which_one_row_remains_is_dropped():
    batch = scored(group_sizes=(1, 1))
    assert kept(batch) == [False, False]


def test_resampling_is_off_unless_asked_for():
    assert load_plugin("filters", "zero_variance").resample == 0
    assert load_plugin("filters", "zero_variance", resample=3).resample == 3


def test_the_entropy_term_is_minus_coef_times_entropy_with_equal_weights():
    mask = torch.tensor([[1.0, 1, 0], [1, 0, 0]])
    entropy = torch.tensor([[0.5, 1.0, 9.0], [2.0, 9.0, 9.0]])
    term = load_plugin("loss_terms", "entropy", coef=0.1)
    torch.testing.assert_close(term(-entropy, mask, entropy=entropy), -0.1 * entropy * mask)
    torch.testing.assert_close(term.weights(mask), mask / 3)


def test_an_entropy_term_of_coef_0_is_refused():
    algorithm: Any = SimpleNamespace()
    assert "leave it out" in next(iter(load_plugin("loss_terms", "entropy", coef=0).check(algorithm)))
    assert not list(load_plugin("loss_terms", "entropy").check(algorithm))


def test_no_correction_multiplies_by_1():
    batch = scored()
    factors = load_plugin("rollout_correction", "none")(batch.old_logps, batch.sampler_logps, batch.mask)
    assert (factors == 1).all()
    assert load_plugin("rollout_correction", "none").needs == frozenset()


@pytest.mark.parametrize("axis", ["critic", "reference"])
def test_none_builds_nothing_and_provides_nothing(axis: str):
    plugin, arguments = load_plugin(axis, "none"), {"critic": (None, None), "reference": (None,)}[axis]
    assert plugin.build(*arguments) is None
    assert plugin.provides == frozenset()


def test_the_trainers_own_optimizer_is_left_to_the_trainer():
    assert load_plugin("optimizer", "trainer").build(tiny_policy()[0], []) is None
