"""Trust region policy optimization (TRPO, arXiv:1502.05477): a natural-gradient step limited by a mean KL.

The step is -sqrt(2 max_kl / x (F + damping) x) x, with x solving (F + damping) x = g by conjugate gradients and F the Fisher
information of the next token's distribution, averaged over the sampled tokens. It is shortened until the exact mean
KL(old || new) is within max_kl and the loss is lower, and skipped if no length achieves both.

Departures: the states are sampled tokens, each with its whole vocabulary; F has damping, which also enters the step length,
so that the first step stays slightly within max_kl; every optimizer step has its own trust region.
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
    """Moves the policy by at most `max_kl` per optimizer step, if that lowers the loss, and the critic by AdamW.

    For small models and adapters: a step costs about `cg_iters` double backward passes over its rows.
    """

    name = "trpo"
    words = "natural-gradient steps within a KL of {max_kl:g}"
    metrics = (
        Metric("kl", "nats per token", "exact mean KL(old, new) of the step that was taken", when="step"),
        Metric("improvement", "loss", "decrease of the loss by the step", when="step"),
        Metric(
            "backtracks",
            "count",
            "number of times the step was shortened",
            (None, 5.0),
            "The quadratic model of the KL is poor: lower `max_kl`, raise `damping` or `cg_iters`.",
            when="step",
        ),
        Metric(
            "accepted",
            "0 or 1",
            "0: no step length was accepted and the policy did not change",
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
    """Added to the diagonal of the Fisher information, so that directions that change no distribution are not followed."""
    backtracks: Annotated[int, Ge(0)] = 10
    """Maximum number of shorter steps tried if the first exceeds the KL limit or does not lower the loss."""
    shrink: Annotated[float, Interval(gt=0, lt=1)] = 0.5
    """Ratio of the length of each tried step to the one before."""

    def __post_init__(self) -> None:
        self._optimizer: TrustRegion | None = None

    def check(self, algorithm: Algorithm) -> Iterable[str]:
        if getattr(algorithm.critic, "shares_forward", False):
            yield (
                f"critic={algorithm.critic.name} trains the policy's trunk, but a trust region does not cover the value "
                "loss. Set critic.use=separate or optimizer.use=trainer"
            )
        stopped = [f"policy_loss={algorithm.policy_loss.name}"] if algorithm.policy_loss.stops_gradient else []
        stopped += [f"kl={kl.estimator.name}" for _, kl in algorithm.kl_in("loss") if kl.estimator.stops_gradient]
        for what in stopped:
            yield (
                f"{what} stops gradients, so its value cannot tell backtracking whether a step was good. Choose one that does "
                "not (policy_loss.use=surrogate), or set optimizer.use=trainer"
            )

        for term in algorithm.loss_terms:
            if isinstance(term, TextTerm):
                yield (
                    f"loss_terms={term.name} trains on separate texts, which the line search does not evaluate. Remove it, or "
                    "set optimizer.use=trainer"
                )

    def check_arguments(self, args: TrainingArguments) -> Iterable[str]:
        if args.max_grad_norm:
            yield (
                f"training.max_grad_norm must be 0 with optimizer=trpo, which ignores the gradient's length, got "
                f"{args.max_grad_norm:g}: it would clip the critic's. Set training.max_grad_norm=0"
            )
        checkpointing: Any = args.gradient_checkpointing_kwargs or {}
        if args.gradient_checkpointing and checkpointing.get("use_reentrant"):
            yield (
                "training.gradient_checkpointing_kwargs: use_reentrant must be false with optimizer=trpo, which differentiates "
                "twice. Set training.gradient_checkpointing_kwargs={use_reentrant: false}"
            )

    def remarks(self, algorithm: Algorithm) -> Iterable[str]:
        yield (
            "max_kl sets the length of the policy's step; training.learning_rate (logged as 0), its schedule and "
            "weight_decay do not"
        )
        update, has_critic = algorithm.update, isinstance(algorithm.critic, TrainedCritic)
        if update.offload and update.ema is None and not has_critic:
            yield "update.offload has no effect: a trust region has no optimizer state, and there is no critic or update.ema"
        if "old_logps" not in algorithm.policy_loss.needs:
            yield (
                f"a step is accepted by policy_loss={algorithm.policy_loss.name}, which does not estimate the new "
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
