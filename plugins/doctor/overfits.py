"""A trainer on a dataset that learns its rows by heart."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hf_rlhf import hookimpl
from hf_rlhf.axes import Finding, History, Pattern

from ._advice import lower_learning_rate

METRIC, TRAINED = "eval_loss", "loss"
EVALUATIONS, RISE = 3, 0.05


@dataclass(kw_only=True)
class Overfits(Pattern):
    """The held-out loss rises while the loss falls."""

    name = "overfits"
    meaning = "a trainer without rollouts learns its rows by heart"
    symptom = "The loss falls and the held-out loss rises"
    rule = (
        f"`{METRIC}` more than {RISE:.0%} above its lowest value in {EVALUATIONS} evaluations in a row, while `{TRAINED}` is "
        "below that value"
    )

    def find(self, history: History) -> Iterable[Finding]:
        if METRIC not in history.series or TRAINED not in history.series:
            return
        best, logged = history.series[METRIC].low, list(history.series[METRIC].last)
        limit = best + RISE * abs(best)
        if history.since(METRIC, lambda loss: loss > limit, EVALUATIONS) is None or history.mean(TRAINED) >= best:
            return
        step = next((step for step, loss in logged if loss == best), 0)
        text = (
            f"The held-out loss has risen from {best:.3g} (step {step}) to {logged[-1][1]:.3g}, and the loss is "
            f"{history.mean(TRAINED):.3g}: rows are learned by heart. Stop earlier, or use more rows."
        )
        overrides = (f"training.max_steps={step}",) if step else lower_learning_rate(history)
        yield Finding(self.name, step, text, overrides, METRIC)


@hookimpl
def doctor() -> list[type[Pattern]]:
    return [Overfits]
