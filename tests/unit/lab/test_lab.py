"""The lab itself: what it enumerates, what it recognises, and which choices it goes through."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from hf_rlhf.axes import AdvantageEstimator
from hf_rlhf.batch import Credit, Scored
from hf_rlhf.config.recipe import resolve
from hf_rlhf.lab import World, run
from hf_rlhf.lab.choices import aggregations, defaults, in_world, kl_choices, scaled, variants
from hf_rlhf.lab.objectives import Candidate, fraction, nearest, parallel
from hf_rlhf.lab.single import left_out
from hf_rlhf.lab.study import WITNESSES, Lab, Verdict
from hf_rlhf.lab.table import cosine, number
from hf_rlhf.lab.worked_example import work
from hf_rlhf.lab.world import Policies
from hf_rlhf.registry.host import get_host
from hf_rlhf.runtime.errors import UserError
from hf_rlhf.testing import rollouts
from hf_rlhf.training.losses import at_last_token
from tests.helpers.truths import BETA, K1, algorithm, ascent, close, kl, lab, made, study, truth

# The enumeration


@pytest.mark.parametrize(
    "sizes", [{}, {"tokens": 2}, {"length": 1, "group": 4}, {"prompts": 2, "group": 2, "length": 2}]
)
def test_every_completion_ends_with_the_end_or_is_cut_off_and_all_rollouts_have_probability_1(sizes: dict[str, int]):
    world = World(**sizes)
    for _, tokens in world.sequences:
        assert 0 not in tokens[:-1]
        assert tokens[-1] == 0 or len(tokens) == world.length
    assert len(set(world.sequences)) == len(world.sequences)
    policies = Policies(world, torch.stack([world.table(i) for i in range(3)]))
    torch.testing.assert_close(policies.probability.sum(1), torch.full((3,), world.prompts, dtype=torch.float64))
    torch.testing.assert_close(policies.rollout_probability.sum(1), torch.ones(3, dtype=torch.float64))


def test_the_best_policy_is_the_reference_tilted_by_the_rewards():
    world = World(prompts=2, group=2, length=2)
    best, ref = (Policies(world, x[None]) for x in (world.optimum(BETA), world.reference))
    tilted = ref.probability[0] * (world.reward / BETA).exp()
    for p in range(2):
        mine = world.prompt == p
        torch.testing.assert_close(best.probability[0, mine], tilted[mine] / tilted[mine].sum(), rtol=0, atol=1e-12)


def test_the_greedy_return_is_that_of_the_most_probable_tokens():
    world = World()
    policies = Policies(world, world.table(0)[None])
    tokens: tuple[int, ...] = ()
    while len(tokens) < world.length and 0 not in tokens:
        state = world.states.index((0, tokens))
        tokens += (int(policies.tables[0, state].argmax()),)
    assert policies.greedy[0].tolist() == [float(world.reward[world.sequences.index((0, tokens))])] * len(
        world.sequences
    )


def test_exact_values_are_what_is_still_to_come_after_the_kl():
    where = lab()
    e = where.expectation
    a = algorithm(where, {"use": "gae", "lam": 0.5}, K1)
    penalties = e.kl_penalties(a)
    values = e.scored(penalties).values.view(len(penalties), *where.world.rollouts[0].shape, where.world.length)
    rewards = at_last_token(where.world.reward, where.world.mask) - penalties[0]
    row = int(where.world.rollouts[0][7, 1])
    for t in range(len(where.world.sequences[row][1])):
        prefix = where.world.sequences[row][1][:t]
        after = [i for i, (_, s) in enumerate(where.world.sequences) if s[:t] == prefix and len(s) > t]
        p = e.sampler.probability[0, after]
        assert float(values[0, 7, 1, t]) == pytest.approx(
            float((p * rewards[after, t:].sum(1)).sum() / p.sum()), abs=1e-12
        )


def ordered_groups(where: Lab, chosen: Any) -> Tensor:
    """The expected direction at the studied policy, group by group in every order, each with its own backward."""
    world, e = where.world, where.expectation
    table = e.policies.tables[0].clone().requires_grad_()
    total = torch.zeros_like(table)
    for rows in itertools.product(range(len(world.sequences)), repeat=world.group):
        index = torch.tensor(rows)
        mask = world.mask[index]
        logps = table.log_softmax(1)[world.state[index], world.token[index]] * mask
        ref_logps = world.reference.log_softmax(1)[world.state[index], world.token[index]] * mask
        rewards = at_last_token(world.reward[index], mask)
        loss_weights = chosen.aggregation(mask)
        penalty = torch.zeros_like(mask)
        for placement in chosen.kl:
            measured = placement.measure(logps, ref_logps, mask)
            if "reward" in placement.places:
                rewards = rewards - placement.reward_penalty(measured.detach())
            else:
                penalty = penalty + placement.loss_penalty(measured)
        scored = Scored(mask=mask, token_rewards=rewards, group_ids=torch.zeros(world.group).long())
        credit = chosen.advantages(scored)
        assert not isinstance(credit, Credit)
        loss = chosen.policy_loss(logps, logps.detach(), credit, mask)[0] + penalty
        (gradient,) = torch.autograd.grad((loss * loss_weights).sum(), table)
        total -= gradient * logps.sum().exp().detach()
    return total


@pytest.mark.parametrize("advantages", ["group_norm", "reinforce_plus_plus", "reward_to_go"])
@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean"])
def test_the_lab_agrees_with_a_loop_over_every_group_in_every_order(advantages: str, aggregation: str):
    where = lab(group=2, length=2)
    chosen = algorithm(where, advantages, K1, kl("in_loss", "k3"), policy_loss="ppo_clip", aggregation=aggregation)
    close(where.gradients(chosen).mean[0], ordered_groups(where, chosen), atol=1e-12)


def test_the_variance_of_single_rows_is_that_of_their_scores():
    where = lab(group=1)
    t, world = truth(where), where.world
    scores = torch.stack(
        [
            torch.autograd.grad(t.now.logps[0, i].sum(), t.tables, retain_graph=True)[0][0]
            for i in range(len(world.reward))
        ]
    )
    p, rows = t.now.probability[0].detach(), scores * world.reward[:, None, None]
    mean = (p[:, None, None] * rows).sum(0)
    want = float((p * (rows - mean).flatten(1).square().sum(1)).sum())
    assert study(where, "reinforce").variance == pytest.approx(want, abs=1e-12)


@dataclass(kw_only=True)
class Counted(AdvantageEstimator):
    """The return, less the mean over all rows it sees."""

    name: ClassVar[str] = "counted"

    across: bool = False
    """Whether that mean is taken."""
    calls: ClassVar[int] = 0

    def __call__(self, scored: Scored) -> Tensor:
        Counted.calls += 1
        returns = scored.returns()
        return (returns - returns.mean() * self.across).unsqueeze(1) * scored.mask


@pytest.mark.parametrize("across", [False, True])
def test_an_estimator_that_looks_across_rollouts_gets_them_one_by_one_and_only_that_one(across: bool):
    where = Lab(world=World(group=3, length=2), beta=BETA)
    Counted.calls = 0
    chosen = in_world(where.world, advantages=Counted(across=across))
    got = where.gradients(chosen).mean[0]
    assert (Counted.calls > len(where.world.rollouts[0])) == across
    close(got, ordered_groups(where, chosen), atol=1e-12)


def test_a_world_too_large_to_enumerate_is_refused():
    with pytest.raises(UserError, match="must have at most 200000 rollouts to enumerate"):
        World(group=12)
    with pytest.raises(UserError, match="length must be at least 1, got 0"):
        World(length=0)


# What it recognises


def test_a_factor_must_be_one_number_for_all_policies():
    t = truth(lab())
    assert nearest(0.25 * t.reward, [Candidate("E[r]", t.reward)]).found
    assert nearest(0.25 * t.reward, [Candidate("E[r]", t.reward)]).factor == 0.25
    scale = torch.tensor([1.0, 2.0]).double().view(WITNESSES, 1, 1)
    assert not nearest(scale * t.reward, [Candidate("E[r]", t.reward)]).found
    assert parallel(scale * t.reward, t.reward) < 1e-12
    assert parallel(-t.reward, t.reward) == float("inf")


def test_fractions_are_found_and_other_numbers_are_not():
    assert str(fraction(2 / 3)) == "2/3"
    assert str(fraction(1 / 1024)) == "1/1024"
    assert fraction(0.6667) is None
    assert fraction(-1.0) == -1


@dataclass(kw_only=True)
class Others(AdvantageEstimator):
    """The sum of the returns of the group's other rows: its expected gradient is 0."""

    name: ClassVar[str] = "others"

    def __call__(self, scored: Scored) -> Tensor:
        returns = scored.returns()
        return (scored.group_sum(returns) - returns).unsqueeze(1) * scored.mask


