"""Policy losses that bound a ratio, against closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_rlhf import load_plugin
from tests.unit.plugins.test_losses import ADVANTAGES, RATIO, close, gradient, run, steps


def doubles(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def random_step(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ratios from 1/4 to 4 and advantages of both signs."""
    generator = torch.Generator().manual_seed(seed)
    ratio = (0.7 * torch.randn(50, 20, generator=generator, dtype=torch.float64)).exp()
    return ratio, torch.randn(50, 20, generator=generator, dtype=torch.float64)


# dual_clip


@pytest.mark.proves("policy_loss.dual_clip", how="closed form", tolerance="1e-12")
def test_dual_clip_stops_a_bad_token_at_c():
    ratio = doubles([0.5, 1.0, 1.5, 2.9, 4.0], [0.5, 1.0, 1.5, 2.9, 4.0])
    value, slope, metrics = gradient(load_plugin("policy_loss", "dual_clip"), ratio, ADVANTAGES)
    close(value, doubles([-1.0, -2.0, -2.4, -2.4, -2.4], [1.6, 2.0, 3.0, 5.8, 6.0]))
    close(slope, doubles([-1.0, -2.0, 0.0, 0.0, 0.0], [0.0, 2.0, 3.0, 5.8, 0.0]))
    close(metrics["clip_frac/dual"], doubles([0, 0, 0, 0, 0], [0, 0, 0, 0, 1]))


def test_a_ratio_of_c_keeps_its_gradient():
    log_ratio, zero = doubles([math.log(2.0)], [math.log(2.0) + 1e-6]), torch.zeros(2, 1, dtype=torch.float64)
    dual_clip, ones = load_plugin("policy_loss", "dual_clip", c=2.0), torch.ones_like(zero)
    _, slope, metrics = run(dual_clip, log_ratio, zero, -ones, ones)
    close(slope, doubles([2.0], [0.0]))
    close(metrics["clip_frac/dual"], doubles([0.0], [1.0]))


def test_dual_clipping_is_gradient_masking_on_both_sides():
    ratio, advantages = random_step()
    _, slope, metrics = gradient(load_plugin("policy_loss", "dual_clip", c=1.5), ratio, advantages)
    above, below = (advantages > 0) & (ratio > 1.2), (advantages < 0) & (ratio < 0.8)
    dual = (advantages < 0) & (ratio > 1.5)
    close(slope, -ratio * advantages * ~(above | below | dual))
    assert torch.equal(metrics["clip_frac/dual"], dual.double())
    assert torch.equal(metrics["clip_frac/high"], above.double())
    assert torch.equal(metrics["clip_frac/low"], below.double())


# cispo


@pytest.mark.proves("policy_loss.cispo", how="closed form", tolerance="1e-12")
def test_cispo_weighs_reinforce_by_the_clipped_ratio():
    cispo = load_plugin("policy_loss", "cispo", epsilon_low=0.2, epsilon_high=0.3)
    value, slope, metrics = gradient(cispo, RATIO, ADVANTAGES)
    weight = doubles([0.8, 0.9, 1.0, 1.1, 1.3]).expand(2, 5)
    close(value, -weight * ADVANTAGES * (RATIO.log() - 1.5))
    close(slope, -weight * ADVANTAGES)
    close(metrics["clip_frac/low"], doubles([1, 0, 0, 0, 0]).expand(2, 5))
    close(metrics["clip_frac/high"], doubles([0, 0, 0, 0, 1]).expand(2, 5))


def test_cispo_never_cuts_a_tokens_gradient():
    ratio, advantages = random_step()
    _, slope, _ = gradient(load_plugin("policy_loss", "cispo", epsilon_low=0.1, epsilon_high=0.1), ratio, advantages)
    assert (slope.sign() == -advantages.sign()).all()


def test_an_absolute_bound_is_the_largest_weight():
    """TRL: min(rho, epsilon_high), without a lower bound."""
    ratio, advantages = random_step()
    trl = load_plugin("policy_loss", "cispo", epsilon_low=1.0, epsilon_high=2.0, bound="absolute")
    _, slope, _ = gradient(trl, ratio, advantages)
    close(slope, -ratio.clamp(max=2.0) * advantages)
    relative = load_plugin("policy_loss", "cispo", epsilon_low=1.0, epsilon_high=1.0)
    close(gradient(relative, ratio, advantages)[1], slope)


def test_an_absolute_bound_below_1_is_refused():
    problem = next(iter(load_plugin("policy_loss", "cispo", epsilon_high=0.2, bound="absolute").check(steps(1))))
    assert "epsilon_high=1.2" in problem
    assert not list(load_plugin("policy_loss", "cispo", epsilon_high=0.2).check(steps(1)))


# gspo

