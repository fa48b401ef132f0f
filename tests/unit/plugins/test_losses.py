"""Policy losses against closed forms: the plain ones and the clip, and what holds for every loss."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_rlhf import load_plugin

LOSSES: dict[str, dict[str, Any]] = {
    "reinforce": {},
    "surrogate": {},
    "ppo_clip": {},
    "dual_clip": {},
    "cispo": {},
    "gspo": {},
    "gmpo": {},
    "sapo": {},
    "dppo_tv": {},
    "clip_cov": {},
    "kl_cov": {},
    "dro": {},
    "topr": {},
    "vespo": {},
    "trpo_penalty": {},
    "token_entropy": {},
}
PRODUCT: tuple[str, dict[str, Any]] = ("gspo", {"ratio": "product"})
"""Each of its tokens has the gradient of the row."""
VARIANTS = [
    *LOSSES.items(),
    ("cispo", {"bound": "absolute", "epsilon_high": 2.0}),
    ("gspo", {"level": "token"}),
    PRODUCT,
    ("gspo", {"ratio": "product", "level": "token"}),
    ("dppo_tv", {"anchor": "sampler"}),
    ("topr", {"level": "token"}),
    ("topr", {"sign": "score"}),
    ("vespo", {"anchor": "sampler"}),
    ("trpo_penalty", {"reduce": "max"}),
]
"""Every loss, and every variant with code of its own."""
variants = pytest.mark.parametrize(("name", "settings"), VARIANTS, ids=str)


def run(
    plugin: Any, logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, selected: Tensor | None = None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss of each token, the slope of its sum in each log-prob, and metrics; the sampler agrees with the trainer."""
    logps = logps.detach().clone().requires_grad_()
    known = {
        "selected": torch.zeros_like(mask) if selected is None else selected,
        "sampler_logps": old_logps,
        "total_score": advantages.sum(1),
        "old_entropy": -old_logps.exp() * old_logps,
    }
    if selected is None and plugin.selects_per_step:
        known["selected"] = mask
    extras = {name: known[name] for name in plugin.needs - {"old_logps"}}
    loss, metrics = plugin(logps, old_logps, advantages, mask, **extras)
    (slope,) = torch.autograd.grad(loss.sum(), logps)
    return loss.detach(), slope, metrics


