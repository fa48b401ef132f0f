"""Expected gradients of KLs, exactly: every completion of a small tabular policy is enumerated in float64.

Three tokens, of which 0 ends a completion, at most three of them: 15 completions. What a placement does is written out by
the law of the score function, so that nothing but the placement and its estimator is under test.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_rlhf import load_plugin

VOCABULARY, LONGEST, BETA = 3, 3, 0.3


def grown(prefix: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
    if len(prefix) == LONGEST or prefix[-1:] == (0,):
        return [prefix]
    return [row for token in range(VOCABULARY) for row in grown((*prefix, token))]


ROWS = grown()
STATES = sorted({row[:t] for row in ROWS for t in range(len(row))})
AT = torch.tensor([[STATES.index(row[:t]) if t < len(row) else 0 for t in range(LONGEST)] for row in ROWS])
TOKEN = torch.tensor([[*row, *[0] * (LONGEST - len(row))] for row in ROWS])
MASK = torch.tensor([[float(t < len(row)) for t in range(LONGEST)] for row in ROWS], dtype=torch.float64)


def table(seed: int) -> Tensor:
    """Log-probs of the next token by state, all different and none small."""
    drawn = torch.randn(len(STATES), VOCABULARY, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.log_softmax(1)


def taken(of: Tensor) -> Tensor:
    """(completions, T) the log-probs of their tokens."""
    return of[AT, TOKEN] * MASK


class World:
    """A policy, its reference, and the policy that rolled out: the same one unless `stale`."""

    def __init__(self, stale: bool = False):
        self.logits = table(0).requires_grad_()
        self.policy, self.reference = self.logits.log_softmax(1), table(1)
        self.old = table(2) if stale else self.policy.detach()
        self.logps, self.ref_logps, self.old_logps = taken(self.policy), taken(self.reference), taken(self.old)
        self.probability = self.old_logps.sum(1).exp()
        assert abs(self.probability.sum() - 1) < 1e-12

    def gradient(self, x: Tensor) -> Tensor:
        found = torch.autograd.grad(x, self.logits, retain_graph=True, allow_unused=True)[0]
        return torch.zeros_like(self.logits) if found is None else found

    def measured(self, kl: Any) -> Tensor:
        """(completions, T) or (completions,), as the core measures it."""
        estimator = kl.estimator
        if "full_distribution" in estimator.needs:
            return kl.limit(estimator(self.policy, self.reference)[AT] * MASK)
        known = {name: getattr(self, name) for name in estimator.needs}
        return kl.measure(self.logps, self.ref_logps, MASK, **known)

    def descent(self, name: str, estimator: str, level: str = "token", **settings: Any) -> Tensor:
        """The expected gradient of what a placement adds to the loss, over beta."""
        kl = load_plugin("kl", name, beta=BETA, estimator=estimator, level=level, **settings)
        value = self.measured(kl)
        penalty = getattr(kl, f"{next(iter(kl.places))}_penalty")(value)
        if "loss" in kl.places:
            per_row = penalty.sum(1) if level == "token" else penalty
        elif level == "token" and "advantage" in kl.places:
            per_row = (penalty.detach() * self.logps).sum(1)
        else:  # every token pays for the whole row
            per_row = (penalty.sum(1) if level == "token" else penalty).detach() * self.logps.sum(1)
        return self.gradient((self.probability * per_row).sum()) / BETA

    def mean(self, estimator: str) -> Tensor:
        """The gradient of E[sum of e] over the policy's own completions."""
        value = self.measured(load_plugin("kl", "monitor", estimator=estimator)).sum(1)
        return self.gradient((self.logps.sum(1).exp() * value).sum())

    def kl(self) -> Tensor:
        return self.gradient((self.logps.sum(1).exp() * (self.logps - self.ref_logps).sum(1)).sum())

    def forward_kl(self) -> Tensor:
        return self.gradient((self.ref_logps.sum(1).exp() * (self.ref_logps - self.logps).sum(1)).sum())

    def l1(self) -> Tensor:
        return self.gradient((self.logps.sum(1).exp() - self.ref_logps.sum(1).exp()).abs().sum())

    def by_state(self, divergence: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The gradient of a divergence of the next token, state by state; the visits are those of the rollout."""
        of_state = divergence(self.policy, self.reference)[AT]
        return self.gradient((self.probability[:, None] * MASK * of_state).sum())


def reverse(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum(1)


def forward(p: Tensor, q: Tensor) -> Tensor:
    return reverse(q, p)


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    m = ((p.exp() + q.exp()) / 2).log()
    return (reverse(p, m) + reverse(q, m)) / 2


def distance(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() - q.exp()).abs().sum(1)


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def far(got: Tensor, want: Tensor) -> None:
    assert (got - want).abs().max() > 1e-3


@pytest.fixture
def world() -> World:
    return World()


@pytest.mark.proves("kl.in_reward", how="exact enumeration", tolerance="1e-12")
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("estimator", ["k1", "k1_is"])
def test_k1_in_the_reward_is_the_gradient_of_the_kl(world: World, estimator: str, level: str):
    close(world.descent("in_reward", estimator, level), world.kl())


@pytest.mark.parametrize("estimator", ["k3", "k3_plus", "k3_is"])
def test_k3_in_the_reward_lacks_the_forward_kl(world: World, estimator: str):
    close(world.descent("in_reward", estimator), world.kl() - world.by_state(forward))
    close(world.descent("in_reward", estimator, "sequence"), world.kl() - world.forward_kl())


@pytest.mark.parametrize("estimator", ["k2", "abs", "k3", "exact"])
def test_reward_and_loss_are_the_two_halves_of_the_gradient_of_the_mean(world: World, estimator: str):
    halves = world.descent("in_reward", estimator) + world.descent("in_loss", estimator)
    close(halves, world.mean(estimator))
    if estimator in ("k3", "exact"):
        close(halves, world.kl())
    else:
        far(halves, world.kl())


def test_exact_in_the_reward_lacks_the_reverse_kl_of_each_state(world: World):
    close(world.descent("in_reward", "exact"), world.kl() - world.by_state(reverse))
    far(world.descent("in_reward", "exact"), world.kl())


@pytest.mark.proves("kl_estimator.abs", "kl_estimator.exact", how="exact enumeration", tolerance="1e-12")
@pytest.mark.proves("kl_estimator.k1_is", "kl_estimator.k3_is", how="exact enumeration", tolerance="1e-12")
@pytest.mark.proves("kl_estimator.k2", "kl_estimator.k3", how="exact enumeration", tolerance="1e-12")
@pytest.mark.proves("kl_estimator.forward", "kl_estimator.jsd", how="exact enumeration", tolerance="1e-12")
@pytest.mark.proves("kl_estimator.k3_plus", "kl.in_loss", how="exact enumeration", tolerance="1e-12")
@pytest.mark.parametrize(
    ("estimator", "divergence"),
    [
        ("k2", reverse),
        ("k3_plus", reverse),
        ("k1_is", reverse),
        ("k3_is", reverse),
        ("k3", forward),
        ("abs", distance),
        ("exact", reverse),
        ("forward", forward),
        ("jsd", jensen_shannon),
    ],
)
def test_by_token_in_the_loss_a_divergence_of_each_state_falls(world: World, estimator: str, divergence: Any):
    close(world.descent("in_loss", estimator), world.by_state(divergence))
    far(world.descent("in_loss", estimator), world.kl())


@pytest.mark.parametrize(
    ("estimator", "truth"),
    [
        ("k2", World.kl),
        ("k3_plus", World.kl),
        ("k1_is", World.kl),
        ("k3_is", World.kl),
        ("k3", World.forward_kl),
        ("abs", World.l1),
    ],
)
def test_by_sequence_in_the_loss_a_divergence_of_completions_falls(world: World, estimator: str, truth: Any):
    close(world.descent("in_loss", estimator, "sequence"), truth(world))


@pytest.mark.proves("kl.in_advantage", how="exact enumeration", tolerance="1e-12")
def test_in_the_advantage_by_token_it_is_the_reverse_kl_of_each_state(world: World):
    close(world.descent("in_advantage", "k1"), world.by_state(reverse))
    far(world.descent("in_advantage", "k1"), world.kl())


def test_in_the_advantage_by_sequence_it_is_the_gradient_of_the_kl(world: World):
    close(world.descent("in_advantage", "k1", "sequence"), world.kl())


def test_k3_in_the_advantage_is_the_reverse_minus_the_forward_kl(world: World):
    close(world.descent("in_advantage", "k3"), world.by_state(reverse) - world.by_state(forward))


def test_what_is_refused_has_no_gradient(world: World):
    close(world.descent("in_advantage", "exact"), torch.zeros_like(world.logits))
    for level in ("token", "sequence"):
        close(world.descent("in_loss", "k1", level), torch.zeros_like(world.logits))


@pytest.mark.parametrize("estimator", ["k1_is", "k3_is"])
def test_off_policy_the_ratio_keeps_the_gradient(estimator: str):
    world = World(stale=True)
    close(world.descent("in_loss", estimator, "sequence"), world.kl())
    close(world.descent("in_loss", estimator), world.by_state(reverse))


@pytest.mark.parametrize(
    ("estimator", "divergence"), [("exact", reverse), ("forward", forward), ("jsd", jensen_shannon)]
)
def test_off_policy_whole_distributions_stay_exact_in_each_state(estimator: str, divergence: Any):
    world = World(stale=True)
    close(world.descent("in_loss", estimator), world.by_state(divergence))


@pytest.mark.parametrize("estimator", ["k2", "k3_plus", "k3", "abs"])
def test_off_policy_the_others_lose_it(estimator: str):
    world = World(stale=True)
    for truth in (world.kl(), world.forward_kl(), world.l1()):
        far(world.descent("in_loss", estimator, "sequence"), truth)
    for divergence in (reverse, forward, distance):
        far(world.descent("in_loss", estimator), world.by_state(divergence))


def test_a_clamp_biases_where_it_bites_and_nowhere_else(world: World):
    widest = (world.logps - world.ref_logps).abs().max().item()
    close(world.descent("in_reward", "k1", clamp=widest + 1), world.kl())
    far(world.descent("in_reward", "k1", clamp=widest / 4), world.kl())
