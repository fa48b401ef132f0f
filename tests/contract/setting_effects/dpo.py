"""Two values of each setting of trainer.dpo and advantages.online_dpo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_rlhf import load_plugin
from hf_rlhf.testing import scored
from tests.contract.setting_effects.base import EFFECTS, SettingEffect
from tests.helpers import dpo_runs as dpo


def moved_loss(setting: str, **others: Any) -> Any:
    """The loss and what is logged of a batch, of a policy that has left its reference."""

    def show(folder: Path, value: Any) -> Any:
        trainer = dpo.moved(dpo.small(folder, **{**others, setting: value}))
        loss, gradient = dpo.loss_and_gradient(trainer)
        return [loss, gradient, {name: x for name, x in trainer._metrics["eval"].items() if name != "num_tokens"}]

    return show


for name, first, second, others in (
    ("beta", 0.1, 0.5, {}),
    ("loss_type", "sigmoid", "fidelity", {}),
    ("label_smoothing", 0.0, 0.2, {}),
    ("f_divergence_type", "reverse_kl", "js_divergence", {}),
    ("f_alpha_divergence_coef", 0.5, 0.1, {"f_divergence_type": "alpha_divergence", "loss_type": "fidelity"}),
    ("discopop_tau", None, 2.0, {"loss_type": "discopop"}),
    ("mask_shared_prefix", False, True, {"loss_type": "ipo"}),
):
    EFFECTS[f"trainer.dpo.{name}"] = SettingEffect(first, second, moved_loss(name, **others))

EFFECTS["trainer.dpo.reference"] = SettingEffect(
    "frozen", "precomputed", lambda folder, value: dpo.small(folder, reference=value).train_dataset.column_names
)
EFFECTS["trainer.dpo.max_length"] = SettingEffect(
    None,
    7,
    lambda folder, value: len(
        dpo.made(folder, f"trainer.max_length={'null' if value is None else value}").train_dataset
    ),
)


def credit(**settings: Any) -> Any:
    return load_plugin("advantages", "online_dpo", **settings)(scored())


for name, first, second in (("beta", 0.1, 0.5), ("loss_type", "sigmoid", "ipo"), ("pairs", "best_worst", "all")):
    EFFECTS[f"advantages.online_dpo.{name}"] = SettingEffect(
        first, second, lambda folder, value, name=name: credit(**{name: value})
    )
