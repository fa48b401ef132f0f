"""Rows 27 and 28: numbers that are not finite in the loss and in the weights."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.faults.world import World, expect, fault

LOSS = '''
from dataclasses import dataclass
from hf_rlhf import hookimpl
from hf_rlhf_plugins.policy_loss.ppo_clip import PPOClip

@dataclass(kw_only=True)
class Broken(PPOClip):
    """ppo_clip, NaN in some calls."""
    name = "broken"
    calls = 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        loss, metrics = super().__call__(*args, **kwargs)
        return (loss * float("nan") if {when} else loss), metrics

@hookimpl
def policy_loss():
    return [Broken]
'''
POISON = '''
from dataclasses import dataclass
import torch
from hf_rlhf import hookimpl
from hf_rlhf_plugins.rollout.generate import Generate

@dataclass(kw_only=True)
class Poison(Generate):
    """Sampling that writes a NaN into the policy before its fourth rollout."""
    name = "poison"
    calls = 0

    def __call__(self, policy, *args, **kwargs):
        self.calls += 1
        if self.calls == 4:
            torch.nn.utils.parameters_to_vector(policy.model.parameters())
            with torch.no_grad():
                policy.model.model.norm.weight[3] = float("nan")
        return super().__call__(policy, *args, **kwargs)

@hookimpl
def rollout():
    return [Poison]
'''


def all_finite(folder: Path) -> None:
    """Check that the weights of every checkpoint with a manifest, and of the run, are finite."""
    from safetensors.torch import load_file

    for path in [
        *folder.glob("model.safetensors"),
        *(p.with_name("model.safetensors") for p in folder.glob("*/rlhf_manifest.json")),
    ]:
        for name, tensor in load_file(path).items():
            expect(torch.isfinite(tensor).all(), f"{path.relative_to(folder)} holds {name}, which is not finite")


@fault(27, "NaN in the loss", "skip the step, end after several, never save it", trl="logs a loss of 0 and saves NaN")
def _(world: World) -> str:
    world.write("broken.py", LOSS.format(when="self.calls in (3, 4)"))
    world.recipe(policy_loss="broken")
    world.train("-p", "broken.py").well()
    expect(world.logged("health/nonfinite_step")[1] == 1, f"not counted: {world.logged('health/nonfinite_step')}")
    all_finite(world.folder / "out")
    world.write("broken.py", LOSS.format(when="self.calls > 4"))
    world.recipe(policy_loss="broken", training={"max_steps": 30})
    line = world.train("-p", "broken.py").stopped().line("error:", "finite")
    all_finite(world.folder / "out")
    return line


@fault(
    28,
    "NaN in the weights",
    "stop and name the tensor, keep the last good checkpoint",
    trl="probability tensor contains inf",
)
def _(world: World) -> str:
    world.write("poison.py", POISON)
    world.recipe(rollout={"use": "poison", "prompts": 2, "num_generations": 4, "max_new_tokens": 6})
    line = world.train("-p", "poison.py").stopped().line("model.norm.weight")
    all_finite(world.folder / "out")
    expect(world.checkpoints(), "no checkpoint is left")
    return line
