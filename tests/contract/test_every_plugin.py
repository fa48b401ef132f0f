"""Every plugin in a run of its own: split-invariant, the same on two processes, and resumed with equal bits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import every, stepping


def specification(plugin: str, folder: Path, **training: Any) -> dict[str, Any]:
    """The plugin on scripted completions with tool tokens, in float64, with plain SGD."""
    every.write_files(folder)
    return {
        "output_dir": str(folder / "out"),
        "algorithm": every.choices(plugin, folder),
        "update": every.update(plugin),
        "experts": every.needs_experts(plugin),
        "lora": every.needs_lora(plugin),
        "training": {"max_steps": 8, **training},
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[torch.Tensor, torch.Tensor]]:
    """Plugin -> its parameters before and after a run on one process, in whole steps: once for all tests."""

    @functools.cache
    def found(plugin: str) -> tuple[torch.Tensor, torch.Tensor]:
        trainer = stepping.make_trainer(specification(plugin, tmp_path_factory.mktemp("whole")))
        begin = stepping.parameters(trainer)
        trainer.train()
        end = stepping.parameters(trainer)
        trainer.close()
        return begin, end

    return found


def assert_same(begin: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> None:
    assert (one - begin).norm() > 1e-5, "nothing moved"
    assert (one - other).norm() <= 1e-6 * (one - begin).norm()


@pytest.mark.parametrize("plugin", every.TRAINED)
def test_micro_batches_of_one_row_give_the_parameters_of_whole_steps(plugin, whole, tmp_path):
    assert_same(*whole(plugin), stepping.run(specification(plugin, tmp_path, per_device_train_batch_size=1)))


@pytest.fixture(scope="module")
def on_two_processes(tmp_path_factory):
    """Plugin -> its parameters after a run on two processes, in micro-batches of three rows."""
    folder = tmp_path_factory.mktemp("two")
    specs = {plugin: specification(plugin, folder, per_device_train_batch_size=3) for plugin in every.TRAINED}
    return stepping.finish(stepping.start(specs, folder / "run", processes=2), folder / "run")


@pytest.mark.parametrize("plugin", every.TRAINED)
def test_two_processes_give_the_parameters_of_one(plugin, whole, on_two_processes):
    assert_same(*whole(plugin), on_two_processes[plugin])


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """The same with `training.fsdp`."""
    folder = tmp_path_factory.mktemp("sharded")
    chosen = {"per_device_train_batch_size": 3, "fsdp": True}
    specs = {plugin: specification(plugin, folder, **chosen) for plugin in SHARDED}
    return stepping.finish(stepping.start(specs, folder / "run", processes=2), folder / "run")


SHARDED = [plugin for plugin in every.TRAINED if plugin != "optimizer.trpo"]


@pytest.mark.slow
@pytest.mark.parametrize("plugin", SHARDED)
def test_shards_give_the_parameters_of_whole_models(plugin, whole, on_two_processes, sharded):
    begin, _ = whole(plugin)
    movement = (on_two_processes[plugin] - begin).norm()
    assert movement > 1e-5, "nothing moved"
    assert (on_two_processes[plugin] - sharded[plugin]).norm() <= 1e-12 * movement


@pytest.mark.parametrize("plugin", every.by_what_is_kept())
def test_resuming_inside_a_rollout_gives_equal_bits(plugin, tmp_path):
    def spec(folder: str) -> dict[str, Any]:
        adam = {"optim": "adamw_torch", "learning_rate": 0.01, "max_steps": 7}
        return specification(plugin, tmp_path / folder, **adam)

    straight = stepping.run(spec("straight"))
    stopped = stepping.run(spec("stopped"), stop=5)
    assert not torch.equal(stopped, straight)
    assert torch.equal(stepping.run(spec("stopped"), resume=True), straight)
