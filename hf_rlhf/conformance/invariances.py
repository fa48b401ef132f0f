"""What the axes of tensor functions promise, from advantages to filters: shapes, masks, needs, and what must not matter.

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
    Claims,
    Statistics,
    equal,
    generators_now,
    observed,
    remade,
    same,
    second_of_two_processes,
)
from hf_rlhf.conformance.tensor_inputs import (
    OUTPUTS,
    Run,
    Tensors,
    declared,
    draw_tensors,
    on_mask,
    ordinary,
    prepared,
    rows_of,
    widened,
)

WHOLE = (AdvantageEstimator, Baseline, Filter)
"""Called once with all rows of a rollout, as a `Scored`."""
BY_ROW = (PolicyLoss, KLEstimator, KLPlacement, LossTerm, RolloutCorrection)
"""Called with some of the rows: on each process, and on each micro-batch."""


def tensor_function_checks(plugin: Plugin, axis: str, finite_differences: bool | None, told: Statistics) -> Claims:
    """Of a plugin on one of the axes in `OUTPUTS`. What is wrong with the first fact is not said again by the others."""

    def run(t: Tensors) -> Tensors:
        return OUTPUTS[axis](plugin, {name: x.clone() for name, x in t.items()})

    @cache
    def answers() -> bool:
        try:
            _keeps_shape(plugin, run)
        except Exception:
            return False
        return True

    def asked(check: Callable[..., None], *arguments: Any) -> Callable[[], None]:
        def holds() -> None:
            if not answers():
                raise SkipTest("not asked: on ordinary input it fails or gives another shape than is due")
            check(*arguments)

        return holds

    yield "shape and dtype follow its input", lambda: _keeps_shape(plugin, run)
    yield "it runs on what it declares, and reads nothing else", asked(_needs_suffice, plugin, axis, run)
    yield "it is 0 off the mask", asked(_is_zero_off_the_mask, run)
    yield "it is finite on degenerate input", asked(_is_finite, run)
    if not isinstance(plugin, WHOLE):
        yield "it is finite for a single row, and without rewards", asked(_is_finite, run, _few_rows)
    if isinstance(plugin, RolloutCorrection):
        yield "it is finite where the sampler's log-probs are far off", asked(_is_finite, run, _extreme_ratios)
    if isinstance(plugin, WHOLE):
        yield "it is finite where a group has one row (K = 1)", asked(_is_finite, run, _single_rows)
        yield "it is finite for equal rewards, and rounding is no signal", asked(_equal_rewards, run)
        yield "it is finite where a reward does not apply (NaN)", asked(_is_finite, run, _missing_scores)
        yield "group ids are only labels", asked(_ids_are_labels, run)
    if isinstance(plugin, AdvantageEstimator | Baseline) and not plugin.across_groups:
        yield "rows of other prompts change nothing", asked(_groups_are_alone, run)
    yield "float32 gives what float64 gives", asked(_precision, run)
    yield "padding columns change nothing", asked(_ignores_padding, run)
    yield "the order of the rows changes nothing", asked(_ignores_order, run)
    if not isinstance(plugin, KLEstimator):  # it sees no mask: what is off it was filled before
        yield "what stands off the mask changes nothing", asked(_ignores_off_mask, run)
    yield "a column of tool tokens changes nothing", asked(_ignores_tool_tokens, run)
    yield "the number of processes changes nothing", asked(_ignores_processes, plugin, run)
    if isinstance(plugin, BY_ROW) and not isinstance(plugin, KLEstimator):
        yield "any split into micro-batches changes nothing", asked(_rows_are_alone, plugin, run)
    yield "it changes neither its input nor a random generator, and repeats itself", asked(_is_pure, plugin, axis)
    if observed(plugin):
        yield "after a checkpoint it computes the same", asked(_resumes, plugin, axis, told)
    if isinstance(plugin, Aggregation | RolloutCorrection | LossTerm):
        yield "its factors are not negative and carry no gradient", asked(_factors, run)
    for title, check, *arguments in gradients.gradient_checks(plugin, axis, run, finite_differences):
        yield title, asked(check, *arguments)


def _keeps_shape(plugin: Plugin, run: Run) -> None:
    for dtype in (torch.float64, torch.float32):
        t = ordinary(dtype)
        try:
            outputs = run(t)
        except AssertionError:
            raise
        except Exception as error:
            raise AssertionError(f"on ordinary input it raises {type(error).__name__}: {error}") from error
        for name, x in outputs.items():
            assert isinstance(x, Tensor), f"{name} is a {type(x).__name__}; a tensor is due"
            per_row = name == "keep" or (isinstance(plugin, KLPlacement) and plugin.level == "sequence")
            due = t["mask"].shape[:1] if per_row else t["mask"].shape
            assert x.shape == due, f"{name} has the shape {tuple(x.shape)}; {tuple(due)} is due"
            kind = torch.bool if name == "keep" else dtype
            free = name.startswith("metric") or name == "selected"
            assert x.dtype == kind or free, f"{name} is {x.dtype} for {dtype} input; {kind} is due"


def _needs_suffice(plugin: Plugin, axis: str, run: Run) -> None:
    t = ordinary()
    needs = sorted(declared(plugin))
    try:
        alone = OUTPUTS[axis](plugin, {name: x.clone() for name, x in t.items()}, strict=True)
    except Exception as error:
        raise AssertionError(
            f"it needs {needs or 'nothing'} and fails on that alone: name in `needs` what it reads, take what it needs. "
            f"{type(error).__name__}: {error}"
        ) from error
    same(
        on_mask(t, alone),
        on_mask(t, run(t)),
        f"it was given what it needs ({needs}) and no more: it reads other fields",
    )


def _is_zero_off_the_mask(run: Run) -> None:
    t = ordinary()
    for name, x in run(t).items():
        if name in ("advantages", "weights"):
            off = x[t["mask"] == 0]
            assert bool((off == 0).all()), (
                f"{name} is not 0 off the mask (up to {off.abs().max():.3g}); multiply by it last"
            )


# Degenerate input


def _with_rewards(t: Tensors, score: Tensor | float) -> Tensors:
    """`score` (N,) at each row's last token and from the first source, and nothing else."""
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
        for case, t in cases(ordinary(dtype)):
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
        _agree(outputs, "all rewards are equal: find that by max == min, their deviation is rounding")