ROWS = doubles([1.3, 1.2, 5.0], [0.7, 0.9, 5.0], [1.3, 1.2, 5.0], [1.1, 0.9, 5.0])
MASK = doubles([1, 1, 0], [1, 1, 0], [1, 1, 0], [1, 1, 0])
SIGNS = doubles([2.0], [-2.0], [-1.0], [1.0])


@pytest.mark.parametrize("level", ["sequence", "token"])
@pytest.mark.proves("policy_loss.gspo", how="closed form", tolerance="1e-12")
def test_gspo_clips_the_geometric_mean_of_a_rows_ratios(level: str):
    gspo = load_plugin("policy_loss", "gspo", level=level, epsilon_low=0.1, epsilon_high=0.1)
    value, slope, metrics = gradient(gspo, ROWS, SIGNS * MASK, MASK)
    s = doubles([math.sqrt(1.56)], [math.sqrt(0.63)], [math.sqrt(1.56)], [math.sqrt(0.99)])
    close(value, -doubles([1.1], [0.9], [s[2, 0].item()], [s[3, 0].item()]) * SIGNS * MASK)
    close(slope, -doubles([0.0], [0.0], [1.0], [1.0]) * s * SIGNS * MASK)
    close(metrics["clip_frac/high"], doubles([1.0], [0.0], [0.0], [0.0]) * MASK)
    close(metrics["clip_frac/low"], doubles([0.0], [1.0], [0.0], [0.0]) * MASK)


def test_the_levels_of_gspo_differ_where_advantages_differ_within_a_row():
    advantages = doubles([1.0, 4.0, 0.0])
    s = math.sqrt(1.1 * 0.9)
    slopes = {
        level: gradient(
            load_plugin("policy_loss", "gspo", level=level, epsilon_high=0.5, epsilon_low=0.5),
            ROWS[3:],
            advantages,
            MASK[3:],
        )[1]
        for level in ("sequence", "token")
    }
    close(slopes["token"], -s * advantages)
    close(slopes["sequence"], -s * doubles([2.5, 2.5, 0.0]))


@pytest.mark.parametrize(("level", "share"), [("sequence", 2.0), ("token", 1.0)])
@pytest.mark.proves("policy_loss.gspo", how="closed form", tolerance="1e-12")
def test_gspo_of_the_product_clips_the_ratio_of_the_whole_row(level: str, share: float):
    """No geometric mean of these rows leaves 0.7 .. 1.3."""
    gspo = load_plugin("policy_loss", "gspo", ratio="product", level=level, epsilon_low=0.3, epsilon_high=0.3)
    value, slope, metrics = gradient(gspo, ROWS, SIGNS * MASK, MASK)
    s = doubles([1.56], [0.63], [1.56], [0.99])
    close(value, -doubles([1.3], [0.7], [1.56], [0.99]) * SIGNS * MASK)
    close(slope, -share * doubles([0.0], [0.0], [1.0], [1.0]) * s * SIGNS * MASK)
    close(metrics["clip_frac/high"], doubles([1.0], [0.0], [0.0], [0.0]) * MASK)
    close(metrics["clip_frac/low"], doubles([0.0], [1.0], [0.0], [0.0]) * MASK)


def test_a_product_on_the_bound_keeps_its_gradient():
    gspo = load_plugin("policy_loss", "gspo", ratio="product", epsilon_low=0.5, epsilon_high=1.0)
    log_ratio, advantages = doubles([4.0, 0.5], [0.25, 2.0]).log(), doubles([1.0, 1.0], [-1.0, -1.0])
    for beyond, kept in ((0.0, 1.0), (5e-7, 0.0)):
        logps = log_ratio + beyond * advantages
        _, slope, metrics = run(gspo, logps, 0 * logps, advantages, torch.ones_like(logps))
        close(slope, -2 * kept * logps.sum(1, keepdim=True).exp() * advantages)
        assert metrics["clip_frac/low"].sum() + metrics["clip_frac/high"].sum() == 4 * (1 - kept)


