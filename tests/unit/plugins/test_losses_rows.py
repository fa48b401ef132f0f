"""Policy losses that look at whole rows or whole rollouts: topr, vespo, clip_cov, kl_cov, trpo_penalty."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_rlhf import load_plugin
from hf_rlhf.testing import scored
from tests.unit.plugins.test_losses import close, gradient, run
from tests.unit.plugins.test_losses_clipped import doubles, random_step

RATIO = doubles([0.5, 0.8, 3.0], [2.0, 0.8, 3.0], [0.5, 0.8, 3.0])
MASK = doubles([1, 1, 0], [1, 1, 0], [1, 1, 0])
ADVANTAGES = doubles([-2.0], [-1.0], [3.0]) * MASK


def slope_of(
    name: str, total_score: Tensor | None = None, sampler_logps: Tensor | None = None, **settings: Any
) -> Tensor:
    """The slope at RATIO, which is relative to old log-probs of -1.5."""
    plugin, old = load_plugin("policy_loss", name, **settings), torch.full_like(RATIO, -1.5)
    logps = (old + RATIO.log()).requires_grad_()
    known = {"total_score": total_score, "sampler_logps": sampler_logps}
    extras = {key: known[key] for key in plugin.needs & known.keys()}
    loss, _ = plugin(logps, old, ADVANTAGES, MASK, **extras)
    return torch.autograd.grad(loss.sum(), logps)[0]


# topr


@pytest.mark.proves("policy_loss.topr", how="closed form", tolerance="1e-12")
def test_topr_fades_bad_rows_and_keeps_good_ones():
    close(slope_of("topr"), -doubles([0.4], [1.0], [1.0]) * ADVANTAGES)


def test_topr_by_token_fades_each_bad_token():
    weight = doubles([0.5, 0.8, 0.0], [1.0, 0.8, 0.0], [1.0, 1.0, 0.0])
    close(slope_of("topr", level="token"), -weight * ADVANTAGES)


def test_topr_by_the_score_takes_its_sign_from_it():
    scores = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    close(slope_of("topr", scores, sign="score"), -doubles([1.0], [1.0], [0.4]) * ADVANTAGES)
    assert load_plugin("policy_loss", "topr", sign="score").needs == {"old_logps", "total_score"}


def test_topr_counts_the_tokens_it_truncates():
    _, _, metrics = gradient(load_plugin("policy_loss", "topr"), RATIO, ADVANTAGES, MASK)
    close(metrics["clip_frac/high"], doubles([0.0], [1.0], [0.0]) * MASK)


# vespo


def kernel(w: float, k: float, decay: float) -> float:
    return w**k * math.exp(decay * (1 - w))


@pytest.mark.proves("policy_loss.vespo", how="closed form", tolerance="1e-12")
def test_vespo_weighs_a_row_by_its_kernel():
    weights = [kernel(0.4, 3, 2), kernel(1.6, 3, 2), kernel(0.4, 2, 3)]
    close(slope_of("vespo"), -doubles(*[[x] for x in weights]) * ADVANTAGES)
    other = {"k_positive": 1.0, "lambda_positive": 0.5, "k_negative": 0.0, "lambda_negative": 4.0}
    weights = [kernel(0.4, 0, 4), kernel(1.6, 0, 4), kernel(0.4, 1, 0.5)]
    close(slope_of("vespo", **other), -doubles(*[[x] for x in weights]) * ADVANTAGES)


def test_the_kernel_of_vespo_is_1_on_policy_and_largest_at_k_over_lambda():
    ratio = torch.linspace(0.05, 4.0, 80, dtype=torch.float64).unsqueeze(1)
    vespo = load_plugin("policy_loss", "vespo", k_positive=3.0, lambda_positive=2.0)
    _, slope, metrics = gradient(vespo, ratio, torch.ones_like(ratio))
    assert ratio[(-slope).argmax()].item() == pytest.approx(1.5)
    close(metrics["row_weight"], -slope)
    close(
        gradient(vespo, torch.ones(1, 4, dtype=torch.float64), torch.ones(1, 4).double())[1], -torch.ones(1, 4).double()
    )


def test_vespo_can_weigh_by_the_ratio_to_the_sampler():
    sampler = torch.full_like(RATIO, -1.5) + RATIO.log() - math.log(1.2)
    weight = doubles([kernel(1.44, 3, 2)], [kernel(1.44, 3, 2)], [kernel(1.44, 2, 3)])
    close(slope_of("vespo", sampler_logps=sampler, anchor="sampler"), -weight * ADVANTAGES)


@pytest.mark.parametrize(
    ("correction", "anchor", "refused"), [("none", "sampler", 0), ("truncated", "sampler", 1), ("truncated", "old", 0)]
)
def test_the_mismatch_with_the_sampler_is_not_counted_twice(correction: str, anchor: str, refused: int):
    algorithm: Any = SimpleNamespace(rollout_correction=load_plugin("rollout_correction", correction))
    problems = list(load_plugin("policy_loss", "vespo", anchor=anchor).check(algorithm))
    assert len(problems) == refused


@pytest.mark.proves("policy_loss.vespo", how="parity", tolerance="1e-6")
def test_the_weights_of_vespo_are_those_of_trl():
    trl = pytest.importorskip("trl")
    weights = getattr(trl.GRPOTrainer, "get_gamma_weights", None)
    if weights is None:
        pytest.skip("this TRL has no VESPO")
    ratio, advantages = random_step()
    advantages = advantages[:, :1].expand_as(advantages)
    _, _, metrics = gradient(load_plugin("policy_loss", "vespo"), ratio, advantages)
    want = weights(advantages[:, :1], ratio.log(), torch.ones_like(ratio), None)
    torch.testing.assert_close(metrics["row_weight"], want.expand_as(ratio), rtol=1e-6, atol=1e-6)


# clip_cov and kl_cov


def chosen(name: str, fraction: float, old_logps: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    return load_plugin("policy_loss", name, fraction=fraction).select(old_logps, advantages, mask)


@pytest.mark.parametrize("name", ["clip_cov", "kl_cov"])
@pytest.mark.proves("policy_loss.clip_cov", "policy_loss.kl_cov", how="closed form", tolerance="exact")
def test_the_tokens_with_the_highest_covariance_are_selected(name: str):
    batch = scored(group_sizes=(4, 4, 4))
    advantages = torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(0)).double()
    on = batch.mask.nonzero().tolist()
    mean = [sum(x[i][t].item() for i, t in on) / len(on) for x in (advantages, batch.old_logps)]
    covariance = {(i, t): (advantages[i, t].item() - mean[0]) * (batch.old_logps[i, t].item() - mean[1]) for i, t in on}
    best = sorted(covariance, key=lambda place: -covariance[place])[: int(0.2 * len(on))]
    want = torch.zeros_like(batch.mask)
    for i, t in best:
        want[i, t] = 1
    assert torch.equal(chosen(name, 0.2, batch.old_logps, advantages, batch.mask), want)


@pytest.mark.proves("policy_loss.clip_cov", "policy_loss.kl_cov", how="invariance", tolerance="exact")
def test_neither_order_nor_padding_nor_tool_tokens_change_what_is_selected():
    batch = scored(group_sizes=(4, 4, 4))
    advantages = (batch.group_ids.unsqueeze(1) - 8.0) * batch.mask  # ties within a row in all but the log-prob
    old_logps = (4 * batch.old_logps).round() / 4
    mine = chosen("clip_cov", 0.1, old_logps, advantages, batch.mask)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    assert torch.equal(chosen("clip_cov", 0.1, old_logps[order], advantages[order], batch.mask[order]), mine[order])
    wide = [torch.nn.functional.pad(x, (2, 3), value=7.0) for x in (old_logps, advantages)]
    mask = torch.nn.functional.pad(batch.mask, (2, 3))
    assert torch.equal(chosen("clip_cov", 0.1, *wide, mask), torch.nn.functional.pad(mine, (2, 3)))
    noise = torch.where(batch.mask > 0, old_logps, math.inf)
    assert torch.equal(chosen("clip_cov", 0.1, noise, advantages, batch.mask), mine)
    assert mine.sum() >= int(0.1 * batch.mask.sum())


def test_ties_are_selected_together():
    old_logps, advantages = doubles([-1, -1, -3, -3]), doubles([1, 1, 0, -1])
    ones = torch.ones_like(old_logps)
    close(chosen("kl_cov", 0.25, old_logps, advantages, ones), doubles([0, 0, 0, 1]))
    close(chosen("kl_cov", 0.5, old_logps, advantages, ones), doubles([1, 1, 0, 1]))


def test_no_token_without_positive_covariance_is_selected():
    ones = torch.ones(2, 3, dtype=torch.float64)
    assert chosen("clip_cov", 1.0, -ones, ones, ones).sum() == 0
    assert chosen("clip_cov", 1.0, doubles([-1, -2]), doubles([0, 1]), ones[:1, :2]).sum() == 0
    assert chosen("clip_cov", 1.0, doubles([-1, -2]), doubles([1, 0]), ones[:1, :2]).sum() == 2
    for empty in (ones * 0, ones[:0]):
        assert torch.equal(chosen("clip_cov", 0.5, empty, empty, empty), empty)


def test_a_small_fraction_still_selects_one_token():
    generator = torch.Generator().manual_seed(0)
    old_logps, advantages = (torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    assert chosen("kl_cov", 2e-4, old_logps, advantages, torch.ones(3, 4).double()).sum() == 1


SELECTED = doubles([1, 0, 0, 1, 0], [0, 1, 0, 0, 1])


@pytest.mark.proves("policy_loss.clip_cov", how="closed form", tolerance="1e-12")
def test_clip_cov_is_ppo_clip_without_the_selected_gradients():
    ratio, advantages = (x[:2, :5] for x in random_step())
    old, ones = torch.full_like(ratio, -1.5), torch.ones_like(ratio)
    want, free, _ = gradient(load_plugin("policy_loss", "ppo_clip"), ratio, advantages)
    value, slope, metrics = run(
        load_plugin("policy_loss", "clip_cov"), old + ratio.log(), old, advantages, ones, SELECTED
    )
    close(value, want)
    close(slope, free * (1 - SELECTED))
    close(metrics["selected_frac"], SELECTED)


@pytest.mark.proves("policy_loss.kl_cov", how="closed form", tolerance="1e-12")
def test_kl_cov_is_the_surrogate_with_a_kl_on_the_selected_tokens():
    ratio, advantages = (x[:2, :5] for x in random_step())
    old, ones = torch.full_like(ratio, -1.5), torch.ones_like(ratio)
    plugin = load_plugin("policy_loss", "kl_cov", beta=0.7)
    value, slope, metrics = run(plugin, old + ratio.log(), old, advantages, ones, SELECTED)
    close(value, -ratio * advantages + 0.7 * SELECTED * (ratio - 1 - ratio.log()))
    close(slope, -ratio * advantages + 0.7 * SELECTED * (ratio - 1))
    close(metrics["selected_frac"], SELECTED)


# trpo_penalty


@pytest.mark.proves("policy_loss.trpo_penalty", how="closed form", tolerance="1e-12")
def test_trpo_penalty_adds_the_kl_to_the_old_policy():
    ratio, advantages = random_step()
    kl = ratio - 1 - ratio.log()
    value, slope, metrics = gradient(load_plugin("policy_loss", "trpo_penalty", coef=0.3), ratio, advantages)
    close(value, -ratio * advantages + 0.3 * kl)
    close(slope, -ratio * advantages + 0.3 * (ratio - 1))
    close(metrics["kl_old"], kl)
    close(metrics["kl_coef"], torch.full_like(kl, 0.3))


def test_reduce_max_charges_every_token_the_largest_kl_of_its_row():
    ratio, advantages = random_step()
    mask = torch.ones_like(ratio)
    mask[:, 15:] = 0
    kl = ((ratio - 1 - ratio.log()) * mask).amax(1, keepdim=True)
    value, _, _ = gradient(load_plugin("policy_loss", "trpo_penalty", reduce="max"), ratio, advantages * mask, mask)
    close(value, (-ratio * advantages + kl) * mask)


@pytest.mark.proves("policy_loss.trpo_penalty", "policy_loss.kl_cov", how="exact enumeration", tolerance="1e-12")
def test_the_penalty_and_its_gradient_are_those_of_the_kl_under_the_old_policy():
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(7, generator=generator, dtype=torch.float64).log_softmax(0)
    logits = torch.randn(7, generator=generator, dtype=torch.float64, requires_grad=True)
    new = logits.log_softmax(0)
    exact = (old.exp() * (old - new)).sum()
    for name in ("trpo_penalty", "kl_cov"):
        plugin, ones = load_plugin("policy_loss", name), torch.ones(1, 7, dtype=torch.float64)
        extras = {"selected": ones} if name == "kl_cov" else {}
        loss, _ = plugin(new.unsqueeze(0), old.unsqueeze(0), 0 * ones, ones, **extras)
        expected = (old.exp() * loss).sum()
        close(expected, exact)
        slopes = [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (expected, exact)]
        close(*slopes)


def coefficient(plugin: Any) -> float:
    ones = torch.ones(1, 1)
    return plugin(ones, ones, ones, ones)[1]["kl_coef"].item()


def test_the_coefficient_doubles_above_and_halves_below_its_band():
    plugin = load_plugin("policy_loss", "trpo_penalty", coef=1.0, target=0.02)
    seen = []
    for kl in (0.031, 0.029, 0.02, 0.0134, 0.0133, 0.0):
        plugin.observe({"policy/approx_kl": kl})
        seen.append(coefficient(plugin))
    assert seen == [2.0, 2.0, 2.0, 2.0, 1.0, 0.5]
    plugin.observe({"reward/total/mean": 1.0})
    assert coefficient(plugin) == 0.5


def test_the_coefficient_returns_from_any_number_of_quiet_rollouts():
    plugin = load_plugin("policy_loss", "trpo_penalty")
    for _ in range(1100):
        plugin.observe({"policy/approx_kl": 0.0})
    assert coefficient(plugin) == 2.0**-20
    for _ in range(1100):
        plugin.observe({"policy/approx_kl": 9.0})
    assert coefficient(plugin) == 2.0**20


def test_the_coefficient_is_saved():
    plugin, other = (load_plugin("policy_loss", "trpo_penalty") for _ in range(2))
    plugin.observe({"policy/approx_kl": 1.0})
    other.load_state_dict(plugin.state_dict())
    assert coefficient(other) == 2.0
