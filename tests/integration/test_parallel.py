"""Everything that saves, merges or averages weights reads them through `training/parallel.py`, which knows how they lie."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hf_rlhf.testing import tiny_policy
from hf_rlhf.training import parallel
from tests.helpers import runs
from tests.helpers.paths import ROOT

KNOWS = re.compile(
    r"accelerator\.(prepare\w*|no_sync|clip_grad_\w+|unwrap_model|get_state_dict)\b|_set_sync_gradients|_foreach_norm\("
)


def test_no_other_module_knows_how_a_module_is_wrapped_or_clipped():
    found = {
        str(path.relative_to(ROOT))
        for folder in ("hf_rlhf", "plugins")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if KNOWS.search(path.read_text(encoding="utf-8"))
    }
    assert found == {"hf_rlhf/training/parallel.py"}


def files(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The weights that a run left behind, by file."""
    return {str(path.relative_to(folder)): load_file(path) for path in sorted(folder.rglob("*.safetensors"))}


def saved(folder: Path, **parts: Any) -> dict[str, dict[str, torch.Tensor]]:
    """What a checkpoint and the end of a run hold: policy, critic, moving reference, average, merged adapters."""
    training = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    made = runs.trainer(folder / "run", policy=tiny_policy()[0], training=training, **parts)
    made.train()
    made.save_model(str(folder / "end"))
    made.close()
    return {**files(folder / "run"), **{f"end/{name}": x for name, x in files(folder / "end").items()}}


WHOLE = {
    "kl": ["in_reward"],
    "reference": {"use": "ema", "decay": 0.5},
    "advantages": "gae",
    "critic": "separate",
    "update": {"mini_batches": 2, "ema": 0.9},
}
ADAPTER = {"lora": True, "model": {"save_merged": True}, "update": {"mini_batches": 2, "ema": 0.9}}


@pytest.mark.parametrize(("parts", "count"), [(WHOLE, 8), (ADAPTER, 6)], ids=["whole", "adapter"])
def test_every_file_of_weights_is_read_through_it(parts, count, tmp_path, monkeypatch):
    """Where it reads weights as twice what they are, every file holds twice the numbers."""
    plain = saved(tmp_path / "plain", **parts)
    assert len(plain) == count
    own = parallel.whole_parameters
    monkeypatch.setattr(parallel, "whole_parameters", lambda module: ((name, 2 * x) for name, x in own(module)))
    doubled = saved(tmp_path / "doubled", **parts)
    assert doubled.keys() == plain.keys()
    for file, tensors in plain.items():
        for name, x in tensors.items():
            merged = parts is ADAPTER and file.endswith("/model.safetensors") and "proj" in name
            if merged:  # W + B A became 2 W + 4 B A
                assert not torch.equal(doubled[file][name], x), (file, name)
            else:
                assert torch.equal(doubled[file][name], 2 * x), (file, name)


def test_names_and_tensors_are_those_of_the_state_and_load_again(tmp_path):
    made = runs.trainer(tmp_path, advantages="gae", critic="separate")
    made.close()
    state = made.actor_critic.state_dict()
    whole = parallel.state_dict(made.actor_critic)
    assert whole.keys() == state.keys()
    assert all(torch.equal(whole[name], x) for name, x in state.items())
    kept = {name: x.clone() for name, x in whole.items()}
    with torch.no_grad():
        for p in made.actor_critic.parameters():
            p.zero_()
    parallel.load_state_dict(made.actor_critic, kept)
    assert all(torch.equal(x, kept[name]) for name, x in made.actor_critic.state_dict().items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_number_that_is_not_finite_is_found(value):
    module = torch.nn.Linear(3, 2)
    assert parallel.gradients_are_finite(module), "without a gradient"
    module.weight.grad, module.bias.grad = torch.ones(2, 3), torch.full((2,), 1e10)
    assert parallel.gradients_are_finite(module)
    module.weight.grad[1, 2] = value
    assert not parallel.gradients_are_finite(module)
