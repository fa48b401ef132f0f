"""What the settings of critics and of the policy's average change; see `base`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from hf_rlhf import load_plugin
from hf_rlhf.batch import Scored
from hf_rlhf.modeling.offload import Keeper, ToMainMemory
from hf_rlhf.training import device_phases
from tests.contract.setting_effects.base import EFFECTS, SettingEffect, after, with_critic
from tests.helpers import runs

HEAD = {"layers": (0, 1), "width": (8, 16), "activation": ("relu", "tanh")}


def with_head(setting: str, value: Any) -> dict[str, Any]:
    made = with_critic("value_head", setting, value)
    return {**made, "critic": {"layers": 1, **made["critic"]}}


for setting, values in HEAD.items():
    EFFECTS[f"critic.value_head.{setting}"] = SettingEffect(
        *values, after(lambda folder, value, s=setting: with_head(s, value))
    )


def own_weights(folder: Path, adapter: bool) -> list[str]:
    """The weights that a critic of an adapted policy trains and saves."""
    parts = with_critic("separate", "adapter", adapter)
    return sorted(runs.trainer(folder, lora=True, **parts).actor_critic.critic.state_dict())


EFFECTS["critic.separate.adapter"] = SettingEffect(False, True, own_weights)


def average_on_disk(folder: Path, decay: float | None) -> Any:
    """What is saved as the policy's average."""
    from transformers import AutoModelForCausalLM

    made = runs.trained(folder, update={"mini_batches": 2, "ema": decay})
    made.save_model(str(folder / "out"))
    place = folder / "out" / "ema"
    return runs.parameters(AutoModelForCausalLM.from_pretrained(place)) if place.is_dir() else None


def evaluated(folder: Path, ema: bool) -> set[str]:
    """What an evaluation reports."""
    parts = {"evaluation": {"ema": ema}, "update": {"ema": 0.5}, "eval_data": runs.problems(2)}
    return {name for name in runs.trainer(folder, **parts).evaluate() if "reward" in name}


EFFECTS["update.ema"] = SettingEffect(None, 0.5, average_on_disk)
EFFECTS["evaluation.ema"] = SettingEffect(False, True, evaluated)


def credited(folder: Path, whiten_rewards: bool) -> Any:
    """Advantages and the critic's targets."""
    rewards = torch.arange(12.0).reshape(3, 4)
    scored = Scored(mask=torch.ones(3, 4), token_rewards=rewards, values=0.1 * rewards, group_ids=torch.arange(3))
    credit = load_plugin("advantages", "gae", whiten_rewards=whiten_rewards)(scored)
    return [credit.advantages, credit.returns]


EFFECTS["advantages.gae.whiten_rewards"] = SettingEffect(False, True, credited)


def critics_device(folder: Path, device: str | None) -> torch.device:
    made = runs.trainer(folder, **with_critic("separate", "device", device))
    return next(made.actor_critic.critic.parameters()).device


EFFECTS["critic.separate.device"] = SettingEffect(None, "meta", critics_device)


# What is offloaded


def offloaded(make: Callable[[bool], dict[str, Any]]) -> Callable[[Path, bool], list[float]]:
    """MiB that are away while completions are sampled, in two rollouts."""

    def show(folder: Path, value: bool) -> list[float]:
        training = {"optim": "adamw_torch", "max_steps": 4}
        with mock.patch.object(device_phases, "keeper", as_from_a_gpu):
            made = runs.trained(folder, training=training, **make(value))
        return [entry.get("memory/offloaded", 0.0) for entry in runs.entries(made)]

    return show


def as_from_a_gpu(tensors: Any, device: torch.device, offload: bool, **options: bool) -> Keeper:
    """Offload to main memory though the run is on a CPU, where `offload` changes nothing."""
    return ToMainMemory(tensors, device, **options) if offload else Keeper(tensors)


def kept_reference(name: str) -> Callable[[bool], dict[str, Any]]:
    return lambda value: {"kl": ["in_loss"], "reference": {"use": name, "offload": value}}


for reference_name in ("frozen", "ema", "sync"):
    EFFECTS[f"reference.{reference_name}.offload"] = SettingEffect(
        False, True, offloaded(kept_reference(reference_name))
    )
EFFECTS["critic.separate.offload"] = SettingEffect(
    False, True, offloaded(lambda value: with_critic("separate", "offload", value))
)
EFFECTS["update.offload"] = SettingEffect(
    False, True, offloaded(lambda value: {"update": {"mini_batches": 2, "offload": value}})
)