def step_of(plugin: Any, aggregation: str, ratio: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """The slope in each log-prob of the aggregated loss."""
    logps = ratio.log().requires_grad_()
    loss, _ = plugin(logps, 0 * ratio, advantages, mask)
    (slope,) = torch.autograd.grad((loss * load_plugin("aggregation", aggregation)(mask)).sum(), logps)
    return slope


def test_averaged_over_its_tokens_the_product_has_the_gradient_of_a_sum():
    """That of reinforce while the ratio is 1, and s times it for rows within their bounds."""
    ratio, advantages = random_step()
    mask = (torch.rand(ratio.shape, generator=torch.Generator().manual_seed(1)) > 0.4).double()
    advantages = advantages[:, :1] * mask
    product = load_plugin("policy_loss", "gspo", ratio="product", epsilon_low=0.2, epsilon_high=0.2)
    on_policy = torch.ones_like(ratio)
    want = step_of(load_plugin("policy_loss", "reinforce"), "seq_mean_token_sum", on_policy, advantages, mask)
    close(step_of(product, "seq_mean_token_mean", on_policy, advantages, mask), want)
    s = ratio.where(mask > 0, 1.0).prod(1, keepdim=True)
    cut = (s > 1.2) & (advantages > 0) | (s < 0.8) & (advantages < 0)
    close(step_of(product, "seq_mean_token_mean", ratio, advantages, mask), s * want * ~cut)
    assert 0 < cut.sum() < mask.sum()


@pytest.mark.proves("policy_loss.gspo", how="exact enumeration", tolerance="1e-12")
def test_within_its_bounds_the_product_is_the_expectation_under_the_new_policy():
    """Over all completions of three tokens, each token's distribution depending on the token before."""
    generator = torch.Generator().manual_seed(0)
    logits = 0.3 * torch.randn(2, 4, 3, generator=generator, dtype=torch.float64)
    new, old = logits[0].requires_grad_(), logits[1]
    ids = torch.cartesian_prod(*[torch.arange(3)] * 3)
    before = torch.nn.functional.pad(ids[:, :-1], (1, 0), value=3)
    logps, old_logps = (x.log_softmax(1)[before, ids] for x in (new, old))
    scores = torch.randn(27, 1, generator=generator, dtype=torch.float64)
    ones = torch.ones_like(old_logps)
    gspo = load_plugin("policy_loss", "gspo", ratio="product", epsilon_low=0.99, epsilon_high=99.0)
    loss, metrics = gspo(logps, old_logps, scores * ones, ones)
    assert not sum(x.sum() for x in metrics.values())
    expected = (old_logps.sum(1).exp() * loss.mean(1)).sum()
    exact = -(logps.sum(1).exp() * scores[:, 0]).sum()
    close(expected, exact)
    slopes = [torch.autograd.grad(x, new, retain_graph=True)[0] for x in (expected, exact)]
    close(*slopes)


def test_the_product_of_a_long_row_is_bounded():
    """3^512 stands for e^20 where the row is bad, and is clipped where it is good; 3^-512 is 0, or the lower bound."""
    gspo = load_plugin("policy_loss", "gspo", ratio="product", epsilon_low=0.2, epsilon_high=0.2)
    log_ratio = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]]).expand(4, 512) * math.log(3.0)
    advantages = torch.tensor([[-1.0], [1.0], [-1.0], [1.0]]).expand(4, 512)
    ones = torch.ones(4, 512)
    loss, slope, _ = run(gspo, log_ratio, 0 * ones, advantages, ones)
    torch.testing.assert_close(loss, torch.tensor([[math.exp(20)], [-1.2], [0.8], [0.0]]) * ones)
    assert (slope == 0).all()


# gmpo


def geometric(ratios: list[float], advantage: float, low: float, high: float) -> float:
    """The paper's objective of one row, token by token."""
    product = 1.0
    for ratio in ratios:
        product *= min(ratio, math.exp(high)) if advantage > 0 else max(ratio, math.exp(-low))
    return product ** (1 / len(ratios)) * advantage


@pytest.mark.proves("policy_loss.gmpo", how="closed form", tolerance="1e-12")
def test_gmpo_is_the_geometric_mean_of_clipped_ratios():
    ratio, advantages = random_step()
    advantages = advantages[:, :1].expand_as(advantages)
    mask = torch.ones_like(ratio)
    mask[:, 7:9] = 0
    value, slope, metrics = gradient(
        load_plugin("policy_loss", "gmpo", epsilon_low=0.3, epsilon_high=0.4), ratio, advantages * mask, mask
    )
    on = [t for t in range(20) if t not in (7, 8)]
    rows = zip(ratio[:, on].tolist(), advantages[:, 0].tolist(), strict=True)
    want = doubles(*[[-geometric(row, advantage, 0.3, 0.4)] for row, advantage in rows])
    close(value, want * mask)
    d = ratio.log()
    above, below = (advantages > 0) & (d > 0.4), (advantages < 0) & (d < -0.3)
    close(slope, want * ~(above | below) * mask)
    close(metrics["clip_frac/high"], above * mask)
    close(metrics["clip_frac/low"], below * mask)


def test_a_token_without_advantage_counts_as_ratio_1_in_gmpo():
    value, _, _ = gradient(load_plugin("policy_loss", "gmpo"), doubles([4.0, 1.2]), doubles([0.0, 1.0]))
    close(value, doubles([0.0, -math.sqrt(1.2)]))


