"""What the axes of tensor functions promise, from advantages to filters, as functions that raise AssertionError."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from hf_rlhf.axes import (
    AdvantageEstimator,
    Aggregation,
    Filter,
    KLEstimator,
    KLPlacement,
    LossTerm,
    Plugin,
    PolicyLoss,
    RolloutCorrection,
)
from hf_rlhf.batch import Credit, Scored
from hf_rlhf.facts import Claims, equal, generators_now, same

Tensors = dict[str, Tensor]
Run = Callable[[Tensors], Tensors]


def of_a_tensor_function(plugin: Plugin, axis: str, finite_differences: bool) -> Claims:
    """Of a plugin on one of the axes in `OUTPUTS`."""

    def run(t: Tensors) -> Tensors:
        return OUTPUTS[axis](plugin, t)

    yield "shape and dtype follow its input", lambda: _keeps_shape(plugin, run)
    yield "it is 0 off the mask", lambda: _is_zero_off_the_mask(run)
    yield "it is finite on degenerate input", lambda: _is_finite(plugin, run)
    yield "padding columns change nothing", lambda: _ignores_padding(run)
    yield "the order of the rows changes nothing", lambda: _ignores_order(run)
    yield "what stands off the mask changes nothing", lambda: _ignores_off_mask(run)
    yield "a column of tool tokens changes nothing", lambda: _ignores_tool_tokens(run)
    yield "it changes neither its input nor a random generator, and repeats itself", lambda: _is_pure(run)
    if isinstance(plugin, Aggregation | RolloutCorrection | LossTerm):
        yield "its factors are not negative and carry no gradient", lambda: _factors(run)
    if isinstance(plugin, AdvantageEstimator | Filter):
        yield "group ids are only labels", lambda: _ids_are_labels(run)
    if isinstance(plugin, PolicyLoss | KLEstimator):
        yield "a row does not see its neighbours", lambda: _rows_are_alone(run)
        yield "its gradient reaches the log-probs", lambda: _has_gradient(run, finite_differences)
    if isinstance(plugin, PolicyLoss):
        yield "a positive advantage raises the log-prob", lambda: _climbs(run)
    if isinstance(plugin, KLEstimator):
        yield "equal log-probs give 0", lambda: _zero_at_equality(run)
    if isinstance(plugin, RolloutCorrection):
        yield "equal log-probs give 1", lambda: _one_at_equality(run)
    if isinstance(plugin, KLPlacement):
        yield "it defines the penalty of each of its places", lambda: _defines_places(plugin)


# What the tensor axes get, and what comes out


def draw_tensors(
    *,
    group_sizes: Sequence[int] = (4, 3, 1, 2),
    length: int = 8,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Tensors:
    """Every tensor that a plugin may see, rows first. Off the mask stand numbers that must not matter."""
    generator = torch.Generator().manual_seed(seed)
    rows = sum(group_sizes)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    lengths = (1 + draw(rows) * length).long().clamp(max=length)
    lengths[0] = length
    place = torch.arange(length)
    sampled = (place < lengths[:, None]) & (draw(rows, length) > 0.25)
    sampled[0, length // 2] = False
    mask = (sampled | (place == lengths[:, None] - 1)).to(torch.float64)
    last = (place == lengths[:, None] - 1).double()
    score = (draw(rows) * 4).round() / 4
    logps = -0.5 - 2 * draw(rows, length)
    tensors = {
        "mask": mask,
        "token_rewards": (score[:, None] * last + 0.1 * draw(rows, length)) * mask,
        "group_ids": torch.repeat_interleave(torch.arange(len(group_sizes)) * 3 + 5, torch.tensor(group_sizes)),
        "values": 2 * draw(rows, length) - 1,
        "score": score,
        "logps": logps,
        "old_logps": logps + 0.4 * draw(rows, length) - 0.2,
        "ref_logps": logps + 0.8 * draw(rows, length) - 0.4,
        "sampler_logps": logps + 0.2 * draw(rows, length) - 0.1,
        "entropy": draw(rows, length),
        "advantages": (2 * draw(rows, length) - 1) * mask,
        "finished": draw(rows) > 0.3,
    }
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in tensors.items()}


def as_scored(t: Tensors) -> Scored:
    names = ("mask", "token_rewards", "group_ids", "values", "old_logps", "ref_logps", "sampler_logps", "finished")
    return Scored(**{name: t[name] for name in names}, scores={"reward": t["score"]}, weights={"reward": 1.0})


def _needed(plugin: Plugin, t: Tensors, *positional: str) -> Tensors:
    return {name: t[name] for name in sorted(plugin.needs - set(positional)) if name in t}


def _advantages(plugin: Any, t: Tensors) -> Tensors:
    out = plugin(as_scored(t))
    if "values" in plugin.needs:
        assert isinstance(out, Credit), (
            f"it needs values and gave a {type(out).__name__}; Credit is due, for the critic"
        )
        return {"advantages": out.advantages, "returns": out.returns}
    assert not isinstance(out, Credit), "it gave a Credit without needing values; a tensor (N, T) is due"
    return {"advantages": out}


def _policy_loss(plugin: Any, t: Tensors) -> Tensors:
    out = plugin(t["logps"], t["old_logps"], t["advantages"], t["mask"], **_needed(plugin, t, "old_logps"))
    is_pair = isinstance(out, tuple) and len(out) == 2
    assert is_pair, "a policy loss gives a pair: the loss (B, T) and a dict of metrics"
    return {"loss": out[0], **{f"metric {name}": x for name, x in out[1].items()}}


def _kl_estimator(plugin: Any, t: Tensors) -> Tensors:
    return {"kl": plugin(t["logps"], t["ref_logps"], **_needed(plugin, t, "ref_logps"))}


def _kl(plugin: Any, t: Tensors) -> Tensors:
    kl = plugin.measure(t["logps"], t["ref_logps"], t["mask"], **_needed(plugin.estimator, t, "ref_logps"))
    return {"kl": kl, **{f"{p}_penalty": getattr(plugin, f"{p}_penalty")(kl) for p in sorted(plugin.places & PLACES)}}


def _loss_term(plugin: Any, t: Tensors) -> Tensors:
    return {"loss": plugin(t["logps"], t["mask"], **_needed(plugin, t)), "weights": plugin.weights(t["mask"])}


PLACES = frozenset({"reward", "loss", "advantage"})

OUTPUTS: dict[str, Callable[[Any, Tensors], Tensors]] = {
    "advantages": _advantages,
    "kl": _kl,
    "kl_estimator": _kl_estimator,
    "policy_loss": _policy_loss,
    "rollout_correction": lambda p, t: {"factors": p(t["old_logps"], t["sampler_logps"], t["mask"])},
    "aggregation": lambda p, t: {"weights": p(t["mask"])},
    "loss_terms": _loss_term,
    "filters": lambda p, t: {"keep": p(as_scored(t))},
}


def _on_mask(t: Tensors, outputs: Tensors) -> Tensors:
    """Outputs times the mask, as the core takes them: an infinity off the mask becomes NaN and shows."""
    return {name: x * t["mask"] if x.dim() == 2 else x for name, x in outputs.items()}


def _keeps_shape(plugin: Plugin, run: Run) -> None:
    for dtype in (torch.float64, torch.float32):
        t = draw_tensors(dtype=dtype)
        for name, x in run(t).items():
            assert isinstance(x, Tensor), f"{name} is a {type(x).__name__}; a tensor is due"
            per_row = name == "keep" or getattr(plugin, "level", "token") == "sequence"
            due = t["mask"].shape[:1] if per_row else t["mask"].shape
            assert x.shape == due, f"{name} has the shape {tuple(x.shape)}; {tuple(due)} is due"
            kind = torch.bool if name == "keep" else dtype
            assert x.dtype == kind or name.startswith("metric"), f"{name} is {x.dtype} for {dtype} input; {kind} is due"


def _is_zero_off_the_mask(run: Run) -> None:
    t = draw_tensors()
    for name, x in run(t).items():
        if name in ("advantages", "weights"):
            off = x[t["mask"] == 0]
            assert bool((off == 0).all()), (
                f"{name} is not 0 off the mask (up to {off.abs().max():.3g}); multiply by it last"
            )


def _degenerate(plugin: Plugin) -> Iterator[tuple[str, Tensors]]:
    t = draw_tensors()
    rewards = t["token_rewards"]
    last = t["mask"] * (t["mask"].flip(1).cumsum(1).flip(1) == 1)
    yield "no reward at all", {**t, "token_rewards": rewards * 0, "score": t["score"] * 0}
    yield "equal rewards", {**t, "token_rewards": 0.2 * last, "score": t["score"] * 0 + 0.2}
    yield "equal log-probs", {**t, **dict.fromkeys(("old_logps", "ref_logps", "sampler_logps"), t["logps"])}
    yield "no advantage", {**t, "advantages": rewards * 0}
    yield "completions of one token", {k: x[:, :1] * t["mask"][:, :1] if x.dim() == 2 else x for k, x in t.items()}
    yield "one row per group", {**t, "group_ids": torch.arange(len(rewards))}
    yield "a single row", {name: x[:1] for name, x in t.items()}
    empty = t["mask"].clone()
    empty[1] = 0
    yield "a row without sampled tokens", {**t, "mask": empty, "token_rewards": rewards * empty}


def _is_finite(plugin: Plugin, run: Run) -> None:
    for case, t in _degenerate(plugin):
        for name, x in _on_mask(t, run(t)).items():
            assert bool(x.isfinite().all()), f"{name} is not finite for {case}"


def _ignores_padding(run: Run) -> None:
    t = draw_tensors()
    wide = {name: pad(x, (0, 3)) if x.dim() == 2 else x for name, x in t.items()}
    want = {name: pad(x, (0, 3)) if x.dim() == 2 else x for name, x in _on_mask(t, run(t)).items()}
    same(_on_mask(wide, run(wide)), want, "three columns of padding were added on the right; count with the mask")


def _ignores_order(run: Run) -> None:
    t = draw_tensors()
    order = torch.randperm(len(t["mask"]), generator=torch.Generator().manual_seed(1))
    shuffled = {name: x[order] for name, x in t.items()}
    want = {name: x[order] for name, x in _on_mask(t, run(t)).items()}
    same(_on_mask(shuffled, run(shuffled)), want, "the rows were shuffled; find a row's group by group_ids")


def _ignores_off_mask(run: Run) -> None:
    t = draw_tensors()
    noise = draw_tensors(seed=1)
    other = dict(t)
    for name in ("values", "logps", "old_logps", "ref_logps", "sampler_logps", "entropy"):
        other[name] = torch.where(t["mask"] > 0, t[name], 10 * noise[name])
    same(_on_mask(other, run(other)), _on_mask(t, run(t)), "numbers off the mask changed (padding, tool tokens)")


def _ignores_tool_tokens(run: Run) -> None:
    t = draw_tensors()
    at, mask = 2, draw_tensors()["mask"]

    def insert(x: Tensor, value: float) -> Tensor:
        return torch.cat([x[:, :at], torch.full_like(x[:, :1], value), x[:, at:]], 1) if x.dim() == 2 else x

    fill = {"mask": 0.0, "token_rewards": 0.0, "advantages": 0.0}
    wide = {name: insert(x, fill.get(name, -0.7)) if x.dim() == 2 else x for name, x in t.items()}
    want = {name: insert(x, 0.0) for name, x in _on_mask(t, run(t)).items()}
    assert wide["mask"].shape[1] == mask.shape[1] + 1
    same(_on_mask(wide, run(wide)), want, "a column of tool tokens (mask 0) came between; step over it")


def _is_pure(run: Run) -> None:
    t = draw_tensors()
    before, generators = copy.deepcopy(t), generators_now()
    first = {name: x.clone() for name, x in run(t).items()}
    for name, x in before.items():
        assert torch.equal(x, t[name]), f"it changes its input {name} in place"
    same(run(t), first, "it was called twice on the same input")
    assert equal(generators_now(), generators), "it draws from a global random generator"


def _factors(run: Run) -> None:
    t = draw_tensors()
    t["logps"].requires_grad_()
    for name, x in run(t).items():
        if name in ("weights", "factors"):
            assert bool((x >= 0).all()), f"{name} are negative somewhere, down to {x.min():.3g}"
            assert bool(x.sum() > 0), f"{name} are 0 everywhere"
            assert not x.requires_grad, f"{name} carry a gradient; detach them"


def _ids_are_labels(run: Run) -> None:
    t = draw_tensors()
    renamed = {**t, "group_ids": 100 - 7 * t["group_ids"]}
    same(run(renamed), run(t), "the groups got other ids and kept their rows")


def _rows_are_alone(run: Run) -> None:
    t = draw_tensors()
    whole = _on_mask(t, run(t))
    for row in range(len(t["mask"])):
        alone = {name: x[row : row + 1] for name, x in t.items()}
        want = {name: x[row : row + 1] for name, x in whole.items()}
        same(_on_mask(alone, run(alone)), want, "the row was computed alone; micro-batches may split anywhere")


def _has_gradient(run: Run, finite_differences: bool) -> None:
    t = draw_tensors(group_sizes=(2, 2), length=5)
    logps = t["logps"].requires_grad_()

    def total(x: Tensor) -> Tensor:
        outputs = run({**t, "logps": x})
        return (outputs["loss" if "loss" in outputs else "kl"] * t["mask"]).sum(1)

    out = total(logps).sum()
    assert out.requires_grad, "no gradient reaches logps: something detaches them, or leaves torch"
    (gradient,) = torch.autograd.grad(out, logps)
    assert bool(gradient.isfinite().all()), "its gradient in logps is not finite"
    assert bool((gradient != 0).any()), "its gradient in logps is 0 everywhere"
    if finite_differences:
        right = torch.autograd.gradcheck(total, (logps,), eps=1e-6, atol=1e-5, raise_exception=False)
        assert right, (
            "its gradient is not that of its value (finite differences); if meant so: finite_differences=False"
        )


def _climbs(run: Run) -> None:
    t = draw_tensors()
    logps = t["logps"].requires_grad_()
    sign = t["advantages"].sum(1, keepdim=True).sign()
    on_policy = {**t, "old_logps": logps.detach(), "advantages": sign * t["mask"]}
    (gradient,) = torch.autograd.grad((run(on_policy)["loss"] * t["mask"]).sum(), logps)
    climbs = bool(((gradient * sign).sum(1) <= 0).all() and (gradient != 0).any())
    assert climbs, "descending this loss lowers the log-probs of rows with a positive advantage: is a sign missing?"


def _zero_at_equality(run: Run) -> None:
    t = draw_tensors()
    kl = run({**t, "logps": t["ref_logps"], "old_logps": t["ref_logps"]})["kl"]
    assert bool((kl.abs() < 1e-12).all()), f"policy and reference agree and its KL is up to {kl.abs().max():.3g}"


def _one_at_equality(run: Run) -> None:
    t = draw_tensors()
    factors = run({**t, "sampler_logps": t["old_logps"]})["factors"]
    on = factors[t["mask"] > 0]
    assert bool(((on - 1).abs() < 1e-12).all()), "sampler and trainer agree and its factors are not 1"


def _defines_places(plugin: KLPlacement) -> None:
    unknown = plugin.places - PLACES
    assert not unknown, f"places {sorted(unknown)} do not exist; there are: {', '.join(sorted(PLACES))}"
    for place in plugin.places:
        for kl in (torch.rand(3, 4, dtype=torch.float64), torch.rand(3, dtype=torch.float64)):
            penalty = getattr(plugin, f"{place}_penalty")(kl)
            assert penalty.shape == kl.shape, f"{place}_penalty turns {tuple(kl.shape)} into {tuple(penalty.shape)}"
