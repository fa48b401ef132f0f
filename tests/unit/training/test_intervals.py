"""Intervals of an evaluation: published closed forms, and how often they cover the truth."""

from __future__ import annotations

import math

import pytest
import torch

from hf_rlhf.training.intervals import Z, interval, paired_interval, student_quantile, wilson


def table(values, counts=None) -> torch.Tensor:
    counts = [1] * len(values) if counts is None else counts
    return torch.tensor(list(zip(values, counts, strict=True)), dtype=torch.float64)


@pytest.mark.parametrize(
    ("freedom", "published"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (5, 2.5706), (10, 2.2281), (100, 1.9840)]
)
def test_the_quantiles_of_student_are_those_of_the_tables(freedom, published):
    assert student_quantile(freedom) == pytest.approx(published, abs=4e-3)


def test_one_completion_per_prompt_gives_wilsons_interval():
    # 8 of 10: Brown, Cai and DasGupta (2001), equation 4
    assert interval(table([1] * 8 + [0] * 2), share=True) == pytest.approx((0.4902, 0.9433), abs=1e-4)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_share_of_zero_or_one_has_an_interval_of_its_prompts_not_its_rows(value):
    found = interval(table([8 * value] * 20, [8] * 20), share=True)
    assert found == wilson(value, 20)
    assert found[int(value)] == value
    assert found[1] - found[0] > 0.1


def test_completions_that_agree_within_their_prompt_add_nothing():
    alone = interval(table([1, 1, 0, 1, 0, 0, 1]), share=True)
    repeated = interval(table([8 * x for x in [1, 1, 0, 1, 0, 0, 1]], [8] * 7), share=True)
    assert repeated == pytest.approx(alone)


def test_the_interval_of_a_mean_is_students():
    values = [1.0, 2.0, 4.0, 9.0]
    mean, std = 4.0, math.sqrt(sum((x - 4) ** 2 for x in values) / 3)
    low, high = interval(table(values), share=False)
    assert (low, high) == pytest.approx((mean - 3.1824 * std / 2, mean + 3.1824 * std / 2), abs=1e-2)


def test_prompts_that_do_not_count_change_nothing():
    both = table([1, 0, 1, 1, 0], [1, 1, 1, 1, 0])
    for share in (True, False):
        assert interval(both, share) == interval(both[:4], share)
        assert paired_interval(both, both.flip(0).clone(), share) is not None


def test_the_difference_of_two_shares_has_the_published_interval():
    # Bonett and Price (2012): f12 pairs gained and f21 lost of n, each with one more
    gained, lost, n = 9, 3, 40
    before = table([0] * gained + [1] * lost + [1] * (n - gained - lost))
    after = table([1] * gained + [0] * lost + [1] * (n - gained - lost))
    p, q = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    margin = Z * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    found = paired_interval(before, after, share=True)
    assert found == pytest.approx((6 / 40, p - q - margin, p - q + margin))


def test_equal_models_differ_by_zero_within_a_width():
    same = table([1, 0, 1, 1])
    difference, low, high = paired_interval(same, same, share=True)
    assert difference == 0
    assert low == -high < 0


def test_one_prompt_has_no_interval():
    assert interval(table([1]), share=True) is None
    assert paired_interval(table([1]), table([0]), share=False) is None


@pytest.mark.parametrize("share", [True, False])
def test_intervals_cover_the_truth_in_19_of_20_samples(share):
    """64 prompts of unequal difficulty with 4 completions each; two models, the second better by 0.1 on every prompt."""
    draw = torch.Generator().manual_seed(0)
    rounds, single, paired = 600, 0, 0
    for _ in range(rounds):
        chance = torch.rand(64, generator=draw, dtype=torch.float64) * 0.8

        def sample(p: torch.Tensor) -> torch.Tensor:
            right = torch.bernoulli(p.expand(4, -1), generator=draw).sum(0)
            return torch.stack([right, torch.full_like(right, 4)], 1)

        before, after = sample(chance), sample(chance + 0.1)
        low, high = interval(before, share)
        single += low <= 0.4 <= high
        _, low, high = paired_interval(before, after, share)
        paired += low <= 0.1 <= high
    assert 0.925 <= single / rounds <= 0.98
    assert 0.925 <= paired / rounds <= 0.985
