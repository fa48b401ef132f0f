"""Checks of tensor functions, from advantages to filters: shapes, masks, needs and invariances.

Each fact is a title and a function that raises AssertionError. `hf_rlhf.conformance.gradients` has those about gradients.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any
from unittest import SkipTest

import torch
from torch import Tensor
from torch.nn.functional import pad

from hf_rlhf.axes import (
    AdvantageEstimator,
    Aggregation,
    Baseline,
    Filter,
    KLEstimator,
    KLPlacement,
    LossTerm,
    Plugin,
    PolicyLoss,
    RolloutCorrection,
)
from hf_rlhf.conformance import gradients
from hf_rlhf.conformance.common import (
    Checks,
    Statistics,
    assert_equal,
    equal,
    generators_now,
    has_memory,
    restored_pair,
    second_of_two_processes,
)
from hf_rlhf.conformance.tensor_inputs import (
    OUTPUTS,
    Run,
    Tensors,
    declared_needs,
    draw_tensors,
    on_mask,
    ordinary_tensors,
    rows_of,
    widened,
    with_selected,
)

WHOLE = (AdvantageEstimator, Baseline, Filter)
"""Axes called once with all rows of a rollout, as a `Scored`."""
BY_ROW = (PolicyLoss, KLEstimator, KLPlacement, LossTerm, RolloutCorrection)
"""Axes called with some of the rows: on each process and for each micro-batch."""


def tensor_function_checks(plugin: Plugin, axis: str, finite_differences: bool | None, history: Statistics) -> Checks:
    """Yield the checks of an axis in `OUTPUTS`. All are skipped but the first if that one fails."""

    def run(t: Tensors) -> Tensors:
        return OUTPUTS[axis](plugin, {name: x.clone() for name, x in t.items()})

    @cache
    def is_sound() -> bool:
        try:
            _keeps_shape(plugin, run)
        except Exception:
            return False
        return True

    def if_sound(check: Callable[..., None], *arguments: Any) -> Callable[[], None]:
        def holds() -> None:
            if not is_sound():
                raise SkipTest("skipped: on ordinary input it fails or returns a wrong shape")
            check(*arguments)

        return holds

    yield "output has the shape and dtype of its input", lambda: _keeps_shape(plugin, run)
    yield "it reads what it declares in needs, and nothing else", if_sound(_needs_suffice, plugin, axis, run)
    yield "it is 0 off the mask", if_sound(_is_zero_off_the_mask, run)
    yield "it is finite on degenerate input", if_sound(_is_finite, run)
    if not isinstance(plugin, WHOLE):
        yield "it is finite for a single row, and without rewards", if_sound(_is_finite, run, _few_rows)
    if isinstance(plugin, RolloutCorrection):
        yield "it is finite for a sampler with very different log-probs", if_sound(_is_finite, run, _extreme_ratios)
    if isinstance(plugin, WHOLE):
        yield "it is finite for groups of one row", if_sound(_is_finite, run, _single_rows)
        yield "it is finite for equal rewards, and ignores rounding", if_sound(_equal_rewards, run)
        yield "it is finite for rewards that do not apply (NaN)", if_sound(_is_finite, run, _missing_scores)
        yield "group ids are only labels", if_sound(_ids_are_labels, run)
    if isinstance(plugin, AdvantageEstimator | Baseline | Filter) and not plugin.across_groups:
        yield "rows of other prompts change nothing", if_sound(_groups_are_alone, run)
    yield "float32 gives what float64 gives", if_sound(_precision, run)
    yield "padding columns change nothing", if_sound(_ignores_padding, run)
    yield "the order of the rows changes nothing", if_sound(_ignores_order, run)
    if not isinstance(plugin, KLEstimator):  # it sees no mask: what is off it was filled before
        yield "values off the mask change nothing", if_sound(_ignores_off_mask, run)
    yield "a column of tool tokens changes nothing", if_sound(_ignores_tool_tokens, run)
    yield "the number of processes changes nothing", if_sound(_ignores_processes, plugin, run)
    if isinstance(plugin, BY_ROW) and not isinstance(plugin, KLEstimator):
        yield "any split into micro-batches changes nothing", if_sound(_rows_are_alone, plugin, run)
    yield "it is deterministic, and changes neither its input nor a random generator", if_sound(_is_pure, plugin, axis)
    if has_memory(plugin):
        yield "it computes the same after a checkpoint", if_sound(_resumes, plugin, axis, history)
    if isinstance(plugin, Aggregation | RolloutCorrection | LossTerm):
        yield "its factors are non-negative and carry no gradient", if_sound(_factors, run)
    for title, check, *arguments in gradients.gradient_checks(plugin, axis, run, finite_differences):
        yield title, if_sound(check, *arguments)


def _keeps_shape(plugin: Plugin, run: Run) -> None:
    for dtype in (torch.float64, torch.float32):
        t = ordinary_tensors(dtype)
        try:
            outputs = run(t)
        except AssertionError:
            raise
        except Exception as error:
            raise AssertionError(f"on ordinary input it raises {type(error).__name__}: {error}") from error
        for name, x in outputs.items():
            assert isinstance(x, Tensor), f"{name} must be a tensor, got {type(x).__name__}"
            per_row = name == "keep" or (isinstance(plugin, KLPlacement) and plugin.level == "sequence")
            due = t["mask"].shape[:1] if per_row else t["mask"].shape
            assert x.shape == due, f"{name} must have shape {tuple(due)}, got {tuple(x.shape)}"
            kind = torch.bool if name == "keep" else dtype
            free = name.startswith("metric") or name == "selected"
            assert x.dtype == kind or free, f"{name} must be {kind} for {dtype} input, got {x.dtype}"


def _needs_suffice(plugin: Plugin, axis: str, run: Run) -> None:
    t = ordinary_tensors()
    needs = sorted(declared_needs(plugin))
    try:
        alone = OUTPUTS[axis](plugin, {name: x.clone() for name, x in t.items()}, strict=True)
    except Exception as error:
        raise AssertionError(
            f"it needs {needs or 'nothing'} and fails with that alone. Name in `needs` what it reads, and accept what it needs. "
            f"{type(error).__name__}: {error}"
        ) from error
    assert_equal(
        on_mask(t, alone),
        on_mask(t, run(t)),
        f"it reads fields that it does not need ({needs})",
    )


def _is_zero_off_the_mask(run: Run) -> None:
    t = ordinary_tensors()
    for name, x in run(t).items():
        if name in ("advantages", "weights"):
            off = x[t["mask"] == 0]
            assert bool((off == 0).all()), (
                f"{name} must be 0 off the mask, got up to {off.abs().max():.3g}. Multiply by the mask last"
            )


# Degenerate input


def _with_rewards(t: Tensors, score: Tensor | float) -> Tensors:
    """Set the first source's scores to `score` (N,), at each row's last token, and all other rewards to 0."""
    flat = torch.zeros_like(t["score"]) + score
    last = t["mask"] * (t["mask"].flip(1).cumsum(1).flip(1) == 1)
    none = {"style": flat * 0, "kl_penalties": last * 0}
    return {**t, **none, "token_rewards": last * flat[:, None], "score": flat, "total_score": flat}


def _degenerate(t: Tensors) -> Iterator[tuple[str, Tensors]]:
    log_probs = ("old_logps", "ref_logps", "sampler_logps")
    yield "rewards without a KL", {k: x for k, x in _with_rewards(t, t["total_score"]).items() if k != "kl_penalties"}
    yield "equal log-probs", {**t, **dict.fromkeys(log_probs, t["logps"]), "ref_log_probs": t["log_probs"]}
    yield "no advantage", {**t, "advantages": t["mask"] * 0}
    first = {name: x[:, :1] for name, x in t.items() if x.dim() >= 2}
    yield (
        "completions of one token",
        _with_rewards({**t, **first, "mask": torch.ones_like(first["mask"])}, t["total_score"]),
    )
    empty = t["mask"].clone()
    empty[1] = 0
    on = {name: t[name] * empty for name in ("token_rewards", "kl_penalties", "advantages")}
    yield "a row without sampled tokens", {**t, **on, "mask": empty}


def _few_rows(t: Tensors) -> Iterator[tuple[str, Tensors]]:
    yield "no reward at all", _with_rewards(t, 0.0)
    yield "a single row", rows_of(t, slice(0, 1))


def _single_rows(t: Tensors) -> Iterator[tuple[str, Tensors]]:
    alone = torch.arange(len(t["mask"]))
    yield "one row per group", {**t, "group_ids": alone}
    yield "one row per group and equal rewards", {**_with_rewards(t, 0.2), "group_ids": alone}
    yield "a single row", rows_of(t, slice(0, 1))


def _missing_scores(t: Tensors) -> Iterator[tuple[str, Tensors]]:
    rows, missing = torch.arange(len(t["mask"])), torch.tensor(torch.nan, dtype=t["style"].dtype)
    for case, where in {
        "a source that does not apply to every other row": rows % 2 == 0,
        "a source that does not apply to a whole group": t["group_ids"] == t["group_ids"][0],
        "a source that applies nowhere": rows >= 0,
    }.items():
        yield case, {**t, "style": torch.where(where, missing, t["style"])}


def _extreme_ratios(t: Tensors) -> Iterator[tuple[str, Tensors]]:
    for sign in (-1, 1):
        far = t["sampler_logps"] + sign * 1e3 * (torch.arange(t["mask"].shape[1]) == 1)
        yield "a sampler whose log-probs are far off", {**t, "sampler_logps": far}


def _is_finite(run: Run, cases: Callable[[Tensors], Iterator[tuple[str, Tensors]]] = _degenerate) -> None:
    for dtype in (torch.float64, torch.float32):
        for case, t in cases(ordinary_tensors(dtype)):
            _asserts_finite(case, on_mask(t, run(t)))


def _asserts_finite(case: str, outputs: Tensors) -> None:
    for name, x in outputs.items():
        assert bool(x.isfinite().all()), f"{name} is not finite for {case}"


def _equal_rewards(run: Run) -> None:
    for score in (0.0, 0.2, 1 / 3, 0.7):
        t = {dtype: _with_rewards(draw_tensors(group_sizes=(8, 7, 3), dtype=dtype), score) for dtype in DTYPES}
        outputs = {dtype: on_mask(t[dtype], run(t[dtype])) for dtype in DTYPES}
        for given in outputs.values():
            _asserts_finite("equal rewards", given)
        _agree(outputs, "all rewards are equal. Test for max == min; their standard deviation is rounding error")


DTYPES = (torch.float64, torch.float32)


def _agree(outputs: dict[torch.dtype, Tensors], why: str) -> None:
    for name, x in outputs[torch.float64].items():
        y = outputs[torch.float32][name].double()
        close = torch.allclose(y, x.double(), rtol=1e-3, atol=1e-3)
        assert close, f"{name} in float32 is off by up to {(y - x.double()).abs().max():.3g}: {why}"


def _precision(run: Run) -> None:
    t = {dtype: ordinary_tensors(dtype) for dtype in DTYPES}
    _agree({dtype: on_mask(t[dtype], run(t[dtype])) for dtype in DTYPES}, "float32 must be accurate enough")


# What must not matter


def _ignores_padding(run: Run) -> None:
    t = ordinary_tensors()
    width = t["mask"].shape[1]
    wide = widened(t, width, 3)
    want = {name: pad(x, (0, 3)) if x.dim() == 2 else x for name, x in on_mask(t, run(t)).items()}
    assert_equal(
        on_mask(wide, run(wide)), want, "three columns of padding were added on the right. Count with the mask"
    )


def _ignores_order(run: Run) -> None:
    t = ordinary_tensors()
    order = torch.randperm(len(t["mask"]), generator=torch.Generator().manual_seed(1))
    shuffled, want = rows_of(t, order), rows_of(on_mask(t, run(t)), order)
    assert_equal(on_mask(shuffled, run(shuffled)), want, "the rows were shuffled. Find a row's group by group_ids")


def _ignores_off_mask(run: Run) -> None:
    t, noise = ordinary_tensors(), ordinary_tensors(seed=1)
    names = ["values", "logps", "old_logps", "ref_logps", "sampler_logps", "sum_sq_probs", "entropy", "old_entropy"]
    off = t["mask"] == 0
    other = t | {name: torch.where(off, 1e4 * noise[name], t[name]) for name in names}
    why = "values off the mask changed (padding, tool tokens). Fill them before an exponential, and multiply by the mask last"
    assert_equal(on_mask(other, run(other)), on_mask(t, run(t)), why)


def _ignores_tool_tokens(run: Run) -> None:
    t = ordinary_tensors()
    at, noise = (
        2,
        dict.fromkeys(("values", "logps", "old_logps", "ref_logps", "sampler_logps", "entropy", "old_entropy"), -0.7),
    )
    wide = widened(t, at, fill={**noise, "sum_sq_probs": 0.5})
    inside = t["completion_ids"][:, at - 1 : at] > 0
    wide["completion_ids"][:, at : at + 1] = torch.where(inside, 7, 0)
    want = widened(on_mask(t, run(t)), at)
    assert_equal(on_mask(wide, run(wide)), want, "a column of tool tokens (mask 0) was inserted. Skip it")


def _ignores_processes(plugin: Plugin, run: Run) -> None:
    t = ordinary_tensors()
    want = on_mask(t, run(t))
    with second_of_two_processes():
        assert_equal(on_mask(t, run(t)), want, "it was called as process 1 of 2")
    groups = t["group_ids"].unique()
    shares = [torch.isin(t["group_ids"], groups[rank::2]).nonzero().flatten() for rank in (0, 1)]
    if isinstance(plugin, BY_ROW):
        t = with_selected(plugin, t)
        for share in shares:
            own = rows_of(t, share)
            assert_equal(
                _row_outputs(own, run), rows_of(_row_outputs(t, run), share), "each process computed its own rows"
            )
        return
    order = torch.cat(shares)
    gathered, want = rows_of(t, order), rows_of(want, order)
    assert_equal(
        on_mask(gathered, run(gathered)), want, "two processes rolled out every other group, and the rows were gathered"
    )


def _row_outputs(t: Tensors, run: Run) -> Tensors:
    """Return the outputs of single rows; weights of a loss term depend on the whole step."""
    return {name: x for name, x in on_mask(t, run(t)).items() if name != "weights"}


def _rows_are_alone(plugin: Plugin, run: Run) -> None:
    t = with_selected(plugin, ordinary_tensors())
    whole = _row_outputs(t, run)
    for row in range(len(t["mask"])):
        length = int(t["mask"][row].nonzero().max()) + 1
        alone = {name: x[row : row + 1, :length] if x.dim() >= 2 else x[row : row + 1] for name, x in t.items()}
        want = {name: x[row : row + 1, :length] if x.dim() >= 2 else x[row : row + 1] for name, x in whole.items()}
        assert_equal(_row_outputs(alone, run), want, "the row was computed alone, as in a micro-batch")


def _groups_are_alone(run: Run) -> None:
    t = ordinary_tensors()
    whole = on_mask(t, run(t))
    for group in t["group_ids"].unique():
        own = (t["group_ids"] == group).nonzero().flatten()
        alone = rows_of(t, own)
        why = "a group was computed alone. If all rows of a rollout should count, set across_groups = True"
        assert_equal(on_mask(alone, run(alone)), rows_of(whole, own), why)


def _is_pure(plugin: Plugin, axis: str) -> None:
    t = ordinary_tensors()
    before, generators = copy.deepcopy(t), generators_now()
    first = {name: x.clone() for name, x in OUTPUTS[axis](plugin, t).items()}
    for name, x in before.items():
        assert torch.equal(x, t[name]), f"it changes its input {name} in place"
    assert_equal(OUTPUTS[axis](plugin, t), first, "it was called twice on the same input")
    assert equal(generators_now(), generators), "it draws from a global random generator"


def _resumes(plugin: Plugin, axis: str, history: Statistics) -> None:
    t = ordinary_tensors()
    try:
        trained, fresh = restored_pair(plugin, history)
    except Exception as error:
        raise SkipTest(f"skipped: its state does not survive. {error}") from None
    assert_equal(
        on_mask(t, OUTPUTS[axis](fresh, t)), on_mask(t, OUTPUTS[axis](trained, t)), "it was loaded from a checkpoint"
    )


def _factors(run: Run) -> None:
    t = ordinary_tensors()
    for name in ("logps", "old_logps", "sampler_logps", "entropy"):
        t[name].requires_grad_()
    for name, x in run(t).items():
        if name in ("weights", "factors"):
            assert bool((x >= 0).all()), f"{name} must be non-negative, got {x.min():.3g}"
            assert bool(x.sum() > 0), f"{name} must not be 0 everywhere"
            assert not x.requires_grad, f"{name} must carry no gradient. Detach them"


def _ids_are_labels(run: Run) -> None:
    t = ordinary_tensors()
    renamed = {**t, "group_ids": 100 - 7 * t["group_ids"]}
    assert_equal(run(renamed), run(t), "the groups were renumbered")


def metric_names(plugin: Plugin) -> list[str]:
    """Return the names under which `observe` gets the metrics of a policy loss."""
    if not isinstance(plugin, PolicyLoss):
        return []
    try:
        outputs = OUTPUTS["policy_loss"](plugin, ordinary_tensors())
    except Exception:
        return []
    return [f"policy/{name.removeprefix('metric ')}" for name in outputs if name.startswith("metric ")]
