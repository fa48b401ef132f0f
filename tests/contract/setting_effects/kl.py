"""Settings of KL estimators, placements and controllers, of references that move, and of the trust region."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_rlhf import load_plugin
from hf_rlhf.contract.optimizer_step import Step
from tests.contract.setting_effects.base import EFFECTS, SettingEffect, after, neighbours, of_tensors, one_kl

neighbours("kl_estimator", "abs", "k1_is", "k3_is")
SLOPES = torch.tensor([[-1.0, -2.0]], dtype=torch.float64)


def slope(folder: Path, name: str) -> Tensor:
    """Of the two whose values are equal."""
    logps = SLOPES.clone().requires_grad_()
    return torch.autograd.grad(load_plugin("kl_estimator", name)(logps, SLOPES.flip(1)).sum(), logps)[0]


def of_distributions(folder: Path, name: str, **settings: Any) -> Tensor:
    p = torch.tensor([[0.6, 0.3, 0.1]]).log()
    return load_plugin("kl_estimator", name, **settings)(p, p.flip(1))


EFFECTS["kl_estimator.k3_plus"] = SettingEffect("k3_plus", "k3", slope)
for estimator in ("exact", "forward", "jsd"):
    EFFECTS[f"kl_estimator.{estimator}.top_k"] = SettingEffect(
        None, 1, lambda folder, value, name=estimator: of_distributions(folder, name, top_k=value)
    )
EFFECTS["kl_estimator.jsd.beta"] = SettingEffect(
    0.5, 0.1, lambda folder, value: of_distributions(folder, "jsd", beta=value)
)
EFFECTS["kl_estimator.jsd.normalize"] = SettingEffect(
    False, True, lambda folder, value: of_distributions(folder, "jsd", normalize=value)
)

for kl_name in ("in_advantage", "in_loss", "in_reward", "monitor"):
    of_tensors("kl", kl_name, "clamp", None, 0.05)
for setting, values in {"estimator": ("k2", "k3"), "level": ("token", "sequence"), "beta": (0.1, 1.0)}.items():
    EFFECTS[f"kl.in_advantage.{setting}"] = SettingEffect(
        *values, after(lambda folder, value, s=setting: one_kl("in_advantage", s, value))
    )


def with_controller(kl_name: str) -> Any:
    """A run of three rollouts whose KL is not on target."""
    moving = {"use": "adaptive", "target": 0.5, "horizon": 17}
    return SettingEffect(
        "fixed",
        moving,
        after(lambda folder, value: {**one_kl(kl_name, "controller", value), "training": {"max_steps": 3}}),
    )


for kl_name in ("in_advantage", "in_loss", "in_reward"):
    EFFECTS[f"kl.{kl_name}.controller"] = with_controller(kl_name)


def moved(folder: Path, controller: Any) -> float:
    controller.observe({"rollout/rows": 100, "kl/rollout/sequence": 6.5, "kl/rollout/token": 0.1})
    return controller(1.0)


def adaptive(setting: str, first: Any, second: Any) -> None:
    EFFECTS[f"kl_controller.adaptive.{setting}"] = SettingEffect(
        first, second, lambda folder, value: moved(folder, load_plugin("kl_controller", "adaptive", **{setting: value}))
    )


adaptive("target", 6.0, 7.0)
adaptive("horizon", 10_000, 1_000)
adaptive("statistic", "sequence", "token")
EFFECTS["kl_controller.fixed"] = SettingEffect(
    "fixed", "adaptive", lambda folder, value: moved(folder, load_plugin("kl_controller", value))
)


# References that move


def reference(name: str, setting: str, first: Any, second: Any, **others: Any) -> None:
    """A run of four rollouts, of one optimizer step each, with a KL in the loss."""

    def parts(folder: Path, value: Any) -> dict[str, Any]:
        chosen = {"use": name, **others, setting: value}
        return {**one_kl("in_loss", "beta", 1.0), "reference": chosen, "training": {"max_steps": 4}}

    EFFECTS[f"reference.{name}.{setting}"] = SettingEffect(first, second, after(parts))


reference("sync", "every", 2, 3)
reference("sync", "mixing", 1.0, 0.6, every=2)
reference("ema", "decay", 0.99, 0.5)


# The trust region


class Softmax(nn.Module):
    """Three actions, one of them nearly certain, so that the KL is far from quadratic."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([0.0, 3.0, 6.0], dtype=torch.float64))


def stepped(**settings: Any) -> Tensor:
    policy, plugin = Softmax(), load_plugin("optimizer", "trpo", **settings)
    optimizer = plugin.build(policy, [])

    def log_probs(rows: int) -> Tensor:
        return policy.logits.log_softmax(0).expand(rows, -1)

    def loss(rows: int) -> Tensor:
        return -(log_probs(rows).exp() * torch.tensor([2.0, 1.0, 0.0])).sum() / rows

    loss(4).backward()
    plugin.hold(Step(micro_batches=[4], loss=loss, log_probs=log_probs, total=lambda x: x.detach()))
    optimizer.step()
    return policy.logits.detach()


def trust(setting: str, first: Any, second: Any, **others: Any) -> None:
    EFFECTS[f"optimizer.trpo.{setting}"] = SettingEffect(
        first, second, lambda folder, value: stepped(**{"damping": 1e-3, **others, setting: value})
    )


trust("max_kl", 0.01, 0.02)
trust("cg_iters", 1, 10)
trust("damping", 0.1, 0.01)
trust("backtracks", 10, 0, max_kl=0.5)
trust("shrink", 0.5, 0.8, max_kl=0.5)
