"""Any plugin goes with any other: a pairwise cover of all that are registered, two optimizer steps per rollout each."""

from __future__ import annotations

import itertools
import random
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import runs
import torch

from hf_rlhf import load_plugin
from hf_rlhf.algorithm import Algorithm
from hf_rlhf.axes import AXES, LISTS
from hf_rlhf.settings import Update

REGISTERED: dict[str, list[str]] = {axis: [] for axis in AXES}
for point in sorted(entry_points(group="hf_rlhf"), key=lambda p: p.name):
    if point.dist and point.dist.name == "hf_rlhf":
        REGISTERED[point.name.split(".")[0]].append(point.name.split(".", 1)[1])

NOTHING = "nothing"
"""The empty list, on an axis that holds a list."""
VALUES: dict[str, list[str]] = {
    **{axis: [*([NOTHING] if axis in LISTS - {"rewards"} else []), *names] for axis, names in REGISTERED.items()},
    "level": ["token", "sequence"],
    "update": ["mini_batches", "epochs"],
}
FIX = ("set ", "choose ", "leave ", "add ", "move ")

Combination = dict[str, str]
Pair = tuple[tuple[str, str], tuple[str, str]]

SETTINGS: dict[tuple[str, str], dict[str, Any]] = {
    ("rollout", "generate"): {"prompts": 4, "num_generations": 4, "max_new_tokens": 5},
    ("rollout", "scripted"): {"prompts": 4, "num_generations": 4},
    ("rewards", "length"): {"target": 1, "maximum": 9, "unit": "words"},
    ("rewards", "format"): {"pattern": ".*[0-9].*"},
    ("rewards", "math_answer"): {"workers": 1},
    ("rewards", "function"): {"function": "{folder}/reward.py:count_spaces"},
    ("rewards", "reward_model"): {"model": "{folder}/classifier"},
}


def plugin(axis: str, name: str, folder: Any = "", **settings: Any) -> Any:
    chosen = {
        key: value.format(folder=folder) if isinstance(value, str) else value
        for key, value in SETTINGS.get((axis, name), {}).items()
    }
    return load_plugin(axis, name, **chosen, **settings)


def parts(chosen: Combination, folder: Any = "") -> dict[str, Any]:
    """Axis -> plugin, or list of plugins. A second reward sees to it that scores differ."""
    made: dict[str, Any] = {}
    for axis in AXES:
        names = [] if chosen[axis] == NOTHING else [chosen[axis]]
        nested = {"estimator": chosen["kl_estimator"], "level": chosen["level"]} if axis == "kl" else {}
        plugins = [plugin(axis, name, folder, **nested) for name in names] if axis != "kl_estimator" else []
        made[axis] = plugins if axis in LISTS else next(iter(plugins), None)
    del made["kl_estimator"]
    made["rewards"].append(load_plugin("rewards", "format", pattern="[ -O].*", label="companion"))
    return made


def refusals(chosen: Combination) -> list[str]:
    return Algorithm(**parts(chosen), update=Update(**{chosen["update"]: 2})).problems()


def pairs(chosen: Combination) -> set[Pair]:
    return set(itertools.combinations(chosen.items(), 2))


def draws(fixed: Combination, count: int, seed: object) -> list[Combination]:
    draw = random.Random(str(seed))
    return [{axis: fixed.get(axis) or draw.choice(names) for axis, names in VALUES.items()} for _ in range(count)]


def cover() -> tuple[list[Combination], list[Pair]]:
    """Combinations that run and hold every pair that can run, taken greedily; and the pairs that cannot."""
    pool = [chosen for chosen in draws({}, 800, "pool") if not refusals(chosen)]
    possible = set().union(*(pairs(chosen) for chosen in pool))
    excluded = []
    for one, other in itertools.combinations(VALUES, 2):
        for pair in itertools.product([(one, name) for name in VALUES[one]], [(other, name) for name in VALUES[other]]):
            if pair in possible:
                continue
            found = next((chosen for chosen in draws(dict(pair), 60, pair) if not refusals(chosen)), None)
            if found is None:
                excluded.append(pair)
            else:
                pool.append(found)
                possible |= pairs(found)
    combinations, missing = [], set(possible)
    while missing:
        best = max(pool, key=lambda chosen: len(pairs(chosen) & missing))
        combinations.append(best)
        missing -= pairs(best)
    return combinations, excluded


COVER, EXCLUDED = cover()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What rewards need on disk."""
    made = tmp_path_factory.mktemp("matrix")
    runs.save_classifier(made / "classifier")
    (made / "reward.py").write_text(
        "def count_spaces(completions):\n    return [text.count(' ') for text in completions]\n"
    )
    return made


def title(chosen: Combination) -> str:
    return "-".join(name for axis, name in chosen.items() if len(VALUES[axis]) > 1)


@pytest.mark.parametrize("chosen", COVER, ids=title)
def test_a_combination_learns_over_two_steps_of_a_rollout(chosen: Combination, folder: Path, tmp_path: Path):
    lora = chosen["reference"] == "adapter_off"
    steps = {chosen["update"]: 2}
    options: dict[str, Any] = {"lora": lora, "training": {"learning_rate": 5.0 if lora else 0.5}}
    made = runs.trainer(tmp_path, **parts(chosen, folder), update=steps, **options)
    before = runs.parameters(made.actor_critic.policy)
    made.train()
    made.close()
    after = runs.parameters(made.actor_critic.policy)
    assert torch.isfinite(runs.parameters(made)).all()
    assert not torch.equal(before, after), "the policy did not move"
    first, second = runs.entries(made)
    assert first["health/nonfinite_step"] == second["health/nonfinite_step"] == 0
    if made.algorithm.readers_of_old_logps:
        assert first["policy/ratio"] == pytest.approx(1, abs=1e-5)
        assert abs(second["policy/ratio"] - 1) > 1e-5 or second["policy/approx_kl"] > 1e-6


def test_every_registered_plugin_is_in_the_cover():
    for axis, names in REGISTERED.items():
        assert names, f"no plugin on the axis {axis}"
        assert set(VALUES[axis]) == {chosen[axis] for chosen in COVER}


@pytest.mark.parametrize("pair", EXCLUDED, ids=lambda pair: "-".join(f"{axis}.{name}" for axis, name in pair))
def test_a_pair_that_cannot_run_is_refused_with_a_fix(pair: Pair):
    for chosen in draws(dict(pair), 20, "refused"):
        problems = refusals(chosen)
        assert problems
        for problem in problems:
            assert any(word in problem for word in FIX), problem
