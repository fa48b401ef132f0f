"""The same rollouts give the same parameters however they are split: micro-batches, mini-batch rows, processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import stepping
from tests.helpers.paths import DATA

FILTERS = [{"use": "zero_variance", "resample": 2}]
AGGREGATIONS: list[Any] = [
    "token_mean",
    "seq_mean_token_mean",
    "seq_mean_token_sum",
    {"use": "seq_mean_token_sum_norm", "length": 8},
]
FULL = {
    "kl": [
        {"use": "in_reward", "beta": 0.1},
        {"use": "in_loss", "beta": 0.2, "estimator": "k3"},
        {"use": "in_loss", "beta": 0.1, "estimator": "k2", "level": "sequence"},
    ],
    "reference": "frozen",
    "loss_terms": [{"use": "entropy", "coef": 0.02}],
    "advantages": {"use": "gae", "lam": 0.9, "whiten": True},
    "critic": {"use": "value_head", "coef": 0.3},
}


def specification(folder: Path, algorithm: dict[str, Any], **training: Any) -> dict[str, Any]:
    return {"output_dir": str(folder / "out"), "algorithm": algorithm, "training": training}


def movement(folder: Path, spec: dict[str, Any]) -> torch.Tensor:
    return stepping.run(spec) - stepping.parameters(stepping.make_trainer(spec))


def assert_same_movement(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.norm() > 1e-3, "nothing moved"
    assert (a - b).norm() <= 1e-6 * a.norm()


@pytest.mark.parametrize("aggregation", AGGREGATIONS, ids=str)
@pytest.mark.parametrize("algorithm", [pytest.param({}, marks=pytest.mark.slow), FULL], ids=["plain", "full"])
def test_any_split_into_micro_batches_gives_the_same_parameters(aggregation, algorithm, tmp_path):
    algorithm = {**algorithm, "aggregation": aggregation}
    whole = movement(tmp_path, specification(tmp_path, algorithm))
    for rows in (1, 3):
        assert_same_movement(
            whole, movement(tmp_path, specification(tmp_path, algorithm, per_device_train_batch_size=rows))
        )


def test_a_token_budget_gives_the_same_parameters(tmp_path):
    spec = specification(tmp_path, FULL)
    tight = {**spec, "update": {"mini_batches": 2, "epochs": 2, "max_tokens_per_micro_batch": 20}}
    assert_same_movement(movement(tmp_path, spec), movement(tmp_path, tight))


@pytest.mark.slow
def test_two_processes_give_the_parameters_of_one(tmp_path):
    """Every aggregation, an uneven number of prompts, a process without rows in some steps, a resampling filter."""
    specs = {}
    for i, aggregation in enumerate(AGGREGATIONS):
        spec = specification(tmp_path, {**FULL, "aggregation": aggregation}, per_device_train_batch_size=3)
        specs[f"aggregation {i}"] = {**spec, "prompts": 7}
    three = {"use": "scripted", "prompts": 3, "num_generations": 4, "mask_column": "masks"}
    one_group_per_step = {
        **specification(tmp_path, {**FULL, "rollout": three}),
        "update": {"mini_batches": 3, "epochs": 1},
    }
    specs["a process without rows"] = one_group_per_step
    texts = {"use": "ptx", "path": str(DATA / "texts.txt"), "rows": 3, "max_tokens": 64}
    specs["texts beside a critic"] = specification(tmp_path, {**FULL, "loss_terms": [texts]})
    specs["filter"] = specification(tmp_path, {"filters": FILTERS})
    normalized = {"use": "length", "target": 1, "maximum": 9, "normalize": "mean_std"}
    specs["normalised rewards"] = specification(tmp_path, {"rewards": [normalized], "advantages": "reinforce"})
    specs["prompts by difficulty"] = {
        **specification(tmp_path, {"sampler": {"use": "difficulty", "warmup": 0}, "filters": FILTERS}),
        "prompts": 9,
    }
    both = stepping.finish(stepping.start(specs, tmp_path / "two", processes=2), tmp_path / "two")
    assert both.keys() == specs.keys()
    for name, spec in specs.items():
        begin = stepping.parameters(stepping.make_trainer(spec))
        assert_same_movement(stepping.run(spec) - begin, both[name] - begin)


@pytest.mark.parametrize("environment", ["Forking", "Duel"])
def test_two_processes_give_the_parameters_of_one_over_forks_and_agents(environment, tmp_path):
    """From equal rollouts: what the engine says depends on the tokens before it alone."""
    own = "tests.helpers.environments"
    episodes = {
        "rollout": {"use": f"{own}:Hashed", "prompts": 4, "num_generations": 4},
        "environment": [{"use": f"{own}:{environment}"}],
        "rewards": ["episode"],
        "advantages": {"use": "gae", "lam": 0.9},
        "critic": {"use": "value_head", "coef": 0.3},
        "kl": FULL["kl"],
        "reference": "frozen",
    }
    spec = specification(tmp_path, episodes, per_device_train_batch_size=3)
    both = stepping.finish(stepping.start({"run": spec}, tmp_path / "two", processes=2), tmp_path / "two")
    begin = stepping.parameters(stepping.make_trainer(spec))
    assert_same_movement(stepping.run(spec) - begin, both["run"] - begin)


@pytest.mark.parametrize("axis", ["kl", "loss_terms"])
def test_two_plugins_of_one_kind_add_up(axis, tmp_path):
    one = {"kl": {"use": "in_loss", "estimator": "k3"}, "loss_terms": {"use": "entropy"}}[axis]
    factor = {"kl": "beta", "loss_terms": "coef"}[axis]
    halves = {**FULL, axis: [{**one, factor: 0.1}, {**one, factor: 0.3}]}
    whole = {**FULL, axis: [{**one, factor: 0.4}]}
    assert_same_movement(*(movement(tmp_path, specification(tmp_path, algorithm)) for algorithm in (halves, whole)))
