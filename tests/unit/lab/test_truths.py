"""Expected gradients, exactly: the KL. The lab enumerates every group of every completion of a small policy in float64.

Three tokens, at most three of them: 15 completions. The expectations that they are compared with are written out in
`truths` and here. Unless said otherwise: on-policy, gamma 1, no clamp, aggregation seq_mean_token_sum.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_rlhf.batch import Scored
from hf_rlhf.lab.distillation import forms, gaps
from hf_rlhf.lab.study import Lab, Verdict
from hf_rlhf.lab.world import Policies, World
from hf_rlhf.training.losses import at_last_token
from tests.helpers.truths import (
    BETA,
    K1,
    Plugins,
    Truth,
    ascent,
    close,
    differs,
    kl,
    lab,
    made,
    of_the_kl,
    study,
    truth,
)

# k1 in the reward


EXACT_ESTIMATORS: dict[str, Plugins] = {
    "reinforce": "reinforce",
    "reward_to_go": "reward_to_go",
    "leave_one_out": "leave_one_out",
    "the others' mean": {"use": "baseline", "baseline": "others_mean"},
    "a constant": {"use": "baseline", "baseline": {"use": "constant", "value": 0.7}},
    "an average of earlier rollouts": {"use": "baseline", "baseline": "ema"},
    "the greedy return": "remax",
    "a critic": {"use": "baseline", "baseline": "critic"},
    "gae of one step": {"use": "gae", "lam": 0.0},
    "gae": {"use": "gae", "lam": 0.6},
    "opo without the own row": {"use": "opo", "leave_one_out": True},
    "otb without the own row": {"use": "optimal_token_baseline", "leave_one_out": True},
}


@pytest.mark.proves(
    "advantages.reinforce",
    "advantages.reward_to_go",
    "advantages.leave_one_out",
    "advantages.baseline",
    "advantages.remax",
    "advantages.gae",
    "advantages.opo",
    "advantages.optimal_token_baseline",
    "baseline.constant",
    "baseline.critic",
    "baseline.ema",
    "baseline.greedy",
    "baseline.others_mean",
    "kl.in_reward",
    "kl_estimator.k1",
    "aggregation.seq_mean_token_sum",
    "policy_loss.reinforce",
    how="exact enumeration",
    tolerance="1e-9",
)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("advantages", EXACT_ESTIMATORS.values(), ids=EXACT_ESTIMATORS)
def test_k1_in_the_reward_gives_the_gradient_of_reward_minus_beta_kl(advantages: Plugins, level: str):
    t = truth(lab())
    close(ascent(lab(), advantages, kl("in_reward", "k1", level)), t.reward - BETA * t.kl)
    row = study(lab(), advantages, kl("in_reward", "k1", level))
    assert row.objective == "E[r] - beta KL(pi||ref)"
    assert row.relative_error < 1e-9


def test_it_does_so_for_any_size_of_the_group_and_several_prompts():
    for sizes in ({"group": 2}, {"group": 4, "length": 2}, {"group": 2, "prompts": 2, "length": 2}):
        t = truth(lab(**sizes))
        close(ascent(lab(**sizes), "leave_one_out", K1), t.reward - BETA * t.mean(t.log_ratio))


def test_gae_is_exact_with_lambda_1_and_any_values_or_any_lambda_and_exact_values():
    wrong, t = lab(values="arbitrary"), truth(lab())
    goal = t.reward - BETA * t.kl
    close(ascent(wrong, {"use": "gae", "lam": 1.0}, K1), goal)
    differs(ascent(wrong, {"use": "gae", "lam": 0.6}, K1), goal)
    close(ascent(lab(), {"use": "gae", "lam": 0.6}, K1), goal)


def test_a_lambda_that_depends_on_the_length_is_biased_even_with_exact_values():
    t = truth(lab())
    differs(ascent(lab(), {"use": "gae", "length_adaptive": 0.9}, K1), t.reward - BETA * t.kl)


@pytest.mark.parametrize("advantages", ["opo", "optimal_token_baseline"])
def test_a_weighted_mean_with_the_own_row_in_it_is_biased(advantages: str):
    differs(ascent(lab(), advantages), truth(lab()).reward)


def test_a_discounted_reward_to_go_is_the_gradient_of_the_discounted_return_only_with_a_further_discount():
    """The rewards stand at the last tokens: a token's credit is gamma^(tokens after it) r."""
    gamma, world = 0.5, lab().world
    t = truth(lab())
    discounted = t.mean(gamma ** (world.lengths - 1) * world.reward)
    estimator = {"use": "reward_to_go", "gamma": gamma}
    differs(ascent(lab(), estimator), discounted)
    scored = Scored(
        mask=world.mask,
        token_rewards=at_last_token(world.reward, world.mask),
        group_ids=torch.arange(len(world.mask)),
    )
    credit = made("advantages", estimator)(scored) * gamma ** torch.arange(world.length)
    close(t.gradient((t.now.probability.detach() * (credit * t.now.logps).sum(2)).sum(1)), discounted)