DTYPES = (torch.float64, torch.float32)


def _agree(outputs: dict[torch.dtype, Tensors], why: str) -> None:
    for name, x in outputs[torch.float64].items():
        y = outputs[torch.float32][name].double()
        close = torch.allclose(y, x.double(), rtol=1e-3, atol=1e-3)
        assert close, f"{name} in float32 is off by up to {(y - x.double()).abs().max():.3g}: {why}"


def _precision(run: Run) -> None:
    t = {dtype: ordinary(dtype) for dtype in DTYPES}
    _agree({dtype: on_mask(t[dtype], run(t[dtype])) for dtype in DTYPES}, "float32 must do")


# What must not matter


def _ignores_padding(run: Run) -> None:
    t = ordinary()
    width = t["mask"].shape[1]
    wide = widened(t, width, 3)
    want = {name: pad(x, (0, 3)) if x.dim() == 2 else x for name, x in on_mask(t, run(t)).items()}
    same(on_mask(wide, run(wide)), want, "three columns of padding were added on the right; count with the mask")


def _ignores_order(run: Run) -> None:
    t = ordinary()
    order = torch.randperm(len(t["mask"]), generator=torch.Generator().manual_seed(1))
    shuffled, want = rows_of(t, order), rows_of(on_mask(t, run(t)), order)
    same(on_mask(shuffled, run(shuffled)), want, "the rows were shuffled; find a row's group by group_ids")


def _ignores_off_mask(run: Run) -> None:
    t, noise = ordinary(), ordinary(seed=1)
    names = ["values", "logps", "old_logps", "ref_logps", "sampler_logps", "sum_sq_probs", "entropy"]
    off = t["mask"] == 0
    other = t | {name: torch.where(off, 1e4 * noise[name], t[name]) for name in names}
    why = "numbers off the mask changed (padding, tool tokens); fill them before an exponential, multiply by the mask last"
    same(on_mask(other, run(other)), on_mask(t, run(t)), why)


def _ignores_tool_tokens(run: Run) -> None:
    t = ordinary()
    at, noise = 2, dict.fromkeys(("values", "logps", "old_logps", "ref_logps", "sampler_logps", "entropy"), -0.7)
    wide = widened(t, at, fill={**noise, "sum_sq_probs": 0.5})
    inside = t["completion_ids"][:, at - 1 : at] > 0
    wide["completion_ids"][:, at : at + 1] = torch.where(inside, 7, 0)
    want = widened(on_mask(t, run(t)), at)
    same(on_mask(wide, run(wide)), want, "a column of tool tokens (mask 0) came between; step over it")


