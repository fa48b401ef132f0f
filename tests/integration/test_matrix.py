"""Any plugin goes with any other: a pairwise cover of all that are registered, two optimizer steps per rollout each."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_rlhf import load_plugin
from hf_rlhf.axes import AXES, LISTS, NESTED
from hf_rlhf.config.algorithm import Algorithm
from hf_rlhf.config.plugin_tree import with_nested
from hf_rlhf.config.sections import Update
from tests.helpers import every, runs
from tests.helpers.models import tiny_moe
from tests.helpers.paths import DATA
from tests.helpers.tiers import slow

ALGORITHM = [axis for axis in AXES if axis not in ("sync", "trainer", "doctor")]
REGISTERED: dict[str, list[str]] = {axis: [] for axis in ALGORITHM}
RULES = ("choice", "constraints", "json_schema", "language", "numeric", "regex", "repetition", "missing_eos")
"""Rewards that are to the core what `exact_match` and `format` are: each is tried alone."""
SERVED = ("judge", "remote", "unit_tests")
"""Rewards that ask another program, with tests of their own."""
for point in sorted(entry_points(group="hf_rlhf"), key=lambda p: p.name):
    alike = point.name in {
        *(f"rewards.{name}" for name in (*RULES, *SERVED)),
        *every.OWN_FUNCTIONS,
        "rollout.vllm",
        "reference.remote",
    }
    alike |= point.name == "reference.policy"  # which is refused but behind another prompt
    alike |= point.name == "environment.verifiers"  # whose package is not here
    if point.dist and point.dist.name == "hf_rlhf" and point.name.split(".")[0] in REGISTERED and not alike:
        REGISTERED[point.name.split(".")[0]].append(point.name.split(".", 1)[1])

NOTHING = "nothing"
"""The empty list, on an axis that holds a list."""
BASELINES = [f"baseline:{name}" for name in REGISTERED["baseline"]]
VALUES: dict[str, list[str]] = {
    **{
        axis: [*([NOTHING] if axis in LISTS - {"rewards"} else []), *names]
        for axis, names in REGISTERED.items()
        if axis != "baseline"
    },
    "advantages": [*(name for name in REGISTERED["advantages"] if name != "baseline"), *BASELINES],
    "level": ["token", "sequence"],
    "update": ["mini_batches", "epochs"],
}
FIX = ("set ", "choose ", "leave ", "add ", "move ", "use ")

Combination = dict[str, str]
Pair = tuple[tuple[str, str], tuple[str, str]]

SETTINGS: dict[tuple[str, str], dict[str, Any]] = {
    ("rollout", "generate"): {"prompts": 4, "num_generations": 4, "max_new_tokens": 5},
    ("rollout", "mixed"): {"prompts": 4, "num_generations": 4, "max_new_tokens": 5, "column": "answer"},
    ("rollout", "scripted"): {"prompts": 4, "num_generations": 4},
    ("environment", "tools"): every.SETTINGS["environment.tools"],
    ("environment", "trl"): every.SETTINGS["environment.trl"],
    ("rewards", "length"): {"target": 1, "maximum": 9, "unit": "words", "weight": -1.0},
    ("rewards", "format"): {"pattern": ".*[0-9].*"},
    ("rewards", "math_answer"): {"workers": "inline"},
    ("rewards", "constraints"): {"instructions": [{"id": "punctuation:no_comma"}]},
    ("rewards", "choice"): {"column": "pick"},
    ("rewards", "json_schema"): {"schema": {"type": "integer"}},
    ("rewards", "language"): {"language": "en"},
    ("rewards", "regex"): {"pattern": "[0-9]"},
    ("rewards", "function"): {"function": "{folder}/reward.py:count_spaces"},
    ("rewards", "reward_model"): {"model": "{folder}/classifier"},
    ("rewards", "token_reward_model"): {"model": "{folder}/tokens"},
    ("rewards", "process_reward_model"): {"model": "{folder}/tokens"},
    ("advantages", "mix"): {"parts": [{"use": "leave_one_out"}, {"use": "reward_to_go"}], "weights": [0.5, 0.5]},
    ("reference", "model"): {"path": "{folder}/teacher"},
    ("reference", "with_context"): {"context": "answer"},
    ("loss_terms", "router_balance"): {"coef": 0.1},
    ("loss_terms", "ptx"): {"path": str(DATA / "texts.txt"), "rows": 2, "max_tokens": 64},
    ("optimizer", "trpo"): {"max_kl": 1e-3, "cg_iters": 3},
}
MAY_BE_NEGATIVE = {"reward_model", "token_reward_model"}
"""Rewards that `maxrl` refuses while it runs, when one is negative."""


def plugin(axis: str, name: str, folder: Any = "", /, **settings: Any) -> Any:
    name, _, inner = name.partition(":")
    chosen = {
        key: value.format(folder=folder) if isinstance(value, str) else value
        for key, value in SETTINGS.get((axis, name), {}).items()
        if key not in settings
    }
    if axis == "environment":
        chosen["max_tokens"] = 40
    if inner:
        chosen[axis if axis == "baseline" else "baseline"] = {"use": inner}
    return load_plugin(axis, name, **chosen, **settings)


def parts(chosen: Combination, make: Callable[..., Any]) -> dict[str, Any]:
    """Axis -> plugin, or list of plugins. A second reward sees to it that scores differ."""
    made: dict[str, Any] = {}
    for axis in ALGORITHM:
        if axis in NESTED:
            continue
        names = [] if chosen[axis] == NOTHING else [chosen[axis]]
        nested = {"estimator": chosen["kl_estimator"], "level": chosen["level"]} if axis == "kl" else {}
        if axis == "kl" and chosen["kl"] not in (NOTHING, "monitor"):
            nested["controller"] = chosen["kl_controller"]
        if axis == "rewards" and chosen["rollout"] == "mixed":  # which trains on no reward
            nested["weight"] = 0.0
        plugins = [make(axis, name, *nested.items()) for name in names]
        made[axis] = plugins if axis in LISTS else next(iter(plugins), None)
    weight = 0.0 if chosen["rollout"] == "mixed" else 1.0
    companion = {"pattern": "[ -O].*", "label": "companion", "weight": weight}
    made["rewards"].append(make("rewards", "format", *companion.items()))
    return made


@functools.cache
def cached(axis: str, name: str, *settings: tuple[str, str]) -> Any:
    """A plugin that is only asked, never run."""
    return plugin(axis, name, **dict(settings))


@functools.cache
def needed(axis: str, name: str, *settings: tuple[str, str]) -> frozenset[str]:
    """What a plugin and those in it need."""
    return frozenset().union(*(p.needs for _, p in with_nested("", cached(axis, name, *settings))))


def algorithm(chosen: Combination) -> Algorithm:
    return Algorithm(**parts(chosen, make=cached), update=Update(**{chosen["update"]: 2}))


def refusals(chosen: Combination) -> list[str]:
    return algorithm(chosen).problems()


def pairs(chosen: Combination) -> set[Pair]:
    return set(itertools.combinations(chosen.items(), 2))


def mended(chosen: Combination, fixed: Combination) -> Combination:
    """With the critic, reference, environment and rollout that the other choices ask for, where they are not fixed."""
    drawn = random.Random(str(sorted(chosen.items())))
    held = [value if isinstance(value, list) else [value or ()] for value in parts(chosen, make=needed).values()]
    needs = set().union(*itertools.chain(*held))
    provided = {"critic": "values", "reference": "ref_logps"}
    for axis, name in provided.items():
        if axis not in fixed:
            some = [x for x in VALUES[axis] if x != "none"]
            chosen = {**chosen, axis: drawn.choice(some) if name in needs else "none"}
    if "turns" in needs and chosen["environment"] == NOTHING and "environment" not in fixed:
        chosen = {**chosen, "environment": drawn.choice([x for x in VALUES["environment"] if x != NOTHING])}
    if "sampler_logps" in needs and "rollout" not in fixed:
        chosen = {**chosen, "rollout": "generate"}
    return chosen


def draws(fixed: Combination, count: int, seed: object) -> Iterator[Combination]:
    draw = random.Random(str(seed))
    for _ in range(count):
        chosen = {axis: fixed.get(axis) or draw.choice(names) for axis, names in VALUES.items()}
        if "loss_terms" not in fixed and draw.random() < 0.5:
            chosen["loss_terms"] = NOTHING
        yield mended(chosen, fixed)


def can_run(chosen: Combination) -> bool:
    """Whether the combination is not refused and is sure to have the rewards that its estimator takes."""
    wild = chosen["advantages"] == "maxrl" and chosen["rewards"] in MAY_BE_NEGATIVE
    return not wild and next(algorithm(chosen).each_problem(), None) is None


def cover() -> tuple[list[Combination], list[Pair]]:
    """Combinations that run and hold every pair that can run, taken greedily; and the pairs that cannot."""
    pool = [chosen for chosen in draws({}, 1500, "pool") if can_run(chosen)]
    possible = set().union(*(pairs(chosen) for chosen in pool))
    excluded = []
    for one, other in itertools.combinations(VALUES, 2):
        for pair in itertools.product([(one, name) for name in VALUES[one]], [(other, name) for name in VALUES[other]]):
            if pair in possible:
                continue
            found = next((chosen for chosen in draws(dict(pair), 400, pair) if can_run(chosen)), None)
            if found is None:
                excluded += [pair] if ("advantages", "maxrl") not in pair or pair[0][1] not in MAY_BE_NEGATIVE else []
            else:
                pool.append(found)
                possible |= pairs(found)
    number = {pair: 1 << i for i, pair in enumerate(sorted(possible))}
    holds = [(sum(number[pair] for pair in pairs(chosen)), chosen) for chosen in pool]
    combinations, missing = [], (1 << len(number)) - 1
    while missing:
        bits, best = max(holds, key=lambda entry: (entry[0] & missing).bit_count())
        combinations.append(best)
        missing &= ~bits
    return combinations, excluded


def new_first(combinations: list[Combination]) -> list[Combination]:
    """Those first that have a plugin which none before them has."""
    seen: set[tuple[str, str]] = set()
    front = []
    for chosen in combinations:
        if not seen >= chosen.items():
            front.append(chosen)
            seen |= chosen.items()
    return front + [chosen for chosen in combinations if chosen not in front]


COVER, EXCLUDED = cover()
COVER = new_first(COVER)
SHARE = 160
"""So many combinations, which hold most of the pairs, run in every test run, and the others in the slow tier: always the
same ones, as the draws are seeded."""


def save_token_classifier(folder: Path) -> None:
    """A tiny token classifier with the tokenizer of `tiny_policy`."""
    from transformers import LlamaForTokenClassification

    policy, tokenizer = runs.tiny_policy()
    policy.config.num_labels = 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForTokenClassification(policy.config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What rewards need on disk."""
    made = tmp_path_factory.mktemp("matrix")
    runs.save_classifier(made / "classifier")
    save_token_classifier(made / "tokens")
    teacher, tokenizer = runs.tiny_policy(seed=1)
    teacher.save_pretrained(made / "teacher")
    tokenizer.save_pretrained(made / "teacher")
    (made / "reward.py").write_text(
        "def count_spaces(completions):\n    return [text.count(' ') for text in completions]\n"
    )
    return made


