"""Packaged recipes on the quickstart's task: what changes, and why a run can be short.

Every choice of plugins stays. Changed for all: the model and the problems; 256 completions of at most 4 tokens per rollout,
in groups of at most 8; a rule for the answer in place of `math_answer`; reward models made for the task; at most 4
mini-batches; a linear schedule without warm-up from the quickstart's learning rate. `FITS` holds what else changes for one
recipe: how many rollouts, and settings that are in units of a long run or of long completions.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from hf_rlhf.config.overrides import apply_overrides
from hf_rlhf.config.recipe import read_recipe
from hf_rlhf.data.addition_task import BUILTIN

COMPLETIONS = 256
GROUP = 8
LONGEST = 4
TWO_LINES = 8
"""Longest completion in tokens where answers have two lines."""
MARGIN = 0.2
"""Minimum gain of every recipe: correct answers in the last tenth of the rollouts minus those in the first tenth."""
RIGHT = "right"
"""Label of a reward of weight 0 that is 1 where the answer is right, whatever the recipe is rewarded for."""

RECIPES = (
    *("reinforce", "reinforce_rtg", "reinforce_with_baseline", "rloo", "remax", "reinforce_plus_plus"),
    *(
        "reinforce_plus_plus_baseline",
        "opo",
        "grpo",
        "dr_grpo",
        "dapo",
        "gspo",
        "luspo",
        "cispo",
        "gmpo",
        "sapo",
        "gpg",
    ),
    *("opd", "opd_exact", "gkd", "grpo_opd", "sdft"),
    *("maxrl", "gdpo", "ppo", "ppo_shared", "vapo", "orz", "r1_zero", "trpo", "christiano2017", "stiennon2020", "prm"),
)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Changes for one recipe."""

    learning_rate: float = 4e-4
    rollouts: int = 40
    overrides: tuple[str, ...] = ()
    policy: str = BUILTIN
    """The model that is trained."""

    @property
    def two_lines(self) -> bool:
        """True for problems whose answers have two lines."""
        return self.policy == "judge:steps"


CRITIC = ("critic.learning_rate=1e-3",)
FITS: dict[str, Fit] = {
    "dr_grpo": Fit(overrides=(f"aggregation.length={LONGEST}",)),
    "opd": Fit(overrides=(f"aggregation.length={LONGEST}",)),
    "opd_exact": Fit(overrides=(f"aggregation.length={LONGEST}",)),
    "sdft": Fit(
        policy="judge:hinted",
        overrides=(
            f"aggregation.length={LONGEST}",
            "reference.context=answer",
            'reference.template="{context};{prompt}"',
        ),
    ),
    "gkd": Fit(overrides=("rollout.column=answer",)),
    "dapo": Fit(  # right answers are up to 4 tokens long: the penalty on length begins after them
        overrides=("rollout.max_new_tokens=6", "rewards.1.target=4", "rewards.1.maximum=6")
    ),
    "ppo": Fit(rollouts=30, overrides=CRITIC),
    "ppo_shared": Fit(rollouts=30),
    "vapo": Fit(overrides=("critic.learning_rate=1e-3", "critic.warmup_steps=8", "advantages.length_adaptive=1")),
    "orz": Fit(overrides=CRITIC),
    "r1_zero": Fit(overrides=("reference.every=40",)),
    "stiennon2020": Fit(rollouts=20),
    "trpo": Fit(rollouts=12, overrides=("optimizer.max_kl=0.03", "optimizer.cg_iters=5")),
    "prm": Fit(rollouts=25, overrides=CRITIC, policy="judge:steps"),
}


def fit_of(name: str) -> Fit:
    """Return the changes for a recipe; the common ones if it is not in the table."""
    return FITS.get(name, Fit())


def fitted(name: str, seed: int, rollouts: int | None = None, overrides: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the recipe on the task as plain data; `judge:KIND` denotes the folder of a model of `benchmarks.judges`."""
    fit, raw = fit_of(name), read_recipe(name)
    raw["model"] = {"path": fit.policy}
    raw["dataset"] = {} if fit.two_lines else {"path": BUILTIN}
    group = min(raw["rollout"]["num_generations"], GROUP)
    raw["rollout"] |= {
        "prompts": COMPLETIONS // group,
        "num_generations": group,
        "max_new_tokens": TWO_LINES if fit.two_lines else LONGEST,
    }
    raw["rewards"] = [_reward(reward) for reward in raw["rewards"]]
    raw["rewards"].append({"use": "exact_match", "column": "answer", "weight": 0.0, "label": RIGHT})
    if raw.get("reference", {}).get("use") == "model":
        raw["reference"]["path"] = "judge:teacher"
    update = raw.get("update", {})
    raw["update"] = {"mini_batches": min(update.get("mini_batches", 1), 4), "epochs": update.get("epochs", 1)}
    kept = {name: x for name, x in raw.get("training", {}).items() if name == "max_grad_norm"}
    raw["training"] = {
        "learning_rate": fit.learning_rate,
        "lr_scheduler_type": "linear",
        "max_steps": (rollouts or fit.rollouts) * raw["update"]["mini_batches"] * raw["update"]["epochs"],
        "per_device_train_batch_size": COMPLETIONS,
        "seed": seed,
        **kept,
    }
    raw["logging"] = {"completions": 0}
    raw, _ = apply_overrides(raw, [*fit.overrides, *overrides])
    steps = raw["update"]["mini_batches"] * raw["update"]["epochs"]
    raw["training"]["max_steps"] = (rollouts or fit.rollouts) * steps
    return raw


def _reward(reward: dict[str, Any]) -> dict[str, Any]:
    """Adapt a reward source to the task."""
    models = {"reward_model": "outcome", "token_reward_model": "token", "process_reward_model": "process"}
    if reward["use"] == "math_answer":
        return {"use": "exact_match", "column": "answer"}
    if reward["use"] == "format":
        return {"use": "format", "pattern": "[1-9][0-9]{1,2}"}
    if reward["use"] in models:
        return {**reward, "model": f"judge:{models[reward['use']]}"}
    return reward


def mark(raw: dict[str, Any]) -> str:
    """Equal for recipes that are written alike and name models made alike: a run is not repeated whose result is there."""
    text = json.dumps(raw, sort_keys=True)
    if "judge:" in text:
        from benchmarks.judges import MAKINGS

        text += "".join(str(making) for kind, making in MAKINGS.items() if f"judge:{kind}" in text)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def located(raw: Any) -> Any:
    """Replace model names in the recipe by their folders."""
    if isinstance(raw, dict):
        return {key: located(value) for key, value in raw.items()}
    if isinstance(raw, list):
        return [located(value) for value in raw]
    if isinstance(raw, str) and raw.startswith("judge:"):
        from benchmarks.judges import judge

        return str(judge(raw.removeprefix("judge:")))
    return raw
