"""KL estimators and placements: values, slopes, penalties, refusals, remarks."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_rlhf import load_plugin
from hf_rlhf.axes import KLEstimator
from tests.helpers import runs

ANY: Any = SimpleNamespace(kl=[], steps_per_rollout=1)
LATER: Any = SimpleNamespace(kl=[], steps_per_rollout=4)
PLACEMENTS = ["in_advantage", "in_loss", "in_reward", "monitor"]
WITH_BETA = ["in_advantage", "in_loss", "in_reward"]
RHO = 1.5


def at(name: str, log_ratio: float) -> tuple[float, float]:
    """Value and slope of an estimator at l = log p - log p_ref, where rho is RHO."""
    logps = torch.tensor([-1.0 + log_ratio], dtype=torch.float64, requires_grad=True)
    estimator = load_plugin("kl_estimator", name)
    known = {"old_logps": logps.detach() - torch.tensor(RHO).double().log()} if estimator.needs else {}
    kl = estimator(logps, torch.tensor([-1.0], dtype=torch.float64), **known)
    (slope,) = torch.autograd.grad(kl.sum(), logps)
    return kl.item(), slope.item()


@pytest.mark.proves("kl_estimator.k1", "kl_estimator.k2", "kl_estimator.k3", how="closed form", tolerance="1e-12")
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


@pytest.mark.proves("kl_estimator.abs", "kl_estimator.k3_plus", how="closed form", tolerance="1e-12")
@pytest.mark.parametrize(
    ("name", "log_ratio", "value", "slope"),
    [
        ("abs", 0.5, 0.5, 1.0),
        ("abs", -2.0, 2.0, -1.0),
        ("abs", 0.0, 0.0, 0.0),
        ("k3_plus", 0.5, 0.10653065971263342, 0.5),
        ("k3_plus", -0.5, 0.14872127070012815, -0.5),
    ],
)
def test_the_size_and_the_straight_through_estimator_have_their_closed_form(
    name: str, log_ratio: float, value: float, slope: float
):
    assert at(name, log_ratio) == pytest.approx((value, slope), rel=1e-12, abs=1e-15)


@pytest.mark.proves("kl_estimator.k1_is", "kl_estimator.k3_is", how="closed form", tolerance="1e-12")
@pytest.mark.parametrize(("name", "plain"), [("k1_is", "k1"), ("k3_is", "k3")])
@pytest.mark.parametrize("log_ratio", [-1.5, -0.1, 0.4, 2.0])
def test_with_the_ratio_value_and_slope_are_those_of_a_product(name: str, plain: str, log_ratio: float):
    value, slope = at(plain, log_ratio)
    assert at(name, log_ratio) == pytest.approx((RHO * value, RHO * (value + slope)), rel=1e-12)


def test_k3_plus_is_k3_to_the_last_digit_with_the_slope_of_k2():
    logps = (3 * torch.randn(1000, generator=torch.Generator().manual_seed(0))).requires_grad_()
    estimators = {name: load_plugin("kl_estimator", name) for name in ("k2", "k3", "k3_plus")}
    values = {name: e(logps, torch.zeros(1000)) for name, e in estimators.items()}
    assert torch.equal(values["k3_plus"], values["k3"])
    slopes = {name: torch.autograd.grad(x.sum(), logps)[0] for name, x in values.items()}
    assert torch.equal(slopes["k3_plus"], slopes["k2"])
    assert load_plugin("kl_estimator", "k3_plus").stops_gradient


def distributions(n: int = 6, vocabulary: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, n, vocabulary, generator=generator, dtype=torch.float64)
    return tuple(logits.log_softmax(-1))  # type: ignore[return-value]


@pytest.mark.proves("kl_estimator.exact", how="closed form", tolerance="1e-12")
def test_exact_is_the_kl_of_the_distributions_and_its_gradient():
    p, q = distributions()
    logits = p.clone().requires_grad_()
    kl = load_plugin("kl_estimator", "exact")(logits.log_softmax(-1), q)
    want = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q)
    )
    torch.testing.assert_close(kl, want, rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(kl.sum(), logits)
    torch.testing.assert_close(gradient, p.exp() * ((p - q) - want[:, None]), rtol=1e-12, atol=1e-14)


def test_exact_counts_a_token_that_the_policy_never_gives_as_0():
    p, q = distributions(n=2)
    p = p.masked_fill(torch.tensor([False, False, True, False, False]), float("-inf")).log_softmax(-1).requires_grad_()
    for reference in (q, q.masked_fill(torch.isinf(p), float("-inf"))):
        kl = load_plugin("kl_estimator", "exact")(p, reference)
        kept = p[:, [0, 1, 3, 4]]
        torch.testing.assert_close(kl, (kept.exp() * (kept - reference[:, [0, 1, 3, 4]])).sum(1))
        (gradient,) = torch.autograd.grad(kl.sum(), p)
        assert gradient.isfinite().all()


def estimate(name: str, p: torch.Tensor, q: torch.Tensor, **settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The values (n,) and their gradient in the logits (n, V)."""
    logits = p.clone().requires_grad_()
    value = load_plugin("kl_estimator", name, **settings)(logits.log_softmax(-1), q)
    return value.detach(), torch.autograd.grad(value.sum(), logits)[0]