# The halves


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    m = ((p.exp() + q.exp()) / 2).log()
    return (p.exp() * (p - m) + q.exp() * (q - m)) / 2


def most_likely(p: Tensor, q: Tensor) -> Tensor:
    """The reverse KL between the probabilities of the reference's most likely token and of all others."""
    best = q.argmax(2, keepdim=True)
    a, b = (x.exp().gather(2, best.expand(*x.shape[:2], 1)) for x in (p, q.expand_as(p)))
    return a * (a / b).log() + (1 - a) * ((1 - a) / (1 - b)).log()


WHOLE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "exact": lambda p, q: p.exp() * (p - q),
    "forward": lambda p, q: q.exp() * (q - p),
    "jsd": jensen_shannon,
}
"""Estimators over whole distributions, and what they add up in each state."""
ESTIMATORS = [*WHOLE, "abs", "k1", "k2", "k3"]


@pytest.mark.proves(
    "kl.in_loss",
    "kl.in_reward",
    "kl_estimator.abs",
    "kl_estimator.exact",
    "kl_estimator.forward",
    "kl_estimator.jsd",
    "kl_estimator.k1",
    "kl_estimator.k2",
    "kl_estimator.k3",
    how="exact enumeration",
    tolerance="1e-9",
)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_reward_and_loss_are_the_halves_of_the_gradient_of_the_estimates_mean(estimator: str, level: str):
    if estimator in WHOLE and level == "sequence":
        assert "no sequence level" in " ".join(study(lab(), "reinforce", kl("in_loss", estimator, level)).refused)
        return
    t = truth(lab())
    placement = made("kl", {"use": "in_loss", "estimator": estimator, "level": level})
    k, n = t.now.probability.shape
    if estimator in WHOLE:
        value = t.now.of_states(WHOLE[estimator](t.now.log_probs, t.ref.log_probs).sum(2)).sum(2)
    else:
        ref_logps, mask = t.ref.logps.expand_as(t.now.logps), t.world.mask.repeat(k, 1)
        value = placement.measure(t.now.logps.flatten(0, 1), ref_logps.flatten(0, 1), mask)
        value = (value if value.dim() == 1 else value.sum(1)).view(k, n)
    score = t.gradient((t.now.probability * value.detach()).sum(1))
    path = t.gradient((t.now.probability.detach() * value).sum(1))
    close(of_the_kl(lab(), kl("in_reward", estimator, level)), score)
    both = of_the_kl(lab(), kl("in_reward", estimator, level), kl("in_loss", estimator, level))
    close(both, t.mean(value))
    torch.testing.assert_close(of_the_kl(lab(), kl("in_loss", estimator, level)), path, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("estimator", "level"), [("k3", "token"), ("k3", "sequence"), ("exact", "token")])
def test_the_same_unbiased_estimate_in_reward_and_loss_makes_the_gradient_of_the_kl(estimator: str, level: str):
    both = (kl("in_reward", estimator, level), kl("in_loss", estimator, level))
    close(of_the_kl(lab(), *both), truth(lab()).kl)
    for half in both:
        differs(of_the_kl(lab(), half), truth(lab()).kl)


TRUTHS: dict[str, tuple[str, list[str], str, Callable[[Truth], Tensor]]] = {
    "reward k3 token": ("in_reward", ["k3", "k3_plus", "k3_is"], "token", lambda t: t.kl - t.forward),
    "reward k3 sequence": (
        "in_reward",
        ["k3", "k3_plus", "k3_is"],
        "sequence",
        lambda t: t.kl - t.kl_of_reference,
    ),
    "reward exact": ("in_reward", ["exact"], "token", lambda t: t.kl - t.reverse),
    "loss token": ("in_loss", ["k2", "k3_plus", "k1_is", "k3_is", "exact"], "token", lambda t: t.reverse),
    "loss sequence": ("in_loss", ["k2", "k3_plus", "k1_is", "k3_is"], "sequence", lambda t: t.kl),
    "loss forward": ("in_loss", ["forward"], "token", lambda t: t.forward),
    "loss jsd": ("in_loss", ["jsd"], "token", lambda t: t.per_state(jensen_shannon)),
    "loss k3 token": ("in_loss", ["k3"], "token", lambda t: t.forward),
    "loss k3 sequence": ("in_loss", ["k3"], "sequence", lambda t: t.kl_of_reference),
    "loss abs token": (
        "in_loss",
        ["abs"],
        "token",
        lambda t: t.per_state(lambda p, q: (p.exp() - q.exp()).abs()),
    ),
    "loss abs sequence": (
        "in_loss",
        ["abs"],
        "sequence",
        lambda t: t.gradient((t.now.probability - t.ref.probability).abs().sum(1)),
    ),
    "advantage k1 token": ("in_advantage", ["k1", "k1_is"], "token", lambda t: t.reverse),
    "advantage k1 sequence": ("in_advantage", ["k1", "k1_is"], "sequence", lambda t: t.kl),
    "advantage k3 token": ("in_advantage", ["k3", "k3_plus", "k3_is"], "token", lambda t: t.reverse - t.forward),
}
"""Placement, estimators, level, and the gradient that the KL adds, over beta."""


