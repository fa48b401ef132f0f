"""Dialects: each by numbers written here from what its system computes, and `hf-rlhf explain`, which shows them."""

from __future__ import annotations

import math
import re
import sys
from statistics import fmean, pstdev, stdev
from unittest.mock import patch

import pytest
import torch

from hf_rlhf import load_recipe
from hf_rlhf.cli.commands.show import split_names
from hf_rlhf.config.recipe import read_recipe, resolve
from hf_rlhf.lab import worked_example
from hf_rlhf.lab.explain import differences, explain
from hf_rlhf.lab.worked_example import GREEDY, NEW, OLD, REFERENCE, SAMPLER, SCORES, VALUES, work
from hf_rlhf.registry.host import get_host
from hf_rlhf.runtime.errors import UserError
from tests.helpers import runs
from tests.helpers.paths import ROOT

RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
DIALECTS = [name for name in RECIPES if "@" in name]
ROWS = range(len(SCORES))
GROUPS = [[0, 1, 2, 3], [4, 5, 6, 7]]
TOKENS = sum(map(len, OLD))


# What the systems compute, in plain Python on the numbers of the example


def of_groups(formula, scores=SCORES):
    """A number for each row from (own score, scores of its group, scores of the others)."""
    out = [0.0] * len(scores)
    for group in GROUPS:
        for i in group:
            out[i] = formula(scores[i], [scores[j] for j in group], [scores[j] for j in group if j != i])
    return out


def spread(rows):
    """One number for each row -> one for each token."""
    return [[value] * len(OLD[i]) for i, value in enumerate(rows)]


def norm(deviation, eps):
    return lambda r, group, others: (r - fmean(group)) / (deviation(group) + eps)


def centred(r, group, others):
    return r - fmean(group)


def left_out(r, group, others):
    return r - fmean(others)


def of_the_others(r, group, others):
    """NeMo-RL: nothing divides where the others are all equal."""
    return (r - fmean(others)) / (stdev(others) + 1e-6 if stdev(others) > 0 else 1)


def each(tokens, formula):
    """formula(A, p, p_old, p_ref, p_sampler) of each token."""
    return [
        [
            formula(a, *(percent / 100 for percent in p))
            for a, *p in zip(tokens[i], NEW[i], OLD[i], REFERENCE[i], SAMPLER[i], strict=True)
        ]
        for i in ROWS
    ]


def token_mean(values):
    return sum(map(sum, values)) / TOKENS


def clip(low, high, c=math.inf):
    """PPO's clip; a bad token's loss ends at c |A|."""

    def loss(a, p, old, ref, sampler):
        rho = p / old
        plain = -min(rho * a, min(max(rho, 1 - low), 1 + high) * a)
        return min(plain, -c * a) if a < 0 else plain

    return loss


def weighed(highest):
    """CISPO: -min(rho, highest) A log p."""
    return lambda a, p, old, ref, sampler: -min(p / old, highest) * a * math.log(p)


def corrected(loss):
    """open-instruct: times the ratio of trainer to sampler, at most 2."""
    return lambda a, p, old, ref, sampler: min(old / sampler, 2.0) * loss(a, p, old, ref, sampler)


def k3(a, p, old, ref, sampler):
    return min(ref / p - 1 + math.log(p / ref), 10.0)


def k3_times_ratio(a, p, old, ref, sampler):
    return p / old * (ref / p - 1 + math.log(p / ref))


def jensen_shannon(a, p, old, ref, sampler):
    """Of the sampled token and all others."""
    pairs = [(p, ref), (1 - p, 1 - ref)]
    return sum((x * math.log(2 * x / (x + y)) + y * math.log(2 * y / (x + y))) / 2 for x, y in pairs)


KL_AT_ROLLOUT = [[math.log(o / r) for o, r in zip(OLD[i], REFERENCE[i], strict=True)] for i in ROWS]
"""k1 of each token, within 10 of 0."""


def minus_kl(tokens, beta):
    """Each token less the KL from it on, which has no baseline: OpenRLHF."""
    return [[a - beta * sum(KL_AT_ROLLOUT[i][t:]) for t, a in enumerate(tokens[i])] for i in ROWS]


def returns(beta):
    """Each row's score less the KL of all its tokens."""
    return [score - beta * sum(KL_AT_ROLLOUT[i]) for i, score in enumerate(SCORES)]


def to_go(beta):
    """The rewards from each token on, less the KL."""
    return minus_kl(spread(SCORES), beta)


def whitened(tokens, deviation):
    flat = [x for row in tokens for x in row]
    mean, width = fmean(flat), math.sqrt(deviation(flat) ** 2 + 1e-8)
    return [[(x - mean) / width for x in row] for row in tokens]