@pytest.mark.proves("kl_estimator.forward", how="closed form", tolerance="1e-12")
def test_forward_is_the_kl_the_other_way_round_and_its_gradient_that_of_the_cross_entropy():
    p, q = distributions()
    value, gradient = estimate("forward", p, q)
    torch.testing.assert_close(value, load_plugin("kl_estimator", "exact")(q, p), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, p.exp() - q.exp(), rtol=1e-12, atol=1e-14)


@pytest.mark.proves("kl_estimator.jsd", how="closed form", tolerance="1e-12")
@pytest.mark.parametrize("beta", [1e-6, 0.01, 0.1, 0.5, 0.9, 0.99, 1 - 1e-6])
def test_jsd_is_the_mean_kl_to_the_mixture_and_its_gradient(beta: float):
    p, q = distributions()
    value, gradient = estimate("jsd", p, q, beta=beta)
    m = (beta * q.exp() + (1 - beta) * p.exp()).log()
    of_policy = (p.exp() * (p - m)).sum(1)
    want = beta * (q.exp() * (q - m)).sum(1) + (1 - beta) * of_policy
    torch.testing.assert_close(value, want, rtol=1e-12, atol=1e-15)
    slope = (1 - beta) * p.exp() * ((p - m) - of_policy[:, None])  # the mixture's own gradient cancels
    torch.testing.assert_close(gradient, slope, rtol=1e-12, atol=1e-15)
    normalized, its_gradient = estimate("jsd", p, q, beta=beta, normalize=True)
    torch.testing.assert_close(normalized, want / (beta * (1 - beta)), rtol=1e-8, atol=0)
    torch.testing.assert_close(its_gradient * beta * (1 - beta), gradient, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("beta", "end"), [(0.0, "forward"), (1.0, "exact")])
