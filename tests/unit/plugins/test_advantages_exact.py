"""Expected gradients of estimators, exactly: every group of sequences of a small tabular policy, in float64.

Three tokens, 0 ends the sequence, at most two of them where not said otherwise: seven sequences, each with a score and
perhaps a reward for each of its tokens. A gradient is the ascent direction of the mean over rows of sum_t A_t log p_t,
averaged over all groups by their probability.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_rlhf import load_plugin
from hf_rlhf.batch import Credit, Scored

VOCAB, BETA = 3, 0.3


def sequences(longest: int, prefix: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
    if len(prefix) == longest or prefix[-1:] == (0,):
        return [prefix]
    return [s for token in range(VOCAB) for s in sequences(longest, (*prefix, token))]


BINARY = [0.0, 0, 0, 1, 0, 1, 0]
TIED = [1.0, 0.5, 0.5, 1.0, 0.0, 2.0, 2.0]


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass
class Tabular:
    """Logits of policy and reference by state, and rewards."""

    longest: int = 2
    scores: list[float] | None = None
    """At the last token of each sequence."""
    by_step: bool = False
    """Whether tokens have rewards of their own, by the state they were sampled in."""
    beta: float = 0.0
    """Of k1 in the reward."""

    def __post_init__(self) -> None:
        self.sequences = all_ = sequences(self.longest)
        self.states = sorted({s[:t] for s in all_ for t in range(len(s))})
        self.score = draw(len(all_), seed=2) if self.scores is None else torch.tensor(self.scores, dtype=torch.float64)
        self.table = (draw(len(self.states), VOCAB, seed=0) / 2).requires_grad_()
        self.state = torch.tensor(
            [[self.states.index(s[:t]) if t < len(s) else 0 for t in range(self.longest)] for s in all_]
        )
        token = torch.tensor([[*s, *[0] * (self.longest - len(s))] for s in all_])
        self.mask = torch.tensor([[float(t < len(s)) for t in range(self.longest)] for s in all_]).double()
        self.last = self.mask * (self.mask.flip(1).cumsum(1).flip(1) == 1)
        distribution = self.table.log_softmax(1)
        self.logps = distribution[self.state, token] * self.mask
        self.squares = (distribution.exp() ** 2).sum(1).detach()[self.state]
        ref_logps = draw(len(self.states), VOCAB, seed=1).log_softmax(1)[self.state, token] * self.mask
        self.kl = self.beta * (self.logps - ref_logps)
        self.steps = self.by_step * draw(len(self.states), VOCAB, seed=5)[self.state, token] * self.mask
        self.token_rewards = (self.last * self.score[:, None] + self.steps - self.kl).detach()
        self.probability = self.logps.sum(1).exp()

    def gradient(self, objective: Tensor) -> Tensor:
        return torch.autograd.grad(objective, self.table, retain_graph=True)[0]

    def of_reward(self) -> Tensor:
        """grad E[sum of all rewards before KL]."""
        return self.gradient((self.probability * (self.score + self.steps.sum(1))).sum())

    def of_kl(self) -> Tensor:
        """beta grad KL(policy || reference)."""
        return self.gradient((self.probability * self.kl.sum(1)).sum())

    def groups(self, size: int) -> tuple[Tensor, Tensor]:
        """Every group of rows, and its probability."""
        rows = torch.tensor(list(itertools.product(range(len(self.sequences)), repeat=size)))
        return rows, self.probability[rows].prod(1)

    def of_best(self, size: int) -> Tensor:
        """grad E[the best score of a group]."""
        rows, probability = self.groups(size)
        return self.gradient((probability * self.score[rows].amax(1)).sum())

    def expected(self, advantages: Any, size: int, *, values: Tensor | None = None, together: bool = True) -> Tensor:
        """The expected ascent direction. `together`: every group is one prompt of one big rollout; else each group is a
        rollout of its own, for estimators with statistics over the rollout."""
        rows, probability = self.groups(size)
        parts = [rows] if together else list(rows.split(1))
        credit = torch.cat([self._credit(advantages, part, values) for part in parts])
        gain = (credit * self.logps[rows.flatten()]).sum(1).view(len(rows), size).mean(1)
        return self.gradient((probability.detach() * gain).sum())

    def _credit(self, advantages: Any, rows: Tensor, values: Tensor | None) -> Tensor:
        flat = rows.flatten()
        batch = Scored(
            mask=self.mask[flat],
            token_rewards=self.token_rewards[flat],
            group_ids=torch.arange(len(rows)).repeat_interleave(rows.size(1)),
            kl_penalties=self.kl.detach()[flat] if self.beta else None,
            values=None if values is None else values[self.state][flat],
            scores={"all": (self.score + self.steps.sum(1))[flat]},
            old_logps=self.logps.detach()[flat],
            sum_sq_probs=self.squares[flat],
            greedy=torch.full((len(flat),), 0.7, dtype=torch.float64),
        )
        made = advantages(batch)
        return made.advantages if isinstance(made, Credit) else made


def estimator(name: str, **settings: Any) -> Any:
    return load_plugin("advantages", name, **settings)


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert want.abs().max() > 1e-3, "the case must not be trivial"


def apart(got: Tensor, want: Tensor) -> None:
    assert (got - want).abs().max() > 1e-3


def cosine(one: Tensor, other: Tensor) -> float:
    return torch.cosine_similarity(one.flatten(), other.flatten(), dim=0).item()


@pytest.fixture
def rich() -> Tabular:
    """Scores at the end, rewards at each token and a KL in the reward."""
    return Tabular(by_step=True, beta=BETA)


UNBIASED: list[tuple[str, dict[str, Any], int]] = [
    ("reinforce", {}, 1),
    ("reward_to_go", {}, 1),
    ("leave_one_out", {}, 2),
    ("leave_one_out", {}, 3),
    ("leave_one_out", {"order": "score_first"}, 3),
    ("opo", {"leave_one_out": True}, 2),
    ("opo", {"leave_one_out": True}, 3),
    ("opo", {"leave_one_out": True, "order": "score_first"}, 3),
    ("optimal_token_baseline", {"leave_one_out": True}, 2),
    ("optimal_token_baseline", {"leave_one_out": True}, 3),
    ("remax", {}, 1),
    ("gae", {"lam": 1.0, "lam_critic": 0.5}, 1),
    ("baseline", {"baseline": {"use": "constant", "value": 0.7}}, 1),
    ("baseline", {"baseline": "ema"}, 1),
    ("baseline", {"baseline": "greedy"}, 1),
    ("baseline", {"baseline": "critic"}, 1),
    ("baseline", {"baseline": "others_mean"}, 2),
    ("baseline", {"baseline": "others_mean"}, 3),
    ("mix", {"parts": ["leave_one_out", "reward_to_go"], "weights": [0.75, 0.25]}, 2),
]


@pytest.mark.proves(
    "advantages.reinforce",
    "advantages.reward_to_go",
    "advantages.leave_one_out",
    "advantages.opo",
    "advantages.optimal_token_baseline",
    "advantages.remax",
    "advantages.gae",
    "advantages.baseline",
    "advantages.mix",
    "baseline.constant",
    "baseline.ema",
    "baseline.greedy",
    "baseline.critic",
    "baseline.others_mean",
    how="exact enumeration",
    tolerance="1e-12",
)
@pytest.mark.parametrize(("name", "settings", "size"), UNBIASED)
def test_the_expected_gradient_is_that_of_the_reward_less_beta_kl(
    rich: Tabular, name: str, settings: dict[str, Any], size: int
):
    made = estimator(name, **settings)
    if settings.get("baseline") == "ema":
        made.baseline.observe({"reward/after_kl/mean": 0.4})
    got = rich.expected(made, size, values=draw(len(rich.states), seed=3))
    close(got, rich.of_reward() - rich.of_kl())
    apart(rich.of_kl(), torch.zeros_like(got))


@pytest.mark.parametrize("name", ["opo", "optimal_token_baseline"])
@pytest.mark.parametrize("size", [2, 3])
def test_with_the_own_row_in_the_baseline_it_is_biased(rich: Tabular, name: str, size: int):
    want = rich.of_reward() - rich.of_kl()
    got = rich.expected(estimator(name), size)
    apart(got, want)
    assert cosine(got, want) < 1 - 1e-6, "not even parallel"


@pytest.mark.proves("advantages.group_mean", "advantages.gpg", how="exact enumeration", tolerance="1e-12")
@pytest.mark.parametrize("name", ["group_mean", "gpg"])
@pytest.mark.parametrize("size", [2, 3])
def test_the_group_mean_takes_1_over_g_of_the_gradient_and_of_the_kl_in_it(name: str, size: int):
    """gpg likewise where no two returns are equal; a rollout is one prompt here."""
    world = Tabular(beta=BETA)
    got = world.expected(estimator(name), size, together=name != "gpg")
    close(got, (1 - 1 / size) * (world.of_reward() - world.of_kl()))


@pytest.mark.parametrize("size", [2, 3])
def test_with_the_score_first_the_group_mean_leaves_the_kl_whole(rich: Tabular, size: int):
    """As with a KL in the loss: the effective beta is larger by G / (G - 1)."""
    got = rich.expected(estimator("group_mean", order="score_first"), size)
    close(got, (1 - 1 / size) * rich.of_reward() - rich.of_kl())


@pytest.mark.proves("advantages.pass_at_k", how="exact enumeration", tolerance="1e-12")
@pytest.mark.parametrize("scores", [BINARY, TIED, None], ids=["binary", "tied", "real"])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_pass_at_k_climbs_the_expected_best_of_the_group(scores: list[float] | None, size: int):
    world = Tabular(scores=scores)
    close(world.expected(estimator("pass_at_k"), size), world.of_best(size) / size)


def test_a_normalised_lead_climbs_something_else():
    world = Tabular()
    got = world.expected(estimator("pass_at_k", normalise="std"), 3)
    assert cosine(got, world.of_best(3)) < 1 - 1e-3


@pytest.mark.proves("advantages.maxrl", how="exact enumeration", tolerance="1e-12")
@pytest.mark.parametrize(("all_wrong", "missing"), [(0, 1), (-1, 0)])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_maxrl_climbs_the_series_of_log_p_up_to_order_g_minus_1_or_g(all_wrong: int, missing: int, size: int):
    world = Tabular(scores=BINARY)
    right = (world.probability * world.score).sum()
    orders = range(1, size + 1 - missing)
    series = world.gradient(right * 0 + sum((1 - (1 - right) ** k) / k for k in orders))
    got = world.expected(estimator("maxrl", all_wrong=all_wrong), size)
    torch.testing.assert_close(got, series, rtol=0, atol=1e-12)
    apart(got, world.gradient(right.log()))  # all orders


@pytest.mark.proves("advantages.group_norm", how="exact enumeration", tolerance="1e-9")
@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("size", [2, 3])
def test_group_norm_on_binary_rewards_is_parallel_to_the_gradient(ddof: int, size: int):
    world = Tabular(scores=BINARY)
    got = world.expected(estimator("group_norm", ddof=ddof), size)
    assert cosine(got, world.of_reward()) > 1 - 1e-9
    assert got.norm() > 1e-3


def test_group_norm_on_other_rewards_points_elsewhere():
    world = Tabular()
    assert cosine(world.expected(estimator("group_norm"), 3), world.of_reward()) < 1 - 1e-3


@pytest.mark.parametrize("name", ["reinforce_plus_plus", "reinforce_plus_plus_baseline"])
def test_whitening_over_a_finite_rollout_is_biased(name: str):
    world = Tabular()
    got = world.expected(estimator(name), 3, together=False)
    assert cosine(got, world.of_reward()) < 1 - 1e-4


def exact_values(world: Tabular) -> Tensor:
    """The expected return after KL from each state on."""
    to_go = world.token_rewards.flip(1).cumsum(1).flip(1)
    values = torch.zeros(len(world.states), dtype=torch.float64)
    for number, state in enumerate(world.states):
        after = [i for i, s in enumerate(world.sequences) if s[: len(state)] == state]
        p = world.probability.detach()[after]
        values[number] = (p * to_go[after, len(state)]).sum() / p.sum()
    return values


@pytest.mark.parametrize("lam", [0.0, 0.5])
def test_gae_is_unbiased_for_any_lambda_with_exact_values_and_not_with_others(rich: Tabular, lam: float):
    want = rich.of_reward() - rich.of_kl()
    close(rich.expected(estimator("gae", lam=lam), 1, values=exact_values(rich)), want)
    apart(rich.expected(estimator("gae", lam=lam), 1, values=draw(len(rich.states), seed=3)), want)


def test_a_lambda_that_adapts_to_the_length_is_biased_even_with_exact_values():
    """From three tokens on: up to two, the length is known once the first token is."""
    adaptive = estimator("gae", length_adaptive=0.7)
    for longest in (2, 3):
        world = Tabular(longest=longest, by_step=True)
        values = exact_values(world)
        close(world.expected(estimator("gae", lam=0.5), 1, values=values), world.of_reward())
        got = world.expected(adaptive, 1, values=values)
        assert ((got - world.of_reward()).abs().max() > 1e-3) == (longest == 3)
