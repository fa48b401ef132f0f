"""Filters, loss terms on the rollout, and the plugins that do nothing."""

from __future__ import annotations

from math import nan
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_rlhf import load_plugin
from hf_rlhf.batch import Scored
from hf_rlhf.testing import scored, tiny_policy

ALGORITHM: Any = SimpleNamespace(rollout=SimpleNamespace(max_new_tokens=64))


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


def kept(batch: Scored, name: str = "zero_variance", **settings: Any) -> list[bool]:
    return load_plugin("filters", name, **settings)(batch).tolist()


# Filters


@pytest.mark.proves("filters.zero_variance", how="closed form", tolerance="exact")
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
    assert kept(scored(group_sizes=(1, 1))) == [False, False]


def test_resampling_is_off_unless_asked_for():
    for name in ("zero_variance", "overlong", "too_short", "duplicates", "opsm"):
        assert load_plugin("filters", name).resample == 0
    assert load_plugin("filters", "zero_variance", resample=3).resample == 3


LENGTHS = torch.tensor([[1.0, 1, 1, 1], [1, 0, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])


@pytest.mark.proves("filters.overlong", how="closed form", tolerance="exact")
def test_overlong_drops_what_was_cut_off_or_is_too_long():
    batch = scored(group_sizes=(2, 2), length=4, mask=LENGTHS, finished=torch.tensor([True, True, False, True]))
    assert kept(batch, "overlong") == [True, True, False, True]
    assert kept(batch, "overlong", max_tokens=3) == [False, True, False, True]
    assert kept(batch, "overlong", max_tokens=2) == [False, False, False, True]


def test_without_finish_reasons_overlong_counts_tokens_alone():
    batch = scored(group_sizes=(2, 2), length=4, mask=LENGTHS, finished=None)
    assert kept(batch, "overlong") == [True] * 4
    assert kept(batch, "overlong", max_tokens=3) == [False, True, True, True]


def test_a_length_that_is_never_reached_is_remarked_on():
    assert "has no effect" in next(iter(load_plugin("filters", "overlong", max_tokens=64).remarks(ALGORITHM)))
    assert not list(load_plugin("filters", "overlong", max_tokens=63).remarks(ALGORITHM))
    assert not list(load_plugin("filters", "overlong").remarks(ALGORITHM))


@pytest.mark.proves("filters.too_short", how="closed form", tolerance="exact")
def test_too_short_counts_sampled_tokens():
    batch = scored(group_sizes=(2, 2), length=4, mask=LENGTHS)
    assert kept(batch, "too_short") == [True, True, True, False]
    assert kept(batch, "too_short", min_tokens=3) == [True, True, False, False]
    assert kept(batch, "too_short", min_tokens=1) == [True] * 4


def completions(*rows: list[int], groups: list[int]) -> Scored:
    """These completions, padded with 0."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1.0] * len(row) + [0.0] * (width - len(row)) for row in rows])
    return Scored(mask=mask, token_rewards=mask, group_ids=torch.tensor(groups), completion_ids=ids)


REPEATED = ([5, 6], [7], [5, 6], [5, 6], [7], [5, 6])


@pytest.mark.proves("filters.duplicates", how="closed form", tolerance="exact")
def test_the_first_of_equal_completions_stays():
    batch = completions(*REPEATED, groups=[3, 3, 3, 3, 3, 3])
    assert kept(batch, "duplicates") == [True, True, False, False, False, False]
    assert kept(batch, "duplicates", keep=2) == [True, True, True, False, True, False]
    assert kept(batch, "duplicates", keep=9) == [True] * 6


def test_equal_completions_of_different_prompts_both_stay():
    batch = completions(*REPEATED, groups=[3, 3, 3, 1, 1, 1])
    assert kept(batch, "duplicates") == [True, True, False, True, True, False]


def test_the_token_0_is_not_padding():
    assert kept(completions([5], [5, 0], [5, 0], groups=[1, 1, 1]), "duplicates") == [True, True, False]


def test_duplicates_are_counted_as_a_plain_loop_counts_them():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 3, (200, 3), generator=generator)
    groups = torch.randint(0, 5, (200,), generator=generator)
    batch = completions(*ids.tolist(), groups=groups.tolist())
    seen: dict[Any, int] = {}
    want = []
    for row, group in zip(ids.tolist(), groups.tolist(), strict=True):
        key = (group, *row)
        want.append(seen.get(key, 0) < 3)
        seen[key] = seen.get(key, 0) + 1
    assert kept(batch, "duplicates", keep=3) == want


def off_policy(advantages: list[float], mismatch: list[float]) -> Scored:
    """Rows with these advantages and mean log-ratios of the sampler to the trainer; nonsense off the mask."""
    rows = len(advantages)
    mask = torch.tensor([[1.0, 1, 0]]).expand(rows, 3)
    spread = torch.tensor([[0.3, -0.3, 99.0]])
    old = torch.full((rows, 3), -1.5)
    return Scored(
        mask=mask,
        token_rewards=mask,
        group_ids=torch.zeros(rows).long(),
        old_logps=old,
        sampler_logps=old + torch.tensor(mismatch)[:, None] + spread,
        advantages=torch.tensor(advantages)[:, None] * torch.tensor([[3.0, -1.0, -90.0]]),
    )


@pytest.mark.proves("filters.opsm", how="closed form", tolerance="exact")
def test_opsm_drops_bad_rows_that_the_trainer_finds_unlikely():
    batch = off_policy([-1.0, -1.0, -1.0, 1.0, 0.0], [0.2, 0.05, -0.5, 0.9, 0.9])
    assert kept(batch, "opsm", delta=0.1) == [False, True, True, True, True]
    assert kept(batch, "opsm", delta=0.04) == [False, False, True, True, True]
    assert kept(batch, "opsm", delta=0.5) == [True] * 5


@pytest.mark.proves("filters.opsm", how="parity", tolerance="exact")
def test_opsm_keeps_what_trl_keeps_before_the_first_update():
    trl = pytest.importorskip("trl")
    mask_of = getattr(trl.GRPOTrainer, "get_off_policy_mask", None)
    if mask_of is None:
        pytest.skip("this TRL has no off-policy mask")
    batch = scored(group_sizes=(8, 8, 8))
    advantages = torch.randn(24, 1, generator=torch.Generator().manual_seed(0)).double()
    batch.advantages = advantages * batch.mask
    want = mask_of(advantages, batch.old_logps, batch.sampler_logps, batch.mask, 0.01).squeeze(1) > 0
    assert kept(batch, "opsm", delta=0.01) == want.tolist()
    assert not want.all()


def test_a_filter_that_never_empties_a_prompt_refuses_to_resample():
    assert "resample=0" in next(iter(load_plugin("filters", "duplicates", resample=1).check(ALGORITHM)))
    assert not list(load_plugin("filters", "duplicates").check(ALGORITHM))


# Loss terms


@pytest.mark.proves("loss_terms.entropy", how="closed form", tolerance="1e-6")
def test_the_entropy_term_is_minus_coef_times_entropy_with_equal_weights():
    mask = torch.tensor([[1.0, 1, 0], [1, 0, 0]])
    entropy = torch.tensor([[0.5, 1.0, 9.0], [2.0, 9.0, 9.0]])
    term = load_plugin("loss_terms", "entropy", coef=0.1)
    torch.testing.assert_close(term(-entropy, mask, entropy=entropy), -0.1 * entropy * mask)
    torch.testing.assert_close(term.weights(mask), mask / 3)


def test_an_entropy_term_of_coef_0_is_refused():
    assert "Remove the term" in next(iter(load_plugin("loss_terms", "entropy", coef=0).check(ALGORITHM)))
    assert not list(load_plugin("loss_terms", "entropy").check(ALGORITHM))


def bonus(term: Any) -> float:
    """The coefficient that an entropy term pays now."""
    ones = torch.ones(1, 1, dtype=torch.float64)
    return -term(ones, ones, entropy=ones).item()


@pytest.mark.proves("loss_terms.adaptive_entropy", how="closed form", tolerance="1e-12")
def test_the_adaptive_coefficient_climbs_below_its_target_and_is_paid_only_there():
    term = load_plugin("loss_terms", "adaptive_entropy", target=0.5, coef=0.01, delta=0.02, maximum=0.04)
    seen = [bonus(term)]
    for entropy in (0.4, 0.5, 0.3, 0.6, 0.2, 0.9, 0.9, 0.9, 0.1):
        term.observe({"policy/entropy": entropy})
        seen.append(bonus(term))
    # the coefficient is .01 .03 .04 .04 .02 .04 .02 0 0 .02, and 0 is paid above the target
    assert seen == pytest.approx([0.01, 0.03, 0.04, 0.04, 0.0, 0.04, 0.0, 0.0, 0.0, 0.02], abs=1e-12)


def test_an_unobserved_entropy_moves_nothing():
    term = load_plugin("loss_terms", "adaptive_entropy", coef=0.3)
    term.observe({"reward/total/mean": 1.0})
    assert bonus(term) == pytest.approx(0.3)


def test_the_adaptive_coefficient_is_saved():
    terms = [load_plugin("loss_terms", "adaptive_entropy", target=0.5) for _ in range(2)]
    for entropy in (0.1, 0.1, 0.9):
        terms[0].observe({"policy/entropy": entropy})
    terms[1].load_state_dict(terms[0].state_dict())
    for term in terms:
        assert bonus(term) == 0
        term.observe({"policy/entropy": 0.1})
        assert bonus(term) == pytest.approx(0.01)


def test_a_start_above_the_maximum_is_refused():
    term = load_plugin("loss_terms", "adaptive_entropy", coef=0.5, maximum=0.1)
    assert "raise maximum" in next(iter(term.check(ALGORITHM)))
    assert not list(load_plugin("loss_terms", "adaptive_entropy").check(ALGORITHM))


@pytest.mark.proves("loss_terms.positive_nll", how="closed form", tolerance="1e-12")
def test_positive_nll_averages_over_the_tokens_of_good_rows():
    mask = torch.tensor([[1.0, 1, 0], [1, 1, 1], [1, 0, 0]], dtype=torch.float64)
    logps = torch.tensor([[-1.0, -2.0, 9.0], [-8.0, -8.0, -8.0], [-4.0, 9.0, 9.0]], dtype=torch.float64)
    scores = torch.tensor([1.0, 0.5, 0.6], dtype=torch.float64)
    term = load_plugin("loss_terms", "positive_nll", coef=0.3, threshold=0.5)
    loss = (term(logps, mask, total_score=scores) * term.weights(mask, total_score=scores)).sum()
    assert loss.item() == pytest.approx(0.3 * (1 + 2 + 4) / 3, abs=1e-12)


def test_without_good_rows_positive_nll_is_0():
    mask, scores = torch.ones(2, 3), torch.zeros(2)
    term = load_plugin("loss_terms", "positive_nll")
    assert (term.weights(mask, total_score=scores) == 0).all()


@pytest.mark.proves("loss_terms.positive_nll", how="invariance", tolerance="1e-12")
def test_any_split_into_micro_batches_gives_one_positive_nll():
    generator = torch.Generator().manual_seed(0)
    mask = (torch.rand(7, 5, generator=generator) > 0.3).double()
    scores = torch.rand(7, generator=generator, dtype=torch.float64)
    logps = -torch.rand(7, 5, generator=generator, dtype=torch.float64)
    term = load_plugin("loss_terms", "positive_nll", threshold=0.4)
    weights = term.weights(mask, total_score=scores)
    losses = [
        sum((term(logps[rows], mask[rows], total_score=scores[rows]) * weights[rows]).sum() for rows in cuts)
        for cuts in (torch.arange(7).split(7), torch.arange(7).split(2))
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=1e-12)


# Plugins that do nothing


@pytest.mark.parametrize("axis", ["critic", "reference"])
@pytest.mark.proves("critic.none", "reference.none", how="closed form", tolerance="exact")
def test_none_builds_nothing_and_provides_nothing(axis: str):
    plugin, arguments = load_plugin(axis, "none"), {"critic": (None, None), "reference": (None,)}[axis]
    assert plugin.build(*arguments) is None
    assert plugin.provides == frozenset()


@pytest.mark.proves("optimizer.trainer", how="closed form", tolerance="exact")
def test_the_trainers_own_optimizer_is_left_to_the_trainer():
    assert load_plugin("optimizer", "trainer").build(tiny_policy()[0], []) is None
