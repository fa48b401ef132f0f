"""Two values of each setting of estimators and baselines that give different results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_rlhf import load_plugin
from tests.contract.setting_effects.base import EFFECTS, SettingEffect
from tests.helpers.advantage_batches import full, of

ESTIMATORS: dict[str, dict[str, tuple[Any, Any]]] = {
    "baseline": {"baseline": ("others_mean", "greedy"), "gamma": (1.0, 0.9)},
    "gae": {
        "gamma": (1.0, 0.9),
        "lam": (0.95, 0.5),
        "lam_critic": (None, 1.0),
        "length_adaptive": (None, 0.5),
        "whiten": (False, True),
    },
    "gdpo": {"eps": (1e-4, 1e-1)},
    "gpg": {"dialect": ("paper", "verl"), "order": ("kl_first", "score_first")},
    "group_mean": {"order": ("kl_first", "score_first")},
    "group_mean_batch_std": {"eps": (1e-4, 1e-1), "ddof": (1, 0), "order": ("kl_first", "score_first")},
    "group_norm": {
        "eps": (1e-4, 1e-1),
        "ddof": (1, 0),
        "statistics": ("group", "others"),
        "order": ("kl_first", "score_first"),
    },
    "leave_one_out": {"order": ("kl_first", "score_first")},
    "opo": {"leave_one_out": (False, True), "order": ("kl_first", "score_first")},
    "optimal_token_baseline": {"leave_one_out": (False, True), "align": ("position", "sampled")},
    "pass_at_k": {"normalise": ("none", "std"), "order": ("kl_first", "score_first")},
    "reinforce": {"gamma": (1.0, 0.9)},
    "reinforce_plus_plus": {"gamma": (1.0, 0.9), "ddof": (1, 0)},
    "reinforce_plus_plus_baseline": {"ddof": (1, 0), "order": ("kl_first", "score_first")},
    "reward_to_go": {"gamma": (1.0, 0.9)},
    "turn_group_norm": {"eps": (1e-4, 1e-1), "scale": ("std", "none"), "order": ("kl_first", "score_first")},
    "turn_gae": {"gamma": (1.0, 0.9), "lam": (0.95, 0.5)},
    "gigpo": {
        "eps": (1e-4, 1e-1),
        "scale": ("std", "none"),
        "order": ("kl_first", "score_first"),
        "step_weight": (1.0, 0.5),
        "gamma": (0.95, 1.0),
    },
}


def credit(name: str, settings: dict[str, Any]) -> list[Any]:
    """Advantages and, where there are any, the critic's targets."""
    made = load_plugin("advantages", name, **settings)(full())
    return [made.advantages, made.returns] if hasattr(made, "returns") else [made]


def of_estimator(name: str, setting: str, first: Any, second: Any, **others: Any) -> None:
    EFFECTS[f"advantages.{name}.{setting}"] = SettingEffect(
        first, second, lambda folder, value: credit(name, {**others, setting: value})
    )


for estimator, settings in ESTIMATORS.items():
    for setting, (first, second) in settings.items():
        of_estimator(estimator, setting, first, second)
of_estimator("gae", "ddof", 1, 0, whiten=True)
of_estimator("mix", "parts", ["gae", "opo"], ["gae", "group_mean"], weights=[1.0, 1.0])
of_estimator("mix", "weights", [1.0, 1.0], [1.0, 0.5], parts=["gae", "opo"])


def all_wrong(folder: Path, value: int) -> Any:
    batch = full()
    batch.token_rewards[:4] = 0
    return of(batch, "maxrl", all_wrong=value)


EFFECTS["advantages.maxrl.all_wrong"] = SettingEffect(0, -1, all_wrong)
EFFECTS["advantages.remax"] = SettingEffect("remax", "reward_to_go", lambda folder, value: of(full(), value))


def decayed(folder: Path, decay: float) -> Any:
    ema = load_plugin("baseline", "ema", decay=decay)
    for mean in (1.0, 2.0):
        ema.observe({"reward/after_kl/mean": mean})
    return ema(full())


EFFECTS["baseline.ema.decay"] = SettingEffect(0.9, 0.5, decayed)
EFFECTS["baseline.constant.value"] = SettingEffect(
    0.0, 0.5, lambda folder, value: load_plugin("baseline", "constant", value=value)(full())
)
PLAIN = ("critic", "greedy", "others_mean")
for plain, other in zip(PLAIN, [*PLAIN[1:], PLAIN[0]], strict=True):
    EFFECTS[f"baseline.{plain}"] = SettingEffect(
        plain, other, lambda folder, value: load_plugin("baseline", value)(full())
    )
