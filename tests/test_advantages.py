"""Advantage estimators against closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_rlhf import load_plugin
from hf_rlhf.batch import Credit, Scored
from hf_rlhf.testing import scored


def bandit(rewards: list[float], groups: list[int] | None = None, length: int = 3) -> Scored:
    """One reward per row, at its last token."""
    token_rewards = torch.zeros(len(rewards), length, dtype=torch.float64)
    token_rewards[:, -1] = torch.tensor(rewards, dtype=torch.float64)
    group_ids = torch.tensor(groups or [0] * len(rewards))
    return Scored(mask=torch.ones_like(token_rewards), token_rewards=token_rewards, group_ids=group_ids)


def gae_by_sum(batch: Scored, gamma: float, lam: float) -> Tensor:
    """A_t = sum_k (gamma lam)^k d_{t+k} over the sampled tokens of each row, written out."""
    assert batch.values is not None
    advantages = torch.zeros_like(batch.mask)
    for row in range(len(batch.mask)):
        places = batch.mask[row].nonzero().flatten().tolist()
        values = [*batch.values[row, places].tolist(), 0.0]
        rewards = batch.token_rewards[row, places].tolist()
        deltas = [r + gamma * values[k + 1] - values[k] for k, r in enumerate(rewards)]
        for k, place in enumerate(places):
            advantages[row, place] = sum((gamma * lam) ** (j - k) * deltas[j] for j in range(k, len(places)))
    return advantages


ONE_OF_FOUR = {
    "group_mean": ({}, 0.75, -0.25),
    "group_norm": ({}, 0.75 / (0.5 + 1e-4), -0.25 / (0.5 + 1e-4)),
    "leave_one_out": ({}, 1.0, -1 / 3),
}


@pytest.mark.parametrize("name", ONE_OF_FOUR)
def test_one_right_answer_in_four(name: str):
    settings, right, wrong = ONE_OF_FOUR[name]
    advantages = load_plugin("advantages", name, **settings)(bandit([1, 0, 0, 0]))
    want = torch.tensor([right, wrong, wrong, wrong], dtype=torch.float64)[:, None].expand(4, 3)
    torch.testing.assert_close(advantages, want)


def test_group_norm_has_the_numbers_of_trl_and_verl():
    rewards = bandit([1, 0, 0, 0])
    trl = load_plugin("advantages", "group_norm")(rewards)
    verl = load_plugin("advantages", "group_norm", eps=1e-6)(rewards)
    assert [round(x, 4) for x in trl[:2, 0].tolist()] == [1.4997, -0.4999]
    assert [round(x, 4) for x in verl[:2, 0].tolist()] == [1.5, -0.5]


@pytest.mark.parametrize("name", ONE_OF_FOUR)
def test_equal_rewards_give_exactly_nothing(name: str):
    advantages = load_plugin("advantages", name)(bandit([0.2] * 8))
    assert (advantages == 0).all()


@pytest.mark.parametrize("name", ONE_OF_FOUR)
def test_a_group_of_which_one_row_remains_gives_nothing(name: str):
    advantages = load_plugin("advantages", name)(bandit([1, 0, 5], groups=[3, 3, 9]))
    assert (advantages[2] == 0).all()
    assert (advantages[:2] != 0).all()


@pytest.mark.parametrize("name", ONE_OF_FOUR)
def test_groups_may_vary_in_size_and_be_interleaved(name: str):
    estimator = load_plugin("advantages", name)
    mixed = estimator(bandit([1, 4, 0, 5, 0.5, 9], groups=[0, 1, 0, 1, 0, 1]))
    torch.testing.assert_close(mixed[0::2], estimator(bandit([1, 0, 0.5])))
    torch.testing.assert_close(mixed[1::2], estimator(bandit([4, 5, 9])))


def test_leave_one_out_is_the_return_minus_the_mean_of_the_others():
    rewards = [1.0, 0.25, -2.0]
    advantages = load_plugin("advantages", "leave_one_out")(bandit(rewards))
    others = [(sum(rewards) - r) / 2 for r in rewards]
    want = torch.tensor([r - o for r, o in zip(rewards, others, strict=True)], dtype=torch.float64)
    torch.testing.assert_close(advantages[:, 0], want)


def test_group_estimators_use_the_return_with_its_token_rewards():
    batch = scored()
    advantages = load_plugin("advantages", "group_mean")(batch)
    first = batch.token_rewards[:4].sum(1)
    torch.testing.assert_close(advantages[:4], (first - first.mean())[:, None] * batch.mask[:4])


def test_reinforce_puts_the_whole_return_on_every_token():
    batch = scored()
    advantages = load_plugin("advantages", "reinforce")(batch)
    torch.testing.assert_close(advantages, batch.token_rewards.sum(1, keepdim=True) * batch.mask)


def test_discounts_count_sampled_tokens_and_not_tool_output():
    mask = torch.tensor([[1.0, 0, 0, 1, 1]], dtype=torch.float64)
    rewards = torch.tensor([[1.0, 0, 0, 2, 4]], dtype=torch.float64)
    batch = Scored(mask=mask, token_rewards=rewards, group_ids=torch.zeros(1))
    full = load_plugin("advantages", "reinforce", gamma=0.5)(batch)
    assert full.tolist() == [[3, 0, 0, 3, 3]]  # 1 + 2/2 + 4/4
    to_go = load_plugin("advantages", "reward_to_go", gamma=0.5)(batch)
    assert to_go.tolist() == [[3, 0, 0, 4, 4]]  # 1 + (2 + 4/2)/2, 2 + 4/2, 4


def test_gamma_0_keeps_only_the_reward_at_hand():
    batch = scored()
    torch.testing.assert_close(load_plugin("advantages", "reward_to_go", gamma=0)(batch), batch.token_rewards)
    first = load_plugin("advantages", "reinforce", gamma=0)(batch)
    places = batch.mask.argmax(1, keepdim=True)
    torch.testing.assert_close(first, batch.token_rewards.gather(1, places) * batch.mask)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_gae_is_the_discounted_sum_of_deltas(gamma: float, lam: float):
    batch = scored(length=12)
    assert (batch.mask[0] == 0).any(), "the case must hold tool tokens"
    credit = load_plugin("advantages", "gae", gamma=gamma, lam=lam)(batch)
    assert isinstance(credit, Credit)
    want = gae_by_sum(batch, gamma, lam)
    torch.testing.assert_close(credit.advantages, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(credit.returns, (want + batch.values) * batch.mask, rtol=1e-12, atol=1e-12)


def test_gae_with_lambda_1_is_reward_to_go_minus_the_value():
    batch = scored()
    credit = load_plugin("advantages", "gae", lam=1)(batch)
    to_go = load_plugin("advantages", "reward_to_go")(batch)
    torch.testing.assert_close(credit.advantages, to_go - batch.values * batch.mask)
    torch.testing.assert_close(credit.returns, to_go)


def test_whitening_gives_mean_0_and_unbiased_variance_1_and_leaves_the_returns():
    batch = scored()
    plain = load_plugin("advantages", "gae")(batch)
    white = load_plugin("advantages", "gae", whiten=True)(batch)
    on = white.advantages[batch.mask > 0]
    assert abs(on.mean()) < 1e-12
    assert abs(on.var() - 1) < 1e-6
    assert (white.advantages[batch.mask == 0] == 0).all()
    assert torch.equal(white.returns, plain.returns)


def test_whitening_one_token_gives_0():
    batch = scored(group_sizes=(1,), length=1)
    assert load_plugin("advantages", "gae", whiten=True)(batch).advantages.tolist() == [[0.0]]


def test_gae_without_values_says_what_is_missing():
    with pytest.raises(ValueError, match="critic"):
        load_plugin("advantages", "gae")(scored(values=None))


@pytest.mark.parametrize(
    ("name", "need"), [("gae", "values"), *((name, "groups") for name in ONE_OF_FOUR), ("reinforce", None)]
)
def test_estimators_declare_what_they_need(name: str, need: str | None):
    assert load_plugin("advantages", name).needs == frozenset([need] if need else [])
