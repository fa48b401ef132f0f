"""Commands to type after a run: they name its folder and its plugins, and are accepted as they are."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_rlhf.config.overrides import apply_overrides
from hf_rlhf.config.plan import plugin_files
from hf_rlhf.config.recipe import OfflineRecipe, resolve
from hf_rlhf.runtime.errors import UserError

if TYPE_CHECKING:
    from hf_rlhf.config.recipe import Recipe

CHANGES = (
    *("advantages.use=leave_one_out", "advantages.use=group_norm", "advantages.use=reward_to_go"),
    *("policy_loss.use=dual_clip", "policy_loss.use=ppo_clip", "aggregation.use=token_mean", "update.epochs=2"),
)
"""Changes to suggest; the first one that the recipe accepts is."""


def next_steps(
    recipe: Recipe, folder: str | Path, plan: dict[str, Any], trusted: bool = False
) -> list[tuple[str, str]]:
    """Return (command, its purpose) after a run of `recipe` in `folder`; `plan`: its plugins."""
    folder, own = str(folder), plugin_options(plan)
    file = str(Path(folder) / "recipe.yaml")
    found = []
    if isinstance(recipe, OfflineRecipe):
        if reward := recipe.trainer().reward:
            source = f"rewards=[{{use: {reward}, model: {json.dumps(folder)}}}]"
            found.append((["check", "grpo", source, *own], "what training a policy with this reward would do"))
    else:
        name = recipe.plugins["advantages"].name
        found.append((["show", "advantages", name, *own], "its estimator of advantages, and the settings"))
        if change := next((x for x in CHANGES if _is_accepted(recipe, x)), None):
            found.append((["check", file, change, *own], "what a change would do, or why not"))
    if isinstance(recipe, OfflineRecipe) or _is_accepted(recipe, f"model.path={json.dumps(folder)}"):
        trust = ["--trust-remote-code"] if trusted else []
        found.append((["train", file, "--model", folder, *trust, *own], "continues from here"))
    return [(shlex.join(["hf-rlhf", *words]), purpose) for words, purpose in found]


def plugin_options(plan: dict[str, Any]) -> list[str]:
    """Return `-p FILE` for each file that the run took a plugin from."""
    return [word for file in plugin_files(plan) for word in ("-p", file)]


def _is_accepted(recipe: Recipe, change: str) -> bool:
    """Return whether the recipe runs with a change that it does not have already."""
    from hf_rlhf.training.setup import describe

    try:
        raw, _ = apply_overrides(recipe.raw, [change])
        changed = resolve(raw, name=recipe.name)
        lora = changed.model.lora is not None
        describe(changed.algorithm(), changed.sections, changed.training_arguments(), lora, (), changed)
    except (UserError, ValueError):
        return False
    return bool(changed.raw != recipe.raw)
