"""Every plugin in a run of its own: split-invariant, the same on two processes, and resumed with equal bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import every, stepping


def specification(plugin: str, folder: Path, **training: Any) -> dict[str, Any]:
    """The plugin on scripted completions with tool tokens, in float64, with plain SGD."""
    every.write_texts(folder)
    return {
        "output_dir": str(folder / "out"),
        "algorithm": every.choices(plugin, folder),
        "update": every.update(plugin),
        "lora": every.needs_lora(plugin),
        "training": {"max_steps": 8, **training},
    }


def movement(spec: dict[str, Any]) -> torch.Tensor:
    return stepping.run(spec) - stepping.parameters(stepping.make_trainer(spec))


def assert_same(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.norm() > 1e-5, "nothing moved"
    assert (a - b).norm() <= 1e-6 * a.norm()


@pytest.mark.parametrize("plugin", every.TRAINED)
def test_micro_batches_of_one_row_give_the_parameters_of_whole_steps(plugin, tmp_path):
    whole = movement(specification(plugin, tmp_path))
    assert_same(whole, movement(specification(plugin, tmp_path, per_device_train_batch_size=1)))


@pytest.fixture(scope="module")
def on_two_processes(tmp_path_factory):
    """Plugin -> its parameters after a run on two processes."""
    folder = tmp_path_factory.mktemp("two")
    specs = {plugin: specification(plugin, folder, per_device_train_batch_size=3) for plugin in every.TRAINED}
    return stepping.finish(stepping.start(specs, folder / "run", processes=2), folder / "run")


@pytest.mark.parametrize("plugin", every.TRAINED)
def test_two_processes_give_the_parameters_of_one(plugin, on_two_processes, tmp_path):
    spec = specification(plugin, tmp_path, per_device_train_batch_size=3)
    begin = stepping.parameters(stepping.make_trainer(spec))
    assert_same(stepping.run(spec) - begin, on_two_processes[plugin] - begin)


@pytest.mark.parametrize("plugin", every.by_what_is_kept())
def test_resuming_inside_a_rollout_gives_equal_bits(plugin, tmp_path):
    def spec(folder: str) -> dict[str, Any]:
        adam = {"optim": "adamw_torch", "learning_rate": 0.01, "max_steps": 7}
        return specification(plugin, tmp_path / folder, **adam)

    straight = stepping.run(spec("straight"))
    stopped = stepping.run(spec("stopped"), stop=5)
    assert not torch.equal(stopped, straight)
    assert torch.equal(stepping.run(spec("stopped"), resume=True), straight)
