"""One hook per axis, each with a complete plugin as an example.

A plugin module ends with the hook of its axis, which returns its classes. Offer the module in pyproject.toml,

    [project.entry-points.hf_rlhf]
    "rewards.one_line" = "my_package.one_line"

or try the file by itself with `hf-rlhf -p ./one_line.py`. Hooks are called once, when a recipe names one of the names.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from hf_rlhf import axes

hookspec = pluggy.HookspecMarker("hf_rlhf")


def example(axis: str) -> str:
    """The example plugin in the docstring of an axis' hook, as the text of a module."""
    return (inspect.getdoc(globals()[axis]) or "").partition("\n\n")[2] + "\n"


@hookspec
def rollout() -> list[type[axes.RolloutEngine]]:  # type: ignore[empty-body]
    '''Engines that sample completions.

    from dataclasses import dataclass

    import torch
    from hf_rlhf import hookimpl
    from hf_rlhf.axes import Count, RolloutEngine
    from hf_rlhf.batch import Completions

    @dataclass(kw_only=True)
    class Noise(RolloutEngine):
        """Random tokens, whatever the policy is: the floor under every other engine."""

        name = "noise"

        length: Count = 8
        """Tokens per completion."""

        def __call__(self, policy, prompts, num_generations, *, temperature=None):
            rows = len(prompts) * num_generations
            ids = torch.randint(len(policy.tokenizer), (rows, self.length)).tolist()
            return Completions(ids=ids, finish_reasons=["length"] * rows)

    @hookimpl
    def rollout():
        return [Noise]
    '''


@hookspec
def rewards() -> list[type[axes.RewardSource]]:  # type: ignore[empty-body]
    '''Sources of rewards: one number per completion, or None where they do not apply.

    from dataclasses import dataclass

    from hf_rlhf import hookimpl
    from hf_rlhf.axes import RewardSource

    @dataclass(kw_only=True)
    class OneLine(RewardSource):
        """1 for a completion on a single line, 0 for any other."""

        name = "one_line"

        blank: float = 0.0
        """Reward of a completion without any text."""

        def __call__(self, rollouts):
            texts = [completion.strip() for completion in rollouts.completions]
            return [float("\\n" not in text) if text else self.blank for text in texts]

    @hookimpl
    def rewards():
        return [OneLine]
    '''


@hookspec
def kl() -> list[type[axes.KLPlacement]]:  # type: ignore[empty-body]
    '''Places where the KL to the reference enters.

    from dataclasses import dataclass

    from hf_rlhf import hookimpl
    from hf_rlhf.axes import KLEstimator, KLPlacement, NonNegative, choice

    @dataclass(kw_only=True)
    class InLossBeyond(KLPlacement):
        """beta (kl - free) in the loss where the KL exceeds `free`, and nothing below."""

        name = "in_loss_beyond"
        places = frozenset({"loss"})

        beta: NonNegative = 0.1
        """Loss added per nat beyond `free`."""
        free: NonNegative = 0.01
        """KL that costs nothing, in nats."""
        estimator: KLEstimator = choice("k3")
        """How the KL is estimated; its gradient is what counts."""

        def loss_penalty(self, kl):
            return self.beta * (kl - self.free).clamp(min=0)

    @hookimpl
    def kl():
        return [InLossBeyond]
    '''


@hookspec
def advantages() -> list[type[axes.AdvantageEstimator]]:  # type: ignore[empty-body]
    '''Estimators of advantages.

    from dataclasses import dataclass

    from hf_rlhf import hookimpl
    from hf_rlhf.axes import AdvantageEstimator, Positive

    @dataclass(kw_only=True)
    class GroupSign(AdvantageEstimator):
        """+1 above the group's mean, -1 below it, 0 at it."""

        name = "group_sign"
        needs = frozenset({"groups"})

        scale: Positive = 1.0
        """Factor of the signs."""

        def __call__(self, scored):
            returns = scored.returns()
            sign = (returns - scored.group_mean(returns)).sign().masked_fill(scored.group_is_flat(returns), 0)
            return self.scale * sign.unsqueeze(1) * scored.mask

    @hookimpl
    def advantages():
        return [GroupSign]
    '''


@hookspec
def critic() -> list[type[axes.Critic]]:  # type: ignore[empty-body]
    '''Critics, which predict returns.

    from dataclasses import dataclass

    import torch
    from hf_rlhf import hookimpl
    from hf_rlhf.axes import TrainedCritic

    class ValueOfToken(torch.nn.Embedding):
        def forward(self, batch, states):
            input_ids, before = batch.padded
            return super().forward(input_ids.flatten()[before]).squeeze(-1)

    @dataclass(kw_only=True)
    class TokenTable(TrainedCritic):
        """One learned value per token of the vocabulary: that of the token before the sampled one."""

        name = "token_table"

        start: float = 0.0
        """Every value at the start."""

        def build(self, policy, algorithm):
            table = ValueOfToken(policy.config.vocab_size, 1)
            torch.nn.init.constant_(table.weight, self.start)
            return table

    @hookimpl
    def critic():
        return [TokenTable]
    '''


