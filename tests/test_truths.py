"""Expected gradients, exactly: every sequence of a small tabular policy is enumerated in float64.

Three tokens, 0 ends the sequence, at most two of them: seven sequences. An expectation over groups enumerates every
group. The plugins are the real ones, on padded tensors, with the aggregation seq_mean_token_sum.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_rlhf import load_plugin
from hf_rlhf.batch import Credit, Scored

VOCAB, LONGEST, BETA = 3, 2, 0.3


def all_sequences(prefix: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
    if len(prefix) == LONGEST or prefix[-1:] == (0,):
        return [prefix]
    return [s for token in range(VOCAB) for s in all_sequences((*prefix, token))]


SEQUENCES = all_sequences()
STATES = sorted({s[:t] for s in SEQUENCES for t in range(len(s))})


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass
class World:
    """Logits of policy and reference by state, and a reward for each sequence."""

    table: Tensor = field(default_factory=lambda: draw(len(STATES), VOCAB, seed=0).requires_grad_())
    ref_table: Tensor = field(default_factory=lambda: draw(len(STATES), VOCAB, seed=1))
    rewards: Tensor = field(default_factory=lambda: draw(len(SEQUENCES), seed=2))

    def __post_init__(self) -> None:
        self.state = torch.tensor(
            [[STATES.index(s[:t]) if t < len(s) else 0 for t in range(LONGEST)] for s in SEQUENCES]
        )
        self.token = torch.tensor([[*s, *[0] * (LONGEST - len(s))] for s in SEQUENCES])
        self.mask = torch.tensor([[float(t < len(s)) for t in range(LONGEST)] for s in SEQUENCES]).double()
        self.logps, self.ref_logps = self.of(self.table), self.of(self.ref_table)
        self.probability = self.logps.sum(1).exp()

    def of(self, table: Tensor) -> Tensor:
        """(sequences, T) log-probs, 0 off the mask."""
        return table.log_softmax(1)[self.state, self.token] * self.mask

    def gradient(self, objective: Tensor) -> Tensor:
        return torch.autograd.grad(objective, self.table, retain_graph=True)[0]

    def mean_reward(self) -> Tensor:
        return self.gradient((self.probability * self.rewards).sum())

    def kl(self) -> Tensor:
        """grad KL(policy || reference) over sequences."""
        return self.gradient((self.probability * (self.logps - self.ref_logps).sum(1)).sum())

    def kl_of_reference(self) -> Tensor:
        """grad KL(reference || policy) over sequences."""
        p = self.ref_logps.sum(1).exp()
        return self.gradient((p * (self.ref_logps - self.logps).sum(1)).sum())

    def per_state(self, divergence: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The gradient of a divergence of the next token's distributions; the visits to each state are held fixed."""
        of_state = divergence(self.table.log_softmax(1), self.ref_table.log_softmax(1))
        visits = (self.probability.detach()[:, None] * self.mask * of_state[self.state]).sum()
        return self.gradient(visits)


def reverse(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum(1)


def forward(p: Tensor, q: Tensor) -> Tensor:
    return (q.exp() * (q - p)).sum(1)


def expected_ascent(world: World, kl: Any, advantages: Any, policy_loss: str, group: int, values: Any = None) -> Tensor:
    """Minus the gradient of the loss, averaged over every group of `group` sequences by its probability."""
    rows = torch.tensor(list(itertools.product(range(len(SEQUENCES)), repeat=group)))
    flat, groups = rows.flatten(), len(rows)
    mask, logps, ref_logps = world.mask[flat], world.logps[flat], world.ref_logps[flat]
    last = mask * (mask.flip(1).cumsum(1).flip(1) == 1)
    token_rewards = last * world.rewards[flat, None]
    measured = kl.measure(logps, ref_logps, mask) if kl else None
    if kl and "reward" in kl.places:
        penalty = kl.reward_penalty(measured.detach())
        token_rewards = token_rewards - (penalty if penalty.dim() == 2 else penalty[:, None] * last)
    batch = Scored(
        mask=mask,
        token_rewards=token_rewards,
        group_ids=torch.arange(groups).repeat_interleave(group),
        values=None if values is None else values[world.state][flat] * mask,
    )
    credit = advantages(batch)
    credit = credit.advantages if isinstance(credit, Credit) else credit
    loss, _ = load_plugin("policy_loss", policy_loss)(logps, logps.detach(), credit, mask)
    aggregation = load_plugin("aggregation", "seq_mean_token_sum")
    weights = torch.cat([aggregation(m) for m in mask.split(group)])
    if kl and "loss" in kl.places:
        penalty = kl.loss_penalty(measured)
        loss = loss + (penalty if penalty.dim() == 2 else penalty[:, None] * last)
    per_group = (loss * weights).sum(1).view(groups, group).sum(1)
    probability = world.probability.detach()[rows].prod(1)
    assert abs(probability.sum() - 1) < 1e-12
    return -world.gradient((probability * per_group).sum())


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9)
    assert want.abs().max() > 1e-3, "the case must not be trivial"


@pytest.fixture
def world() -> World:
    return World()


