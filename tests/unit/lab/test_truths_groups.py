"""Expected gradients, exactly: groups, aggregations, policy losses, what is stationary and what is a gradient at all."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from hf_rlhf.lab.study import WITNESSES
from hf_rlhf.lab.world import Policies
from hf_rlhf.registry.host import get_host
from tests.helpers.truths import (
    BETA,
    K1,
    Plugins,
    Truth,
    algorithm,
    ascent,
    close,
    differs,
    kl,
    lab,
    study,
    truth,
)


def angle(got: Tensor, want: Tensor) -> float:
    """1 - cosine, at the first policy."""
    return 1 - float(torch.cosine_similarity(got[0].flatten(), want[0].flatten(), dim=0))


# Aggregations


@pytest.mark.proves("aggregation.seq_mean_token_mean", how="exact enumeration", tolerance="1e-9")
@pytest.mark.parametrize("group", [2, 3])
def test_the_token_mean_of_each_row_is_the_gradient_of_reward_per_token(group: int):
    where = lab(group=group)
    t = truth(where)
    per_token = t.mean(t.world.reward / t.world.lengths)
    close(ascent(where, "reinforce", aggregation="seq_mean_token_mean"), per_token)
    with_kl = t.mean((t.world.reward - BETA * (t.log_ratio - 1)) / t.world.lengths)
    close(ascent(where, "reinforce", K1, aggregation="seq_mean_token_mean"), with_kl)
    row = study(where, "reinforce", K1, aggregation="seq_mean_token_mean")
    assert row.objective == "E[r/T] - beta E[(l - 1)/T]"


def test_causality_matters_under_the_token_mean_of_each_row():
    """A token's later KL decides how long the row gets, so the reward to go has another gradient there than the return."""
    differs(
        ascent(lab(), "reward_to_go", K1, aggregation="seq_mean_token_mean"),
        ascent(lab(), "reinforce", K1, aggregation="seq_mean_token_mean"),
    )
    assert study(lab(), "reward_to_go", K1, aggregation="seq_mean_token_mean").objective == "none"


def test_leave_one_out_under_the_token_mean_of_each_row_subtracts_the_mean_reward_times_the_gradient_of_1_over_t():
    t, lengths = truth(lab()), lab().world.lengths
    mean = (t.now.probability.detach() * t.world.reward).sum(1)[:, None, None]
    want = t.mean(t.world.reward / lengths) - mean * t.mean(1 / lengths)
    close(ascent(lab(), "leave_one_out", aggregation="seq_mean_token_mean"), want)


@pytest.mark.proves("aggregation.seq_mean_token_sum_norm", how="exact enumeration", tolerance="1e-9")
def test_a_constant_length_only_scales_the_gradient():
    constant = {"use": "seq_mean_token_sum_norm", "length": 7}
    close(ascent(lab(), "leave_one_out", K1, aggregation=constant), ascent(lab(), "leave_one_out", K1) / 7)


@pytest.mark.proves("aggregation.token_mean", how="exact enumeration", tolerance="a law in the number of rows")
def test_the_mean_over_all_tokens_is_biased_and_the_bias_fades_with_the_rows():
    """With more rows the number of tokens becomes a constant, and the direction that of the mean reward."""
    off = [
        angle(
            ascent(lab(group=rows, length=2), "reinforce", aggregation="token_mean"),
            truth(lab(group=rows, length=2)).reward,
        )
        for rows in (1, 2, 4, 8)
    ]
    assert off[0] > 1e-2
    assert all(later < 0.6 * before for before, later in itertools.pairwise(off)), off


@pytest.mark.proves("aggregation.prompt_mean", "aggregation.token_mean", how="exact enumeration", tolerance="1e-9")
def test_for_one_prompt_the_mean_over_prompts_is_the_mean_over_tokens_and_for_two_it_is_not():
    two = lab(group=2, prompts=2, length=2)
    close(*(ascent(lab(), "leave_one_out", aggregation=name) for name in ("prompt_mean", "token_mean")))
    differs(*(ascent(two, "leave_one_out", aggregation=name) for name in ("prompt_mean", "token_mean")))