def minus_values(tokens):
    """GAE with gamma = lambda = 1."""
    return [[g - v / 100 for g, v in zip(tokens[i], VALUES[i], strict=True)] for i in ROWS]


def value_loss(tokens):
    """Half the mean squared error of the critic."""
    return 0.5 * token_mean([[x**2 for x in row] for row in minus_values(tokens)])


def dialect(advantages, loss, aggregate=token_mean, more=0.0):
    return advantages, aggregate(each(advantages, loss)) + more


def oracles():
    """Recipe -> (the advantage of each token, the loss of the example)."""
    verl, trl = spread(of_groups(norm(stdev, 1e-6))), spread(of_groups(norm(stdev, 1e-4)))
    kl = token_mean(each(verl, k3))
    others, population = spread(of_groups(of_the_others)), spread(of_groups(norm(pstdev, 1e-8)))
    scores_first = minus_kl(spread(of_groups(norm(stdev, 1e-9))), 0.01)
    long = [score - 0.25 * (len(OLD[i]) == 4) for i, score in enumerate(SCORES)]
    yield "grpo@trl", dialect(trl, clip(0.2, 0.2))
    yield "grpo@verl", dialect(verl, clip(0.2, 0.2, 3), more=0.001 * kl)
    yield "grpo@nemo_rl", dialect(others, clip(0.2, 0.2), more=0.01 * token_mean(each(others, k3_times_ratio)))
    yield "grpo@openrlhf", dialect(scores_first, clip(0.2, 0.2))
    yield "grpo@open_instruct", dialect(population, corrected(clip(0.2, 0.272)), more=0.05 * kl)
    paper = spread(of_groups(left_out, returns(0.05)))
    ratios = [math.prod(new / old for new, old in zip(NEW[i], OLD[i], strict=True)) for i in ROWS]
    yield "rloo@trl", (paper, fmean(clip(0.2, 0.2)(paper[i][0], ratios[i], 1, None, None) for i in ROWS))
    yield "rloo@verl", dialect(spread(of_groups(left_out, returns(0.001))), clip(0.2, 0.2, 3))
    yield "rloo@openrlhf", dialect(minus_kl(spread(of_groups(left_out)), 0.01), clip(0.2, 0.2))
    yield "cispo@trl", dialect(trl, weighed(5.0))
    yield "cispo@verl", dialect(verl, weighed(1.2), more=0.001 * kl)
    yield "cispo@open_instruct", dialect(spread(of_groups(centred)), corrected(weighed(1.272)), more=0.05 * kl)
    not_0 = sum(score != 0 for score in SCORES)
    gpg = spread([len(SCORES) / not_0 * x for x in of_groups(centred)])
    yield "gkd@trl", dialect(spread([0.0] * len(SCORES)), jensen_shannon)
    yield "gpg@verl", dialect(gpg, lambda a, p, *_: -a * math.log(p))
    yield "dapo@verl", dialect(spread(of_groups(norm(stdev, 1e-6), long)), clip(0.2, 0.28, 10))
    ppo = whitened(minus_values(spread(SCORES)), stdev)
    yield "ppo@verl", dialect(ppo, clip(0.2, 0.2, 3), more=value_loss(spread(SCORES)))
    ppo = whitened(minus_values(to_go(0.01)), pstdev)
    yield "ppo@openrlhf", dialect(ppo, clip(0.2, 0.2), more=value_loss(to_go(0.01)))
    yield "reinforce_plus_plus@openrlhf", dialect(whitened(to_go(0.01), pstdev), clip(0.2, 0.2))


ORACLES = dict(oracles())


def of_recipe(name, **changes):
    return work(resolve({**load_recipe(name).raw, **changes}).algorithm())


def test_every_dialect_has_an_oracle():
    assert sorted(ORACLES) == DIALECTS


@pytest.mark.proves(
    "advantages.group_norm",
    "advantages.leave_one_out",
    "advantages.gpg",
    "advantages.reinforce_plus_plus",
    "advantages.gae",
    "policy_loss.dual_clip",
    "policy_loss.cispo",
    "policy_loss.gspo",
    "rollout_correction.truncated",
    how="closed form",
    tolerance="1e-9",
)
@pytest.mark.parametrize("name", ORACLES)
def test_a_dialect_computes_what_its_system_does(name):
    advantages, loss = ORACLES[name]
    worked = of_recipe(name)
    for i in ROWS:
        assert worked.advantages[i, : len(OLD[i])].tolist() == pytest.approx(advantages[i], abs=1e-9)
    assert worked.terms["loss"] == pytest.approx(loss, abs=1e-9)