@pytest.mark.parametrize("policy_loss", ["reinforce", "surrogate", "ppo_clip"])
@pytest.mark.parametrize(
    ("advantages", "group"), [("reinforce", 1), ("reward_to_go", 1), ("leave_one_out", 2), ("leave_one_out", 3)]
)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_k1_in_the_reward_gives_the_gradient_of_reward_minus_beta_kl(
    world: World, advantages: str, group: int, level: str, policy_loss: str
):
    kl = load_plugin("kl", "in_reward", beta=BETA, level=level)
    got = expected_ascent(world, kl, load_plugin("advantages", advantages), policy_loss, group)
    close(got, world.mean_reward() - BETA * world.kl())


@pytest.mark.parametrize("group", [2, 3])
def test_group_mean_gives_the_gradient_times_1_minus_1_over_g(world: World, group: int):
    got = expected_ascent(world, None, load_plugin("advantages", "group_mean"), "ppo_clip", group)
    close(got, (1 - 1 / group) * world.mean_reward())


def test_group_norm_on_binary_rewards_is_parallel_to_the_gradient():
    world = World(rewards=torch.tensor([1.0, 0, 0, 1, 0, 0, 0], dtype=torch.float64))
    got = expected_ascent(world, None, load_plugin("advantages", "group_norm"), "ppo_clip", 3)
    want = world.mean_reward()
    assert torch.cosine_similarity(got.flatten(), want.flatten(), dim=0) > 1 - 1e-9
    assert (got - want).abs().max() > 1e-2


def test_gae_with_lambda_1_is_unbiased_for_any_values(world: World):
    kl = load_plugin("kl", "in_reward", beta=BETA)
    gae = load_plugin("advantages", "gae", lam=1)
    got = expected_ascent(world, kl, gae, "ppo_clip", 1, values=draw(len(STATES), seed=3))
    close(got, world.mean_reward() - BETA * world.kl())


@pytest.mark.parametrize("lam", [0.0, 0.5])
def test_gae_is_unbiased_for_any_lambda_with_the_exact_values(world: World, lam: float):
    gain = (world.rewards - BETA * (world.logps - world.ref_logps).sum(1)).detach()
    values = torch.zeros(len(STATES), dtype=torch.float64)
    for number, state in enumerate(STATES):
        after = [i for i, s in enumerate(SEQUENCES) if s[: len(state)] == state]
        p = world.probability.detach()[after]
        spent = BETA * (world.logps - world.ref_logps).detach()[after, : len(state)].sum(1)
        values[number] = (p * (gain[after] + spent)).sum() / p.sum()
    kl = load_plugin("kl", "in_reward", beta=BETA)
    exact = expected_ascent(world, kl, load_plugin("advantages", "gae", lam=lam), "ppo_clip", 1, values=values)
    close(exact, world.mean_reward() - BETA * world.kl())
    wrong = expected_ascent(world, kl, load_plugin("advantages", "gae", lam=lam), "ppo_clip", 1, values=values.flip(0))
    assert (wrong - exact).abs().max() > 1e-3


def kl_in_the_loss(world: World, estimator: str, level: str) -> Tensor:
    """The expected descent direction of the KL in the loss alone, over beta."""
    kl = load_plugin("kl", "in_loss", beta=BETA, estimator=estimator, level=level)
    world.rewards = torch.zeros_like(world.rewards)
    return -expected_ascent(world, kl, load_plugin("advantages", "reinforce"), "reinforce", 1) / BETA


@pytest.mark.parametrize(
    ("estimator", "level", "truth"),
    [
        ("k2", "sequence", World.kl),
        ("k3", "sequence", World.kl_of_reference),
        ("k2", "token", lambda world: world.per_state(reverse)),
        ("k3", "token", lambda world: world.per_state(forward)),
    ],
    ids=[
        "k2 sequence: KL",
        "k3 sequence: KL of the reference",
        "k2 token: reverse by state",
        "k3 token: forward by state",
    ],
)
def test_the_kl_in_the_loss_has_the_gradient_of(
    world: World, estimator: str, level: str, truth: Callable[[World], Tensor]
):
    close(kl_in_the_loss(world, estimator, level), truth(world))


def test_k2_by_token_in_the_loss_is_not_the_gradient_of_the_kl(world: World):
    assert (kl_in_the_loss(world, "k2", "token") - world.kl()).abs().max() > 1e-3


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_k1_in_the_loss_has_no_gradient(world: World, level: str):
    assert kl_in_the_loss(world, "k1", level).abs().max() < 1e-12


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_k3_in_reward_and_loss_together_make_the_gradient_of_the_kl(world: World, level: str):
    in_reward = load_plugin("kl", "in_reward", beta=BETA, estimator="k3", level=level)
    reinforce = load_plugin("advantages", "reinforce")
    world.rewards = torch.zeros_like(world.rewards)
    half = -expected_ascent(world, in_reward, reinforce, "reinforce", 1) / BETA
    close(half + kl_in_the_loss(world, "k3", level), world.kl())
    assert (half - world.kl()).abs().max() > 1e-3