# Groups


@pytest.mark.proves("advantages.group_mean", how="exact enumeration", tolerance="1e-9")
@pytest.mark.parametrize("group", [2, 3, 4])
def test_the_group_mean_takes_one_gth_off_the_gradient_so_a_kl_in_the_loss_weighs_more(group: int):
    where = lab(group=group, length=2)
    t = truth(where)
    in_loss = kl("in_loss", "k2", "sequence")
    close(ascent(where, "group_mean"), (1 - 1 / group) * t.reward)
    close(ascent(where, "group_mean", in_loss), (1 - 1 / group) * t.reward - BETA * t.kl)
    row = study(where, "group_mean", in_loss)
    assert row.kl_factor / row.reward_factor == pytest.approx(group / (group - 1), abs=1e-12)
    assert not row.stationary
    effective = lab(beta=BETA * group / (group - 1), group=group, length=2)
    gradients = effective.gradients(algorithm(effective, "group_mean", in_loss)).mean
    assert gradients[WITNESSES].abs().max() < 1e-12, "pi* of the effective beta is stationary"


@pytest.mark.proves(
    "advantages.group_norm", "advantages.group_mean_batch_std", how="exact enumeration", tolerance="1e-9"
)
@pytest.mark.parametrize("advantages", ["group_norm", "group_mean_batch_std"])
def test_group_norm_is_parallel_to_the_gradient_for_one_prompt_and_rewards_of_0_and_1(advantages: str):
    binary = lab(group=4, length=2, rewards="binary")
    assert angle(ascent(binary, advantages), truth(binary).reward) < 1e-12
    row = study(binary, advantages)
    assert (row.objective, row.is_gradient) == ("c(pi) E[r]", True)
    real = lab()
    assert angle(ascent(real, advantages), truth(real).reward) > 1e-2
    assert study(real, advantages).objective == "none"


def test_group_norm_weighs_prompts_by_their_difficulty():
    """Each prompt's gradient gets a factor that depends on its chance of success alone."""
    group = 4
    two = lab(group=group, length=1, prompts=2, rewards="binary")
    t, got = truth(two), ascent(two, "group_norm")
    of_prompt = torch.tensor([p for p, _ in two.world.states])
    factors = []
    for p in (0, 1):
        mine = two.world.prompt == p
        success = float((t.now.probability[0].detach() * two.world.reward)[mine].sum())
        factor = 0.0
        for right in range(1, group):
            deviation = math.sqrt(right * (group - right) / group / (group - 1)) + 1e-4
            chance = math.comb(group, right) * success**right * (1 - success) ** (group - right)
            lead = right * (1 - right / group) / success + (group - right) * right / group / (1 - success)
            factor += chance * lead / deviation / group
        close(got[0, of_prompt == p], factor * t.reward[0, of_prompt == p])
        factors.append(factor)
    assert abs(factors[0] - factors[1]) > 1e-2


def test_deviations_of_the_others_alone_keep_the_direction_for_one_prompt():
    """Mean and deviation do not depend on the own row, so the factor is a mean that every row shares."""
    t = truth(lab())
    assert angle(ascent(lab(), {"use": "group_norm", "statistics": "others"}, K1), t.reward - BETA * t.kl) < 1e-12
    row = study(lab(), {"use": "group_norm", "statistics": "others"}, K1)
    assert row.objective == "c(pi) (E[r] - beta KL(pi||ref))"
    assert not row.is_gradient


@pytest.mark.proves("advantages.pass_at_k", how="exact enumeration", tolerance="1e-9")
@pytest.mark.parametrize("group", [2, 3])
def test_the_lead_of_the_best_row_climbs_the_best_of_the_group(group: int):
    where = lab(group=group, length=2)
    t, n = truth(where), len(where.world.sequences)
    rows = torch.tensor(list(itertools.product(range(n), repeat=group)))
    best = (t.now.probability[:, rows].prod(2) * where.world.reward[rows].amax(1)).sum(1)
    close(ascent(where, "pass_at_k"), t.gradient(best) / group)