# sapo


@pytest.mark.proves("policy_loss.sapo", how="closed form", tolerance="1e-12")
def test_sapo_fades_by_4_g_times_1_minus_g():
    ratio, advantages = random_step()
    value, slope, _ = gradient(
        load_plugin("policy_loss", "sapo", tau_positive=1.5, tau_negative=3.0), ratio, advantages
    )
    tau = torch.where(advantages > 0, 1.5, 3.0).double()
    gate = 1 / (1 + (-tau * (ratio - 1)).exp())
    close(value, -4 / tau * gate * advantages)
    close(slope, -4 * gate * (1 - gate) * ratio * advantages)


# dppo_tv


def dppo(advantage: float, p: list[float], p_old: float, p_sampler: float | None = None, **settings: Any) -> Any:
    """Slope in log p and metrics where the policy gives p, and p_old or the sampler gave p_sampler."""
    plugin = load_plugin("policy_loss", "dppo_tv", **settings)
    logps, old = doubles(p).log().requires_grad_(), torch.full((1, len(p)), math.log(p_old), dtype=torch.float64)
    extras = {} if p_sampler is None else {"sampler_logps": torch.full_like(old, math.log(p_sampler))}
    loss, metrics = plugin(logps, old, torch.full_like(old, advantage), torch.ones_like(old), **extras)
    return torch.autograd.grad(loss.sum(), logps)[0], metrics


@pytest.mark.proves("policy_loss.dppo_tv", how="closed form", tolerance="1e-12")
def test_dppo_masks_by_the_move_in_probability():
    p = [0.05, 0.1, 0.2, 0.3, 0.4, 0.5]
    ratio = doubles(p) / 0.25
    slope, metrics = dppo(2.0, p, 0.25, low=0.1, high=0.16, c=1.3)
    weight = ratio.clamp(max=1.3)
    close(slope, -2 * weight * doubles([1, 1, 1, 1, 1, 0]))
    close(metrics["clip_frac/high"], doubles([0, 0, 0, 0, 0, 1]))
    slope, metrics = dppo(-2.0, p, 0.25, low=0.1, high=0.16, c=1.3)
    close(slope, 2 * weight * doubles([0, 0, 1, 1, 1, 1]))
    close(metrics["clip_frac/low"], doubles([1, 1, 0, 0, 0, 0]))


def test_dppo_keeps_a_move_on_the_bound():
    assert dppo(1.0, [0.5], 0.25, high=0.25)[0].item() == pytest.approx(-2.0)
    assert dppo(1.0, [0.5 + 1e-9], 0.25, high=0.25)[0].item() == 0
    assert dppo(-1.0, [0.25], 0.5, low=0.25)[0].item() == pytest.approx(0.5)
    assert dppo(-1.0, [0.25 - 1e-9], 0.5, low=0.25)[0].item() == 0


def test_dppo_forgives_a_rare_token_the_ratio_that_a_clip_forbids():
    (slope,), _ = dppo(1.0, [0.004], 0.001)
    assert slope.item() == pytest.approx(-4.0)
    clip = load_plugin("policy_loss", "ppo_clip")
    assert gradient(clip, doubles([4.0]), doubles([1.0]))[1].item() == 0


def test_dppo_can_hold_the_policy_to_the_sampler():
    sampler = {"anchor": "sampler", "high": 0.1, "low": 0.1}
    assert dppo(1.0, [0.3], 0.25, 0.15, **sampler)[0].item() == 0
    assert dppo(1.0, [0.3], 0.15, 0.25, **sampler)[0].item() == pytest.approx(-2.0)
    assert load_plugin("policy_loss", "dppo_tv", anchor="sampler").needs == {"old_logps", "sampler_logps"}
    assert load_plugin("policy_loss", "dppo_tv").needs == {"old_logps"}


def test_a_sampler_as_anchor_binds_on_policy():
    assert "low" not in next(iter(load_plugin("policy_loss", "dppo_tv", anchor="sampler").remarks(steps(1))))
    assert not list(load_plugin("policy_loss", "vespo", anchor="sampler").remarks(steps(1)))


def test_ratios_are_bounded_where_no_clip_bounds_them():
    """e^20 stands for any larger ratio, and its token keeps no gradient: nothing overflows, nothing changes before."""
    surrogate = load_plugin("policy_loss", "surrogate")
    old = torch.zeros(1, 2)
    loss, slope, _ = run(surrogate, torch.tensor([[19.0, 90.0]]), old, torch.ones(1, 2), torch.ones(1, 2))
    torch.testing.assert_close(loss, -torch.tensor([[math.exp(19), math.exp(20)]]))
    torch.testing.assert_close(slope, -torch.tensor([[math.exp(19), 0.0]]))