def title(chosen: Combination) -> str:
    return "-".join(name for axis, name in chosen.items() if len(VALUES[axis]) > 1)


@pytest.mark.parametrize("chosen", [*COVER[:SHARE], *slow(*COVER[SHARE:])], ids=title)
def test_a_combination_learns_over_two_steps_of_a_rollout(chosen: Combination, folder: Path, tmp_path: Path):
    lora = chosen["reference"] == "adapter_off"
    steps = {chosen["update"]: 2}
    options: dict[str, Any] = {"lora": lora, "training": {"learning_rate": 5.0 if lora else 0.5}}
    if chosen["loss_terms"] == "router_balance":
        options["policy"] = tiny_moe(len(runs.tiny_policy()[1]))
    made = runs.trainer(
        tmp_path,
        data=runs.problems(played=True),
        **parts(chosen, lambda axis, name, *s: plugin(axis, name, folder, **dict(s))),
        update=steps,
        **options,
    )
    before = runs.parameters(made.actor_critic.policy)
    made.train()
    made.close()
    after = runs.parameters(made.actor_critic.policy)
    assert torch.isfinite(runs.parameters(made)).all()
    first, second = runs.entries(made)
    few = chosen["filters"] == "overlong"  # it drops whatever is cut off, which may be all, or all that differ
    few |= chosen["rollout"] == "mixed" and chosen["filters"] != NOTHING  # which find no difference without a reward
    few |= chosen["policy_loss"] == "token_entropy"  # of whose few tokens none may have an advantage
    few |= chosen["advantages"] == "pass_at_k"  # none has where every group has a success, or none
    assert few or not torch.equal(before, after), "the policy did not move"
    assert first["health/nonfinite_step"] == second["health/nonfinite_step"] == 0
    # opsm drops, and a loss without gradient where the advantages are 0 skips, the rows of a whole mini-batch
    may_be_empty = chosen["filters"] == "opsm" or made.algorithm.policy_loss.zero_without_advantage
    idle = [entry.get("policy/grad_norm", 0.0) == 0 for entry in (first, second)]
    emptied = may_be_empty and (idle[0] or ("policy/ratio" not in second and idle[1]))
    if made.algorithm.readers_of_old_logps and not few and not emptied:
        assert first["policy/ratio"] == pytest.approx(1, abs=1e-5)
        assert abs(second["policy/ratio"] - 1) > 1e-8


