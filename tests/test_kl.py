"""KL estimators and placements: values, gradients, refusals."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_rlhf import load_plugin
from hf_rlhf.axes import KLEstimator

ANY: Any = SimpleNamespace()


def at(name: str, log_ratio: float) -> tuple[float, float]:
    """Value and slope of an estimator at l = log p - log p_ref."""
    logps = torch.tensor([-1.0 + log_ratio], dtype=torch.float64, requires_grad=True)
    kl = load_plugin("kl_estimator", name)(logps, torch.tensor([-1.0], dtype=torch.float64))
    (slope,) = torch.autograd.grad(kl.sum(), logps)
    return kl.item(), slope.item()


@pytest.mark.parametrize(
    ("name", "log_ratio", "value", "slope"),
    [
        ("k1", 0.5, 0.5, 1.0),
        ("k1", -0.5, -0.5, 1.0),
        ("k2", 0.5, 0.125, 0.5),
        ("k2", -2.0, 2.0, -2.0),
        ("k3", 0.5, 0.10653065971263342, 0.3934693402873666),
        ("k3", -0.5, 0.14872127070012815, -0.6487212707001282),
    ],
)
def test_estimators_have_their_closed_form(name: str, log_ratio: float, value: float, slope: float):
    assert at(name, log_ratio) == pytest.approx((value, slope), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_k3_is_never_negative(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    k3 = load_plugin("kl_estimator", "k3")
    for scale in (1e-8, 1e-4, 1e-2, 1.0, 10.0):
        log_ratio = scale * torch.randn(100_000, generator=generator, dtype=dtype)
        assert (k3(log_ratio, torch.zeros_like(log_ratio)) >= 0).all()


def test_k3_keeps_its_digits_near_zero():
    log_ratio = torch.tensor([1e-3, -1e-3])
    k3 = load_plugin("kl_estimator", "k3")(log_ratio, torch.zeros(2))
    torch.testing.assert_close(k3, torch.tensor([4.998334e-7, 5.001667e-7]), rtol=2e-4, atol=0)


@pytest.mark.parametrize("name", ["in_reward", "in_loss"])
def test_a_penalty_is_beta_times_the_kl_in_its_shape(name: str):
    placement = load_plugin("kl", name, beta=0.5)
    for kl in (torch.rand(3, 4), torch.rand(3)):
        for place in placement.places:
            torch.testing.assert_close(getattr(placement, f"{place}_penalty")(kl), 0.5 * kl)


def test_each_placement_enters_where_its_name_says():
    assert load_plugin("kl", "in_reward").places == {"reward"}
    assert load_plugin("kl", "in_loss").places == {"loss"}
    assert load_plugin("kl", "monitor").places == frozenset()


def test_placements_have_the_estimator_that_suits_them():
    names = {name: load_plugin("kl", name).estimator.name for name in ("in_reward", "in_loss", "monitor")}
    assert names == {"in_reward": "k1", "in_loss": "k3", "monitor": "k1"}
    assert (load_plugin("kl", "in_reward").beta, load_plugin("kl", "in_loss").beta) == (0.05, 0.04)


def test_at_level_sequence_the_estimator_sees_the_sums_over_the_mask():
    logps, ref_logps = -torch.rand(2, 4, dtype=torch.float64), -torch.rand(2, 4, dtype=torch.float64)
    mask = torch.tensor([[1.0, 1, 0, 1], [1, 1, 0, 0]], dtype=torch.float64)
    placement = load_plugin("kl", "in_loss", estimator="k2", level="sequence")
    want = ((logps - ref_logps) * mask).sum(1) ** 2 / 2
    torch.testing.assert_close(placement.measure(logps, ref_logps, mask), want)


def test_k1_in_the_loss_is_refused_with_what_to_write_instead():
    (problem,) = load_plugin("kl", "in_loss", estimator="k1").check(ANY)
    assert "expected gradient 0" in problem
    for fix in ("k2", "k3", "in_reward"):
        assert fix in problem


@pytest.mark.parametrize("estimator", ["k2", "k3"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_curved_estimators_in_the_loss_are_accepted(estimator: str, level: str):
    assert not list(load_plugin("kl", "in_loss", estimator=estimator, level=level).check(ANY))


def test_a_strangers_linear_estimator_in_the_loss_is_refused_too():
    class Doubled(KLEstimator):
        name = "doubled"

        def __call__(self, logps: torch.Tensor, ref_logps: torch.Tensor) -> torch.Tensor:
            return 2 * (logps - ref_logps)

    (problem,) = load_plugin("kl", "in_loss", estimator=Doubled()).check(ANY)
    assert problem.startswith("doubled in the loss")


@pytest.mark.parametrize("name", ["in_reward", "in_loss"])
def test_beta_0_is_refused_with_what_to_write_instead(name: str):
    (problem,) = load_plugin("kl", name, beta=0).check(ANY)
    assert "monitor" in problem
    assert "kl=[]" in problem


@pytest.mark.parametrize("name", ["in_reward", "in_loss", "monitor"])
def test_the_exponential_of_a_sum_is_remarked_on(name: str):
    def remarked(estimator: str, level: str) -> bool:
        placement = load_plugin("kl", name, estimator=estimator, level=level)
        return any("exponential of a sum" in remark for remark in placement.remarks(ANY))

    assert remarked("k3", "sequence")
    assert not remarked("k3", "token")
    assert not remarked("k2", "sequence")


def test_only_k1_in_the_reward_passes_without_a_remark():
    assert not list(load_plugin("kl", "in_reward").remarks(ANY))
    assert any("alone" in remark for remark in load_plugin("kl", "in_reward", estimator="k3").remarks(ANY))