def _ignores_processes(plugin: Plugin, run: Run) -> None:
    t = ordinary()
    want = on_mask(t, run(t))
    with second_of_two_processes():
        same(on_mask(t, run(t)), want, "it was called as process 1 of 2")
    groups = t["group_ids"].unique()
    shares = [torch.isin(t["group_ids"], groups[rank::2]).nonzero().flatten() for rank in (0, 1)]
    if isinstance(plugin, BY_ROW):
        t = prepared(plugin, t)
        for share in shares:
            own = rows_of(t, share)
            same(_row_outputs(own, run), rows_of(_row_outputs(t, run), share), "each process computed its own rows")
        return
    order = torch.cat(shares)
    gathered, want = rows_of(t, order), rows_of(want, order)
    same(
        on_mask(gathered, run(gathered)), want, "two processes rolled out every other group, and the rows were gathered"
    )


def _row_outputs(t: Tensors, run: Run) -> Tensors:
    """What belongs to a row alone; a term's weights are of the whole step."""
    return {name: x for name, x in on_mask(t, run(t)).items() if name != "weights"}


def _rows_are_alone(plugin: Plugin, run: Run) -> None:
    t = prepared(plugin, ordinary())
    whole = _row_outputs(t, run)
    for row in range(len(t["mask"])):
        length = int(t["mask"][row].nonzero().max()) + 1
        alone = {name: x[row : row + 1, :length] if x.dim() >= 2 else x[row : row + 1] for name, x in t.items()}
        want = {name: x[row : row + 1, :length] if x.dim() >= 2 else x[row : row + 1] for name, x in whole.items()}
        same(_row_outputs(alone, run), want, "the row was computed alone; micro-batches may split anywhere")


def _groups_are_alone(run: Run) -> None:
    t = ordinary()
    whole = on_mask(t, run(t))
    for group in t["group_ids"].unique():
        own = (t["group_ids"] == group).nonzero().flatten()
        alone = rows_of(t, own)
        why = "a group was computed alone; if all rows of a rollout are meant to count, say across_groups = True in its body"
        same(on_mask(alone, run(alone)), rows_of(whole, own), why)


def _is_pure(plugin: Plugin, axis: str) -> None:
    t = ordinary()
    before, generators = copy.deepcopy(t), generators_now()
    first = {name: x.clone() for name, x in OUTPUTS[axis](plugin, t).items()}
    for name, x in before.items():
        assert torch.equal(x, t[name]), f"it changes its input {name} in place"
    same(OUTPUTS[axis](plugin, t), first, "it was called twice on the same input")
    assert equal(generators_now(), generators), "it draws from a global random generator"


def _resumes(plugin: Plugin, axis: str, told: Statistics) -> None:
    t = ordinary()
    try:
        trained, fresh = remade(plugin, told)
    except Exception as error:
        raise SkipTest(f"not asked: its state does not survive. {error}") from None
    same(on_mask(t, OUTPUTS[axis](fresh, t)), on_mask(t, OUTPUTS[axis](trained, t)), "it was loaded from a checkpoint")


def _factors(run: Run) -> None:
    t = ordinary()
    for name in ("logps", "old_logps", "sampler_logps", "entropy"):
        t[name].requires_grad_()
    for name, x in run(t).items():
        if name in ("weights", "factors"):
            assert bool((x >= 0).all()), f"{name} are negative somewhere, down to {x.min():.3g}"
            assert bool(x.sum() > 0), f"{name} are 0 everywhere"
            assert not x.requires_grad, f"{name} carry a gradient; detach them"


def _ids_are_labels(run: Run) -> None:
    t = ordinary()
    renamed = {**t, "group_ids": 100 - 7 * t["group_ids"]}
    same(run(renamed), run(t), "the groups got other ids and kept their rows")


def metric_names(plugin: Plugin) -> list[str]:
    """The names under which the metrics of a policy loss are observed."""
    if not isinstance(plugin, PolicyLoss):
        return []
    try:
        outputs = OUTPUTS["policy_loss"](plugin, ordinary())
    except Exception:
        return []
    return [f"policy/{name.removeprefix('metric ')}" for name in outputs if name.startswith("metric ")]
