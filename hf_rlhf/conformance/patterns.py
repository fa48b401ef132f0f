"""Checks of patterns of the run doctor, as functions that raise AssertionError."""

from __future__ import annotations

import copy
from dataclasses import fields

from hf_rlhf.conformance.common import Checks
from hf_rlhf.contract.pattern import Finding, History, Pattern

STEPS = 40


def pattern_checks(pattern: Pattern) -> Checks:
    """Yield the checks of a pattern."""
    yield "its meaning, symptom and rule are phrases, and it has no settings", lambda: _is_explained(pattern)
    yield "it finds nothing in a run that has logged nothing", lambda: _is_silent(pattern, History())
    yield "it finds nothing in the first steps of a run", lambda: _is_silent(pattern, _run(3))
    yield "it leaves the history as it is, and finds the same in it again", lambda: _only_reads(pattern)


def _is_explained(pattern: Pattern) -> None:
    for name in ("meaning", "symptom", "rule"):
        text = getattr(pattern, name, None)
        assert isinstance(text, str), f"it has no {name}. Write {name} = '...' in its body"
        assert text, f"its {name} is empty"
        assert not text.endswith("."), f"its {name} must be a phrase without a full stop, got {text!r}"
    settings = [setting.name for setting in fields(pattern)]
    assert not settings, f"no recipe names a pattern, so nothing sets {', '.join(settings)}. Annotate them as ClassVar"


def _is_silent(pattern: Pattern, history: History) -> None:
    found = _found(pattern, history)
    assert not found, f"it found {found[0].text!r}. Wait for several entries of the log, and for metrics that are there"


def _only_reads(pattern: Pattern) -> None:
    history = _run(STEPS)
    before = copy.deepcopy(history)
    first, second = _found(pattern, history), _found(pattern, history)
    assert first == second, f"it found {first}, and then {second}. Keep no state in a pattern"
    same = {name: list(x.last) for name, x in history.series.items()} == {
        name: list(x.last) for name, x in before.series.items()
    }
    assert same, "find changed the history"


def _found(pattern: Pattern, history: History) -> list[Finding]:
    found = list(pattern.find(history))
    for each in found:
        assert isinstance(each, Finding), f"find must yield hf_rlhf.axes.Finding, got {type(each).__name__}"
        assert each.pattern == pattern.name, f"Finding.pattern must be {pattern.name!r}, got {each.pattern!r}"
        words = isinstance(each.overrides, tuple) and all("=" in word for word in each.overrides)
        assert words, f"Finding.overrides must be a tuple of KEY=VALUE, got {each.overrides!r}"
    return found


def _run(steps: int) -> History:
    """Return the history of a run in which nothing has signal: every number is 0, but completions have a length."""
    history = History(recipe={"rollout": {"num_generations": 8}, "update": {"mini_batches": 1, "epochs": 1}})
    zero = (
        *("reward/total/mean", "reward/total/std", "reward/one/mean", "reward/one/std", "kl/ref", "policy/entropy"),
        *("policy/grad_norm", "learning_rate", "loss", "rollout/truncated_frac"),
    )
    for step in range(1, steps + 1):
        history.add(step, {**dict.fromkeys(zero, 0.0), "reward/zero_std_frac": 1.0, "rollout/length/mean": 4.0})
    return history
