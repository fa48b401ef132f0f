"""Metrics of individual offline trainers: TRL's during training, and those of `measure` on held-out rows."""

from __future__ import annotations

from hf_rlhf import Metric

GAMED = "Falls while that of the training rows rises: overfitting; train for fewer epochs."


def both(name: str, unit: str, meaning: str, **more: object) -> tuple[Metric, Metric]:
    """Return a metric of the training rows, and the same of the held-out ones."""
    given: dict[str, object] = {"when": "step", **more}
    return (
        Metric(name, unit, f"{meaning}, over the rows since the last entry", **given),  # type: ignore[arg-type]
        held_out(name, unit, f"{meaning}, averaged over batches by TRL", **more),
    )


def held_out(name: str, unit: str, meaning: str, **more: object) -> Metric:
    """Return a metric of an evaluation."""
    return Metric(name, unit, f"{meaning}, of the held-out rows", **{**more, "when": "evaluation"})  # type: ignore[arg-type]


def rate(name: str, what: str, count: str, **more: object) -> tuple[Metric, ...]:
    """Return a share with its 95 % interval (Wilson 1927)."""
    return (
        held_out(name, f"share of {count}", what, summary="max", unhealthy=GAMED, **more),
        held_out(f"{name}_low", f"share of {count}", f"lower end of the 95 % interval of `eval_{name}`", **more),
        held_out(f"{name}_high", f"share of {count}", f"upper end of the 95 % interval of `eval_{name}`", **more),
    )


TOKENS = (
    Metric("num_tokens", "tokens", "tokens trained on so far", when="step", summary="max"),
    held_out("num_tokens", "tokens", "tokens trained on so far, at the evaluation"),
)
CAUSAL = (
    *TOKENS,
    *both("entropy", "nats per token", "mean entropy of the model's distributions"),
    *both("mean_token_accuracy", "share of tokens", "for which the most likely token is correct"),
    *both("aux_loss", "loss", "the load-balancing loss of a mixture of experts", optional=True),
)
"""Metrics of causal models."""
OF_SFT = (
    *CAUSAL,
    held_out("tokens/log_loss", "nats per token", "-log p, over all learned tokens together", summary="min"),
    held_out("tokens/perplexity", "", "exponential of the log loss", summary="min"),
    held_out("tokens/accuracy", "share of tokens", "for which the most likely token is correct", summary="max"),
    held_out("tokens/count", "tokens", "number of learned tokens"),
)
PAIRS = (
    *rate("pairs/accuracy", "pairs whose chosen completion has the higher score", "pairs"),
    held_out("pairs/count", "pairs", "number of pairs"),
    held_out(
        "pairs/longer_wins",
        "share of pairs",
        "pairs whose longer completion was chosen: the accuracy of length alone",
    ),
    held_out("pairs/shorter_wins", "share of pairs", "pairs whose shorter completion was chosen"),
    held_out("pairs/margin", "score", "mean score of the chosen completion minus that of the rejected one"),
    held_out(
        "pairs/log_loss", "nats per pair", "-log of the probability that the scores give to the label", summary="min"
    ),
    held_out("pairs/confidence", "probability", "mean probability that the scores give to the preferred completion"),
    held_out(
        "pairs/calibration_error",
        "probability",
        "expected calibration error of the confidence, over ten bins",
        summary="min",
        healthy=(None, 0.1),
        unhealthy="Scores are over- or underconfident: train for fewer epochs, or set `center_rewards_coefficient`.",
    ),
    held_out("pairs/score_mean", "score", "mean score of all completions"),
)
"""Metrics of scored pairs."""
OF_REWARD = (
    *TOKENS,
    *both("accuracy", "share of pairs", "pairs whose chosen completion has the higher score"),
    *both("margin", "score", "mean score of the chosen completion minus that of the rejected one"),
    *both("mean_reward", "score", "mean score"),
    *both("min_reward", "score", "lowest score of a batch"),
    *both("max_reward", "score", "highest score of a batch"),
    *PAIRS,
)
OF_DPO = (
    *CAUSAL,
    *both("rewards/chosen", "reward", "implicit reward of the chosen completions, beta log pi / pi_ref"),
    *both(
        "rewards/rejected",
        "reward",
        "implicit reward of the rejected completions",
    ),
    *both("rewards/margins", "reward", "difference of the chosen and rejected implicit rewards"),
    *both("rewards/accuracies", "share of pairs", "pairs whose chosen completion has the higher implicit reward"),
    *both("logps/chosen", "nats per row", "log-prob of the chosen completions"),
    *both("logps/rejected", "nats per row", "log-prob of the rejected completions"),
    *both("logits/chosen", "logit", "mean logit over the vocabulary at the chosen completions"),
    *both("logits/rejected", "logit", "mean logit over the vocabulary at the rejected completions"),
    *PAIRS,
    *rate("likelihood/accuracy", "pairs whose chosen completion is likelier under the policy", "pairs"),
    held_out(
        "drift/chosen",
        "nats per row",
        "log-ratio of policy and reference at the chosen completions",
        unhealthy="Falls far below 0: both completions become less likely, the rejected one faster; raise `beta`, or use "
        "`apo_zero`.",
    ),
    held_out("drift/rejected", "nats per row", "log-ratio of policy and reference at the rejected completions"),
    held_out(
        "drift/k2",
        "nats per row",
        "half the squared log-ratio of policy and reference",
        unhealthy="Keeps growing: the policy leaves the reference; raise `beta` or lower the learning rate.",
    ),
)


def labels(area: str, what: str, **more: object) -> tuple[Metric, ...]:
    """Return metrics of log-odds of good against labels."""
    return (
        *rate(f"{area}/accuracy", f"{what} predicted on the side of their label", what, **more),
        held_out(f"{area}/count", what, f"number of {what}", **more),
        held_out(f"{area}/all_good", f"share of {what}", "good ones: the accuracy of always predicting good", **more),
        held_out(f"{area}/all_bad", f"share of {what}", "bad ones: the accuracy of always predicting bad", **more),
        held_out(
            f"{area}/log_loss",
            f"nats per {what.removesuffix('s')}",
            "-log of the label's probability",
            summary="min",
            **more,
        ),
        held_out(
            f"{area}/calibration_error",
            "probability",
            "expected calibration error of the probability of good, over ten bins",
            summary="min",
            **more,
        ),
    )


OF_STEPS = labels("steps", "steps")
"""Metrics of a process reward model."""
SQUARED = "loss=squared_error"
OF_SPANS = (
    *labels("tokens", "tokens", setting="loss=binary_cross_entropy"),
    held_out("tokens/squared_error", "score squared", "mean squared error", summary="min", setting=SQUARED),
    held_out(
        "tokens/explained_var",
        "share",
        "explained share of the labels' variance",
        optional=True,
        setting=SQUARED,
        summary="max",
        healthy=(0.0, None),
        unhealthy="Below 0: worse than the labels' mean; train longer or raise the learning rate.",
    ),
)
"""Metrics of a token reward model, by its loss."""
