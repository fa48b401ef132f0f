"""Metrics of a recipe that trains on a dataset, without rollouts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_rlhf.axes import AXES
from hf_rlhf.metrics.catalog import EVAL, HEALTH, THROUGHPUT, TRAINER, CoreMetric, core
from hf_rlhf.metrics.catalog_rollout import RUNNING
from hf_rlhf.metrics.names import Named, is_logged, under

if TYPE_CHECKING:
    from hf_rlhf.contract.offline_trainer import OfflineTrainer

_SHARED = {"loss", "grad_norm", "health/nonfinite_step"}
OFFLINE: tuple[CoreMetric, ...] = (
    core(
        TRAINER,
        "loss",
        "loss",
        "what the trainer minimises, mean over the rows since the last entry",
        when="step",
        summary="min",
        unhealthy="Not falling: the learning rate is too low, or the rows are not what the trainer expects. Falling far below "
        "the held-out one: the rows are learned by heart; train for fewer epochs.",
    ),
    core(
        TRAINER,
        "grad_norm",
        "norm",
        "of the gradient before clipping",
        when="step",
        unhealthy="Spikes: look at the longest rows; lower the learning rate or `max_grad_norm`.",
    ),
    core(
        HEALTH,
        "health/nonfinite_step",
        "count",
        "optimizer steps left out because the gradient was not finite; the third in a row ends the run",
        when="step",
        healthy=(None, 0.0),
        summary="max",
        unhealthy="Overflow: lower the learning rate, use bf16 rather than fp16.",
    ),
    *(metric for metric in RUNNING if metric.section == TRAINER and metric.name not in _SHARED),
)
"""Training metrics of every trainer."""
OFFLINE_EVALUATION: tuple[CoreMetric, ...] = (
    core(TRAINER, "loss", "loss", "the same of the held-out rows", when="evaluation", summary="min"),
    core(THROUGHPUT, "runtime", "seconds", "of the evaluation", when="evaluation"),
    core(THROUGHPUT, "samples_per_second", "rows/s", "held-out rows over that time", when="evaluation"),
    core(THROUGHPUT, "steps_per_second", "steps/s", "batches over that time", when="evaluation"),
    core(
        THROUGHPUT,
        "model_preparation_time",
        "seconds",
        "of preparing the model, of the evaluation before training alone",
        when="evaluation",
        optional=True,
    ),
)
"""Metrics of every trainer on held-out rows, without `eval_`."""


def metrics_of_trainer(trainer: OfflineTrainer) -> list[Named]:
    """Return every metric that a run of `trainer` may log; all but the `optional` ones appear in the log."""
    found = [Named(metric.name, metric, metric.section) for metric in OFFLINE]
    found += [Named(f"{EVAL}{metric.name}", metric, metric.section) for metric in OFFLINE_EVALUATION]
    found += [
        Named(under(AXES["trainer"].axis.metric_prefix, metric), metric, "trainer", f"trainer.{trainer.name}")
        for metric in trainer.metrics
        if is_logged(metric, trainer)
    ]
    return found