NUMBERS = {
    "grpo@trl": [1.4997, -0.4999],
    "grpo@verl": [1.5, -0.5],
    "grpo@nemo_rl": [1.0, -0.57735],
    "grpo@open_instruct": [1.73205, -0.57735],
    "rloo": [1.0, -0.33333],
    "dr_grpo": [0.75, -0.25],
}


@pytest.mark.parametrize("name", NUMBERS)
def test_one_right_answer_of_four_tells_the_dialects_apart(name):
    found = of_recipe(name, kl=[], reference="none").advantages[:2, 0]
    assert found.tolist() == pytest.approx(NUMBERS[name], abs=6e-6)


def test_the_example_reaches_every_bound():
    ratios = [new / old for i in ROWS for new, old in zip(NEW[i], OLD[i], strict=True)]
    assert min(ratios) < 0.8
    assert max(ratios) > 10
    assert any(rho > 1.28 for i in ROWS if SCORES[i] for rho in (n / o for n, o in zip(NEW[i], OLD[i], strict=True)))
    assert max(o / s for i in ROWS for o, s in zip(OLD[i], SAMPLER[i], strict=True)) > 2
    assert len(GREEDY) == len(GROUPS)


def test_the_gradient_of_nemo_rl_s_kl_is_the_k3_s_plus_k3():
    """Its factor exp(log p - sg log p) is 1 and has the gradient of its sampling."""
    with patch.object(worked_example, "NEW", OLD):
        with_kl, without = of_recipe("grpo@nemo_rl"), of_recipe("grpo@nemo_rl", kl=[], reference="none")
    for i in ROWS:
        for t, (old, ref) in enumerate(zip(OLD[i], REFERENCE[i], strict=True)):
            gradient = (1 - ref / old) + (ref / old - 1 + math.log(old / ref))
            found = (without.gradient - with_kl.gradient)[i, t].item()
            assert found == pytest.approx(0.01 * gradient / TOKENS, abs=1e-12)


def test_openrlhf_s_kl_has_no_baseline_and_is_not_normalised():
    kl_first = of_recipe("grpo@openrlhf", advantages={"use": "group_norm", "eps": 1e-9})
    assert not torch.allclose(kl_first.advantages, of_recipe("grpo@openrlhf").advantages, atol=1e-4)


# The files


@pytest.mark.parametrize("name", DIALECTS)
def test_a_dialect_is_a_flat_file_that_says_what_differs_and_from_which_version(name):
    text = (ROOT / "recipes" / f"{name}.yaml").read_text()
    base, _, system = name.partition("@")
    comment = " ".join(line[2:] for line in text.splitlines() if line.startswith("# "))
    called = {"trl": "TRL 1.16", "verl": "verl 0.10", "nemo_rl": "NeMo-RL 0.6", "openrlhf": "OpenRLHF 0.11"}
    assert called.get(system, "open-instruct (August 2026)") in comment
    assert len(text.splitlines()) < 60
    assert f"Differs from {base}:" in comment or f"that of {base}," in comment
    recipe = load_recipe(name)
    assert recipe.algorithm().problems() == []
    assert get_host().find_recipe(name).summary
    numbers = {"rollout", "rewards", "training", "update"}
    differ = {path for path, _, _ in differences(load_recipe(base).raw, recipe.raw)}
    assert {path for path in differ if path.partition(".")[0] not in numbers}
    assert not [path for path in differ if path.partition(".")[0] in ("rollout", "rewards", "training")]


def test_every_dialect_stands_in_the_documentation():
    text = (ROOT / "docs" / "dialects.md").read_text()
    assert [name for name in DIALECTS if f"`{name}`" not in text] == []
    for name, numbers in NUMBERS.items():
        if "@" in name:
            line = next(line for line in text.splitlines() if line.startswith(f"| `{name}` |"))
            assert all(f"{number:.4g}" in line for number in numbers)


# explain


@pytest.mark.parametrize("name", [name for name in RECIPES if not {"trainer", "stages"} & set(read_recipe(name))])
def test_every_recipe_can_be_explained(name, capsys):
    explain([name])
    printed = capsys.readouterr().out
    raw = load_recipe(name).raw
    for axis in ("advantages", "policy_loss", "aggregation"):
        assert re.search(rf"^{axis}: {raw[axis]['use']}\b", printed, re.MULTILINE)
    assert "nan" not in printed
    assert "\x1b" not in printed
    assert re.search(r"^  loss +-?[0-9.e-]+$", printed, re.MULTILINE)


