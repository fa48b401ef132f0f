"""References of single KLs on two processes: the parameters of one, also after a checkpoint within a rollout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers import every, stepping
from tests.processes.test_invariance import assert_same_movement

MOVING = {"use": "ema", "decay": 0.5}


def algorithms(folder: Path) -> dict[str, dict[str, Any]]:
    """A teacher by column beside an anchor and a slow copy; top k; behind hints and a sibling's success."""
    every.write_files(folder)
    teacher = {"use": "model", "path": str(folder / "teacher")}
    anchor = {"use": "in_reward", "beta": 0.1}
    learn = {"use": "in_loss", "beta": 0.5, "estimator": "exact", "reference": teacher}
    first, rest = {"answer": ["a", "b", "c"]}, {"answer": ["d", "e", "f"]}
    hinted = {"use": "with_context", "of": MOVING, "context": "answer"}
    shown = {"use": "with_context", "of": "policy", "context": "tests.helpers.own_functions:sibling"}
    return {
        "tasks": {
            "kl": [
                {**learn, "when": first, "label": "first"},
                {**learn, "when": rest, "label": "rest", "estimator": {"use": "forward", "top_k": 5}},
                {"use": "in_loss", "beta": 0.2, "estimator": "k2", "level": "sequence", "reference": MOVING},
                anchor,
            ],
            "reference": "frozen",
        },
        "contexts": {
            "kl": [
                {"use": "in_loss", "beta": 0.5, "estimator": "exact", "reference": hinted},
                {"use": "in_advantage", "beta": 0.2, "reference": shown},
                {"use": "in_reward", "beta": 0.2, "estimator": "exact", "reference": shown},
            ],
        },
    }


def specifications(folder: Path) -> dict[str, Any]:
    return {
        name: {
            "output_dir": str(folder / name),
            "algorithm": algorithm,
            "update": {"mini_batches": 2, "epochs": 2},
            "prompts": 7,
            "training": {"max_steps": 8, "per_device_train_batch_size": 3},
        }
        for name, algorithm in algorithms(folder).items()
    }


@pytest.mark.slow
def test_two_processes_give_the_parameters_of_one(tmp_path):
    specs = specifications(tmp_path)
    found = stepping.finish(stepping.start(specs, tmp_path / "run", processes=2), tmp_path / "run")
    for name, spec in specs.items():
        begin = stepping.parameters(stepping.make_trainer(spec))
        one = stepping.run({**spec, "output_dir": str(tmp_path / f"{name} alone")})
        assert_same_movement(one - begin, found[name] - begin)


@pytest.mark.parametrize("at", [3, 5])
@pytest.mark.parametrize("name", ["tasks", "contexts"])
def test_a_run_resumes_to_the_bit_within_a_rollout(tmp_path, name, at):
    spec = specifications(tmp_path)[name]
    whole = stepping.run(spec)
    other = {**spec, "output_dir": str(tmp_path / "stopped")}
    stepping.run(other, stop=at)
    resumed = stepping.run(other, resume=True)
    assert bool((resumed == whole).all())