@pytest.mark.proves("advantages.maxrl", how="exact enumeration", tolerance="1e-9")
@pytest.mark.parametrize(("all_wrong", "order"), [(0, 2), (-1, 3)])
def test_maxrl_climbs_the_logarithm_of_success_up_to_an_order(all_wrong: int, order: int):
    where = lab(rewards="binary")
    t = truth(where)
    failure = 1 - (t.now.probability * where.world.reward).sum(1)
    want = t.gradient(-sum((failure**k / k for k in range(1, order + 1)), start=0 * failure))
    close(ascent(where, {"use": "maxrl", "all_wrong": all_wrong}), want)


@pytest.mark.proves("advantages.opo", how="exact enumeration", tolerance="1e-9")
def test_a_baseline_that_all_rows_of_a_group_share_takes_its_own_mean_off_the_objective():
    where = lab()
    t, (groups, orders) = truth(where), where.world.groups
    lengths, reward = where.world.lengths[groups], where.world.reward[groups]
    baseline = (lengths * reward).sum(1) / lengths.sum(1)
    mean = (t.now.probability[:, groups].prod(2) * orders * baseline).sum(1)
    close(ascent(where, "opo"), t.reward - t.gradient(mean) / where.world.group)


@pytest.mark.proves("advantages.gpg", "advantages.gdpo", how="exact enumeration", tolerance="1e-9")
def test_for_one_prompt_gpg_is_the_group_mean_and_gdpo_of_one_source_the_group_norm_up_to_a_factor():
    close(ascent(lab(), "gpg"), ascent(lab(), "group_mean"))
    binary = lab(group=3, length=2, rewards="binary")
    assert angle(ascent(binary, "gdpo"), ascent(binary, "group_norm")) < 1e-12
    differs(ascent(lab(group=2, length=2, prompts=2), "gpg"), ascent(lab(group=2, length=2, prompts=2), "group_mean"))


@pytest.mark.proves("advantages.mix", how="exact enumeration", tolerance="1e-9")
def test_the_gradient_of_a_mixture_is_the_mixture_of_the_gradients():
    mixed = {"use": "mix", "parts": ["leave_one_out", "pass_at_k"], "weights": [0.7, -0.2]}
    close(ascent(lab(), mixed, K1), 0.7 * ascent(lab(), "leave_one_out", K1) - 0.2 * ascent(lab(), "pass_at_k", K1))


@pytest.mark.proves(
    "advantages.gae",
    "advantages.reinforce_plus_plus",
    "advantages.reinforce_plus_plus_baseline",
    how="exact enumeration",
    tolerance="a bias that is there",
)
@pytest.mark.parametrize(
    "advantages", [{"use": "gae", "whiten": True}, "reinforce_plus_plus", "reinforce_plus_plus_baseline"]
)
def test_whitening_is_biased_at_a_finite_number_of_rows(advantages: Plugins):
    t = truth(lab())
    assert angle(ascent(lab(), advantages, K1), t.reward - BETA * t.kl) > 1e-3
    row = study(lab(), advantages, K1)
    assert (row.objective, row.is_gradient) == ("none", False)


def test_whitening_keeps_pi_star_stationary_only_where_the_advantages_are_0_there():
    """With exact values they are, and with the group's mean taken off; the return alone is not 0."""
    assert study(lab(), {"use": "gae", "whiten": True}, K1).stationary
    assert study(lab(), "reinforce_plus_plus_baseline", K1).stationary
    assert not study(lab(), "reinforce_plus_plus", K1).stationary


# pi*, and whether there is an objective at all