def test_two_recipes_are_explained_by_what_differs(capsys):
    explain(["grpo@verl", "grpo@trl"])
    printed = capsys.readouterr().out
    assert re.search(r"^  advantages\.eps +1e-06 +0\.0001$", printed, re.MULTILINE)
    assert re.search(r"^  policy_loss +dual_clip .*c 3\.0 +ppo_clip ", printed, re.MULTILINE)
    assert re.search(r"^  kl\.0 +in_loss .*beta 0\.001.* +-$", printed, re.MULTILINE)
    assert re.search(r"^  1 +1 +2 +1\.5 +1\.4997 +\*$", printed, re.MULTILINE)
    assert "weight of each token: the same" in printed
    assert "\x1b" not in printed


def test_a_recipe_differs_in_nothing_from_itself(capsys):
    explain(["gspo", "gspo"])
    printed = capsys.readouterr().out
    assert "None." in printed
    assert "*" not in printed
    assert printed.count(": the same") == 5


def test_overrides_hold_for_both_and_dropped_rows_say_so(capsys):
    explain(["grpo", "dr_grpo"], ["filters=[{use: too_short, min_tokens: 2}]", "aggregation=token_mean"])
    printed = capsys.readouterr().out
    assert "aggregation" not in printed.partition("The example")[0]
    assert re.search(r"^  1 +0 +1 +dropped +dropped$", printed, re.MULTILINE)


def test_a_refused_recipe_is_not_explained():
    with pytest.raises(UserError, match=r"recipe grpo is rejected:\n  kl\.0: k1 in the loss has expected gradient 0"):
        explain(["grpo"], ["kl.0.estimator=k1"])


def test_the_words_of_the_command_are_names_and_overrides():
    assert split_names(["a", "b", "x=1"]) == (["a", "b"], ["x=1"])
    for words in (["x=1"], ["a", "b", "c"]):
        with pytest.raises(UserError, match="one recipe or two"):
            split_names(words)


def test_on_a_terminal_lines_that_differ_have_a_colour(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with patch.object(sys.stdout, "isatty", lambda: True):
        explain(["grpo@verl", "grpo@trl"])
    printed = capsys.readouterr().out
    assert re.search(r"\x1b\[1;33m1\.5 *\x1b\[0m.*\x1b\[1;33m1\.4997 *\x1b\[0m", printed)
    assert "\x1b[1madvantage\x1b[0m" in printed


PIPELINE = [
    {"kl": [{"use": "in_reward", "beta": 0.3, "level": "sequence"}], "reference": "frozen"},
    {"kl": [{"use": "in_advantage", "beta": 0.3, "estimator": "k1"}], "reference": "frozen"},
    {"advantages": {"use": "group_norm", "order": "score_first"}, "kl": [{"use": "in_reward"}], "reference": "frozen"},
    {"advantages": "gae", "critic": "value_head"},
    {"advantages": "remax", "filters": ["zero_variance"], "aggregation": "prompt_mean"},
]


@pytest.mark.parametrize("parts", PIPELINE)
def test_the_example_goes_the_way_of_a_rollout(parts, tmp_path):
    """What `work` makes of a trainer's rollout is what the trainer made of it."""
    rewards = [{"use": "length", "label": "a", "target": 1, "maximum": 9}, {**runs.FORMAT, "weight": 0.5}]
    chosen = {"aggregation": "seq_mean_token_mean", **parts, "rewards": rewards, "update": {"epochs": 2}}
    trainer = runs.trainer(tmp_path, dtype=torch.float64, **chosen)
    tables = []

    def watch(collected):
        tables.append({name: x.clone() for name, x in collected.table.items()})
        return credit(collected)

    credit, trainer.collector.rows_of.credit = trainer.collector.rows_of.credit, watch
    buffer = trainer.collector.collect(0)
    table = tables[0]
    wide = dict.fromkeys(("old_logps", "ref_logps", "sampler_logps", "values", "sum_sq_probs"), 0 * table["mask"])
    inputs = {**wide, "greedy": 0 * table["total"], "completion_ids": table["mask"].long(), **table}
    inputs |= {"score": table["score:a"], "further": table["score:early"], "logps": inputs["old_logps"] * 0.9}
    with patch.object(worked_example, "inputs", lambda: inputs):
        worked = work(trainer.algorithm)
    kept = worked.kept
    assert int(kept.sum()) == len(buffer.mask)
    assert torch.allclose(worked.advantages[kept], buffer.rows["advantages"], atol=1e-12)
    micro = buffer.slot(0, trainer.algorithm, 0, trainer.collector.forwards.batching)
    learned = kept
    if trainer.algorithm.skips_rows_without_advantage:
        learned = kept & (worked.advantages != 0).any(1)
    assert sum(float(part["weights"].sum()) for part in micro) == pytest.approx(float(worked.weights[learned].sum()))
    trainer.close()
