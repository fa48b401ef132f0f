"""One hook per axis.

A plugin module ends with the hook of its axis, which returns its classes. Offer the module in pyproject.toml,

    [project.entry-points.hf_rlhf]
    "rewards.one_line" = "my_package.one_line"

or try the file by itself with `hf-rlhf -p ./one_line.py`. Hooks are called once, when a recipe names one of the names.
`hf_rlhf/registry/examples` has a complete plugin for each hook; `hf-rlhf new AXIS NAME` starts a package from it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from hf_rlhf import axes

hookspec = pluggy.HookspecMarker("hf_rlhf")


def summary(axis: str) -> str:
    """Return what the plugins of an axis are, in one line."""
    return (globals()[axis].__doc__ or "").partition("\n")[0]


def example(axis: str) -> str:
    """Return the source of the axis' example plugin."""
    return (Path(__file__).parent / "examples" / f"{axis}.py").read_text(encoding="utf-8")


@hookspec
def sampler() -> list[type[axes.PromptSampler]]:  # type: ignore[empty-body]
    """Samplers, which choose the prompts of each rollout. With rollouts ahead of the updates they observe scores late."""


@hookspec
def rollout() -> list[type[axes.RolloutEngine]]:  # type: ignore[empty-body]
    """Engines that sample completions."""


@hookspec
def sync() -> list[type[axes.WeightSync]]:  # type: ignore[empty-body]
    """Transports of weights to the servers of a rollout engine, nested in `rollout`."""


@hookspec
def environment() -> list[type[axes.Environment]]:  # type: ignore[empty-body]
    """Environments, which play episodes of several turns with the policy."""


@hookspec
def rewards() -> list[type[axes.RewardSource]]:  # type: ignore[empty-body]
    """Sources of rewards: one number per completion, or None where they do not apply."""


@hookspec
def kl() -> list[type[axes.KLPlacement]]:  # type: ignore[empty-body]
    """Places where the KL to the reference enters."""


@hookspec
def kl_estimator() -> list[type[axes.KLEstimator]]:  # type: ignore[empty-body]
    """Estimates of the KL from sampled log-probs, nested in each `kl`."""


@hookspec
def kl_controller() -> list[type[axes.KLController]]:  # type: ignore[empty-body]
    """Schedules of beta during training, nested in each `kl` that has one."""


@hookspec
def advantages() -> list[type[axes.AdvantageEstimator]]:  # type: ignore[empty-body]
    """Estimators of advantages."""


@hookspec
def baseline() -> list[type[axes.Baseline]]:  # type: ignore[empty-body]
    """Baselines that returns are compared with, nested in the estimator `baseline`."""


@hookspec
def critic() -> list[type[axes.Critic]]:  # type: ignore[empty-body]
    """Critics, which predict returns."""


@hookspec
def policy_loss() -> list[type[axes.PolicyLoss]]:  # type: ignore[empty-body]
    """Losses of each token."""


@hookspec
def rollout_correction() -> list[type[axes.RolloutCorrection]]:  # type: ignore[empty-body]
    """Corrections for a sampler that is not the trainer's policy."""


@hookspec
def reference() -> list[type[axes.Reference]]:  # type: ignore[empty-body]
    """Models that the KL is measured to."""


@hookspec
def optimizer() -> list[type[axes.UpdateRule]]:  # type: ignore[empty-body]
    """Optimizers and other update rules."""


@hookspec
def aggregation() -> list[type[axes.Aggregation]]:  # type: ignore[empty-body]
    """Weights of the tokens in an optimizer step."""


@hookspec
def loss_terms() -> list[type[axes.LossTerm]]:  # type: ignore[empty-body]
    """Further terms of the loss."""


@hookspec
def filters() -> list[type[axes.Filter]]:  # type: ignore[empty-body]
    """Filters, which choose the rows that are trained on."""


@hookspec
def trainer() -> list[type[axes.OfflineTrainer]]:  # type: ignore[empty-body]
    """Trainers on a dataset, without rollouts; a recipe with one has no other axis."""


@hookspec
def doctor() -> list[type[axes.Pattern]]:  # type: ignore[empty-body]
    """Patterns of a run that goes wrong, which every run watches for; no recipe names them."""
