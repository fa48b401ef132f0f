"""Estimators that credit each token, and the combinators, against closed forms."""

from __future__ import annotations

import copy
import dataclasses
import runpy
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_rlhf import load_plugin
from hf_rlhf.batch import Credit, Scored
from hf_rlhf.config.recipe import RecipeError
from hf_rlhf.testing import scored
from hf_rlhf_plugins.advantages._tokens import reward_to_go, whiten_tokens
from tests.helpers import runs
from tests.helpers.advantage_batches import bandit, full, of
from tests.helpers.paths import ROOT


def gae_by_sum(batch: Scored, gamma: float, lam: float | list[float]) -> Tensor:
    """A_t = sum_k (gamma lam)^k d_{t+k} over the sampled tokens of each row, written out."""
    assert batch.values is not None
    advantages = torch.zeros_like(batch.mask)
    for row in range(len(batch.mask)):
        factor = gamma * (lam[row] if isinstance(lam, list) else lam)
        places = batch.mask[row].nonzero().flatten().tolist()
        values = [*batch.values[row, places].tolist(), 0.0]
        rewards = batch.token_rewards[row, places].tolist()
        deltas = [r + gamma * values[k + 1] - values[k] for k, r in enumerate(rewards)]
        for k, place in enumerate(places):
            advantages[row, place] = sum(factor ** (j - k) * deltas[j] for j in range(k, len(places)))
    return advantages


def credit(batch: Scored, name: str, **settings: Any) -> Credit:
    made = load_plugin("advantages", name, **settings)(batch)
    assert isinstance(made, Credit)
    return made


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


# The scan