@pytest.mark.proves(
    "kl.in_reward",
    "kl.in_loss",
    "kl.in_advantage",
    "kl_estimator.abs",
    "kl_estimator.exact",
    "kl_estimator.forward",
    "kl_estimator.jsd",
    "kl_estimator.k1",
    "kl_estimator.k1_is",
    "kl_estimator.k2",
    "kl_estimator.k3",
    "kl_estimator.k3_is",
    "kl_estimator.k3_plus",
    how="exact enumeration",
    tolerance="1e-9",
)
@pytest.mark.parametrize(("place", "estimators", "level", "want"), TRUTHS.values(), ids=TRUTHS)
def test_each_kl_adds_the_gradient_of(place: str, estimators: list[str], level: str, want: Callable[[Truth], Tensor]):
    t = truth(lab())
    for estimator in estimators:
        close(of_the_kl(lab(), kl(place, estimator, level)), want(t))
    if not torch.equal(want(t), t.kl):
        differs(want(t), t.kl)


def test_k3_in_the_reward_vanishes_near_the_reference():
    """Its part of the expected direction shrinks with the square of the distance, the gradient of the KL with the distance."""

    def sizes(distance: float) -> tuple[float, float]:
        near = Lab(world=World(length=2, group=2), beta=BETA)
        tables = near.expectation.policies.tables
        near.expectation.policies = near.expectation.sampler = Policies(
            near.world, near.world.reference + distance * (tables - near.world.reference)
        )
        return float(of_the_kl(near, kl("in_reward", "k3"))[0].norm()), float(Truth(near).kl[0].norm())

    (far, of_far), (close_by, of_close) = sizes(1e-2), sizes(1e-3)
    assert far / close_by == pytest.approx(100, rel=0.1)
    assert of_far / of_close == pytest.approx(10, rel=0.1)


def test_exact_in_the_reward_is_nothing_for_completions_of_one_token():
    assert of_the_kl(lab(length=1), kl("in_reward", "exact")).abs().max() < 1e-12


# Refused


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_k1_in_the_loss_has_no_gradient_and_is_refused(level: str):
    assert of_the_kl(lab(), kl("in_loss", "k1", level)).abs().max() < 1e-12
    row = study(lab(), "reinforce", kl("in_loss", "k1", level))
    assert row.objective == "E[r]"
    assert "k1 in the loss has expected gradient 0" in " ".join(row.refused)


def test_k1_in_the_loss_rewards_short_completions_under_the_token_mean_of_each_row():
    got = of_the_kl(lab(), kl("in_loss", "k1"), aggregation="seq_mean_token_mean")
    t = truth(lab())
    close(got, t.mean(1 / t.world.lengths))


def test_exact_in_the_advantage_has_no_gradient_and_is_refused():
    assert of_the_kl(lab(), kl("in_advantage", "exact")).abs().max() < 1e-12
    row = study(lab(), "reinforce", kl("in_advantage", "exact"))
    assert row.objective == "E[r]"
    assert "exact in the advantage has expected gradient 0" in " ".join(row.refused)


# Distillation: no reward, the reference is a teacher


DISTILLATION: dict[str, tuple[dict[str, Any], str, Callable[[Truth], Tensor]]] = {
    "k1 as the advantage": (kl("in_advantage", "k1"), "per-state KL(pi||ref)", lambda t: t.reverse),
    "k1 of the row as the advantage": (kl("in_advantage", "k1", "sequence"), "KL(pi||ref)", lambda t: t.kl),
    "k1 in the reward": (K1, "KL(pi||ref)", lambda t: t.kl),
    "reverse KL in the loss": (kl("in_loss", "exact"), "per-state KL(pi||ref)", lambda t: t.reverse),
    "forward KL in the loss": (kl("in_loss", "forward"), "per-state KL(ref||pi)", lambda t: t.forward),
    "jsd in the loss": (kl("in_loss", "jsd"), "per-state jsd 0.5", lambda t: t.per_state(jensen_shannon)),
    "top 1 in the loss": (
        {"use": "in_loss", "estimator": {"use": "exact", "top_k": 1}},
        "per-state exact over the reference's top 1",
        lambda t: t.per_state(most_likely),
    ),
}