@pytest.mark.parametrize("name", RULES)
def test_a_rule_scores_a_run(name: str, tmp_path: Path):
    rewards = [plugin("rewards", name), load_plugin("rewards", "length", target=1, maximum=9)]
    data = [{**row, "pick": "A"} for row in runs.problems()]
    before = runs.parameters(runs.trainer(tmp_path / "before", rewards=rewards, data=data))
    made = runs.trained(tmp_path, rewards=rewards, data=data)
    assert not torch.equal(runs.parameters(made), before)
    assert any(f"reward/{name}/mean" in entry for entry in runs.entries(made))


def test_every_registered_plugin_is_in_every_test_run():
    for axis, names in REGISTERED.items():
        assert names, f"no plugin on the axis {axis}"
        values = BASELINES if axis == "baseline" else VALUES[axis]
        assert set(values) <= {chosen["advantages" if axis == "baseline" else axis] for chosen in COVER[:SHARE]}


def test_most_pairs_are_in_every_test_run():
    every, share = (set().union(*map(pairs, combinations)) for combinations in (COVER, COVER[:SHARE]))
    assert len(share) > 0.85 * len(every)


@pytest.mark.parametrize("pair", EXCLUDED, ids=lambda pair: "-".join(f"{axis}.{name}" for axis, name in pair))
def test_a_pair_that_cannot_run_is_refused_with_a_fix(pair: Pair):
    for chosen in draws(dict(pair), 20, "refused"):
        problems = refusals(chosen)
        assert problems
        for problem in problems:
            assert any(word in problem.lower() for word in FIX), problem