def test_jsd_ends_at_the_forward_and_the_reverse_kl_which_it_approaches_if_it_is_normalized(
    beta: float, end: str, dtype: torch.dtype
):
    p, q = (x.to(dtype) for x in distributions())
    value, gradient = estimate(end, p, q)
    for settings in ({}, {"normalize": True}):
        for got, want in zip(estimate("jsd", p, q, beta=beta, **settings), (value, gradient), strict=True):
            assert torch.equal(got, want)
    near = abs(beta - 1e-5)
    for got, want in zip(estimate("jsd", p, q, beta=near, normalize=True), (value, gradient), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    assert bool((estimate("jsd", p, q, beta=near)[0] < 1e-3 * value).all()), "without it the value jumps at the end"


@pytest.mark.parametrize("beta", [0.0, 0.01, 0.3, 0.5, 1.0])
def test_jsd_is_what_trl_computes(beta: float):
    gkd = pytest.importorskip("trl.experimental.gkd")
    p, q = distributions()
    logits = p.clone().requires_grad_()
    theirs = gkd.GKDTrainer.generalized_jsd_loss(logits[None], q[None], beta=beta, reduction="none").sum(-1)[0]
    value, gradient = estimate("jsd", p, q, beta=beta)
    torch.testing.assert_close(value, theirs.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, torch.autograd.grad(theirs.sum(), logits)[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("settings", [{}, {"normalize": True}])
@pytest.mark.parametrize("beta", [0.001, 0.5, 0.999])
def test_jsd_is_finite_where_one_side_or_both_exclude_a_token(beta: float, settings: dict[str, Any]):
    p, q = distributions(n=2)
    p[0, 1] = q[0, 1] = p[0, 2] = q[1, 3] = float("-inf")
    value, gradient = estimate("jsd", p.log_softmax(-1), q.log_softmax(-1), beta=beta, **settings)
    assert value.isfinite().all()
    assert gradient.isfinite().all()
    mine, its = p.log_softmax(-1).exp(), q.log_softmax(-1).exp()
    m = beta * its + (1 - beta) * mine
    want = beta * torch.xlogy(its, its / m).nan_to_num() + (1 - beta) * torch.xlogy(mine, mine / m).nan_to_num()
    torch.testing.assert_close(value * (beta * (1 - beta) if settings else 1), want.sum(1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("far", [1e3, 1e30])
def test_jsd_does_not_overflow_far_from_the_reference(far: float):
    p = torch.tensor([[0.0, -far], [-far, 0.0]]).log_softmax(-1)
    for beta in (1e-3, 0.5, 1 - 1e-3):
        value, gradient = estimate("jsd", p, p.flip(0), beta=beta)
        entropy = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
        assert value.tolist() == pytest.approx([entropy] * 2, rel=1e-5)
        assert gradient.isfinite().all()


DIVERGENCES: list[tuple[str, dict[str, Any]]] = [
    ("exact", {}),
    ("forward", {}),
    ("jsd", {"beta": 0.3}),
    ("jsd", {"beta": 0.9, "normalize": True}),
]


@pytest.mark.parametrize(("name", "settings"), DIVERGENCES)
def test_over_the_top_k_it_is_a_lower_bound_that_rises_to_the_divergence(name: str, settings: dict[str, Any]):
    p, q = distributions(n=50, vocabulary=12)
    values = [estimate(name, p, q, top_k=k, **settings)[0] for k in (*range(1, 13), 40)]
    for fewer, more in itertools.pairwise(values):
        assert bool((fewer <= more + 1e-12).all())
    whole, gradient = estimate(name, p, q, **settings)
    assert torch.equal(values[-1], whole)
    for k in (11, 12):  # a single token is left for the bucket, or none
        for got, want in zip(estimate(name, p, q, top_k=k, **settings), (whole, gradient), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    assert bool((values[0] < whole).all())


def test_the_top_k_are_the_references_and_the_others_share_one_bucket_without_a_gradient_between_them():
    p = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64).log()
    q = torch.tensor([[0.6, 0.25, 0.1, 0.05]], dtype=torch.float64).log()
    value, gradient = estimate("exact", p, q, top_k=2)
    want = 0.1 * math.log(0.1 / 0.6) + 0.2 * math.log(0.2 / 0.25) + 0.7 * math.log(0.7 / 0.15)
    assert value.item() == pytest.approx(want, rel=1e-12)
    assert (gradient[0, 2] / gradient[0, 3]).item() == pytest.approx(0.3 / 0.4, rel=1e-9), "the bucket keeps its shares"


@pytest.mark.parametrize(("name", "settings"), DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_bucket_that_rounding_empties_is_finite(name: str, settings: dict[str, Any], dtype: torch.dtype):
    sure, even = torch.tensor([[0.0, -60.0, -70.0]], dtype=dtype), torch.zeros(1, 3, dtype=dtype).log_softmax(-1)
    for p, q in ((sure, even), (even, sure), (sure, sure)):
        for x in estimate(name, p.log_softmax(-1), q.log_softmax(-1), top_k=1, **settings):
            assert x.isfinite().all()


def test_near_the_ends_without_normalize_the_plan_says_that_the_divergence_jumps():
    assert "jumps" in " ".join(load_plugin("kl_estimator", "jsd", beta=0.01).remarks(ANY))
    for settings in ({"beta": 0.01, "normalize": True}, {"beta": 0.5}, {"beta": 0}, {"beta": 1}):
        assert not list(load_plugin("kl_estimator", "jsd", **settings).remarks(ANY))


@pytest.mark.parametrize("name", ["abs", "k2", "k3", "k3_plus", "k3_is"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_cannot_be_negative_is_not(name: str, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    estimator = load_plugin("kl_estimator", name)
    for scale in (1e-8, 1e-4, 1e-2, 1.0, 10.0):
        log_ratio = scale * torch.randn(100_000, generator=generator, dtype=dtype)
        known = {"old_logps": log_ratio - 0.3} if estimator.needs else {}
        assert (estimator(log_ratio, torch.zeros_like(log_ratio), **known) >= 0).all()


def test_k3_keeps_its_digits_near_zero():
    log_ratio = torch.tensor([1e-3, -1e-3])
    k3 = load_plugin("kl_estimator", "k3")(log_ratio, torch.zeros(2))
    torch.testing.assert_close(k3, torch.tensor([4.998334e-7, 5.001667e-7]), rtol=2e-4, atol=0)


# Placements


@pytest.mark.parametrize("name", WITH_BETA)
def test_a_penalty_is_beta_times_the_kl_in_its_shape(name: str):
    placement = load_plugin("kl", name, beta=0.5)
    for kl in (torch.rand(3, 4), torch.rand(3)):
        for place in placement.places:
            torch.testing.assert_close(getattr(placement, f"{place}_penalty")(kl), 0.5 * kl)


def test_each_placement_enters_where_its_name_says():
    assert load_plugin("kl", "in_reward").places == {"reward"}
    assert load_plugin("kl", "in_loss").places == {"loss"}
    assert load_plugin("kl", "in_advantage").places == {"advantage"}
    assert load_plugin("kl", "monitor").places == frozenset()


def test_placements_have_the_estimator_that_suits_them():
    names = {name: load_plugin("kl", name).estimator.name for name in PLACEMENTS}
    assert names == {"in_advantage": "k1", "in_loss": "k3", "in_reward": "k1", "monitor": "k1"}
    assert {name: load_plugin("kl", name).beta for name in WITH_BETA} == {
        "in_advantage": 0.05,
        "in_loss": 0.04,
        "in_reward": 0.05,
    }


@pytest.mark.parametrize("name", PLACEMENTS)
def test_at_level_sequence_the_estimator_sees_the_sums_over_the_mask(name: str):
    logps, ref_logps = -torch.rand(2, 4, dtype=torch.float64), -torch.rand(2, 4, dtype=torch.float64)
    mask = torch.tensor([[1.0, 1, 0, 1], [1, 1, 0, 0]], dtype=torch.float64)
    placement = load_plugin("kl", name, estimator="k2", level="sequence")
    want = ((logps - ref_logps) * mask).sum(1) ** 2 / 2
    torch.testing.assert_close(placement.measure(logps, ref_logps, mask), want)


def test_at_level_sequence_the_ratio_is_that_of_the_whole_row():
    logps, ref_logps, old = (-torch.rand(2, 4, dtype=torch.float64) for _ in range(3))
    mask = torch.tensor([[1.0, 1, 0, 1], [1, 1, 0, 0]], dtype=torch.float64)
    placement = load_plugin("kl", "in_loss", estimator="k1_is", level="sequence")
    want = ((logps - old) * mask).sum(1).exp() * ((logps - ref_logps) * mask).sum(1)
    torch.testing.assert_close(placement.measure(logps, ref_logps, mask, old_logps=old), want)


@pytest.mark.proves("kl.monitor", how="closed form", tolerance="0")
@pytest.mark.parametrize("name", PLACEMENTS)
def test_a_clamp_limits_the_value_and_stops_the_gradient_beyond(name: str):
    placement = load_plugin("kl", name, estimator="k2", clamp=0.5)
    logps = torch.tensor([[0.5, 3.0]], requires_grad=True)
    kl = placement.measure(logps, torch.zeros(1, 2), torch.ones(1, 2))
    assert kl.tolist() == [[0.125, 0.5]]
    (gradient,) = torch.autograd.grad(kl.sum(), logps)
    assert gradient.tolist() == [[0.5, 0.0]]


def collected(folder: Path, **parts: Any) -> dict[str, torch.Tensor]:
    """The rows of a rollout by a policy that has left its reference."""
    made = runs.trainer(folder, dtype=torch.float64, reference=parts.pop("reference", "frozen"), **parts)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    rows = made.collector.collect(0).rows
    made.close()
    return rows


@pytest.mark.proves("kl.in_advantage", how="closed form", tolerance="1e-12")
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_in_the_advantage_each_token_pays_for_itself_or_for_its_row_after_the_estimator(tmp_path: Path, level: str):
    placement = {"use": "in_advantage", "beta": 0.7, "level": level}
    rows = collected(tmp_path, kl=[placement])
    plain = collected(tmp_path, kl=["monitor"])
    kl = (rows["old_logps"] - rows["ref_logps"]) * rows["mask"]
    assert kl.abs().max() > 0.1
    paid = kl if level == "token" else kl.sum(1, keepdim=True) * rows["mask"]
    torch.testing.assert_close(rows["advantages"], plain["advantages"] - 0.7 * paid, rtol=1e-12, atol=1e-12)


# Refusals


def test_k1_in_the_loss_is_refused_with_what_to_write_instead():
    (problem,) = load_plugin("kl", "in_loss", estimator="k1").check(ANY)
    assert "expected gradient 0" in problem
    for fix in ("k2", "k3", "k1_is", "in_reward"):
        assert fix in problem


@pytest.mark.parametrize("estimator", ["abs", "k2", "k3", "k3_plus", "k3_is", "k1_is"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_curved_estimators_in_the_loss_are_accepted(estimator: str, level: str):
    assert not list(load_plugin("kl", "in_loss", estimator=estimator, level=level).check(ANY))


class Doubled(KLEstimator):
    """2 l."""

    name = "doubled"

    def __call__(self, logps: torch.Tensor, ref_logps: torch.Tensor) -> torch.Tensor:
        return 2 * (logps - ref_logps)


class Fourth(KLEstimator):
    """l^4, whose gradient is that of no divergence."""

    name = "fourth"

    def __call__(self, logps: torch.Tensor, ref_logps: torch.Tensor) -> torch.Tensor:
        return (logps - ref_logps) ** 4


class Renyi(KLEstimator):
    """Another divergence of whole distributions."""

    name = "renyi"
    needs = frozenset({"full_distribution"})

    def __call__(self, logps: torch.Tensor, ref_logps: torch.Tensor) -> torch.Tensor:
        return -2 * ((logps + ref_logps) / 2).logsumexp(-1)


class Guarded(KLEstimator):
    """k2 where the policy is unsure."""

    name = "guarded"
    needs = frozenset({"entropy"})

    def __call__(self, logps: torch.Tensor, ref_logps: torch.Tensor, *, entropy: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return entropy * (logps - ref_logps) ** 2


def test_a_strangers_linear_estimator_in_the_loss_is_refused_too():
    (problem,) = load_plugin("kl", "in_loss", estimator=Doubled()).check(ANY)
    assert problem.startswith("doubled in the loss")


@pytest.mark.parametrize("estimator", ["exact", Renyi()])
def test_in_the_advantage_what_depends_on_the_state_alone_is_refused(estimator: Any):
    (problem,) = load_plugin("kl", "in_advantage", estimator=estimator).check(ANY)
    assert "expected gradient 0" in problem
    assert "baseline" in problem
    assert "use=in_loss" in problem
    assert not list(load_plugin("kl", "in_advantage", estimator="k3").check(ANY))


@pytest.mark.parametrize("name", PLACEMENTS)
def test_whole_distributions_have_no_sequence_level(name: str):
    chosen = runs.recipe(kl=[{"use": name, "estimator": "exact", "level": "sequence"}], reference="frozen").algorithm()
    (problem,) = [text for text in chosen.problems() if "sequence level" in text]
    assert "exact" in problem
    assert "level=token" in problem


@pytest.mark.parametrize("name", WITH_BETA)
def test_beta_0_is_refused_with_what_to_write_instead(name: str):
    (problem,) = load_plugin("kl", name, beta=0).check(ANY)
    assert "monitor" in problem
    assert "Set beta=" in problem


# Remarks


def remarks(name: str, algorithm: Any = ANY, **settings: Any) -> str:
    return "\n".join(load_plugin("kl", name, **settings).remarks(algorithm))


@pytest.mark.parametrize("name", PLACEMENTS)
def test_the_exponential_of_a_sum_is_remarked_on(name: str):
    for estimator, level, remarked in [
        ("k3", "sequence", True),
        ("k3_is", "sequence", True),
        ("k3", "token", False),
        ("k2", "sequence", False),
        ("k1_is", "sequence", False),
    ]:
        assert ("exponential of a sum" in remarks(name, estimator=estimator, level=level)) is remarked


@pytest.mark.parametrize("name", PLACEMENTS)
def test_a_clamp_is_remarked_on(name: str):
    assert "clamp=3 biases" in remarks(name, clamp=3)


REVERSE, FORWARD, L1 = (
    "KL(policy || reference)",
    "KL(reference || policy)",
    "the L1 distance (twice the total variation)",
)
STATES = " state by state, with the visited states held fixed"
EXPECTED = [
    # placement, estimator, level, the gradient that is expected; None where it is the KL's
    ("in_reward", "k1", "token", None),
    ("in_reward", "k1", "sequence", None),
    ("in_reward", "k2", "token", f"its mean minus that of {REVERSE}{STATES}"),
    ("in_reward", "k2", "sequence", f"its mean minus that of {REVERSE}, "),
    ("in_reward", "k3", "token", f"the KL minus that of {FORWARD}{STATES}"),
    ("in_reward", "k3", "sequence", f"the KL minus that of {FORWARD}, "),
    ("in_reward", "k3_plus", "token", f"the KL minus that of {FORWARD}{STATES}"),
    ("in_reward", "abs", "token", f"its mean minus that of {L1}{STATES}"),
    ("in_reward", "exact", "token", f"the KL minus that of {REVERSE}{STATES}"),
    ("in_advantage", "k1", "token", f"that of {REVERSE}{STATES}"),
    ("in_advantage", "k1", "sequence", None),
    ("in_advantage", "k3", "token", f"the KL minus that of {FORWARD}{STATES}"),
    ("in_loss", "k2", "token", f"that of {REVERSE}{STATES}, not that of the KL (level=sequence gives it)"),
    ("in_loss", "k3_plus", "token", f"that of {REVERSE}{STATES}"),
    ("in_loss", "k1_is", "token", f"that of {REVERSE}{STATES}"),
    ("in_loss", "k3_is", "token", f"that of {REVERSE}{STATES}"),
    ("in_loss", "exact", "token", f"that of {REVERSE}{STATES}, not that of the KL"),
    ("in_loss", "k3", "token", f"that of {FORWARD}{STATES}"),
    ("in_loss", "abs", "token", f"that of {L1}{STATES}"),
    ("in_loss", "k2", "sequence", None),
    ("in_loss", "k3_plus", "sequence", None),
    ("in_loss", "k1_is", "sequence", None),
    ("in_loss", "k3_is", "sequence", None),
    ("in_loss", "k3", "sequence", f"that of {FORWARD}, not that of {REVERSE}"),
    ("in_loss", "abs", "sequence", f"that of {L1}, not that of {REVERSE}"),
]


@pytest.mark.parametrize(("name", "estimator", "level", "text"), EXPECTED)
def test_the_plan_names_the_gradient_that_is_expected(name: str, estimator: str, level: str, text: str | None):
    said = remarks(name, estimator=estimator, level=level)
    if text is None:
        assert "expected gradient" not in said
    else:
        assert text in said


def test_what_a_stranger_brings_is_tried_and_not_looked_up():
    assert f"that of renyi{STATES}" in remarks("in_loss", estimator=Renyi())
    assert "that of none of the known divergences" in remarks("in_loss", estimator=Fourth())
    assert "needs entropy, so its expected gradient is unknown" in remarks("in_loss", estimator=Guarded())
    assert "that of its mean minus that of doubled in the loss" in remarks("in_reward", estimator=Doubled())


def test_the_two_halves_of_a_gradient_are_not_remarked_on():
    def said(estimator: str, **others: Any) -> list[str]:
        in_reward = load_plugin("kl", "in_reward", estimator=estimator, beta=0.1)
        in_loss = load_plugin("kl", "in_loss", **{"estimator": estimator, "beta": 0.1, **others})
        both: Any = SimpleNamespace(kl=[in_reward, in_loss], steps_per_rollout=1)
        return [text for kl in both.kl for text in kl.remarks(both)]

    assert said("k3") == said("exact") == []
    assert len(said("k2")) == 2, "together they are the gradient of E[k2], not of the KL"
    assert len(said("k3_plus")) == 2
    assert len(said("k3", beta=0.2)) == 2
    assert len(said("k3", level="sequence")) == 3
    assert len(said("k3", controller="adaptive")) == 2


@pytest.mark.parametrize(
    ("estimator", "biased"),
    [("k2", True), ("k3", True), ("k3_plus", True), ("abs", True), ("k1_is", False), ("k3_is", False)],
)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_in_the_loss_only_the_ratio_survives_further_optimizer_steps(estimator: str, level: str, biased: bool):
    chosen = {"estimator": estimator, "level": level}
    assert ("4 optimizer steps per rollout" in remarks("in_loss", LATER, **chosen)) is biased
    assert "optimizer steps per rollout" not in remarks("in_loss", ANY, **chosen)


def test_exact_needs_no_ratio_as_no_token_is_sampled_in_it():
    assert "optimizer steps per rollout" not in remarks("in_loss", LATER, estimator="exact")


@pytest.mark.parametrize("name", ["in_reward", "in_advantage"])
def test_a_ratio_that_is_always_1_is_remarked_on(name: str):
    assert "its ratio is always 1 there" in remarks(name, estimator="k1_is")
    assert "its ratio" not in remarks(name, estimator="k3")
