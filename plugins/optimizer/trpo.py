"""Trust region policy optimisation (TRPO, arXiv:1502.05477): the natural gradient, as far as a mean KL allows.

The step is -sqrt(2 max_kl / x (F + damping) x) x, with x solving (F + damping) x = g by conjugate gradients and F the Fisher
information of the next token's distribution, averaged over the sampled tokens. It is shortened until the exact mean
KL(old || new) is within max_kl and the loss is lower, and not taken at all where no length does.

Departures: the paper's states are sampled tokens here, each with its whole vocabulary; F has a damping, which also enters
the length, so that the first step stays a little within max_kl; every optimizer step has a trust region of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Interval

from hf_rlhf import Metric, hookimpl
from hf_rlhf.axes import Count, NonNegative, Positive, TextTerm, TrainedCritic, UpdateRule

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import TrainingArguments

    from hf_rlhf.axes import Algorithm, Step

    from ._trust_region import TrustRegion


@dataclass(kw_only=True)
class TRPO(UpdateRule):
    """Moves the policy by at most `max_kl` per optimizer step, and only where that lowers the loss; the critic by AdamW.

    For small models and adapters: a step costs about `cg_iters` double backwards over its rows.
    """

    name = "trpo"
    metrics = (
        Metric("kl", "nats per token", "exact mean KL(old, new) of the step that was taken", when="step"),
        Metric("improvement", "loss", "by how much the step lowered the loss", when="step"),
        Metric(
            "backtracks",
            "count",
            "how often the step was shortened",
            (None, 5.0),
            "The quadratic model of the KL is poor: lower `max_kl`, raise `damping` or `cg_iters`.",
            when="step",
        ),
        Metric(
            "accepted",
            "0 or 1",
            "0: no shorter step was good enough and nothing moved",
            (0.5, None),
            "Nothing is learned: raise `backtracks` or `damping`.",
            when="step",
        ),
    )
    needs = frozenset({"double_backward", "old_logps"})

    max_kl: Positive = 0.01
    """Largest mean KL(old || new) of the next token, in nats."""
    cg_iters: Count = 10
    """Iterations of conjugate gradients; 1 gives the plain gradient's direction."""
    damping: NonNegative = 0.1
    """Added to the Fisher information's diagonal, so that directions that move no distribution are not followed."""
    backtracks: Annotated[int, Ge(0)] = 10
    """How many shorter steps are tried where the first breaks the KL's limit or does not lower the loss."""
    shrink: Annotated[float, Interval(gt=0, lt=1)] = 0.5
    """Length of each step that is tried, over the one before."""

    def __post_init__(self) -> None:
        self._optimizer: TrustRegion | None = None

    def check(self, algorithm: Algorithm) -> Iterable[str]:
        if getattr(algorithm.critic, "shares_forward", False):
            yield (
                f"critic={algorithm.critic.name} learns on the policy's trunk, and the value loss has no part in a trust "
                "region: set critic.use=separate, or optimizer.use=trainer"
            )
        stopped = [f"policy_loss={algorithm.policy_loss.name}"] if algorithm.policy_loss.stops_gradient else []
        stopped += [f"kl={kl.estimator.name}" for _, kl in algorithm.kl_in("loss") if kl.estimator.stops_gradient]
        for what in stopped:
            yield (
                f"{what} stops gradients, so its value does not say whether a step was good, and backtracking compares values: "
                "choose one that does not (policy_loss.use=surrogate), or set optimizer.use=trainer"
            )

        for term in algorithm.loss_terms:
            if isinstance(term, TextTerm):
                yield (
                    f"loss_terms={term.name} learns on texts of its own, which the line search does not see: leave it out, or "
                    "set optimizer.use=trainer"
                )

    def check_arguments(self, args: TrainingArguments) -> Iterable[str]:
        if args.max_grad_norm:
            yield (
                f"training.max_grad_norm={args.max_grad_norm:g} clips a gradient whose length optimizer=trpo does not use, and "
                "the critic's with it: set training.max_grad_norm=0"
            )
        checkpointing: Any = args.gradient_checkpointing_kwargs or {}
        if args.gradient_checkpointing and checkpointing.get("use_reentrant"):
            yield (
                "training.gradient_checkpointing_kwargs={use_reentrant: true} cannot be differentiated twice, as optimizer=trpo "
                "must: set use_reentrant to false"
            )

    def remarks(self, algorithm: Algorithm) -> Iterable[str]:
        yield (
            "training.learning_rate (logged as 0), its schedule and weight_decay do not scale the policy's step: max_kl does"
        )
        update, has_critic = algorithm.update, isinstance(algorithm.critic, TrainedCritic)
        if update.offload and update.ema is None and not has_critic:
            yield "update.offload has no effect: a trust region keeps no state, and there is no critic and no update.ema"
        if "old_logps" not in algorithm.policy_loss.needs:
            yield (
                f"the loss that has to fall is policy_loss={algorithm.policy_loss.name}, which does not estimate the new "
                "policy's reward; surrogate does"
            )

    def build(self, policy: Module, groups: list[dict[str, Any]]) -> TrustRegion:
        from ._trust_region import TrustRegion

        critic = {id(p) for group in groups for p in group["params"]}
        own = [p for p in policy.parameters() if p.requires_grad and id(p) not in critic]
        settings: dict[str, Any] = {setting.name: getattr(self, setting.name) for setting in fields(self)}
        self._optimizer = TrustRegion(own, groups, **settings)
        return self._optimizer

    def hold(self, step: Step) -> None:
        if self._optimizer is not None:
            self._optimizer.held = step

    def take_logs(self) -> dict[str, float]:
        return {} if self._optimizer is None else self._optimizer.measured


@hookimpl
def optimizer() -> list[type[UpdateRule]]:
    return [TRPO]
