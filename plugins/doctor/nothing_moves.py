"""A learning rate that is too small to move the policy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hf_rlhf import hookimpl
from hf_rlhf.axes import Finding, History, Pattern

from ._advice import learning_rate

METRIC, RATE, GRADIENT = "kl/ref", "learning_rate", "policy/grad_norm"
ENTRIES, KL, LEAST, NO_GRADIENT = 15, 1e-4, 1e-8, 1e-6


@dataclass(kw_only=True)
class NothingMoves(Pattern):
    """After some steps the policy is still the reference, or the learning rate itself is next to nothing."""

    name = "nothing_moves"
    meaning = "the learning rate is too small to move anything"
    symptom = "Nothing changes: reward, KL and completions stay as they were"
    rule = (
        f"`{METRIC}` between -{KL:g} and {KL:g} nats per row in the first {ENTRIES} entries of the log though `{GRADIENT}` is "
        f"not 0, or `{RATE}` below {LEAST:g} in all of them, while it does not rise in a warm-up"
    )

    def find(self, history: History) -> Iterable[Finding]:
        rates = history.values(RATE, ENTRIES)
        if len(rates) < ENTRIES or rates[-1] > rates[-ENTRIES // 3]:
            return
        kls = history.values(METRIC)
        still = len(kls) >= ENTRIES and max(map(abs, kls)) < KL and history.series[METRIC].high < KL
        still = still and max(history.values(GRADIENT), default=1.0) > NO_GRADIENT  # else there is nothing to follow
        if not still and history.series[RATE].high >= LEAST:
            return
        rate = history.series[RATE].high
        moved = f", and the KL to the reference is {kls[-1]:.1g} nats per completion" if kls else ""
        text = f"After {history.step} steps nothing has moved: the learning rate is {rate:.1g}{moved}. Raise it."
        overrides = ("training.learning_rate=1.0e-06",) if rate < 1e-7 else learning_rate(history, 10.0)
        yield Finding(self.name, 1, text, overrides, METRIC if kls else RATE)


@hookimpl
def doctor() -> list[type[Pattern]]:
    return [NothingMoves]
