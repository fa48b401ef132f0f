"""One base class per axis: what a plugin is.

A plugin is a keyword-only dataclass whose fields are its settings, each with a docstring below it. `name` is what a recipe
writes after `use:`; `needs` names its requirements, `provides` what it supplies. Shapes are those of `hf_rlhf.batch`. A field
typed with a class of this module is a nested plugin (`{use: ...}` in a recipe); `choice("k3")` gives it a default.

`needs` may hold: ref_logps, values, groups (at least two rows per prompt), greedy (a greedy completion of each prompt),
sampler_logps, old_logps, old_entropy, sum_sq_probs, scores, total_score (of each row), group_ids, entropy, selected (by a
policy loss), full_distribution, completion_ids, turns and states (of an environment), advantages (filters), adapter (the policy
trains one), plain_weights (not quantized to 4 or 8 bits), double_backward (attention with second derivatives), and for loss
terms on a mixture of experts router_logits and routing_fractions (of the optimizer step), (B, T, L, E) for L routers of E
experts. Tensor functions (policy losses, KL estimators, aggregations, loss terms) get each needed name that is not a
positional argument as a keyword. Estimators and filters get theirs as fields of `Scored`. A KL estimator that needs
full_distribution is called with the log-probs of the whole vocabulary, (n, V) and (n, V) -> (n,), a chunk of tokens at a time.

One that stops gradients on purpose, so that its gradient differs from finite differences, sets `stops_gradient = True`. One that
is costly to start has `setup(context)` and `close()`; one with state, saved in checkpoints, `observe` and `(load_)state_dict`.

A new axis is a base class here with an `Axis` and its entry in `AXES`, from which most of the rest follows: CONTRIBUTING.md.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge

from hf_rlhf.batch import Context as Context, Credit, Prompt as Prompt, ReferenceRows as ReferenceRows, Scored
from hf_rlhf.contract import chat as chat, outputs
from hf_rlhf.contract.algorithm_view import Algorithm as Algorithm
from hf_rlhf.contract.axis import Axis as Axis
from hf_rlhf.contract.base import Count as Count, Fraction as Fraction, NonNegative, Plugin, Positive, choice
from hf_rlhf.contract.base import HubDataset as HubDataset, HubModel as HubModel, HubTokenizer as HubTokenizer
from hf_rlhf.contract.environment import Environment, Message as Message, Model as Model, Outcome as Outcome
from hf_rlhf.contract.environment import Over as Over, Task as Task, Turn as Turn
from hf_rlhf.contract.model_settings import Lora as LoraSettings, Model as ModelSettings  # noqa: F401
from hf_rlhf.contract.offline_trainer import Footprint as Footprint, Materials as Materials, OfflineTrainer
from hf_rlhf.contract.outputs import check_output as check_output
from hf_rlhf.contract.pattern import Finding as Finding, History as History, Pattern
from hf_rlhf.contract.prompt_sampler import PromptSampler
from hf_rlhf.contract.reference import Reference
from hf_rlhf.contract.reward_source import Answers as Answers, RewardSource
from hf_rlhf.contract.rollout_engine import Pending as Pending, RolloutEngine
from hf_rlhf.contract.rollout_engine import Session as Session, Weights as Weights
from hf_rlhf.contract.update_rule import UpdateRule
from hf_rlhf.contract.weight_sync import EngineServer as EngineServer, WeightSync
from hf_rlhf.modeling.offload import Keeper as Keeper, keeper as keeper, tensors_of as tensors_of
from hf_rlhf.runtime.errors import did_you_mean as did_you_mean
from hf_rlhf.runtime.worker_pool import Lost as Lost, WorkerError as WorkerError, WorkerPool as WorkerPool
from hf_rlhf.runtime.worker_process import worker_processes as worker_processes

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from hf_rlhf.contract.optimizer_step import Step as Step
    from hf_rlhf.modeling.attention import attend as attend, attention_refusal as attention_refusal
    from hf_rlhf.modeling.lm_head import at_least_float32 as at_least_float32, with_rest as with_rest
    from hf_rlhf.modeling.policy import Policy as Policy
    from hf_rlhf.modeling.token_batch import TokenBatch as TokenBatch


@dataclass(kw_only=True)
class KLEstimator(Plugin, ABC):
    """Estimate KL(policy || reference) from sampled log-probs. Axis `kl_estimator`, nested in each `kl`."""

    axis = Axis(
        section="KL",
        metric_prefix="kl_estimator/<label>",
        nested="kl: [{use: in_loss, estimator: k3}]",
        outputs=outputs.ESTIMATOR,
    )

    stops_gradient: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, logps: Tensor, ref_logps: Tensor) -> Tensor:
        """Map (...) and (...) to (...), elementwise and differentiable in `logps`."""


@dataclass(kw_only=True)
class KLController(Plugin, ABC):
    """Adjust beta during training. Axis `kl_controller`, nested in each `kl` that has a beta."""

    axis = Axis(
        section="KL",
        metric_prefix="kl_controller/<label>",
        nested="kl: [{use: in_reward, controller: adaptive}]",
        outputs=outputs.BETA,
    )

    @abstractmethod
    def __call__(self, beta: float) -> float:
        """Map the recipe's beta to the current one."""


