"""docs/ppo_checklist.md: both lists are whole, what it names is there, and the details that no other test holds."""

from __future__ import annotations

import ast
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from hf_rlhf import load_plugin
from hf_rlhf.config.sections import SECTIONS
from hf_rlhf.registry.host import get_host
from hf_rlhf.registry.settings_schema import settings_of
from hf_rlhf.runtime.seeding import seeded
from tests.helpers import runs
from tests.helpers.paths import ROOT

PAGE = (ROOT / "docs" / "ppo_checklist.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.splitlines()
    if line.startswith("| ") and not line.startswith(("| #", "| ---"))
]
"""number, detail, here, how, where, test."""


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def functions_of(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def is_there(name: str) -> bool:
    """Whether a file, a setting (axis.plugin.setting, section.setting, training.argument) or a plugin (axis.plugin) is."""
    if "/" in name:
        return (ROOT / name).is_file()
    first, *rest = name.split(".")
    if first == "training" and len(rest) == 1:
        return rest[0] in {field.name for field in fields(TrainingArguments)}
    if first in SECTIONS and len(rest) == 1:
        return rest[0] in {setting.name for setting in settings_of(SECTIONS[first])}
    found = {(offer.axis, offer.name) for offer in get_host().offers() if offer.package == "hf_rlhf"}
    if (first, rest[0]) not in found:
        return False
    return len(rest) == 1 or rest[1] in {setting.name for setting in settings_of(get_host().get(first, rest[0]))}


# The page


def test_the_37_details_and_those_of_rlhf_are_listed_once_each():
    numbers = [row[0] for row in ROWS]
    assert [x for x in numbers if x.isdigit()] == [str(i) for i in range(1, 38)]
    groups = {"S": 4, "G": 6, "R": 3, "P": 11, "A": 1}
    assert [x for x in numbers if x[0] in groups] == [f"{x}{i}" for x, n in groups.items() for i in range(1, n + 1)]
    assert len(numbers) == len(set(numbers))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_row_says_where_a_detail_lives_and_what_holds_it(row: list[str]):
    assert len(row) == 6
    _, detail, here, how, where, test = row
    assert detail
    assert here in ("yes", "differs", "no")
    assert here == "yes" or how, "a reason is due"
    assert bool(names(where)) == bool(names(test)) == (here != "no")
    missing = [name for name in names(where) if not is_there(name)]
    assert not missing, f"there is no {', '.join(missing)}"
    for name in names(test):
        file, _, function = name.partition("::")
        assert function in functions_of(ROOT / file), f"there is no {name}"


@pytest.mark.parametrize("wrong", ["hf_rlhf/no.py", "update.no", "training.no", "critic.no", "critic.separate.no"])
def test_what_is_not_there_is_found_out(wrong: str):
    assert not is_there(wrong)


# Details


def test_adams_epsilon_reaches_policy_and_critic(tmp_path: Path):
    """The first step of Adam is rate x g / (|g| + epsilon): with epsilon far above |g| it is rate / epsilon x g."""

    def step(**training: Any) -> tuple[Any, torch.Tensor, torch.Tensor]:
        made = runs.trainer(
            tmp_path,
            dtype=torch.float64,
            advantages="gae",
            critic="separate",
            update={"mini_batches": 1},
            training={"max_steps": 1, "learning_rate": 0.1, **training},
        )
        before = [runs.parameters(m) for m in (made.actor_critic.policy, made.actor_critic.critic)]
        made.train(overwrite=True)
        after = [runs.parameters(m) for m in (made.actor_critic.policy, made.actor_critic.critic)]
        return made, *[a - b for a, b in zip(after, before, strict=True)]

    made, *moved = step(optim="adamw_torch", weight_decay=0.0, adam_epsilon=1e5)
    _, *plain = step(optim="sgd")
    assert {group["eps"] for group in made.optimizer.param_groups} == {1e5}
    for one, other in zip(moved, plain, strict=True):
        assert other.norm() > 0
        torch.testing.assert_close(one * 1e5, other, rtol=1e-4, atol=1e-9)
    usual, *_ = step(optim="adamw_torch", adam_epsilon=1e-5)
    assert len(usual.optimizer.param_groups) == 4
    assert {group["eps"] for group in usual.optimizer.param_groups} == {1e-5}


def test_what_ppo_is_debugged_with_is_logged(tmp_path: Path):
    made = runs.trained(tmp_path, advantages="gae", critic="value_head", update={"mini_batches": 2, "epochs": 2})
    due = {"policy/loss", "policy/entropy", "policy/approx_kl", "policy/clip_frac/low", "policy/clip_frac/high"}
    due |= {"value/loss", "value/clip_frac", "value/explained_var", "policy/grad_norm", "value/grad_norm"}
    logged = set().union(*runs.entries(made))
    assert due <= logged, f"missing: {', '.join(sorted(due - logged))}"


def test_processes_and_rollouts_draw_from_seeds_of_their_own():
    def drawn(rollout: int, process: int, seed: int = 0) -> tuple[float, ...]:
        with seeded(seed, "rollout", rollout, 0, process):
            return tuple(torch.rand(4).tolist())

    different = {drawn(rollout, process, seed) for rollout in range(3) for process in range(3) for seed in range(3)}
    assert len(different) == 27
    assert drawn(1, 2) == drawn(1, 2)


def test_the_discount_is_1_unless_set():
    assert load_plugin("advantages", "gae").gamma == 1.0
    assert load_plugin("advantages", "gae", gamma=0.9).gamma == 0.9


def test_a_token_pays_its_own_kl_and_the_last_one_gets_the_score(tmp_path: Path):
    """R_t = -beta (log p - log q) at each token, and the score more at the last one (InstructGPT, arXiv:2203.02155)."""
    made = runs.trainer(
        tmp_path,
        kl=[{"use": "in_reward", "beta": 0.3, "estimator": "k1"}],
        reference={"use": "sync", "every": 100},
        advantages="reward_to_go",
        update={"mini_batches": 1},
        training={"max_steps": 2, "learning_rate": 2.0},
    )
    made.train(overwrite=True)
    seen: list[Any] = []
    estimate = made.algorithm.advantages.__class__.__call__

    class Looking(type(made.algorithm.advantages)):  # type: ignore[misc]
        def __call__(self, scored: Any) -> Any:
            seen.append(scored)
            return estimate(self, scored)

    made.algorithm.advantages.__class__ = Looking
    buffer = made.collector.collect(9)
    made.close()
    (scored,) = seen
    rows, mask = buffer.rows, buffer.rows["mask"]
    kl = (rows["old_logps"] - rows["ref_logps"]) * mask
    assert kl.abs().max() > 0.01
    last = mask.size(1) - 1 - mask.flip(1).argmax(1)
    want = -0.3 * kl
    want[torch.arange(len(mask)), last] += scored.scores["early"].to(want.dtype)
    torch.testing.assert_close(scored.token_rewards, want, rtol=1e-5, atol=1e-6)
    assert scored.scores["early"].unique().tolist() == [0, 1]
