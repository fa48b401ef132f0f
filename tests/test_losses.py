"""Policy losses against closed forms."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_rlhf import load_plugin


def gradient(loss: Any, ratio: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Per-token loss, its slope in log p, and metrics, at these ratios p / p_old."""
    old_logps = torch.full_like(ratio, -1.5)
    logps = (old_logps + ratio.log()).requires_grad_()
    value, metrics = loss(logps, old_logps, advantages, torch.ones_like(ratio))
    (slope,) = torch.autograd.grad(value.sum(), logps)
    return value.detach(), slope, metrics


RATIO = torch.tensor([[0.5, 0.9, 1.0, 1.1, 1.5], [0.5, 0.9, 1.0, 1.1, 1.5]], dtype=torch.float64)
ADVANTAGES = torch.tensor([[2.0] * 5, [-2.0] * 5], dtype=torch.float64)


def test_reinforce_is_minus_advantage_times_log_prob():
    value, slope, metrics = gradient(load_plugin("policy_loss", "reinforce"), RATIO, ADVANTAGES)
    torch.testing.assert_close(value, -ADVANTAGES * (RATIO.log() - 1.5))
    torch.testing.assert_close(slope, -ADVANTAGES)
    assert metrics == {}


def test_surrogate_is_minus_ratio_times_advantage():
    value, slope, _ = gradient(load_plugin("policy_loss", "surrogate"), RATIO, ADVANTAGES)
    torch.testing.assert_close(value, -RATIO * ADVANTAGES)
    torch.testing.assert_close(slope, -RATIO * ADVANTAGES)


def test_ppo_clip_has_its_closed_form():
    value, _, _ = gradient(load_plugin("policy_loss", "ppo_clip"), RATIO, ADVANTAGES)
    want = [[-1.0, -1.8, -2.0, -2.2, -2.4], [1.6, 1.8, 2.0, 2.2, 3.0]]
    torch.testing.assert_close(value, torch.tensor(want, dtype=torch.float64))


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.2, 0.28), (0.05, 0.6)])
def test_clipping_is_gradient_masking(low: float, high: float):
    generator = torch.Generator().manual_seed(0)
    ratio = (0.5 * torch.randn(50, 20, generator=generator, dtype=torch.float64)).exp()
    advantages = torch.randn(50, 20, generator=generator, dtype=torch.float64)
    clip = load_plugin("policy_loss", "ppo_clip", epsilon_low=low, epsilon_high=high)
    _, slope, metrics = gradient(clip, ratio, advantages)
    _, free, _ = gradient(load_plugin("policy_loss", "surrogate"), ratio, advantages)
    above, below = (advantages > 0) & (ratio > 1 + high), (advantages < 0) & (ratio < 1 - low)
    torch.testing.assert_close(slope, free * ~(above | below))
    assert torch.equal(metrics["clip_frac_high"], above.double())
    assert torch.equal(metrics["clip_frac_low"], below.double())
    assert above.any()
    assert below.any()


def test_at_ratio_1_all_losses_have_the_gradient_of_reinforce():
    ones = torch.ones_like(ADVANTAGES)
    for name in ("reinforce", "surrogate", "ppo_clip"):
        torch.testing.assert_close(gradient(load_plugin("policy_loss", name), ones, ADVANTAGES)[1], -ADVANTAGES)


@pytest.mark.parametrize("name", ["surrogate", "ppo_clip"])
def test_an_overflow_off_the_mask_stays_there(name: str):
    logps = torch.tensor([[-1.0, -1.0, 900.0]], requires_grad=True)
    mask = torch.tensor([[1.0, 1.0, 0.0]])
    loss, _ = load_plugin("policy_loss", name)(logps, torch.tensor([[-1.0, -1.2, 0.0]]), mask, mask)
    (slope,) = torch.autograd.grad(loss.sum(), logps)
    assert loss.isfinite().all()
    assert slope.isfinite().all()
    assert slope[0, 2] == 0


def steps(count: int) -> Any:
    return SimpleNamespace(steps_per_rollout=count)


def test_bounds_that_cannot_bind_are_remarked_on():
    clip = load_plugin("policy_loss", "ppo_clip")
    assert "never bind" in next(iter(clip.remarks(steps(1))))
    assert not list(clip.remarks(steps(2)))


def test_reinforce_off_policy_is_remarked_on():
    reinforce = load_plugin("policy_loss", "reinforce")
    assert not list(reinforce.remarks(steps(1)))
    assert "4 optimizer steps" in next(iter(reinforce.remarks(steps(4))))


def test_only_reinforce_does_without_old_log_probs():
    needs = {name: load_plugin("policy_loss", name).needs for name in ("reinforce", "surrogate", "ppo_clip")}
    assert needs == {"reinforce": frozenset(), "surrogate": {"old_logps"}, "ppo_clip": {"old_logps"}}


@pytest.mark.parametrize("wrong", [{"epsilon_low": 1.0}, {"epsilon_low": -0.1}, {"epsilon_high": 0}])
def test_bounds_without_meaning_are_refused(wrong: dict[str, float]):
    with pytest.raises(Exception, match=next(iter(wrong))):
        load_plugin("policy_loss", "ppo_clip", **wrong)