@dataclass(kw_only=True)
class KLPlacement(Plugin, ABC):
    """Place the KL to the reference in reward, loss or advantage. Axis `kl`, a list. Penalties keep their input's shape."""

    axis = Axis(section="KL", metric_prefix="kl/<label>", many=True, default=(), outputs=outputs.PENALTY)

    needs: ClassVar[frozenset[str]] = frozenset({"ref_logps"})
    places: ClassVar[frozenset[str]] = frozenset()
    """Places where the penalty enters: any of reward, loss, advantage. A placement overrides the method of each."""
    token_level: ClassVar[bool] = False
    """True where `loss_penalty` of a token depends on its numbers alone: it is then called on (1, c) tiles, as PolicyLoss is."""

    estimator: KLEstimator = choice("k1")
    """KL estimator."""
    level: Literal["token", "sequence"] = "token"
    """`token`: the estimator sees each token's log-probs; `sequence`: their sums over the mask."""
    clamp: Positive | None = None
    """Clamp the estimator's value to [-clamp, clamp]; beyond it the gradient is 0. None: no limit."""
    reference: Reference | None = None
    """Reference of this KL alone, such as a teacher; the recipe's `reference` by default."""
    when: dict[str, Any] | None = None
    """Dataset column -> value or list of values: the KL is taken on rows that match all; by default on all rows."""
    label: str | None = None
    """Name in the logs; the placement's name by default."""

    def estimate(self, logps: Tensor, ref_logps: Tensor, mask: Tensor, **needed: Tensor) -> Tensor:
        """Return the unclamped KL of R rows: (R, T), 0 off the mask, at level token; (R,) at level sequence."""
        off = mask == 0
        on_mask = {name: x.masked_fill(off, 0.0) for name, x in needed.items()}
        logps, ref_logps = logps.masked_fill(off, 0.0), ref_logps.masked_fill(off, 0.0)
        if self.level == "sequence":
            logps, ref_logps, on_mask = logps.sum(1), ref_logps.sum(1), {name: x.sum(1) for name, x in on_mask.items()}
        kl, inputs = self.estimator(logps, ref_logps, **on_mask), {"logps": logps, "ref_logps": ref_logps, **on_mask}
        check_output("kl_estimator", self.estimator, kl, logps, inputs=inputs)
        return kl * mask if self.level == "token" else kl

    def limit(self, kl: Tensor) -> Tensor:
        """Return `kl` clamped to [-clamp, clamp]."""
        return kl if self.clamp is None else kl.clamp(-self.clamp, self.clamp)

    def measure(self, logps: Tensor, ref_logps: Tensor, mask: Tensor, **needed: Tensor) -> Tensor:
        """Return the clamped KL, in the shapes of `estimate`."""
        return self.limit(self.estimate(logps, ref_logps, mask, **needed))

    def reward_penalty(self, kl: Tensor) -> Tensor:
        """Return what is subtracted from rewards: (N, T), or (N,), at the last token, at level sequence."""
        raise TypeError(f"kl.{self.name} declares the place 'reward' and does not define reward_penalty")

    def loss_penalty(self, kl: Tensor) -> Tensor:
        """Return what is added to the loss: (B, T), or (B,), once per row, at level sequence."""
        raise TypeError(f"kl.{self.name} declares the place 'loss' and does not define loss_penalty")

    def advantage_penalty(self, kl: Tensor) -> Tensor:
        """Return what is subtracted from advantages: (N, T), or (N,), at every token, at level sequence."""
        raise TypeError(f"kl.{self.name} declares the place 'advantage' and does not define advantage_penalty")