def test_no_gradient_at_all_is_called_0():
    where = lab()
    row = where.study(in_world(where.world, advantages=Others()))
    assert (row.objective, row.relative_error, row.cosine) == ("0", 0.0, None)
    assert row.norm < 1e-12


@dataclass(kw_only=True)
class Next(AdvantageEstimator):
    """The return of the row above."""

    name: ClassVar[str] = "next"

    def __call__(self, scored: Scored) -> Tensor:
        return scored.returns().roll(1).unsqueeze(1) * scored.mask


def test_an_estimator_that_goes_by_the_place_of_a_row_is_refused_as_groups_have_no_order():
    where = lab()
    row = where.study(in_world(where.world, advantages=Next()))
    assert "must not depend on its position" in " ".join(row.refused)
    assert row.objective is None


@dataclass(kw_only=True)
class Touchy(AdvantageEstimator):
    """Refuses every rollout."""

    name: ClassVar[str] = "touchy"

    def __call__(self, scored: Scored) -> Tensor:
        raise ValueError("rewards are to be words")


def test_what_an_estimator_says_against_the_rewards_is_a_reason_and_no_number():
    where = lab()
    row = where.study(in_world(where.world, advantages=Touchy()))
    assert row.refused == ["advantages=touchy: rewards are to be words"]
    assert (row.objective, row.cosine, row.verdict) == (None, None, Verdict.UNDEFINED)