def loop(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    to_go, later = torch.zeros_like(rewards), rewards.new_zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        later = (rewards[:, t] + gamma * later).where(mask[:, t] > 0, later)
        to_go[:, t] = later * mask[:, t]
    return to_go


@pytest.mark.parametrize("length", [1, 2, 3, 15, 16, 17, 1000])
@pytest.mark.parametrize("gamma", [0.0, 1e-6, 0.5, 0.99, 1.0])
def test_the_scan_is_the_loop_over_time_to_1e_9(length: int, gamma: float):
    generator = torch.Generator().manual_seed(length)
    rewards = torch.randn(5, length, generator=generator, dtype=torch.float64)
    mask = (torch.rand(5, length, generator=generator) > 0.3).double()
    got = reward_to_go(rewards, mask, gamma)
    torch.testing.assert_close(got, loop(rewards, mask, gamma), rtol=1e-9, atol=1e-9)


def test_the_scan_keeps_tiny_numbers_beside_a_strong_discount():
    """Dividing by gamma^t would be 0/0 long before the end of the row."""
    rewards = torch.full((1, 4000), 1e-30, dtype=torch.float64)
    got = reward_to_go(rewards, torch.ones_like(rewards), 1e-3)[:, :-20]
    torch.testing.assert_close(got, torch.full_like(got, 1e-30 / (1 - 1e-3)), rtol=1e-12, atol=0)


def test_the_scan_without_discount_is_the_sum_of_what_follows():
    rewards = torch.randn(3, 3001, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    want = rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(reward_to_go(rewards, torch.ones_like(rewards)), want, rtol=0, atol=1e-10)


def test_numbers_off_the_mask_do_not_matter_even_where_they_are_no_numbers():
    batch = full()
    assert batch.values is not None
    off = batch.mask == 0
    nan = dataclasses.replace(batch, values=batch.values.masked_fill(off, torch.nan))
    want, got = credit(batch, "gae"), credit(nan, "gae")
    assert torch.equal(got.advantages, want.advantages)
    assert torch.equal(got.returns, want.returns)


# Discounts


@pytest.mark.proves("advantages.reinforce", "advantages.reward_to_go", how="closed form", tolerance="exact")
def test_discounts_count_sampled_tokens_and_not_tool_output():
    mask = torch.tensor([[1.0, 0, 0, 1, 1]], dtype=torch.float64)
    rewards = torch.tensor([[1.0, 0, 0, 2, 4]], dtype=torch.float64)
    batch = Scored(mask=mask, token_rewards=rewards, group_ids=torch.zeros(1))
    assert of(batch, "reinforce", gamma=0.5).tolist() == [[3, 0, 0, 3, 3]]  # 1 + 2/2 + 4/4
    assert of(batch, "reward_to_go", gamma=0.5).tolist() == [[3, 0, 0, 4, 4]]  # 1 + (2 + 4/2)/2, 2 + 4/2, 4


def test_reinforce_puts_the_whole_return_on_every_token():
    batch = scored()
    torch.testing.assert_close(of(batch, "reinforce"), batch.token_rewards.sum(1, keepdim=True) * batch.mask)


def test_gamma_0_keeps_only_the_reward_at_hand():
    batch = scored()
    torch.testing.assert_close(of(batch, "reward_to_go", gamma=0), batch.token_rewards)
    places = batch.mask.argmax(1, keepdim=True)
    torch.testing.assert_close(of(batch, "reinforce", gamma=0), batch.token_rewards.gather(1, places) * batch.mask)


# GAE


@pytest.mark.proves("advantages.gae", how="closed form", tolerance="1e-12")
@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_gae_is_the_discounted_sum_of_deltas(gamma: float, lam: float):
    batch = scored(length=12)
    assert (batch.mask[0] == 0).any(), "the case must hold tool tokens"
    made = credit(batch, "gae", gamma=gamma, lam=lam)
    want = gae_by_sum(batch, gamma, lam)
    close(made.advantages, want)
    close(made.returns, (want + batch.values) * batch.mask)


def test_gae_with_lambda_1_is_reward_to_go_minus_the_value():
    batch = scored()
    made, to_go = credit(batch, "gae", lam=1), of(batch, "reward_to_go")
    torch.testing.assert_close(made.advantages, to_go - batch.values * batch.mask)
    torch.testing.assert_close(made.returns, to_go)


def test_the_critic_has_a_lambda_of_its_own():
    batch = full()
    both = credit(batch, "gae", gamma=0.9, lam=0.5, lam_critic=0.8)
    close(both.advantages, gae_by_sum(batch, 0.9, 0.5))
    close(both.returns, (gae_by_sum(batch, 0.9, 0.8) + batch.values) * batch.mask)
    assert torch.equal(credit(batch, "gae", lam=0.5, lam_critic=0.5).returns, credit(batch, "gae", lam=0.5).returns)


def test_lambda_adapts_to_the_sampled_tokens_of_each_row():
    batch = full(length=40, group_sizes=(12,))
    tokens = batch.mask.sum(1).tolist()
    lams = [1 - 1 / max(0.15 * t, 1) for t in tokens]
    assert min(lams) == 0 < max(lams), "the case must hold short and long rows"
    made = credit(batch, "gae", length_adaptive=0.15, lam=0.7)
    close(made.advantages, gae_by_sum(batch, 1.0, lams))
    close(made.returns, (gae_by_sum(batch, 1.0, 0.7) + batch.values) * batch.mask)


def test_the_paper_s_alpha_gives_lambda_0_up_to_20_tokens():
    batch = full(length=20)
    close(of(batch, "gae", length_adaptive=0.05), of(batch, "gae", lam=0))


def remarks(**settings: Any) -> str:
    made = runs.recipe(advantages={"use": "gae", **settings}, critic="value_head").algorithm()
    return " ".join(made.advantages.remarks(made))


def test_the_plan_says_which_settings_of_gae_cannot_bind():
    assert remarks() == ""
    assert "whiten=true" in remarks(ddof=0)
    assert remarks(ddof=0, whiten=True) == ""
    assert "lam=0.95 is unused" in remarks(length_adaptive=0.05, lam_critic=1.0)


def test_the_plan_says_when_every_completion_is_too_short_for_an_adaptive_lambda():
    def with_tokens(count: int) -> str:
        rollout = {"use": "generate", "max_new_tokens": count, "prompts": 4, "num_generations": 4}
        made = runs.recipe(
            rollout=rollout, advantages={"use": "gae", "length_adaptive": 0.05}, critic="value_head"
        ).algorithm()
        return " ".join(made.advantages.remarks(made))

    assert "lam 0" in with_tokens(20)
    assert with_tokens(21) == ""


def test_gae_without_values_says_what_is_missing():
    with pytest.raises(ValueError, match="critic"):
        load_plugin("advantages", "gae")(scored(values=None))


# Whitening


@pytest.mark.proves("advantages.reinforce_plus_plus", how="closed form", tolerance="1e-12")
@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_reinforce_plus_plus_is_the_reward_to_go_less_its_mean_over_its_deviation(ddof: int, gamma: float):
    batch = full()
    on = batch.mask > 0
    to_go = of(batch, "reward_to_go", gamma=gamma)[on]
    want = (to_go - to_go.mean()) / (to_go.var(correction=ddof) + 1e-8).sqrt()
    got = of(batch, "reinforce_plus_plus", gamma=gamma, ddof=ddof)
    close(got[on], want)
    assert (got[~on] == 0).all()


@pytest.mark.parametrize("ddof", [0, 1])
def test_whitening_gives_mean_0_and_variance_1_and_leaves_the_critic_s_targets(ddof: int):
    batch = scored()
    plain, white = credit(batch, "gae"), credit(batch, "gae", whiten=True, ddof=ddof)
    on = white.advantages[batch.mask > 0]
    assert abs(on.mean()) < 1e-12
    assert abs(on.var(correction=ddof) - 1) < 1e-6
    assert (white.advantages[batch.mask == 0] == 0).all()
    assert torch.equal(white.returns, plain.returns)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whitening_equal_numbers_gives_exactly_0(dtype: torch.dtype):
    mask = torch.ones(3, 7, dtype=dtype)
    assert (whiten_tokens(torch.full_like(mask, 0.2), mask) == 0).all()
    assert whiten_tokens(mask[:1, :1], mask[:1, :1]).tolist() == [[0.0]]


# The baseline of least variance at each token


@pytest.mark.proves("advantages.optimal_token_baseline", how="closed form", tolerance="1e-12")
@pytest.mark.parametrize("leave_one_out", [False, True])
def test_the_optimal_token_baseline_weighs_by_the_energy_up_to_the_token(leave_one_out: bool):
    batch = full()
    mask, probs, to_go = batch.mask, batch.old_logps.exp(), of(batch, "reward_to_go")
    want = torch.zeros_like(mask)
    alone = 0
    for i, t in mask.nonzero().tolist():
        there = [j for j in range(len(mask)) if batch.group_ids[j] == batch.group_ids[i] and mask[j, t] > 0]
        counted = [j for j in there if not (leave_one_out and j == i)]
        energy = {
            j: sum(mask[j, s] * (1 - 2 * probs[j, s] + batch.sum_sq_probs[j, s]) for s in range(t + 1)) for j in counted
        }
        baseline = sum(energy[j] * to_go[j, t] for j in counted) / sum(energy.values()) if len(there) > 1 else 0
        alone += len(there) == 1
        want[i, t] = to_go[i, t] - baseline
    assert alone, "the case must hold a place where one row remains"
    close(of(batch, "optimal_token_baseline", leave_one_out=leave_one_out), want)


def test_tokens_that_were_certain_have_no_weight_and_no_baseline():
    """p = 1 everywhere: no gradient, so nothing to weigh by, and nothing is divided by 0."""
    rows = bandit([1, 0], old_logps=torch.zeros(2, 3).double(), sum_sq_probs=torch.ones(2, 3).double())
    assert of(rows, "optimal_token_baseline").tolist() == [[1.0] * 3, [0.0] * 3]


# Combinators


@pytest.mark.proves(
    "advantages.baseline",
    "advantages.remax",
    "baseline.constant",
    "baseline.greedy",
    "baseline.others_mean",
    "baseline.critic",
    how="closed form",
    tolerance="1e-12",
)
def test_the_baseline_is_subtracted_from_the_reward_to_go():
    batch = full()
    mask, returns, to_go = batch.mask, batch.returns(), of(batch, "reward_to_go", gamma=0.9)

    def minus(baseline: Any) -> Tensor:
        return of(batch, "baseline", gamma=0.9, baseline=baseline)

    close(minus({"use": "constant", "value": 0.3}), (to_go - 0.3) * mask)
    close(minus("greedy"), (to_go - batch.greedy[:, None]) * mask)
    close(minus("critic"), (to_go - batch.values) * mask)
    close(of(batch, "remax"), of(batch, "baseline", baseline="greedy"))
    of_others = torch.zeros_like(returns)
    for i in range(len(returns)):
        rest = [returns[j] for j in range(len(returns)) if batch.group_ids[j] == batch.group_ids[i] and j != i]
        of_others[i] = sum(rest) / len(rest) if rest else 0.0
    close(minus("others_mean"), (to_go - of_others[:, None]) * mask)
    close(load_plugin("advantages", "baseline", gamma=0.9)(batch), minus("others_mean"))


def test_a_critic_as_baseline_is_gae_with_lambda_1():
    batch = full()
    one, other = credit(batch, "baseline", baseline="critic", gamma=0.9), credit(batch, "gae", lam=1, gamma=0.9)
    close(one.advantages, other.advantages)
    close(one.returns, other.returns)


def test_the_others_mean_on_one_reward_at_the_end_is_leave_one_out():
    batch = bandit([1, 0, 0.25, 5, 5], groups=[0, 0, 0, 1, 1])
    close(of(batch, "baseline"), of(batch, "leave_one_out"))
    assert (of(bandit([0.2] * 8, dtype=torch.float32), "baseline") == 0).all()


@pytest.mark.proves("baseline.ema", how="closed form", tolerance="exact")
def test_the_running_mean_begins_with_the_first_rollout_and_fades():
    ema = load_plugin("baseline", "ema", decay=0.75)
    batch = bandit([1, 0])
    seen = [ema(batch)[0, 0].item()]
    for mean in (4.0, 8.0, 0.0):
        ema.observe({"reward/after_kl/mean": mean, "rollout/rows": 2})
        seen.append(ema(batch)[0, 0].item())
    assert seen == [0.0, 4.0, 5.0, 3.75]
    ema.observe({"rollout/rows": 0})
    assert ema(batch).tolist() == [[3.75], [3.75]]


def test_the_running_mean_is_in_the_checkpoint():
    ema, fresh = load_plugin("baseline", "ema"), load_plugin("baseline", "ema")
    fresh.load_state_dict(copy.deepcopy(ema.state_dict()))
    assert fresh == ema
    ema.observe({"reward/after_kl/mean": 0.1})
    fresh.load_state_dict(copy.deepcopy(ema.state_dict()))
    assert fresh == ema
    assert fresh.mean == 0.1


def test_a_nested_running_mean_is_told_of_rollouts():
    made = runs.recipe(advantages={"use": "baseline", "baseline": "ema"}).algorithm()
    for path, plugin in made.plugins():
        if path.startswith("advantages"):
            plugin.observe({"reward/after_kl/mean": 0.5})
    assert of(bandit([1, 0]), "baseline", baseline=made.advantages.baseline)[:, 0].tolist() == [0.5, -0.5]


@pytest.mark.proves("advantages.mix", how="closed form", tolerance="1e-12")
def test_a_mix_is_the_weighted_sum_of_its_parts():
    batch = full()
    parts = ["leave_one_out", {"use": "pass_at_k", "normalise": "std"}, "reward_to_go"]
    got = of(batch, "mix", parts=parts, weights=[1.0, -0.5, 2.0])
    lead = of(batch, "pass_at_k", normalise="std")
    close(got, of(batch, "leave_one_out") - 0.5 * lead + 2 * of(batch, "reward_to_go"))
    assert load_plugin("advantages", "mix", parts=parts, weights=[1, 1, 1])(batch).returns is None


def test_a_mix_passes_on_the_targets_of_the_first_part_that_has_some():
    batch = full()
    parts = ["pass_at_k", {"use": "gae", "lam": 0.5}, "gae"]
    made = credit(batch, "mix", parts=parts, weights=[1.0, 0.5, 0.0])
    close(made.advantages, of(batch, "pass_at_k") + 0.5 * of(batch, "gae", lam=0.5))
    assert torch.equal(made.returns, credit(batch, "gae", lam=0.5).returns)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parts": [], "weights": []}, "parts must name at least one estimator"),
        ({"parts": ["gae", "group_mean"], "weights": [1.0]}, r"got 1 for 2 parts \(gae, group_mean\)"),
        ({"parts": ["gae"]}, "weights"),
    ],
)
def test_a_mix_says_what_is_wrong_with_its_lists(settings: dict[str, Any], message: str):
    with pytest.raises(RecipeError, match=message):
        load_plugin("advantages", "mix", **settings)