@dataclass(kw_only=True)
class Baseline(Plugin, ABC):
    """Baseline of returns. Axis `baseline`, nested in the estimator `baseline`."""

    axis = Axis(
        section="Advantages",
        metric_prefix="baseline/<label>",
        nested="advantages: {use: baseline, baseline: ema}",
        outputs=outputs.BASELINE,
    )

    across_groups: ClassVar[bool] = False  # as in AdvantageEstimator

    @abstractmethod
    def __call__(self, scored: Scored) -> Tensor:
        """Return (N, 1), or (N, T) if it differs between tokens. A pure function of `scored` and of observed statistics."""


@dataclass(kw_only=True)
class AdvantageEstimator(Plugin, ABC):
    """Compute advantages from rewards. Axis `advantages`."""

    axis = Axis(section="Advantages", metric_prefix="advantage", outputs=outputs.ADVANTAGES)

    @property
    def across_groups(self) -> bool:
        """True if rows of other prompts change a row's result, as whitening does; else it gets those of its process alone."""
        return False

    @abstractmethod
    def __call__(self, scored: Scored) -> Tensor | Credit:
        """Return (N, T), 0 off the mask, or `Credit` if it needs values. A pure function: no distributed code, no state."""


@dataclass(kw_only=True)
class Critic(Plugin, ABC):
    """Predict returns. Axis `critic`. A critic that learns is a `TrainedCritic`."""

    axis = Axis(section="Critic", metric_prefix="value", default="none", outputs=outputs.CRITIC)

    @abstractmethod
    def build(self, policy: PreTrainedModel, algorithm: Algorithm) -> torch.nn.Module | None:
        """Return the critic's module, or None if there is none.

        The module is called as (batch, states (n, H) or None) -> (n,): the value of the state in which each sampled token was
        chosen, at the token before it. `batch.states(trunk)` runs a transformers trunk over the rows and returns its hidden
        states (n, H) there. If the module's attribute `on_trunk` is True, `states` are the policy's.
        """


@dataclass(kw_only=True)
class TrainedCritic(Critic, ABC):
    """Critic trained by clipped or plain squared error to the estimator's returns."""

    provides: ClassVar[frozenset[str]] = frozenset({"values"})
    shares_forward: ClassVar[bool] = False
    """True if the policy's own forward computes the values."""

    coef: NonNegative = 0.5
    """Factor of the value loss in the loss."""
    value_clip: Positive | Literal["none"] = 0.2
    """Distance from the rollout's value beyond which a value has no gradient; `none`: plain squared error."""
    learning_rate: Positive | None = None
    """Learning rate of the critic's own parameters; the policy's by default."""
    warmup_steps: Annotated[int, Ge(0)] = 0
    """Optimizer steps at the start in which only the critic learns."""


