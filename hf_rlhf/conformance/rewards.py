"""Checks of reward sources, as functions that raise AssertionError."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any
from unittest import SkipTest

from hf_rlhf.axes import RewardSource
from hf_rlhf.batch import Rollouts, Spans, TokenScores
from hf_rlhf.conformance.common import Checks, equal, generators_now, second_of_two_processes, through_a_file
from hf_rlhf.conformance.metrics import check_declared, check_finite
from hf_rlhf.scoring.runners.process_runner import packed_source
from hf_rlhf.scoring.runners.reward_call import finish
from hf_rlhf.scoring.runners.worker_source import Served


def reward_checks(plugin: RewardSource, given: Rollouts) -> Checks:
    """Yield the checks of a reward source on these rollouts. All are skipped but the first if that one fails."""

    @cache
    def is_sound() -> bool:
        try:
            _answers_per_row(plugin, given)
        except Exception:
            return False
        return True

    def if_sound(check: Callable[..., None]) -> Callable[[], None]:
        def holds() -> None:
            if not is_sound():
                raise SkipTest("skipped: it does not return one answer per row")
            check(plugin, given)

        return holds

    yield "it returns one number, Spans, TokenScores or None per row", lambda: _answers_per_row(plugin, given)
    yield "the order of the rows changes no score", if_sound(_scores_rows)
    if plugin.rowwise:
        yield "a row alone gets the same score as among others (rowwise)", if_sound(_scores_alone)
    if plugin.workers in ("processes", "ray"):
        yield "a copy in another process gives the same scores", if_sound(_can_be_sent)
    yield "the number of processes changes no score", if_sound(_ignores_processes)
    yield "it is deterministic, and changes neither its rollouts nor a random generator", if_sound(_is_pure)
    yield "its state after scoring survives a checkpoint", if_sound(_keeps_plain_state)
    yield "logged columns have one value per row", if_sound(_logs_per_row)
    yield "logged metrics are declared, finite numbers", if_sound(_metrics_are_declared)
    if plugin.verifier:
        yield "a row without a reference (None) scores None, not 0", if_sound(_none_without_reference)
        yield "answer() returns text or None", if_sound(_answers_text)


def _scores(plugin: RewardSource, given: Rollouts) -> list[Any]:
    try:
        answer: Any = plugin(given)
        answer = finish(answer) if inspect.isawaitable(answer) else answer
    except KeyError as error:
        raise AssertionError(
            f"missing column {error}. Pass rollouts=... with the columns it reads to conformance"
        ) from error
    is_list = hasattr(answer, "__len__") and not isinstance(answer, str | dict)
    assert is_list, f"it must return a list with one number or None per row, got {type(answer).__name__}"
    return answer.tolist() if hasattr(answer, "tolist") else list(answer)


def _answers_per_row(plugin: RewardSource, given: Rollouts) -> None:
    scores, rows = _scores(plugin, copy.deepcopy(given)), len(given)
    assert len(scores) == rows, f"it returns {len(scores)} numbers for {rows} rows"
    for row, x in enumerate(scores):
        if isinstance(x, TokenScores):
            tokens = len(given.completion_ids[row])
            assert len(x.values) == tokens, f"row {row}: {len(x.values)} token scores for {tokens} tokens"
            _are_finite(row, x.values)
        elif isinstance(x, Spans):
            length = len(given.completions[row])
            outside = [end for end, _ in x.values if not 0 <= end <= length]
            assert not outside, f"row {row}: steps end at {outside} in a completion of {length} characters"
            _are_finite(row, [value for _, value in x.values])
        else:
            number = x is None or (not isinstance(x, str) and hasattr(x, "__float__"))
            assert number, f"row {row}: {x!r} is neither a number nor None"
            assert x is None or not math.isinf(x), f"row {row}: {x!r} is infinite"


def _are_finite(row: int, values: Sequence[float]) -> None:
    wrong = [x for x in values if not math.isfinite(x)]
    assert not wrong, (
        f"row {row}: steps and tokens must be finite, got {wrong[0]}. Return None for a row that it does not apply to"
    )


def _scores_rows(plugin: RewardSource, given: Rollouts) -> None:
    backwards = copy.deepcopy(given)
    for name in ("prompts", "completions", "prompt_ids", "completion_ids", "masks", "finish_reasons", "group_ids"):
        getattr(backwards, name).reverse()
    for values in backwards.columns.values():
        values.reverse()
    forth, back = _scores(plugin, copy.deepcopy(given)), _scores(plugin, backwards)
    assert _close(forth, back[::-1]), f"reversed rows score {back[::-1]}, not {forth}"


def _scores_alone(plugin: RewardSource, given: Rollouts) -> None:
    together = _scores(plugin, copy.deepcopy(given))
    alone = [_scores(plugin, copy.deepcopy(given.select([row])))[0] for row in range(len(given))]
    assert _close(together, alone), f"rows score {alone} alone and {together} together. Remove rowwise = True"


def _can_be_sent(plugin: RewardSource, given: Rollouts) -> None:
    own = _scores(plugin, copy.deepcopy(given))
    copied = Served(packed_source(plugin.name, plugin, None)).source
    try:
        assert _close(own, _scores(copied, copy.deepcopy(given))), "a copy made from its settings scores differently"
    finally:
        copied.close()


def _ignores_processes(plugin: RewardSource, given: Rollouts) -> None:
    alone = _scores(plugin, copy.deepcopy(given))
    with second_of_two_processes():
        other = _scores(plugin, copy.deepcopy(given))
    assert _close(alone, other), f"as process 1 of 2 it scores {other}, not {alone}"


def _keeps_plain_state(plugin: RewardSource, given: Rollouts) -> None:
    _scores(plugin, copy.deepcopy(given))
    state = plugin.state_dict()
    assert equal(through_a_file(state), state), f"a checkpoint changes its state, {state}"


def _is_pure(plugin: RewardSource, given: Rollouts) -> None:
    seen, generators = copy.deepcopy(given), generators_now()
    first = _scores(plugin, seen)
    for name, value in vars(given).items():
        assert getattr(seen, name) == value, f"it changes rollouts.{name} in place"
    assert _close(_scores(plugin, seen), first), "called twice on the same rollouts it scores differently"
    assert equal(generators_now(), generators), "it draws from a global random generator"


def _logs_per_row(plugin: RewardSource, given: Rollouts) -> None:
    plugin.take_logs()
    _scores(plugin, copy.deepcopy(given))
    columns, _ = plugin.take_logs()
    for name, column in columns.items():
        assert len(column) == len(given), f"it logs {len(column)} values of {name!r} for {len(given)} rows"


def _metrics_are_declared(plugin: RewardSource, given: Rollouts) -> None:
    plugin.take_logs()
    _scores(plugin, copy.deepcopy(given))
    _, metrics = plugin.take_logs()
    for name, values in metrics.items():
        for x in values:
            check_finite({name: x}, "it logs")
    check_declared(plugin, metrics, "it logs")


def _none_without_reference(plugin: RewardSource, given: Rollouts) -> None:
    without = copy.deepcopy(given)
    named = [name for name in getattr(plugin, "columns", set)() if name in without.columns]
    for name in named:
        without.columns[name][0] = None
    if not named:
        return
    (first, *others), (_, *before) = _scores(plugin, without), _scores(plugin, copy.deepcopy(given))
    missing = first is None or (isinstance(first, float) and math.isnan(first))
    assert missing, (
        f"{', '.join(named)} of row 0 is None and its score {first!r}. An unknown answer is not a wrong answer"
    )
    assert _close(others, before), "a row without a reference changes the scores of the others"


def _answers_text(plugin: RewardSource, given: Rollouts) -> None:
    for text in given.completions:
        answer = plugin.answer(text)
        assert answer is None or isinstance(answer, str), f"answer({text!r}) must be text or None, got {answer!r}"


def _close(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Compare answers, numbers up to the rounding of a float32 model."""
    return len(a) == len(b) and all(_close_answers(x, y) for x, y in zip(a, b, strict=True))


def _close_answers(a: Any, b: Any) -> bool:
    if isinstance(a, Spans | TokenScores):
        return type(a) is type(b) and _close(a.values, b.values)
    if isinstance(a, tuple | list):
        return isinstance(b, tuple | list) and _close(a, b)
    x, y = (math.nan if n is None else float(n) for n in (a, b))
    return (math.isnan(x) and math.isnan(y)) or math.isclose(x, y, rel_tol=1e-5, abs_tol=1e-6)