def test_the_needs_and_checks_of_nested_estimators_count():
    mixed = {"use": "mix", "parts": ["gae", "maxrl"], "weights": [1.0, 1.0]}
    made = runs.recipe(advantages=mixed, kl=[{"use": "in_reward"}], reference="frozen").algorithm()
    assert {"values", "groups"} <= made.needs
    text = " ".join(made.problems())
    assert "=gae needs values" in text
    assert "maxrl needs rewards of 0 and 1" in text
    single = runs.recipe(advantages="baseline", rollout={**runs.SCRIPTED, "num_generations": 1}).algorithm()
    assert any("others_mean" in problem and "num_generations" in problem for problem in single.problems())


def test_the_reward_to_go_of_no_tokens_is_nothing():
    empty = torch.zeros(2, 0, dtype=torch.float64)
    assert reward_to_go(empty, empty).shape == (2, 0)


@pytest.mark.parametrize(("rows", "length"), [(1, 1), (1, 5), (5, 1)])
def test_what_is_computed_in_place_is_a_copy(rows: int, length: int):
    batch = full(group_sizes=(rows,), length=length)
    before = copy.deepcopy(batch)
    credit(batch, "gae", gamma=0.9)
    of(batch, "reward_to_go", gamma=0.9)
    for name in ("token_rewards", "values", "mask"):
        assert torch.equal(getattr(batch, name), getattr(before, name))


def test_the_benchmark_compares_with_loops_that_compute_the_same():
    made = runpy.run_path(str(ROOT / "benchmarks" / "estimators.py"))
    entries = made["measure"](16, 9, 8)
    compared = [entry["apart"] for entry in entries if "apart" in entry]
    assert len(compared) == 3
    assert max(compared) < 1e-5
    assert "`gae`" in made["table"](entries)
