"""A small algorithm for every plugin of this package: the choices with which it runs and has an effect."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from hf_rlhf.axes import LISTS, Plugin
from hf_rlhf.registry.host import Host
from hf_rlhf.testing import tiny_policy

PLUGINS = sorted(p.name for p in entry_points(group="hf_rlhf") if p.dist and p.dist.name == "hf_rlhf")
"""`axis.name` of each."""

OWN_FUNCTIONS = {
    f"{axis}.function": {"function": f"tests.helpers.own_functions:{name}"}
    for axis, name in (("advantages", "adv"), ("filters", "keep"), ("kl_estimator", "k3"), ("policy_loss", "clip"))
}
SETTINGS: dict[str, dict[str, Any]] = {
    "advantages.mix": {"parts": ["leave_one_out", "reward_to_go"], "weights": [0.5, 0.5]},
    **OWN_FUNCTIONS,
    "environment.tools": {"tools": ["hf_rlhf.data.calculator_task:calc"], "workers": "inline"},
    "environment.trl": {"factory": "tests.helpers.environments:Doubling"},
    "filters.overlong": {"max_tokens": 7},
    "filters.too_short": {"min_tokens": 3},
    "filters.opsm": {"delta": 0.01},
    "kl_controller.adaptive": {"target": 0.01, "horizon": 40},
    "loss_terms.adaptive_entropy": {"target": 10.0, "coef": 0.05},
    "loss_terms.positive_nll": {"threshold": -0.5},
    "loss_terms.ptx": {"path": "{folder}/texts.txt", "rows": 3, "max_tokens": 64, "coef": 0.1},
    "loss_terms.router_balance": {"coef": 0.1},
    "policy_loss.trpo_penalty": {"target": 1e-4},
    "reference.model": {"path": "{folder}/teacher"},
    "reference.with_context": {"context": "answer"},
    "reference.sync": {"every": 3, "mixing": 0.5},
    "reference.ema": {"decay": 0.5},
    "optimizer.trpo": {"max_kl": 0.001},
}
"""What a plugin needs or where its default would not show in a few steps."""

CRITIC = {"critic": {"use": "value_head", "coef": 0.3}}
REFERENCE = {"kl": [{"use": "in_loss", "beta": 0.2, "estimator": "k2"}], "reference": "frozen"}
TURNS = {
    "environment": [{"use": "second_chance", "max_tokens": 32}],
    "rollout": {"use": "scripted", "prompts": 4, "num_generations": 4},
}
"""Episodes of two turns."""
GAINS = {"rewards": [{"use": "length", "label": "short", "target": 1, "maximum": 9, "weight": -1}]}
"""Rewards that are not negative."""


def choices(plugin: str, folder: Path) -> dict[str, Any]:
    """Axis choices of an algorithm that contains `axis.name`. Raises KeyError for what is not here."""
    axis, _, name = plugin.partition(".")
    settings = {k: x.format(folder=folder) if isinstance(x, str) else x for k, x in SETTINGS.get(plugin, {}).items()}
    chosen = {"use": name, **settings}
    moved = {"use": "in_reward", "beta": 0.2}
    match axis:
        case "kl":
            return {**REFERENCE, "kl": [{"beta": 0.2, **chosen} if name != "monitor" else chosen]}
        case "kl_estimator":
            place = "in_reward" if name == "k1" else "in_loss"
            return {**REFERENCE, "kl": [{"use": place, "beta": 0.2, "estimator": chosen}]}
        case "kl_controller":
            in_loss = {"use": "in_loss", "beta": 0.2, "estimator": "k2", "controller": chosen}
            return {**REFERENCE, "kl": [{**moved, "controller": chosen}, in_loss]}
        case "advantages":
            return {
                "advantages": chosen,
                **GAINS,
                **(CRITIC if name in ("gae", "turn_gae") else {}),
                **(TURNS if name in ("turn_gae", "turn_group_norm", "gigpo") else {}),
                **({"reference": "frozen"} if name == "online_dpo" else {}),
            }
        case "baseline":
            return {"advantages": {"use": "baseline", "baseline": chosen}, **(CRITIC if name == "critic" else {})}
        case "critic":
            return {"advantages": "gae", "critic": chosen} if name != "none" else {}
        case "environment" if name == "verifiers":
            raise KeyError(plugin)
        case "environment":
            engine = {"use": "scripted", "prompts": 4, "num_generations": 4}
            return {"environment": [{"max_tokens": 32, **chosen}], "rollout": engine}
        case "reference":
            if name == "policy":
                chosen = {"use": "with_context", "of": name, **SETTINGS["reference.with_context"]}
            return {**REFERENCE, "reference": chosen} if name != "none" else {}
        case "rewards" | "rollout" | "sync" | "trainer" | "doctor":
            raise KeyError(plugin)
    return {axis: [chosen] if axis in LISTS else chosen}


def update(plugin: str) -> dict[str, int]:
    """Two mini-batches and two epochs, so that ratios leave 1."""
    return {"mini_batches": 2, "epochs": 2}


def needs_experts(plugin: str) -> bool:
    """Whether the policy has to be a mixture of experts."""
    return plugin == "loss_terms.router_balance"


def needs_lora(plugin: str) -> bool:
    """Whether the policy has to have an adapter."""
    return plugin == "reference.adapter_off"


TRAINED = [
    plugin
    for plugin in PLUGINS
    if plugin.split(".")[0] not in ("rewards", "rollout", "sync", "trainer", "doctor")
    and plugin not in ("reference.remote", "environment.verifiers")
]
"""The plugins that `choices` knows: all but those that make completions and score them, train without any, ask a server, or need
a package that is not here."""


def by_what_is_kept() -> list[Any]:
    """TRAINED as parameters: `slow` are those that keep nothing themselves and need what an earlier one of their axis needs,
    so that a checkpoint holds the same of both."""
    host, seen, found = Host(disable=""), set(), []
    for plugin in TRAINED:
        axis, _, name = plugin.partition(".")
        cls = host.get(axis, f"hf_rlhf/{name}")
        needs = cls.needs if isinstance(cls.needs, frozenset) else frozenset({plugin})
        alike = cls.state_dict is Plugin.state_dict and axis not in ("critic", "reference", "optimizer")
        found.append(pytest.param(plugin, marks=pytest.mark.slow) if alike and (axis, needs) in seen else plugin)
        seen.add((axis, needs))
    return found


def write_files(folder: Path) -> None:
    """Texts for the loss term that brings its own, and another model for the reference that is one."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in tiny_policy(seed=1):
        part.save_pretrained(folder / "teacher")
    (folder / "texts.txt").write_text("\n".join(f"{i} and {i} make {2 * i}." for i in range(12)) + "\n")
