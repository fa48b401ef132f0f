"""Metrics of rewards, KL, policy and critic."""

from __future__ import annotations

from hf_rlhf.metrics.catalog import CRITIC, KL, POLICY, REWARDS, CoreMetric, core

LEARNING: tuple[CoreMetric, ...] = (
    core(
        REWARDS,
        "reward/total/mean",
        "reward",
        "weighted sum of the sources, mean over the rows that any source scored, before filters",
        "rewards",
        summary="max",
        unhealthy="Flat from the start: no group has signal (see `reward/zero_std_frac`) or the learning rate is too low. "
        "Rising while the held-out accuracy falls: the reward is being gamed; raise `kl.0.beta` or fix the reward.",
    ),
    core(REWARDS, "reward/total/std", "reward", "its standard deviation over those rows", "rewards"),
    core(
        REWARDS,
        "reward/<label>/mean",
        "score",
        "one source as it answered (before `clip`, `normalize` and its weight), mean over the rows it applies to",
        summary="max",
        unhealthy="One source rises and another falls: the weights trade them against each other; change `weight`.",
    ),
    core(REWARDS, "reward/<label>/std", "score", "its standard deviation over those rows"),
    core(
        REWARDS,
        "reward/<label>/corr/<other>",
        "correlation",
        "of two weighted sources over the rows that both scored; 0 where one of them does not vary",
        "rewards",
        unhealthy="Clearly below 0: what one pays for costs with the other; change `weight`, or drop one.",
    ),
    core(
        REWARDS,
        "reward/<label>/answered_frac",
        "share of rows",
        "completions of a rollout, 16 by process at most, in which a verifier that calls none of the rollout's right finds an "
        "answer at all",
        "verifier",
        optional=True,
        unhealthy="Near 0: completions do not have the form that the verifier reads; ask for it in the prompt.",
    ),
    core(
        REWARDS,
        "reward/after_kl/mean",
        "reward",
        "return of a row: total reward minus the KL in the reward, over the rows that filters kept",
        "rewards",
        unhealthy="Falls while `reward/total/mean` rises: the KL costs more than it gains; lower `kl.0.beta` or "
        "the learning rate.",
    ),
    core(REWARDS, "reward/after_kl/std", "reward", "its standard deviation over those rows", "rewards"),
    core(
        REWARDS,
        "reward/zero_std_frac",
        "share of rows",
        "rows of groups in which all total rewards are equal, before KL and filters: no signal between them",
        "rewards groups",
        healthy=(None, 0.8),
        unhealthy="Most prompts are too easy or too hard: choose prompts near the policy's ability, raise "
        "`rollout.num_generations`, or add the filter `zero_variance` with `resample`.",
    ),
    core(
        REWARDS,
        "advantage/mean",
        "advantage",
        "over the tokens of the rows that filters kept, before a KL in the advantages",
    ),
    core(REWARDS, "advantage/std", "advantage", "over those tokens"),
    core(REWARDS, "advantage/min", "advantage", "over those tokens", summary="min"),
    core(REWARDS, "advantage/max", "advantage", "over those tokens", summary="max"),
    core(
        KL,
        "kl/ref",
        "nats per row",
        "log-prob of the policy that rolled out minus the reference's, summed over each row's tokens, mean over the rows of "
        "the step. The same for every placement and estimator, so that runs compare",
        "reference",
        when="step",
        healthy=(None, 30.0),
        unhealthy="Growing without end: the policy leaves the reference; raise `beta` or lower the learning rate. Clearly "
        "below 0: the sampler and the trainer disagree, see `rollout/sampler_gap/mean`.",
    ),
    core(
        KL,
        "kl/<kl>/<estimator>",
        "nats per row",
        "a placement's own estimate, summed over each row's tokens. In the reward and the advantages: of the policy that "
        "rolled out, over all rows. In the loss and for `monitor`: of the policy as it is in the update, over the rows of the "
        "step",
        "kl",
        when="step",
        unhealthy="Spikes where `kl/ref` is calm: single tokens with a huge log-ratio; set `clamp`.",
    ),
    core(KL, "kl/<kl>/loss", "loss", "what a placement in the loss adds to it", "kl_loss", when="step"),
    core(
        KL,
        "kl/<kl>/beta",
        "reward or loss per nat",
        "the placement's `beta` times what its controller makes of it, after this rollout was observed",
        "beta",
        unhealthy="An adaptive one at its bound: the target KL cannot be met; change `target` or the learning rate.",
    ),
    core(
        KL,
        "kl/<kl>/clamp_frac",
        "share of tokens",
        "where `clamp` cut the estimate (of rows at level `sequence`)",
        "clamp",
        when="step",
        healthy=(None, 0.05),
        unhealthy="Much of the KL has no gradient any more: raise `clamp` or lower the learning rate.",
    ),
    core(
        KL,
        "kl/rollout/sequence",
        "nats per row",
        "mean k1 of the policy that rolled out, summed over each row, over the rows that filters kept",
        "drift",
        healthy=(None, 30.0),
        unhealthy="As `kl/ref`.",
    ),
    core(KL, "kl/rollout/token", "nats per token", "the same per token", "drift"),
    core(
        KL,
        "kl/<kl>/rollout/sequence",
        "nats per row",
        "mean k1 to the placement's own reference, summed over each row, over the rows it is taken on",
        "own_drift",
    ),
    core(KL, "kl/<kl>/rollout/token", "nats per token", "the same per token", "own_drift"),
    core(POLICY, "policy/loss", "loss", "the policy loss under the recipe's weights, per optimizer step", when="step"),
    core(
        POLICY,
        "policy/approx_kl",
        "nats per token",
        "exp(l) - 1 - l with l the log-ratio to the policy that rolled out: how far the update has moved. 0 in the first "
        "step of a rollout",
        "old",
        when="step",
        healthy=(None, 0.1),
        unhealthy="The update leaves the policy that wrote the rollout: lower the learning rate, `update.epochs` or "
        "`update.mini_batches`.",
    ),
    core(
        POLICY,
        "policy/ratio",
        "ratio",
        "mean over tokens of p / p_old",
        "old",
        when="step",
        healthy=(0.8, 1.25),
        unhealthy="As `policy/approx_kl`.",
    ),
    core(
        POLICY,
        "policy/entropy",
        "nats per token",
        "minus the mean log-prob of the sampled tokens, an estimate of the entropy at the rollout's temperature; the exact "
        "entropy where something needs it or `logging.entropy=exact`",
        when="step",
        healthy=(0.02, None),
        unhealthy="Near 0: the policy says one thing and explores no more; raise `epsilon_high`, the temperature or an entropy "
        "term, lower the learning rate. Rising without end: the text falls apart; lower the learning rate or the entropy term.",
    ),
    core(
        POLICY,
        "policy/grad_norm",
        "norm",
        "of the policy's gradient before clipping",
        when="step",
        unhealthy="Spikes: look at the longest and the rarest rows of that step; lower the learning rate or `max_grad_norm`. "
        "0: nothing has signal, see `reward/zero_std_frac`.",
    ),
    core(POLICY, "plugin/<term>/loss", "loss", "what a loss term adds to the loss", "terms", when="step"),
    core(
        CRITIC,
        "value/loss",
        "loss",
        "`coef` x 0.5 x the mean over tokens of the (clipped) squared error",
        "critic",
        when="step",
        unhealthy="Rising: the returns move faster than the critic learns; raise `critic.learning_rate` or `warmup_steps`.",
    ),
    core(
        CRITIC,
        "value/clip_frac",
        "share of tokens",
        "where the clipped error is the larger one",
        "value_clip",
        when="step",
        healthy=(None, 0.5),
        unhealthy="The critic may not move as far as it should: raise `value_clip`, or whiten the rewards.",
    ),
    core(
        CRITIC,
        "value/grad_norm",
        "norm",
        "of the critic's own parameters' gradient before clipping",
        "critic",
        when="step",
    ),
    core(CRITIC, "value/mean", "reward", "mean value of the rollout's tokens", "critic"),
    core(
        CRITIC,
        "value/explained_var",
        "share",
        "1 - var(returns - values) / var(returns), over tokens: 1 is perfect, 0 no better than a constant",
        "critic",
        healthy=(0.0, None),
        optional=True,
        summary="max",
        unhealthy="Below 0 after the first rollouts: the critic hurts; start it from the reward model, give it `warmup_steps` "
        "or a higher learning rate.",
    ),
)