@pytest.mark.proves(
    "kl_estimator.exact", "kl_estimator.forward", "kl_estimator.jsd", how="exact enumeration", tolerance="1e-9"
)
@pytest.mark.parametrize(("placement", "name", "want"), DISTILLATION.values(), ids=DISTILLATION)
def test_without_a_reward_the_lab_names_the_divergence_that_falls(
    placement: dict[str, Any], name: str, want: Callable[[Truth], Tensor]
):
    where = lab(rewards="none")
    close(-ascent(where, "reinforce", placement) / BETA, want(truth(where)))
    row = study(where, "reinforce", placement)
    assert row.objective == f"- beta {name}"
    assert row.relative_error < 1e-9
    assert row.verdict is (Verdict.GOAL if name == "KL(pi||ref)" else Verdict.FIXED)


def test_the_mean_over_a_rows_tokens_keeps_the_divergence_of_whole_distributions_and_not_k1s():
    """The number of tokens of a row depends on the token that k1 is to judge."""
    where, mean = lab(rewards="none"), {"aggregation": "seq_mean_token_mean"}
    row = study(where, "reinforce", kl("in_loss", "exact"), **mean)
    assert row.objective == "- beta per-state KL(pi||ref) / T"
    t = truth(where)
    of_state = t.now.of_states((t.now.log_probs.exp() * (t.now.log_probs - t.ref.log_probs)).sum(2)).sum(2)
    want = t.gradient((t.old.probability.detach() * of_state / t.world.lengths).sum(1))
    close(-ascent(where, "reinforce", kl("in_loss", "exact"), **mean) / BETA, want)
    differs(-ascent(where, "reinforce", kl("in_advantage", "k1"), **mean) / BETA, want)


# Off-policy


@pytest.mark.proves("kl_estimator.k1_is", "kl_estimator.k3_is", how="exact enumeration", tolerance="1e-9")
def test_off_policy_only_the_estimates_with_a_ratio_keep_their_gradient():
    where = lab(off_policy=True)
    t = truth(where)
    for estimator in ("k1_is", "k3_is"):
        close(of_the_kl(where, kl("in_loss", estimator, "sequence")), t.kl)
        close(of_the_kl(where, kl("in_loss", estimator, "token")), t.reverse)
    for estimator in ("k2", "k3_plus"):
        differs(of_the_kl(where, kl("in_loss", estimator, "sequence")), t.kl)


def test_off_policy_k1_in_the_loss_drives_away_from_the_policy_that_rolled_out():
    where = lab(off_policy=True)
    t = truth(where)
    towards_old = t.gradient(-(t.old.probability * t.now.logps.sum(2)).sum(1))
    for level in ("token", "sequence"):
        close(of_the_kl(where, kl("in_loss", "k1", level)), -towards_old)


def test_the_table_of_distillation_says_what_is_exact_and_what_is_not():
    found = {form.title.partition(" (")[0]: form for form in forms(World(group=1, rewards="none"))}
    for title in ("k1 as the reward", "k1 of the row as the advantage"):
        assert found[title].objective == "KL(pi||ref)"
        assert found[title].bias < 1e-9
    sampled, whole = found["k1 as the advantage"], found["exact in the loss"]
    assert sampled.objective == whole.objective == found["k2 in the loss"].objective == "per-state KL(pi||ref)"
    assert sampled.bias == pytest.approx(whole.bias, rel=1e-9)
    assert 0.1 < whole.bias < 0.3
    assert whole.variance < sampled.variance / 10, "the sampled token is what is noisy"
    assert found["k3 in the loss"].objective == found["forward in the loss"].objective == "per-state KL(ref||pi)"


def test_the_gap_of_the_top_k_closes_with_k():
    found = list(gaps(World(tokens=5, length=2, group=1, rewards="none"), (1, 2, 3, 4)))
    for name in ("exact", "forward", "jsd"):
        of_name = [gap for gap in found if gap.estimator == name]
        assert all(later.gap < earlier.gap for earlier, later in itertools.pairwise(of_name))
        assert of_name[0].gap > 0.05
        assert abs(of_name[-1].gap) < 1e-12, "one token is left for the bucket"
        assert of_name[-1].cosine == pytest.approx(1, abs=1e-12)