@hookspec
def policy_loss() -> list[type[axes.PolicyLoss]]:  # type: ignore[empty-body]
    '''Losses of each token.

    from dataclasses import dataclass

    from hf_rlhf import Metric, hookimpl
    from hf_rlhf.axes import PolicyLoss, Positive

    @dataclass(kw_only=True)
    class Quadratic(PolicyLoss):
        """-ratio A + |A| (ratio - 1)^2 / (2 epsilon): the ratio's best value is 1 +- epsilon, by the sign of A."""

        name = "quadratic"
        metrics = (Metric("move", "ratio", "mean distance of the ratio from 1", when="step"),)

        epsilon: Positive = 0.2
        """How far the ratio should move."""

        def __call__(self, logps, old_logps, advantages, mask):
            move = (logps - old_logps).exp() - 1
            loss = -(1 + move) * advantages + advantages.abs() * move**2 / (2 * self.epsilon)
            return loss * mask, {"move": move.detach().abs() * mask}

    @hookimpl
    def policy_loss():
        return [Quadratic]
    '''


@hookspec
def rollout_correction() -> list[type[axes.RolloutCorrection]]:  # type: ignore[empty-body]
    '''Corrections for a sampler that is not the trainer's policy.

    from dataclasses import dataclass

    from hf_rlhf import hookimpl
    from hf_rlhf.axes import Positive, RolloutCorrection

    @dataclass(kw_only=True)
    class DropFar(RolloutCorrection):
        """Leaves out the tokens whose probability differs between sampler and trainer by more than a factor."""

        name = "drop_far"

        factor: Positive = 2.0
        """The largest factor that stays."""

        def __call__(self, old_logps, sampler_logps, mask):
            ratio = (old_logps - sampler_logps).exp()
            return ((ratio < self.factor) & (ratio > 1 / self.factor)) * mask

    @hookimpl
    def rollout_correction():
        return [DropFar]
    '''


@hookspec
def reference() -> list[type[axes.Reference]]:  # type: ignore[empty-body]
    '''Models that the KL is measured to.

    from dataclasses import dataclass

    from hf_rlhf import hookimpl
    from hf_rlhf.axes import Reference

    @dataclass(kw_only=True)
    class Other(Reference):
        """Another model that shares the policy's tokens."""

        name = "other"

        path: str
        """A folder, or a name on the Hub."""

        def build(self, policy):
            from transformers import AutoModelForCausalLM

            model = AutoModelForCausalLM.from_pretrained(self.path, dtype=policy.dtype).to(policy.device)
            return model.eval().requires_grad_(False)

    @hookimpl
    def reference():
        return [Other]
    '''


@hookspec
def optimizer() -> list[type[axes.UpdateRule]]:  # type: ignore[empty-body]
    '''Makers of optimizers.

    from dataclasses import dataclass

    import torch
    from hf_rlhf import hookimpl
    from hf_rlhf.axes import Fraction, Positive, UpdateRule

    @dataclass(kw_only=True)
    class Momentum(UpdateRule):
        """Plain gradient descent with momentum; `groups` are the critic's, if there is one."""

        name = "momentum"

        learning_rate: Positive = 1e-3
        """Of the policy; it follows the schedule of TrainingArguments."""
        momentum: Fraction = 0.9
        """Share of the last step that is kept."""

        def build(self, policy, groups):
            critic = {id(weight) for group in groups for weight in group["params"]}
            own = [weight for weight in policy.parameters() if weight.requires_grad and id(weight) not in critic]
            return torch.optim.SGD([{"params": own, "lr": self.learning_rate}, *groups], momentum=self.momentum)

    @hookimpl
    def optimizer():
        return [Momentum]
    '''


@hookspec
def aggregation() -> list[type[axes.Aggregation]]:  # type: ignore[empty-body]
    '''Weights of the tokens in an optimizer step.

    from dataclasses import dataclass

    from hf_rlhf import hookimpl
    from hf_rlhf.axes import Aggregation, Fraction

    @dataclass(kw_only=True)
    class ByLength(Aggregation):
        """m / (N_u T^power): between the sum over a row's tokens (0) and their mean (1)."""

        name = "by_length"

        power: Fraction = 0.5
        """How much of a row's length T is divided out."""

        def __call__(self, mask):
            return mask / (len(mask) * mask.sum(1, keepdim=True).clamp(min=1) ** self.power)

    @hookimpl
    def aggregation():
        return [ByLength]
    '''


