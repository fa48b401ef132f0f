"""Estimators that compare the rows of a group, against closed forms."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_rlhf import load_plugin
from hf_rlhf.batch import Scored
from tests.helpers import runs
from tests.helpers.advantage_batches import GROUP, SETTINGS, bandit, full, of, title

RIGHT, WRONG = 0.75, -0.25
ONE_OF_FOUR: dict[str, tuple[str, dict[str, Any], float, float]] = {
    "group_mean": ("group_mean", {}, RIGHT, WRONG),
    "trl": ("group_norm", {}, RIGHT / (0.5 + 1e-4), WRONG / (0.5 + 1e-4)),
    "verl": ("group_norm", {"eps": 1e-6}, RIGHT / (0.5 + 1e-6), WRONG / (0.5 + 1e-6)),
    "nemo-rl": ("group_norm", {"statistics": "others", "eps": 1e-6}, 1.0, -1 / 3 / (math.sqrt(1 / 3) + 1e-6)),
    "open-instruct": ("group_norm", {"ddof": 0, "eps": 1e-8}, math.sqrt(3), -math.sqrt(1 / 3)),
    "leave_one_out": ("leave_one_out", {}, 1.0, -1 / 3),
    "maxrl": ("maxrl", {}, 3.0, -1.0),
    "pass_at_k": ("pass_at_k", {}, 1.0, 0.0),
    "pass_at_k over std": ("pass_at_k", {"normalise": "std"}, 2.0, 0.0),
    "opo": ("opo", {}, RIGHT, WRONG),
    "opo without the own row": ("opo", {"leave_one_out": True}, 1.0, -1 / 3),
    "gpg": ("gpg", {}, RIGHT, WRONG),
    "gpg of verl": ("gpg", {"dialect": "verl"}, 4 * RIGHT, 4 * WRONG),
    "group_mean_batch_std": ("group_mean_batch_std", {}, RIGHT / (0.5 + 1e-4), WRONG / (0.5 + 1e-4)),
    "reinforce_plus_plus_baseline": (
        "reinforce_plus_plus_baseline",
        {},
        RIGHT / math.sqrt(2.25 / 11 + 1e-8),
        WRONG / math.sqrt(2.25 / 11 + 1e-8),
    ),
    "reinforce_plus_plus_baseline, population": (
        "reinforce_plus_plus_baseline",
        {"ddof": 0},
        RIGHT / math.sqrt(2.25 / 12 + 1e-8),
        WRONG / math.sqrt(2.25 / 12 + 1e-8),
    ),
}


@pytest.mark.proves(
    "advantages.group_mean",
    "advantages.group_norm",
    "advantages.leave_one_out",
    "advantages.group_mean_batch_std",
    "advantages.reinforce_plus_plus_baseline",
    "advantages.maxrl",
    "advantages.pass_at_k",
    "advantages.opo",
    "advantages.gpg",
    how="closed form",
    tolerance="1e-7",
)
@pytest.mark.parametrize("case", ONE_OF_FOUR)
def test_one_right_answer_in_four(case: str):
    name, settings, right, wrong = ONE_OF_FOUR[case]
    want = torch.tensor([right, wrong, wrong, wrong], dtype=torch.float64)[:, None].expand(4, 3)
    torch.testing.assert_close(of(bandit([1, 0, 0, 0]), name, **settings), want, rtol=0, atol=1e-7)


def test_group_norm_has_the_numbers_of_each_system():
    """TRL 1.4997 / -0.4999, verl 1.5 / -0.5, NeMo-RL 1.0 / -0.577, open-instruct 1.732 / -0.577."""
    rewards = bandit([1, 0, 0, 0])
    seen = {
        system: [round(x, places) for x in of(rewards, "group_norm", **ONE_OF_FOUR[system][1])[:2, 0].tolist()]
        for system, places in {"trl": 4, "verl": 4, "nemo-rl": 3, "open-instruct": 3}.items()
    }
    assert seen == {
        "trl": [1.4997, -0.4999],
        "verl": [1.5, -0.5],
        "nemo-rl": [1.0, -0.577],
        "open-instruct": [1.732, -0.577],
    }


Rule = Callable[[list[float], list[float]], list[float]]


def by_rule(batch: Scored, rule: Rule, returns: Tensor | None = None) -> Tensor:
    """(N, T) from a rule in plain Python: a group's returns and lengths -> its rows' advantages."""
    returns = batch.returns() if returns is None else returns
    advantages = torch.zeros_like(returns)
    for group in batch.group_ids.unique():
        rows = (batch.group_ids == group).nonzero().flatten()
        if len(rows) > 1:
            lengths = batch.mask[rows].sum(1).tolist()
            advantages[rows] = torch.tensor(rule(returns[rows].tolist(), lengths), dtype=returns.dtype)
    return advantages[:, None] * batch.mask


def norm(std: Callable[[list[float]], float], r: list[float]) -> list[float]:
    return [(x - statistics.mean(r)) / (std(r) + 1e-4) for x in r]


def against_others(std: Callable[[list[float]], float], r: list[float]) -> list[float]:
    rest = [r[:i] + r[i + 1 :] for i in range(len(r))]
    spread = [std(o) + 1e-4 if len(set(o)) > 1 else 1.0 for o in rest]
    return [(x - statistics.mean(o)) / s for x, o, s in zip(r, rest, spread, strict=True)]


def optimal(r: list[float], t: list[float], without_own: bool) -> list[float]:
    kept = [[j for j in range(len(r)) if not (without_own and j == i)] for i in range(len(r))]
    return [r[i] - sum(t[j] * r[j] for j in kept[i]) / sum(t[j] for j in kept[i]) for i in range(len(r))]


def lead(r: list[float], std: float = 1.0) -> list[float]:
    second, best = sorted(r)[-2:]
    return [(best - second) / std if x == best and best > second else 0.0 for x in r]


RULES: list[tuple[str, dict[str, Any], Rule]] = [
    ("group_mean", {}, lambda r, t: [x - statistics.mean(r) for x in r]),
    ("leave_one_out", {}, lambda r, t: [x - (sum(r) - x) / (len(r) - 1) for x in r]),
    ("group_norm", {}, lambda r, t: norm(statistics.stdev, r)),
    ("group_norm", {"ddof": 0}, lambda r, t: norm(statistics.pstdev, r)),
    ("group_norm", {"statistics": "others"}, lambda r, t: against_others(statistics.stdev, r)),
    ("group_norm", {"statistics": "others", "ddof": 0}, lambda r, t: against_others(statistics.pstdev, r)),
    ("opo", {}, lambda r, t: optimal(r, t, False)),
    ("opo", {"leave_one_out": True}, lambda r, t: optimal(r, t, True)),
    ("maxrl", {}, lambda r, t: [(x - statistics.mean(r)) / statistics.mean(r) for x in r]),
    ("pass_at_k", {}, lambda r, t: lead(r)),
    ("pass_at_k", {"normalise": "std"}, lambda r, t: lead(r, statistics.stdev(r))),
]


@pytest.mark.parametrize(("name", "settings", "rule"), RULES, ids=[title((n, s)) for n, s, _ in RULES])
@pytest.mark.parametrize("seed", range(3))
def test_each_group_is_computed_on_its_own_from_returns_after_kl(
    name: str, settings: dict[str, Any], rule: Rule, seed: int
):
    batch = full(seed=seed)
    torch.testing.assert_close(of(batch, name, **settings), by_rule(batch, rule), rtol=0, atol=1e-12)


def test_the_batch_deviation_is_of_all_returns_and_gpg_counts_rows_with_signal():
    batch = bandit([1, 0, 0, 0, 0.2, 0.2, 0.2, 7], groups=[0, 0, 0, 0, 1, 1, 1, 2])
    centred = of(batch, "group_mean")
    std = statistics.stdev([1, 0, 0, 0, 0.2, 0.2, 0.2, 7])
    for got, want in (
        (of(batch, "group_mean_batch_std", eps=0.5), centred / (std + 0.5)),
        (of(batch, "gpg"), centred * 8 / 4),  # rows of the first group alone
        (of(batch, "gpg", dialect="verl"), centred * 8 / 5),  # returns that are not 0
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_a_rollout_without_signal_gives_gpg_nothing_to_divide_by():
    assert (of(bandit([0, 0, 0]), "gpg") == 0).all()
    assert (of(bandit([0, 0, 0]), "gpg", dialect="verl") == 0).all()


COMPARES = [case for case in SETTINGS if case[0] in GROUP]


@pytest.mark.parametrize("case", COMPARES, ids=title)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_give_exactly_nothing(case: tuple[str, dict[str, Any]], dtype: torch.dtype):
    # a deviation computed from these is 1.5e-8 and not 0
    assert (of(bandit([0.2] * 8, dtype=dtype), case[0], **case[1]) == 0).all()


@pytest.mark.parametrize("case", COMPARES, ids=title)
def test_a_group_of_which_one_row_remains_gives_nothing(case: tuple[str, dict[str, Any]]):
    advantages = of(bandit([1, 0, 5], groups=[3, 3, 9]), case[0], **case[1])
    assert (advantages[2] == 0).all()
    assert (advantages[0] != 0).all()


@pytest.mark.parametrize("case", [c for c in COMPARES if c[0] not in ("group_mean_batch_std", "gpg")], ids=title)
def test_groups_may_vary_in_size_and_be_interleaved(case: tuple[str, dict[str, Any]]):
    name, settings = case
    mixed = of(bandit([1, 4, 0, 5, 0.5, 9, 9], groups=[0, 1, 0, 1, 0, 1, 1]), name, **settings)
    torch.testing.assert_close(mixed[[0, 2, 4]], of(bandit([1, 0, 0.5]), name, **settings))
    torch.testing.assert_close(mixed[[1, 3, 5, 6]], of(bandit([4, 5, 9, 9]), name, **settings))


def test_of_two_equal_best_rows_neither_gets_credit_for_pass_at_k():
    assert of(bandit([1, 1, 0.5]), "pass_at_k").tolist() == [[0.0] * 3] * 3
    assert of(bandit([3, 1, 1]), "pass_at_k")[:, 0].tolist() == [2, 0, 0]


def test_one_far_row_leaves_no_rounding_error_in_the_statistics_of_the_others():
    rewards = [4096.0, 0.125, 0.25, 0.5]
    exact = of(bandit(rewards), "group_norm", statistics="others")
    rough = of(bandit(rewards, dtype=torch.float32), "group_norm", statistics="others")
    torch.testing.assert_close(rough.double(), exact, rtol=1e-5, atol=0)


def test_maxrl_refuses_negative_returns_by_name():
    with pytest.raises(ValueError, match=r"row 1 has -0\.5, row 3 has -2"):
        of(bandit([1, -0.5, 0, -2]), "maxrl")


def test_maxrl_gives_all_wrong_rows_what_it_is_told():
    batch = bandit([0, 0, 1, 0], groups=[0, 0, 1, 1])
    assert of(batch, "maxrl")[:, 0].tolist() == [0, 0, 1, -1]
    assert of(batch, "maxrl", all_wrong=-1)[:, 0].tolist() == [-1, -1, 1, -1]


def test_maxrl_refuses_a_kl_in_the_reward():
    problems = runs.recipe(advantages="maxrl", kl=[{"use": "in_reward"}], reference="frozen").algorithm().problems()
    assert any("maxrl" in p and "in_loss" in p for p in problems), problems
    assert runs.recipe(advantages="maxrl").algorithm().problems() == []


# The order of KL and comparison


ORDERED = [*(name for name in GROUP if name != "maxrl")]


@pytest.mark.parametrize("name", ORDERED)
def test_score_first_compares_scores_and_then_subtracts_the_kl_from_each_token_on(name: str):
    batch = full()
    assert batch.kl_penalties is not None
    without_kl = dataclasses.replace(
        batch, token_rewards=batch.token_rewards + batch.kl_penalties, kl_penalties=torch.zeros_like(batch.mask)
    )
    to_go = of(dataclasses.replace(batch, token_rewards=batch.kl_penalties), "reward_to_go")
    torch.testing.assert_close(of(batch, name, order="score_first"), of(without_kl, name) - to_go)
    torch.testing.assert_close(of(without_kl, name, order="score_first"), of(without_kl, name))
    assert (of(batch, name, order="score_first") - of(batch, name)).abs().max() > 1e-3


def test_score_first_comes_before_the_whitening_of_reinforce_plus_plus_baseline():
    batch = full()
    white = of(batch, "reinforce_plus_plus_baseline", order="score_first")
    plain = of(batch, "group_mean", order="score_first")
    on = batch.mask > 0
    torch.testing.assert_close(white[on], (plain[on] - plain[on].mean()) / (plain[on].var() + 1e-8).sqrt())


def test_the_plan_says_that_an_order_without_a_kl_in_the_reward_changes_nothing():
    quiet = runs.recipe(advantages={"use": "group_mean", "order": "score_first"}).algorithm()
    assert any("order=score_first" in remark for remark in quiet.advantages.remarks(quiet))
    kl = runs.recipe(advantages={"use": "group_mean", "order": "score_first"}, kl=[{"use": "in_reward"}]).algorithm()
    assert list(kl.advantages.remarks(kl)) == []


# Several reward sources


def gdpo_by_loop(batch: Scored, eps: float) -> Tensor:
    assert batch.scores is not None
    assert batch.weights is not None
    combined = [0.0] * len(batch.mask)
    for source, score in batch.scores.items():
        for group in set(batch.group_ids.tolist()):
            rows = [i for i, g in enumerate(batch.group_ids.tolist()) if g == group and not math.isnan(score[i])]
            given = [score[i].item() for i in rows]
            for i in rows if len(set(given)) > 1 else []:
                normal = (score[i].item() - statistics.mean(given)) / (statistics.stdev(given) + eps)
                combined[i] += batch.weights[source] * normal
    whole = torch.tensor(combined, dtype=torch.float64)
    return (whole - whole.mean()) / (whole.std() + eps)


@pytest.mark.proves("advantages.gdpo", how="closed form", tolerance="1e-12")
@pytest.mark.parametrize("eps", [1e-4, 0.1])
def test_gdpo_normalises_each_source_over_the_rows_it_applies_to_and_then_the_batch(eps: float):
    batch = full(group_sizes=(4, 3, 1, 5), kl_penalties=None)
    assert batch.scores is not None
    assert batch.scores["b"].isnan().any()
    want = gdpo_by_loop(batch, eps)[:, None] * batch.mask
    torch.testing.assert_close(of(batch, "gdpo", eps=eps), want, rtol=0, atol=1e-12)


def test_gdpo_tells_apart_mixtures_with_equal_sums():
    """1 + 0, 0 + 1 and two rows that set the scale: one number for both sums, two for the sources."""
    scores = {"a": [1.0, 0, 0, 0], "b": [0.0, 1, 0.75, 0.75]}
    batch = bandit([1, 1, 0.75, 0.75], scores={k: torch.tensor(v).double() for k, v in scores.items()})
    summed = of(batch, "group_norm")[:, 0]
    apart = of(batch, "gdpo")[:, 0]
    assert summed[0] == summed[1]
    assert abs(apart[0] - apart[1]) > 0.1


def test_gdpo_subtracts_the_kl_in_the_reward_last():
    batch = full()
    assert batch.kl_penalties is not None
    quiet = dataclasses.replace(batch, kl_penalties=None)
    to_go = of(dataclasses.replace(batch, token_rewards=batch.kl_penalties), "reward_to_go")
    torch.testing.assert_close(of(batch, "gdpo"), of(quiet, "gdpo") - to_go)


def test_gdpo_gives_nothing_where_no_source_tells_rows_apart():
    scores = {"a": torch.full((3,), 0.2).double(), "b": torch.full((3,), torch.nan).double()}
    assert (of(bandit([0.2] * 3, scores=scores), "gdpo") == 0).all()


# What every estimator promises


OPTIONAL = {field.name for field in dataclasses.fields(Scored) if field.default is None} - {"weights", "kl_penalties"}


def needed(plugin: Any) -> frozenset[str]:
    inner = [getattr(plugin, "baseline", None), *getattr(plugin, "parts", [])]
    return plugin.needs.union(*(needed(part) for part in inner if part is not None))


@pytest.mark.parametrize("case", SETTINGS, ids=title)
def test_needs_is_what_is_read_and_no_more(case: tuple[str, dict[str, Any]]):
    name, settings = case
    needs = needed(load_plugin("advantages", name, **settings))
    rich = full()
    bare = dataclasses.replace(rich, **dict.fromkeys(OPTIONAL - needs))
    assert torch.equal(of(bare, name, **settings), of(rich, name, **settings))
    for field in OPTIONAL & needs:
        with pytest.raises(ValueError, match=rf"needs {field}: Scored\.{field} is None"):
            of(dataclasses.replace(rich, **{field: None}), name, **settings)
    if "groups" in needs:
        alone = dataclasses.replace(rich, group_ids=torch.arange(len(rich.mask)))
        assert not torch.equal(of(alone, name, **settings), of(rich, name, **settings))


@pytest.mark.parametrize("case", SETTINGS, ids=title)
def test_float32_gives_what_float64_gives_to_rounding(case: tuple[str, dict[str, Any]]):
    batch = full(length=16)
    single = {}
    for field in dataclasses.fields(batch):
        x = getattr(batch, field.name)
        single[field.name] = x.float() if isinstance(x, Tensor) and x.is_floating_point() else x
    single["scores"] = {source: score.float() for source, score in (batch.scores or {}).items()}
    got = of(Scored(**single), case[0], **case[1])
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), of(batch, case[0], **case[1]), rtol=1e-4, atol=1e-4)