STATIONARY: dict[str, tuple[str, dict[str, str], bool, bool]] = {
    "k1 in the reward": ("leave_one_out", K1, True, True),
    "k1 in the reward, reinforce": ("reinforce", K1, True, True),
    "k2 of the sequence in the loss": ("reinforce", kl("in_loss", "k2", "sequence"), True, True),
    "k2 by token in the loss": ("reinforce", kl("in_loss", "k2"), False, False),
    "k3 by token in the loss": ("reinforce", kl("in_loss", "k3"), False, False),
    "k3 of the sequence in the loss": ("reinforce", kl("in_loss", "k3", "sequence"), False, True),
}


@pytest.mark.parametrize(("advantages", "placed", "stationary", "gradient"), STATIONARY.values(), ids=STATIONARY)
def test_whether_pi_star_is_stationary_and_the_expectation_a_gradient(
    advantages: str, placed: dict[str, str], stationary: bool, gradient: bool
):
    row = study(lab(), advantages, placed)
    assert (row.stationary, row.is_gradient) == (stationary, gradient)
    there = float(lab().gradients(algorithm(lab(), advantages, placed)).mean[WITNESSES].abs().max())
    assert there < 1e-12 if stationary else there > 1e-3
    assert row.asymmetry < 1e-8 if gradient else row.asymmetry > 1e-2


def test_pi_star_maximises_the_goal():
    where = lab()
    tables = where.expectation.policies.tables

    def goal(table: Tensor) -> Tensor:
        now = Policies(where.world, table[None])
        log_ratio = (now.logps - Policies(where.world, where.world.reference[None]).logps).sum(2)
        return now.mean(where.world.reward - BETA * log_ratio)[0]

    best = goal(tables[WITNESSES])
    ref = Truth(where).ref.logps.sum(2)[0]
    assert best == pytest.approx(BETA * float(torch.logsumexp(ref + where.world.reward / BETA, 0)), abs=1e-12)
    assert all(goal(tables[WITNESSES] + 0.1 * where.world.table(i)) < best for i in range(5))


def test_the_lab_can_say_that_there_is_no_objective():
    row = study(lab(), "group_norm", kl("in_loss", "k3"), aggregation="seq_mean_token_mean", policy_loss="ppo_clip")
    assert (row.objective, row.is_gradient) == ("none", False)
    assert row.nearest is not None
    assert row.relative_error > 1e-3


# Policy losses


@pytest.mark.proves(
    "policy_loss.cispo",
    "policy_loss.dppo_tv",
    "policy_loss.dual_clip",
    "policy_loss.gmpo",
    "policy_loss.gspo",
    "policy_loss.kl_cov",
    "policy_loss.ppo_clip",
    "policy_loss.reinforce",
    "policy_loss.sapo",
    "policy_loss.surrogate",
    "policy_loss.dro",
    "policy_loss.token_entropy",
    "policy_loss.topr",
    "policy_loss.trpo_penalty",
    "policy_loss.vespo",
    how="exact enumeration",
    tolerance="1e-9",
)
def test_at_ratio_1_every_policy_loss_but_clip_cov_has_the_gradient_of_the_advantages():
    want = ascent(lab(), "leave_one_out")
    for name in set(get_host().names("policy_loss")) - {"clip_cov", "function", "token_entropy"}:
        close(ascent(lab(), "leave_one_out", policy_loss=name), want)
    differs(ascent(lab(), "leave_one_out", policy_loss="clip_cov"), want)
    differs(ascent(lab(), "leave_one_out", policy_loss="token_entropy"), want)
    close(ascent(lab(), "leave_one_out", policy_loss={"use": "token_entropy", "fraction": 1.0}), want)


def test_off_policy_the_ratio_of_a_token_is_exact_for_completions_of_one_token_alone():
    one, three = lab(length=1, off_policy=True), lab(off_policy=True)
    close(ascent(one, "leave_one_out", policy_loss="surrogate"), truth(one).reward)
    differs(ascent(three, "leave_one_out", policy_loss="surrogate"), truth(three).reward)
    differs(ascent(one, "leave_one_out", policy_loss="reinforce"), truth(one).reward)
