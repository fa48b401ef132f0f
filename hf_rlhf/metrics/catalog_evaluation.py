"""Metrics of an evaluation."""

from __future__ import annotations

from hf_rlhf.metrics.catalog import CoreMetric, core

_VERIFIED = (
    ("accuracy", "completions to which the verifier gives 1"),
    (
        "pass@<k>",
        "unbiased estimate that one of k completions is right (arXiv:2107.03374), k = 2, 4, ... up to "
        "`evaluation.num_generations`",
    ),
    ("maj@<k>", "the most frequent answer is right, k = `evaluation.num_generations`; ties give the mean"),
)


def _evaluation() -> tuple[CoreMetric, ...]:
    def of(prefix: str, given: str) -> list[CoreMetric]:
        def m(name: str, unit: str, meaning: str, needs: str = "", **more: object) -> CoreMetric:

            if prefix:
                more["optional"] = True
            return core("", f"{prefix}{name}", unit, meaning, f"{given} {needs}", when="evaluation", **more)

        gamed = "Falls while the training reward rises: over-optimisation; raise `kl.0.beta` or stop earlier."
        found = [
            m(
                "reward/total/mean",
                "reward",
                "weighted sum of the sources over the rows that any source scored",
                "rewards",
                summary="max",
                unhealthy=gamed,
            ),
            m("reward/<label>/mean", "score", "one source, over the rows it applies to", optional=True, summary="max"),
            m("rollout/length/mean", "tokens", "sampled tokens per completion"),
            m("rollout/truncated_frac", "share of rows", "completions cut off"),
        ]
        for label in ("", "<label>/"):
            whose = "" if not label else " Of the second verifier and further ones; the first carries no label"
            for name, meaning in _VERIFIED:
                found.append(
                    m(
                        f"{label}{name}",
                        "share of rows" if name == "accuracy" else "share of prompts",
                        f"{meaning}.{whose}" if whose else meaning,
                        "verifier",
                        summary="max",
                        optional=bool(label) or name != "accuracy",
                        unhealthy=gamed if not label and name == "accuracy" else "",
                    )
                )
        found.append(m("health/reward_error", "count", "rows of a source that raised, after the retries", "rewards"))
        found.append(
            m("health/reward_timeout", "count", "rows that took longer than the source's `timeout`", "rewards")
        )
        return found

    trainers = [
        core("", "runtime", "seconds", "of the evaluation", when="evaluation"),
        core("", "samples_per_second", "prompts/s", "held-out prompts over that time", when="evaluation"),
        core(
            "",
            "steps_per_second",
            "",
            "Trainer's count by `per_device_eval_batch_size`, which has no meaning here",
            when="evaluation",
        ),
    ]
    return (*of("", ""), *of("ema/", "ema"), *trainers)


EVALUATION: tuple[CoreMetric, ...] = _evaluation()
"""Metrics of an evaluation, without `eval_`."""