def gradient(
    loss: Any, ratio: Tensor, advantages: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Per-token loss, its slope in log p, and metrics, at these ratios p / p_old with p_old = exp(-1.5)."""
    old_logps = torch.full_like(ratio, -1.5)
    return run(loss, old_logps + ratio.log(), old_logps, advantages, torch.ones_like(ratio) if mask is None else mask)


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


RATIO = torch.tensor([[0.5, 0.9, 1.0, 1.1, 1.5], [0.5, 0.9, 1.0, 1.1, 1.5]], dtype=torch.float64)
ADVANTAGES = torch.tensor([[2.0] * 5, [-2.0] * 5], dtype=torch.float64)


@pytest.mark.proves("policy_loss.reinforce", how="closed form", tolerance="1e-12")
def test_reinforce_is_minus_advantage_times_log_prob():
    value, slope, metrics = gradient(load_plugin("policy_loss", "reinforce"), RATIO, ADVANTAGES)
    close(value, -ADVANTAGES * (RATIO.log() - 1.5))
    close(slope, -ADVANTAGES)
    assert metrics == {}


@pytest.mark.proves("policy_loss.surrogate", how="closed form", tolerance="1e-12")
def test_surrogate_is_minus_ratio_times_advantage():
    value, slope, _ = gradient(load_plugin("policy_loss", "surrogate"), RATIO, ADVANTAGES)
    close(value, -RATIO * ADVANTAGES)
    close(slope, -RATIO * ADVANTAGES)


@pytest.mark.proves("policy_loss.dro", how="closed form", tolerance="1e-12")
def test_dro_is_the_regression_of_the_log_ratio_on_the_advantage():
    for beta in (0.1, 2.0):
        loss, d = load_plugin("policy_loss", "dro", beta=beta), RATIO.log()
        value, slope, metrics = gradient(loss, RATIO, ADVANTAGES)
        regression = (ADVANTAGES - beta * d) ** 2 / (2 * beta) - ADVANTAGES**2 / (2 * beta)
        close(value, regression + 1.5 * ADVANTAGES)  # -A log p_old, which has no gradient
        close(slope, beta * d - ADVANTAGES)
        close(metrics["squared_log_ratio"], d**2)


@pytest.mark.proves("policy_loss.ppo_clip", how="closed form", tolerance="1e-12")
def test_ppo_clip_has_its_closed_form():
    value, _, _ = gradient(load_plugin("policy_loss", "ppo_clip"), RATIO, ADVANTAGES)
    close(value, torch.tensor([[-1.0, -1.8, -2.0, -2.2, -2.4], [1.6, 1.8, 2.0, 2.2, 3.0]], dtype=torch.float64))


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.2, 0.28), (0.05, 0.6)])
def test_clipping_is_gradient_masking(low: float, high: float):
    generator = torch.Generator().manual_seed(0)
    ratio = (0.5 * torch.randn(50, 20, generator=generator, dtype=torch.float64)).exp()
    advantages = torch.randn(50, 20, generator=generator, dtype=torch.float64)
    clip = load_plugin("policy_loss", "ppo_clip", epsilon_low=low, epsilon_high=high)
    _, slope, metrics = gradient(clip, ratio, advantages)
    _, free, _ = gradient(load_plugin("policy_loss", "surrogate"), ratio, advantages)
    above, below = (advantages > 0) & (ratio > 1 + high), (advantages < 0) & (ratio < 1 - low)
    close(slope, free * ~(above | below))
    assert torch.equal(metrics["clip_frac/high"], above.double())
    assert torch.equal(metrics["clip_frac/low"], below.double())
    assert above.any()
    assert below.any()


@pytest.mark.parametrize("name", ["ppo_clip", "dual_clip", "clip_cov"])
def test_a_ratio_on_the_bound_keeps_its_gradient(name: str):
    clip = load_plugin("policy_loss", name, epsilon_low=0.5, epsilon_high=1.0)
    log_ratio, zero = torch.tensor([[2.0], [0.5]], dtype=torch.float64).log(), torch.zeros(2, 1, dtype=torch.float64)
    advantages = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    for beyond, kept in ((0.0, 1.0), (1e-6, 0.0)):
        logps = log_ratio + beyond * advantages
        _, slope, metrics = run(clip, logps, zero, advantages, torch.ones_like(zero))
        close(slope, -kept * logps.exp() * advantages)
        assert metrics["clip_frac/low"].sum() + metrics["clip_frac/high"].sum() == 2 * (1 - kept)


# What holds for every loss


@pytest.mark.parametrize(("name", "settings"), [variant for variant in VARIANTS if variant != PRODUCT], ids=str)
@pytest.mark.proves(
    "policy_loss.reinforce",
    "policy_loss.surrogate",
    "policy_loss.ppo_clip",
    "policy_loss.dual_clip",
    "policy_loss.cispo",
    "policy_loss.gspo",
    "policy_loss.gmpo",
    "policy_loss.sapo",
    "policy_loss.dppo_tv",
    "policy_loss.clip_cov",
    "policy_loss.kl_cov",
    "policy_loss.dro",
    "policy_loss.topr",
    "policy_loss.vespo",
    "policy_loss.trpo_penalty",
    how="closed form",
    tolerance="1e-12",
)
def test_at_ratio_1_every_loss_has_the_gradient_of_reinforce(name: str, settings: dict[str, Any]):
    """One advantage per row, tokens that weigh alike; the first advantage is positive, so its log-probs climb."""
    mask = torch.tensor([[1.0, 1, 0, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.float64)
    _, slope, _ = gradient(load_plugin("policy_loss", name, **settings), torch.ones_like(mask), ADVANTAGES * mask, mask)
    close(slope, -ADVANTAGES * mask)


@variants
def test_an_overflow_off_the_mask_stays_there(name: str, settings: dict[str, Any]):
    logps = torch.tensor([[-1.0, -1.0, 900.0]])
    mask = torch.tensor([[1.0, 1.0, 0.0]])
    plugin = load_plugin("policy_loss", name, **settings)
    loss, slope, metrics = run(plugin, logps, torch.tensor([[-1.0, -1.2, 0.0]]), mask, mask, mask)
    for x in (loss, slope, *metrics.values()):
        assert x.isfinite().all()
        assert x[0, 2] == 0


@variants
@pytest.mark.parametrize("advantage", [2.0, 0.0, -2.0])
def test_log_ratios_of_100_give_finite_losses_and_gradients(name: str, settings: dict[str, Any], advantage: float):
    logps = torch.tensor([[-101.0, -1.0], [-1.0, -1.0], [-101.0, -1.0], [-1.0, -1.0]])
    old_logps = torch.tensor([[-1.0, -1.0], [-101.0, -1.0], [-1.0, -101.0], [-101.0, -101.0]])
    ones = torch.ones(4, 2)
    plugin = load_plugin("policy_loss", name, **settings)
    for x in (y for y in run(plugin, logps, old_logps, advantage * ones, ones, ones) if isinstance(y, Tensor)):
        assert x.isfinite().all()


@variants
@pytest.mark.proves(
    "policy_loss.reinforce",
    "policy_loss.surrogate",
    "policy_loss.ppo_clip",
    "policy_loss.dual_clip",
    "policy_loss.cispo",
    "policy_loss.gspo",
    "policy_loss.gmpo",
    "policy_loss.sapo",
    "policy_loss.dppo_tv",
    "policy_loss.clip_cov",
    "policy_loss.kl_cov",
    "policy_loss.dro",
    "policy_loss.topr",
    "policy_loss.vespo",
    "policy_loss.trpo_penalty",
    how="invariance",
    tolerance="1e-12",
)
def test_rows_give_alone_what_they_give_together(name: str, settings: dict[str, Any]):
    generator = torch.Generator().manual_seed(0)
    ratio = (0.5 * torch.randn(6, 5, generator=generator, dtype=torch.float64)).exp()
    advantages = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    mask = (torch.rand(6, 5, generator=generator) > 0.3).double()
    old_logps = torch.full_like(ratio, -1.5)
    selected = (torch.rand(6, 5, generator=generator) > 0.5).double() * mask
    plugin = load_plugin("policy_loss", name, **settings)
    together = run(plugin, old_logps + ratio.log(), old_logps, advantages, mask, selected)
    for row in range(6):
        at = slice(row, row + 1)
        alone = run(plugin, (old_logps + ratio.log())[at], old_logps[at], advantages[at], mask[at], selected[at])
        close(alone[0], together[0][at])
        close(alone[1], together[1][at])
        for metric, x in together[2].items():
            close(alone[2][metric], x[at])
            assert x.shape == mask.shape
            assert (x[mask == 0] == 0).all()


def off_policy(name: str, **settings: Any) -> Any:
    """A function of log-probs for finite differences, far enough from old ones that clips bite, away from their edges."""
    generator = torch.Generator().manual_seed(3)
    old_logps = -0.5 - 2 * torch.rand(4, 5, generator=generator, dtype=torch.float64)
    advantages = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    mask = (torch.rand(4, 5, generator=generator) > 0.2).double()
    mask[:, 0] = 1
    logps = old_logps + 0.6 * torch.randn(4, 5, generator=generator, dtype=torch.float64)
    plugin = load_plugin("policy_loss", name, **settings)
    extras = {"selected": (old_logps < -1.5).double() * mask} if "selected" in plugin.needs else {}
    return lambda x: plugin(x, old_logps, advantages, mask, **extras)[0].sum(1), logps.requires_grad_()


SMOOTH = [
    ("surrogate", {}),
    ("ppo_clip", {}),
    ("dual_clip", {"c": 1.5}),
    ("gspo", {"epsilon_low": 0.2, "epsilon_high": 0.2}),
    ("gspo", {"epsilon_low": 0.2, "epsilon_high": 0.2, "ratio": "product"}),
]
SMOOTH += [("gmpo", {}), ("sapo", {}), ("kl_cov", {}), ("trpo_penalty", {}), ("trpo_penalty", {"reduce": "max"})]


@pytest.mark.parametrize(("name", "settings"), SMOOTH, ids=str)
def test_far_off_policy_the_gradient_is_that_of_the_value(name: str, settings: dict[str, Any]):
    assert torch.autograd.gradcheck(*off_policy(name, **settings), eps=1e-7, atol=1e-5)


def test_losses_that_stop_gradients_say_so():
    stopping = {name for name in LOSSES if load_plugin("policy_loss", name).stops_gradient}
    assert stopping == {"cispo", "gspo", "dppo_tv", "clip_cov", "topr", "vespo"}


# Settings


def steps(count: int, **others: Any) -> Any:
    return SimpleNamespace(steps_per_rollout=count, **others)


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - {"reinforce", "surrogate", "token_entropy"}))
def test_settings_that_cannot_bind_on_policy_are_remarked_on(name: str):
    plugin = load_plugin("policy_loss", name)
    assert "never bind" in next(iter(plugin.remarks(steps(1))))
    assert not list(plugin.remarks(steps(2)))


def test_reinforce_off_policy_is_remarked_on():
    reinforce = load_plugin("policy_loss", "reinforce")
    assert not list(reinforce.remarks(steps(1)))
    assert "4 optimizer steps" in next(iter(reinforce.remarks(steps(4))))


def test_only_reinforce_does_without_old_log_probs():
    needs = {name: load_plugin("policy_loss", name).needs for name in LOSSES}
    assert [name for name, needed in needs.items() if "old_logps" not in needed] == ["reinforce"]
    assert {name for name, needed in needs.items() if "selected" in needed} == {"clip_cov", "kl_cov", "token_entropy"}


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("ppo_clip", {"epsilon_low": 1.0}),
        ("ppo_clip", {"epsilon_low": -0.1}),
        ("ppo_clip", {"epsilon_high": 0}),
        ("dual_clip", {"c": 1.0}),
        ("cispo", {"epsilon_low": 1.5}),
        ("sapo", {"tau_positive": 0.0}),
        ("dppo_tv", {"c": 0.5}),
        ("clip_cov", {"fraction": 0.0}),
        ("kl_cov", {"fraction": 1.5}),
        ("trpo_penalty", {"target": 0.0}),
    ],
    ids=str,
)
def test_bounds_without_meaning_are_refused(name: str, wrong: dict[str, float]):
    with pytest.raises(Exception, match=next(iter(wrong))):
        load_plugin("policy_loss", name, **wrong)