@dataclass(kw_only=True)
class PolicyLoss(Plugin, ABC):
    """Loss of each token. Axis `policy_loss`. A loss that ignores `old_logps` sets empty `needs`."""

    axis = Axis(section="Policy loss", metric_prefix="policy", default="ppo_clip", outputs=outputs.POLICY_LOSS)

    needs: ClassVar[frozenset[str]] = frozenset({"old_logps"})
    stops_gradient: ClassVar[bool] = False
    zero_without_advantage: ClassVar[bool] = False
    """True if a row whose advantages are all 0 has no gradient: the update then skips it."""
    token_level: ClassVar[bool] = False
    """True where a token's loss depends on its numbers alone: it is called on (1, c) tiles unless `update.fused_loss` is off."""
    selects_per_step: ClassVar[bool] = False
    """True if `select` is called for each optimizer step, on its rows; False: once per rollout, on all rows."""

    @abstractmethod
    def __call__(
        self, logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Map (B, T) each to the loss of each token (B, T), to be minimized, and metrics (B, T), averaged over the mask."""

    def select(self, old_logps: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        """Map (N, T) each to (N, T), which calls get as `selected` if `needs` names it, whatever the split.

        A loss that needs `old_entropy` gets it as a keyword.
        """
        raise TypeError(f"policy_loss.{self.name} needs selected and does not define select")


@dataclass(kw_only=True)
class RolloutCorrection(Plugin, ABC):
    """Correct for a sampler that differs from the trainer's policy. Axis `rollout_correction`."""

    axis = Axis(section="Rollout correction", metric_prefix="rollout", default="none", outputs=outputs.CORRECTION)

    needs: ClassVar[frozenset[str]] = frozenset({"sampler_logps", "old_logps"})

    @abstractmethod
    def __call__(self, old_logps: Tensor, sampler_logps: Tensor, mask: Tensor) -> Tensor:
        """Map (N, T) each to multipliers of the policy loss (N, T), without gradient."""


@dataclass(kw_only=True)
@dataclass(kw_only=True)
class Aggregation(Plugin, ABC):
    """Weight the tokens of an optimizer step. Axis `aggregation`."""

    axis = Axis(section="Aggregation", metric_prefix="aggregation", default="token_mean", outputs=outputs.WEIGHTS)

    @abstractmethod
    def __call__(self, mask: Tensor) -> Tensor:
        """Map (N_u, T) to the weight of each token in the loss (N_u, T); micro-batches do not change the gradient."""


@dataclass(kw_only=True)
class LossTerm(Plugin, ABC):
    """Additional loss term with its own normalization. Axis `loss_terms`, a list."""

    axis = Axis(section="Loss terms", metric_prefix="plugin/<label>", many=True, default=(), outputs=outputs.LOSS_TERM)

    @abstractmethod
    def __call__(self, logps: Tensor, mask: Tensor) -> Tensor:
        """Map (B, T) each, and one keyword per name in `needs`, to (B, T), to be minimized."""

    def weights(self, mask: Tensor) -> Tensor:
        """Map (N_u, T), and keywords total_score and group_ids (N_u,) if `needs` names them, to each token's weight (N_u, T)."""
        return mask / mask.sum().clamp(min=1)


@dataclass(kw_only=True)
class TextTerm(LossTerm, ABC):
    """Loss term on texts of its own instead of the rollout. It gets the log-probs of every token but the first."""

    @abstractmethod
    def texts(self, step: int) -> list[list[int]]:
        """Return the token ids, at least two each, of the texts of step `step` (from 0), equal on every process."""


@dataclass(kw_only=True)
class Filter(Plugin, ABC):
    """Choose the rows to train on. Axis `filters`, a list."""

    axis = Axis(section="Filters", metric_prefix="filter/<label>", many=True, default=(), outputs=outputs.KEEP)

    across_groups: ClassVar[bool] = True
    """False if rows of other prompts do not change whether a row is kept: the filter then gets those of its process alone."""

    resample: Annotated[int, Ge(0)] = 0
    """Maximum number of further rounds of prompts that replace dropped groups (0: none)."""

    @abstractmethod
    def __call__(self, scored: Scored) -> Tensor:
        """Return (N,) bool, True on rows to keep. A pure function."""


AXES: dict[str, type[Plugin]] = {
    "sampler": PromptSampler,
    "rollout": RolloutEngine,
    "sync": WeightSync,
    "environment": Environment,
    "rewards": RewardSource,
    "kl": KLPlacement,
    "kl_estimator": KLEstimator,
    "kl_controller": KLController,
    "advantages": AdvantageEstimator,
    "baseline": Baseline,
    "critic": Critic,
    "policy_loss": PolicyLoss,
    "rollout_correction": RolloutCorrection,
    "reference": Reference,
    "optimizer": UpdateRule,
    "aggregation": Aggregation,
    "loss_terms": LossTerm,
    "filters": Filter,
    "trainer": OfflineTrainer,
    "doctor": Pattern,
}
"""Recipe key -> base class, in the order of a step; the trainer without rollouts comes last, then what no recipe names."""


def axis_of(cls: type) -> str:
    """Return the axis of a plugin class, empty if it has none."""
    return next((axis for axis, base in AXES.items() if issubclass(cls, base)), "")


NESTED = frozenset(axis for axis, base in AXES.items() if base.axis.nested)
"""Axes whose plugins are settings of other plugins, not keys of a recipe."""
LISTS = frozenset(axis for axis, base in AXES.items() if base.axis.many)
"""Axes that take any number of plugins."""
_WITH_TORCH = {
    "Policy": "hf_rlhf.modeling.policy",
    "Step": "hf_rlhf.contract.optimizer_step",
    "TokenBatch": "hf_rlhf.modeling.token_batch",
    **dict.fromkeys(("attend", "attention_refusal"), "hf_rlhf.modeling.attention"),
    "at_least_float32": "hf_rlhf.modeling.lm_head",
    "with_rest": "hf_rlhf.modeling.lm_head",
}


def __getattr__(name: str) -> Any:
    """Import names that need torch on first use."""
    if name in _WITH_TORCH:
        return getattr(importlib.import_module(_WITH_TORCH[name]), name)
    raise AttributeError(f"module 'hf_rlhf.axes' has no attribute {name!r}")
