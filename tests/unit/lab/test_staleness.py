"""Older samples: what the ratio of a policy loss, and what a rollout correction, makes of them."""

from __future__ import annotations

from typing import Any

import pytest

from hf_rlhf.lab import World
from hf_rlhf.lab.staleness import Aged, distances, study

AGES = (0, 4, 16)


def studied(**sizes: Any) -> dict[tuple[str, str], Aged]:
    return {(aged.policy_loss, aged.correction): aged for aged in study(World(group=2, **sizes), AGES)}


def test_fresh_samples_need_no_correction_and_older_ones_are_further_away():
    far = distances(World(group=2), AGES)
    assert far[0] == 0 < far[1] < far[2]
    for aged in studied(length=2).values():
        assert aged.policy_loss == "clip_cov" or aged.bias[0] == pytest.approx(0, abs=1e-12)


def test_the_correction_of_the_whole_sequence_is_exact_and_that_of_each_token_is_not():
    found = studied()
    assert max(found["reinforce", "truncated sequence"].bias) < 1e-12, "nothing is truncated yet"
    by_token, none = found["reinforce", "truncated token"].bias, found["reinforce", "none"].bias
    assert 0.1 < by_token[1] < none[1]
    assert by_token == pytest.approx(found["surrogate", ""].bias, abs=1e-12), "a ratio is a ratio, wherever it is taken"


def test_for_completions_of_one_token_both_are_exact():
    found = studied(length=1, tokens=4)
    for choice in (("reinforce", "truncated token"), ("reinforce", "truncated sequence"), ("surrogate", "")):
        assert max(found[choice].bias) < 1e-12
    assert found["reinforce", "none"].bias[1] > 0.01


def test_a_clip_and_a_penalty_turn_the_step_back_to_the_sampler():
    found = studied()
    assert found["ppo_clip", ""].cosine[2] < 0.5 < found["surrogate", ""].cosine[2]
    assert found["trpo_penalty", ""].cosine[2] < 0
