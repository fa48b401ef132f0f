"""`update.fused_loss: auto` trains what `off` trains, whose `backward()` differentiates the plugins' (B, T) loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from hf_rlhf import load_plugin
from hf_rlhf.axes import PolicyLoss
from hf_rlhf.registry.host import get_host
from tests.helpers import runs
from tests.unit.plugins.test_losses import VARIANTS

ESTIMATORS = [
    name
    for name in sorted(offer.name for offer in get_host().offers("kl_estimator") if offer.package == "hf_rlhf")
    if name != "function"
    if "full_distribution" not in load_plugin("kl_estimator", name).needs
]
LINEAR = ("k1",)
"""Estimators that are refused in the loss: their expected gradient is 0."""
MEASURED = ("loss", "grad_norm", "policy/", "kl/", "value/")


class Gradients(TrainerCallback):
    """The gradient of policy and critic before each optimizer step."""

    def __init__(self) -> None:
        self.found: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        module = self.trainer.actor_critic  # type: ignore[attr-defined]
        self.found.append(torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]))


def run(folder: Path, fused_loss: str, **parts: Any) -> tuple[Any, list[torch.Tensor], torch.Tensor]:
    """The trainer after four optimizer steps, two of them off the policy that rolled out, its gradients, and how far it went."""
    watch = Gradients()
    update = {"mini_batches": 2, "epochs": 2, "fused_loss": fused_loss}
    training = {"max_steps": 4, "per_device_train_batch_size": 5}
    rollout = {**runs.SCRIPTED, "mask_column": "masks"}
    made = runs.trainer(
        folder,
        dtype=torch.float64,
        callbacks=[watch],
        **{"rollout": rollout, **parts, "update": update, "training": training},
    )
    watch.trainer = made  # type: ignore[attr-defined]
    begin = runs.parameters(made)
    made.train()
    made.close()
    return made, watch.found, runs.parameters(made) - begin


def measured(made: Any) -> list[dict[str, float]]:
    """The metrics of loss, KL and critic of each step."""
    return [{name: x for name, x in entry.items() if name.startswith(MEASURED)} for entry in runs.entries(made)]


def assert_both_train_alike(folder: Path, fused: bool = True, **parts: Any) -> None:
    short, by_tiles, moved = run(folder / "auto", "auto", **parts)
    long, by_rows, also = run(folder / "off", "off", **parts)
    assert short.algorithm.loss_is_fused == fused
    assert not long.algorithm.loss_is_fused
    assert also.norm() > 1e-3
    assert (moved - also).norm() < 1e-7 * also.norm()  # the model's norms round to float32
    for one, other in zip(by_tiles, by_rows, strict=True):
        assert (one - other).norm() <= 1e-7 * other.norm()  # a step may be clipped away whole
    for one, other in zip(measured(short), measured(long), strict=True):
        assert one == pytest.approx(other, rel=1e-6, abs=1e-9)


def of_loss(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What a run needs besides, so that this loss can be trained: log-probs of the sampler where it reads them."""
    plugin: PolicyLoss = load_plugin("policy_loss", name, **settings)
    parts: dict[str, Any] = {"policy_loss": {"use": name, **settings}}
    if "sampler_logps" in plugin.needs:
        parts["rollout"] = {**runs.SAMPLED}
    return parts


@pytest.mark.parametrize(("name", "settings"), VARIANTS, ids=str)
def test_a_policy_loss_trains_alike_on_tiles_and_on_rows(name, settings, tmp_path):
    parts = of_loss(name, settings)
    plugin: PolicyLoss = load_plugin("policy_loss", name, **settings)
    fused = plugin.token_level and not plugin.needs & {"total_score", "group_ids"}
    assert_both_train_alike(tmp_path, fused, **parts)


@pytest.mark.parametrize("clamp", [None, 0.05], ids=["", "clamp"])
@pytest.mark.parametrize("estimator", [x for x in ESTIMATORS if x not in LINEAR])
def test_a_kl_in_the_loss_trains_alike_on_tiles_and_on_rows(estimator, clamp, tmp_path):
    kl = [{"use": "in_loss", "beta": 0.3, "estimator": estimator, "clamp": clamp}, {"use": "in_reward"}]
    assert_both_train_alike(tmp_path, kl=kl, reference="frozen")


def test_a_critic_and_texts_train_alike_beside_a_loss_on_tiles(tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("1+1=2\n22+3=25\n5+0=5\n", encoding="utf-8")
    ptx = {"use": "ptx", "path": str(texts), "max_tokens": 64}
    parts: dict[str, Any] = {"advantages": "gae", "critic": "value_head", "loss_terms": [ptx]}
    assert_both_train_alike(tmp_path, **parts)