@pytest.mark.parametrize(
    ("advantages", "chosen", "verdict"),
    [
        ("leave_one_out", K1, Verdict.GOAL),
        ("group_mean", K1, Verdict.GOAL),
        ("group_mean", kl("in_loss", "k2", "sequence"), Verdict.OTHER_BETA),
        ("leave_one_out", kl("in_loss", "k3", "sequence"), Verdict.OTHER),
        ("leave_one_out", kl("in_loss", "k3"), Verdict.FIXED),
        ("leave_one_out", kl("in_loss", "k1"), Verdict.OTHER),
        ({"use": "group_norm", "statistics": "others"}, K1, Verdict.PARALLEL),
        ("group_norm", K1, Verdict.NOTHING),
    ],
)
def test_each_kind_of_gradient_has_its_verdict(advantages: Any, chosen: dict[str, str], verdict: Verdict):
    assert study(lab(), advantages, chosen).verdict is verdict


def test_numbers_are_shown_without_their_rounding_errors():
    assert [number(x) for x in (None, 3e-16, 0.12345)] == ["", "0", "0.123"]
    assert [cosine(x) for x in (1 - 1e-12, 1 - 1e-6, 0.99951, -0.5, -1.0)] == ["1", "0.9999", "0.9995", "-0.500", "-1"]


# Choices


def built_in(axis: str) -> set[str]:
    """All plugins but that of the user's own functions."""
    return set(get_host().names(axis)) - {"function"}


def test_the_matrix_has_every_plugin_of_its_axes():
    host = get_host()
    assert {x.name for x in defaults("advantages")} == built_in("advantages")
    assert {x.name for x in aggregations(World())} == set(host.names("aggregation"))
    single = [kls[0] for kls in kl_choices(BETA) if len(kls) == 1]
    placements = {name for name in host.names("kl") if host.get("kl", name).places}
    want = set(itertools.product(placements, built_in("kl_estimator"), ("token", "sequence")))
    assert {(x.name, x.estimator.name, x.level) for x in single} == want
    baselines = {x.baseline.name for e in defaults("advantages") if hasattr(e, "baseline") for x in (e, *variants(e))}
    assert baselines == set(host.names("baseline"))


def test_variants_change_one_setting_each():
    gae = made("advantages", "gae")
    assert {("lam", 1.0), ("whiten", True)} <= {
        (name, getattr(x, name))
        for x in variants(gae)
        for name in ("lam", "whiten", "gamma")
        if getattr(x, name) != getattr(gae, name)
    }


def test_betas_are_scaled_together():
    kls = [
        made("kl", {"use": "in_reward", "beta": 0.01}),
        made("kl", {"use": "in_loss", "beta": 0.04}),
        made("kl", "monitor"),
    ]
    assert [getattr(x, "beta", None) for x in scaled(kls, 0.2)] == [pytest.approx(0.05), pytest.approx(0.2), None]
    assert scaled(kls, None) == kls


def test_the_world_answers_as_a_reward_source():
    where = World(length=2)
    source = in_world(where, advantages=made("advantages", "reinforce")).rewards[0]
    asked = rollouts(["a", "b"])
    asked.completion_ids = [[0], [9, 9, 9]]
    assert source(asked) == [float(where.scores["first"][where.sequences.index((0, (0,)))]), None]


def test_a_recipe_runs_with_every_aggregation_its_own_first():
    rows = run("rloo", ["aggregation=token_mean"])
    assert {row.aggregation for row in rows} == set(get_host().names("aggregation"))
    assert rows[0].aggregation == "token_mean"
    by = {row.aggregation: row for row in rows}
    assert by["seq_mean_token_sum"].objective == "E[r] - beta KL(pi||ref)"
    assert by["seq_mean_token_sum"].beta == pytest.approx(BETA)
    assert by["token_mean"].objective == "none"


def test_the_witnesses_and_directions_of_the_lab_are_not_the_studied_policy():
    tables = lab().expectation.policies.tables
    assert all(not torch.allclose(tables[0], x) for x in tables[1 : WITNESSES + 1])
    assert ascent(lab(), "reinforce").shape == tables[:WITNESSES].shape


def test_the_worlds_reference_stands_for_those_of_single_kls():
    kls: list[dict[str, Any]] = [
        {"use": "in_loss", "estimator": "exact"},
        {"use": "in_reward"},
        {"use": "in_advantage"},
    ]
    rest = {"rollout": "generate", "rewards": ["exact_match"], "advantages": "group_norm", "aggregation": "token_mean"}
    own = [x | {"reference": y, "when": {"task": "a"}} for x, y in zip(kls, ("ema", "frozen", "sync"), strict=True)]
    one, several = (resolve({**rest, "kl": x}).algorithm() for x in (kls, own))
    rows, others = run(one), run(several)
    assert [str(row) for row in rows] == [str(row) for row in others]
    assert left_out(one) == []
    assert left_out(several) == ["kl.0.reference=ema", "kl.1.reference=frozen", "kl.2.reference=sync"]
    assert str(work(one)) == str(work(several))