@hookspec
def loss_terms() -> list[type[axes.LossTerm]]:  # type: ignore[empty-body]
    '''Further terms of the loss.

    from dataclasses import dataclass

    from hf_rlhf import hookimpl
    from hf_rlhf.axes import LossTerm, NonNegative

    @dataclass(kw_only=True)
    class EntropyFloor(LossTerm):
        """coef (floor - entropy) on tokens whose entropy is below the floor, and nothing elsewhere."""

        name = "entropy_floor"
        needs = frozenset({"entropy"})

        coef: NonNegative = 0.01
        """Loss per missing nat."""
        floor: NonNegative = 0.1
        """Entropy that costs nothing, in nats."""

        def __call__(self, logps, mask, *, entropy):
            return self.coef * (self.floor - entropy).clamp(min=0) * mask

    @hookimpl
    def loss_terms():
        return [EntropyFloor]
    '''


@hookspec
def filters() -> list[type[axes.Filter]]:  # type: ignore[empty-body]
    '''Filters, which choose the rows that are trained on.

    from dataclasses import dataclass

    from hf_rlhf import hookimpl
    from hf_rlhf.axes import Count, Filter

    @dataclass(kw_only=True)
    class Longer(Filter):
        """Keeps the rows with at least `tokens` sampled tokens."""

        name = "longer"

        tokens: Count = 2
        """Shortest row that is kept."""

        def __call__(self, scored):
            return scored.mask.sum(1) >= self.tokens

    @hookimpl
    def filters():
        return [Longer]
    '''


@hookspec
def kl_estimator() -> list[type[axes.KLEstimator]]:  # type: ignore[empty-body]
    '''Estimates of the KL from sampled log-probs, nested in each `kl`.

    from dataclasses import dataclass

    from hf_rlhf import hookimpl
    from hf_rlhf.axes import KLEstimator

    @dataclass(kw_only=True)
    class Jeffreys(KLEstimator):
        """l (1 - exp(-l)) with l = logps - ref_logps: on average KL(policy || ref) + KL(ref || policy)."""

        name = "jeffreys"

        def __call__(self, logps, ref_logps):
            log_ratio = logps - ref_logps
            return log_ratio * (1 - (-log_ratio).exp())

    @hookimpl
    def kl_estimator():
        return [Jeffreys]
    '''


@hookspec
def kl_controller() -> list[type[axes.KLController]]:  # type: ignore[empty-body]
    '''Rules that move beta during training, nested in each `kl` that has one.

    from dataclasses import dataclass, field

    from hf_rlhf import hookimpl
    from hf_rlhf.axes import Count, KLController

    @dataclass(kw_only=True)
    class Ramp(KLController):
        """From 0 to the recipe's beta over the first rollouts."""

        name = "ramp"

        rollouts: Count = 10
        """After how many rollouts beta is the recipe's."""
        seen: int = field(default=0, init=False)

        def observe(self, statistics):
            self.seen += 1

        def __call__(self, beta):
            return beta * min(1.0, self.seen / self.rollouts)

        def state_dict(self):
            return {"seen": self.seen}

        def load_state_dict(self, state):
            self.seen = state["seen"]

    @hookimpl
    def kl_controller():
        return [Ramp]
    '''


@hookspec
def baseline() -> list[type[axes.Baseline]]:  # type: ignore[empty-body]
    '''What returns are compared with, nested in the estimator `baseline`.

    from dataclasses import dataclass

    from hf_rlhf import hookimpl
    from hf_rlhf.axes import Baseline

    @dataclass(kw_only=True)
    class Worst(Baseline):
        """The worst return of the row's group: no completion is pushed down. Biased, as it depends on the row itself."""

        name = "worst"
        needs = frozenset({"groups"})

        def __call__(self, scored):
            index, counts = scored.groups()
            returns = scored.returns()
            worst = returns.new_full((len(counts),), float("inf")).scatter_reduce(0, index, returns, "amin")
            return worst[index].unsqueeze(1)

    @hookimpl
    def baseline():
        return [Worst]
    '''


@hookspec
def trainer() -> list[type[axes.OfflineTrainer]]:  # type: ignore[empty-body]
    '''Trainers on a dataset, without rollouts; a recipe with one has no other axis.

    from dataclasses import dataclass

    from hf_rlhf import hookimpl
    from hf_rlhf.axes import OfflineTrainer, Positive

    @dataclass(kw_only=True)
    class Rating(OfflineTrainer):
        """A sequence classifier fitted to ratings of texts by squared error."""

        name = "rating"
        head = "sequence"
        reward = "reward_model"

        best: Positive = 5.0
        """The rating that becomes the score 1."""

        def columns(self):
            return {"text", "rating"}

        def encode(self, row, tokenizer):
            return {"input_ids": tokenizer(row["text"])["input_ids"], "labels": row["rating"] / self.best}

        def build(self, materials):
            from transformers import Trainer, TrainingArguments

            return materials.trainer(Trainer, TrainingArguments(**materials.arguments))

    @hookimpl
    def trainer():
        return [Rating]
    '''
