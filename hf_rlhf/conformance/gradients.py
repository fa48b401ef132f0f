"""Checks of signs and gradients of losses, KL estimators and KL placements."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import SkipTest

import torch
from torch import Tensor

from hf_rlhf.axes import KLEstimator, KLPlacement, LossTerm, Plugin, PolicyLoss, RolloutCorrection
from hf_rlhf.conformance.common import LATER_ROLLOUT, has_memory, restored_pair
from hf_rlhf.conformance.tensor_inputs import (
    OUTPUTS,
    PLACES,
    Run,
    Tensors,
    draw_tensors,
    ordinary_tensors,
    rows_of,
    with_selected,
)


def gradient_checks(plugin: Plugin, axis: str, run: Run, finite_differences: bool | None) -> Iterator[tuple[Any, ...]]:
    """Yield title, check and its arguments. `finite_differences`: None asks the plugin's `stops_gradient`."""
    if isinstance(plugin, PolicyLoss | KLEstimator | LossTerm):
        if finite_differences is None:
            finite_differences = not getattr(plugin, "stops_gradient", False)
        yield "its gradient reaches its inputs", _has_gradient, plugin, axis
        if finite_differences:
            yield "its gradient equals finite differences", _is_its_own_gradient, plugin, run
    if isinstance(plugin, PolicyLoss):
        yield "a positive advantage raises the log-prob", _climbs, run
        yield "a clip stops both directions, and only away from the old policy", _clips_both_ways, run
        if plugin.zero_without_advantage:
            yield "a row without advantages has no gradient", _silent_without_advantage, run
        if plugin.token_level:
            yield "each token's loss depends on its own numbers alone", _by_token, plugin, run
    if isinstance(plugin, KLEstimator):
        yield "equal log-probs give 0", _zero_at_equality, run
        yield "its mean under the policy is non-negative", _positive_mean, plugin
        yield "each number depends on its own log-probs alone", _elementwise, plugin, run
    if isinstance(plugin, RolloutCorrection):
        yield "equal log-probs give 1", _one_at_equality, run
    if isinstance(plugin, KLPlacement):
        yield "it defines a penalty for each of its places", _defines_places, plugin
        yield "more KL is a larger penalty", _penalises, plugin
        if "loss" in plugin.places:
            yield "the KL in the loss has a gradient", _has_gradient, plugin, axis


def _inputs(plugin: Plugin) -> list[str]:
    """Return the names of the tensors that carry a gradient to the policy."""
    estimator = getattr(plugin, "estimator", plugin)
    if "full_distribution" in estimator.needs:
        return ["log_probs"]
    if "router_logits" in plugin.needs:
        return ["router_logits"]
    return ["logps", "entropy"] if "entropy" in plugin.needs | estimator.needs else ["logps"]


def _total(t: Tensors, outputs: Tensors) -> Tensor:
    """Return what is minimized before aggregation: (n,), summed over each row's mask."""
    x = next(outputs[name] for name in ("loss", "loss_penalty", "kl") if name in outputs)
    return (x * t["mask"]).sum(1) if x.dim() == 2 else x


def _has_gradient(plugin: Plugin, axis: str) -> None:
    said, found, idle = " and ".join(_inputs(plugin)), [], isinstance(plugin, LossTerm)
    for each in _in_every_state(plugin):
        out, gradients = _gradients(each, axis, ordinary_tensors())
        idle &= not bool(out.any())
        assert out.requires_grad, f"no gradient reaches {said}. Something detaches them, or leaves torch"
        assert all(bool(g.isfinite().all()) for g in gradients), f"its gradient in {said} is not finite"
        found += [bool((g != 0).any()) for g in gradients]
        if not isinstance(plugin, KLEstimator):  # it sees no mask: what is off it was filled before
            _, gradients = _gradients(each, axis, _far_off_mask(ordinary_tensors(), _inputs(plugin)))
            finite = all(bool(g.isfinite().all()) for g in gradients)
            assert finite, "its gradient is not finite for large values off the mask. Fill them before an exponential"
    if idle:
        raise SkipTest("skipped: with these settings it is 0")
    assert any(found), f"its gradient in {said} is 0 everywhere"


def _in_every_state(plugin: Plugin) -> Iterator[Plugin]:
    """Yield the plugin, and if it keeps state also copies after small and after large statistics: it may start at 0."""
    yield plugin
    if has_memory(plugin):
        for factor in (1e-3, 1e3):
            yield restored_pair(plugin, [{name: factor * x for name, x in LATER_ROLLOUT.items()}])[0]


def _gradients(plugin: Plugin, axis: str, t: Tensors) -> tuple[Tensor, list[Tensor]]:
    """Return what is minimized, and its gradients."""
    inputs = [t[name].requires_grad_() for name in _inputs(plugin)]
    out = _total(t, OUTPUTS[axis](plugin, t)).sum()
    if not out.requires_grad:
        return out, []
    return out, [g for g in torch.autograd.grad(out, inputs, allow_unused=True) if g is not None]


def _far_off_mask(t: Tensors, names: list[str]) -> Tensors:
    off = t["mask"] == 0
    return t | {name: torch.where(off, 1e3, t[name]) for name in names if t[name].dim() == 2}


def _is_its_own_gradient(plugin: Plugin, run: Run) -> None:
    t, names = draw_tensors(group_sizes=(2, 2), length=5), _inputs(plugin)
    inputs = tuple(t[name].requires_grad_() for name in names)

    def total(*changed: Tensor) -> Tensor:
        given = {**t, **dict(zip(names, changed, strict=True))}
        return _total(t, run(given))

    if not total(*inputs).requires_grad:
        raise SkipTest("skipped: it has no gradient")
    right = torch.autograd.gradcheck(total, inputs, eps=1e-6, atol=1e-5, raise_exception=False)
    assert right, "its gradient differs from finite differences. If that is intended, set stops_gradient = True"


def _climbs(run: Run) -> None:
    t = ordinary_tensors()
    logps = t["logps"].requires_grad_()
    sign = t["advantages"].sum(1, keepdim=True).sign()
    on_policy = {**t, "old_logps": logps.detach(), "advantages": sign * (0.5 + t["advantages"].abs()) * t["mask"]}
    loss = _total(t, run(on_policy)).sum()
    if not loss.requires_grad:
        raise SkipTest("skipped: it has no gradient")
    (gradient,) = torch.autograd.grad(loss, logps)
    climbs = bool(((gradient * sign).sum(1) <= 0).all() and (gradient != 0).any())
    assert climbs, "descending this loss lowers the log-probs of rows with a positive advantage. Check the sign"


def _clips_both_ways(run: Run) -> None:
    """Check where the gradient is 0, in rows of a token whose probability rises from 0.05 to 0.9 or falls from 0.9 to 0.05."""

    def stops(sign: float, old: float, new: float) -> bool:
        t = ordinary_tensors()
        t["mask"] = t["mask"] * (t["mask"].cumsum(1) == 1)
        logps = torch.full_like(t["logps"], new).requires_grad_()
        moved = {
            **t,
            "logps": logps,
            "old_logps": torch.full_like(logps, old),
            "advantages": sign * (0.5 + t["advantages"].abs()) * t["mask"],
        }
        loss = _total(t, run(moved)).sum()
        if not loss.requires_grad:
            raise SkipTest("skipped: it has no gradient")
        return not bool(torch.autograd.grad(loss, logps)[0].any())

    low, high = -3.0, -0.1
    risen, fallen = stops(1.0, low, high), stops(-1.0, high, low)
    said = "a positive advantage whose probability rose", "a negative advantage whose probability fell"
    stopped, free = said if risen else said[::-1]
    assert risen == fallen, f"it stops the gradient of tokens with {stopped}, and not of those with {free}. Clip both"
    assert not stops(1.0, high, low), (
        "tokens with a positive advantage whose probability fell have no gradient, so nothing brings them back. Take the "
        "larger of the clipped and the unclipped loss"
    )


def _silent_without_advantage(run: Run) -> None:
    t = ordinary_tensors()
    logps = t["logps"].requires_grad_()
    t["advantages"][::2] = 0
    loss = run(t)["loss"]
    if not loss.requires_grad:
        raise SkipTest("skipped: it has no gradient")
    (gradient,) = torch.autograd.grad((loss * t["mask"]).sum(), logps)
    assert bool((gradient[::2] == 0).all()), (
        "rows whose advantages are all 0 have a gradient, and zero_without_advantage = True skips them. Remove it"
    )


def _by_token(plugin: Any, run: Run) -> None:
    t = with_selected(plugin, ordinary_tensors())
    names = ["logps", "old_logps", "advantages", "mask", *sorted(plugin.needs - {"old_logps"})]
    try:
        tokens = {name: t[name][t["mask"] > 0].unsqueeze(0) for name in names}
        positional = [tokens.pop(name) for name in names[:4]]
        alone = plugin(*positional, **tokens)[0].squeeze(0)
    except (IndexError, RuntimeError) as error:
        raise AssertionError(
            f"it fails on a row of unrelated tokens, which token_level = True allows: {error}"
        ) from error
    apart = not torch.allclose(alone, run(t)["loss"][t["mask"] > 0], rtol=1e-9, atol=1e-12)
    assert not apart, "a token's loss depends on other tokens. Remove token_level = True"


def _zero_at_equality(run: Run) -> None:
    t = ordinary_tensors()
    equal = dict.fromkeys(("logps", "old_logps"), t["ref_logps"])
    kl = run({**t, **equal, "log_probs": t["ref_log_probs"]})["kl"]
    assert bool((kl.abs() < 1e-12).all()), f"policy and reference agree, and its KL is up to {kl.abs().max():.3g}"


def _positive_mean(plugin: Any) -> None:
    """Check the mean over a whole vocabulary, for a few policies and references."""
    t = ordinary_tensors()
    own, ref = t["log_probs"].flatten(0, 1), t["ref_log_probs"].flatten(0, 1)
    if "full_distribution" in plugin.needs:
        mean = plugin(own, ref)
    else:
        flat = {name: x.flatten() for name, x in (("logps", own), ("ref_logps", ref), ("old_logps", own))}
        flat["entropy"] = -(own.exp() * own).sum(-1, keepdim=True).expand_as(own).flatten()
        extras = {name: flat[name] for name in sorted(plugin.needs - {"ref_logps"}) if name in flat}
        mean = (own.exp() * plugin(flat["logps"], flat["ref_logps"], **extras).view_as(own)).sum(-1)
    assert bool((mean > -1e-12).all()), (
        f"a KL must be non-negative, got a mean of {mean.min():.3g} under a policy. It is called with "
        "(logps, ref_logps), and log p - log p_ref has a positive mean"
    )


def _elementwise(plugin: Any, run: Run) -> None:
    t = ordinary_tensors()
    if "full_distribution" in plugin.needs:
        parts = [plugin(t["log_probs"][i], t["ref_log_probs"][i]) for i in range(len(t["mask"]))]
        alone = torch.stack(parts)
    else:
        extras = {name: t[name].flatten() for name in sorted(plugin.needs - {"ref_logps"}) if name in t}
        try:
            alone = plugin(t["logps"].flatten(), t["ref_logps"].flatten(), **extras).view(t["mask"].shape)
        except (IndexError, RuntimeError) as error:
            raise AssertionError(f"it fails on shape (R,), which it gets at level sequence: {error}") from error
    apart = not torch.allclose(alone, run(t)["kl"], rtol=1e-9, atol=1e-12)
    assert not apart, "a token's KL depends on other tokens. The core sums over a row (level sequence)"


def _one_at_equality(run: Run) -> None:
    t = ordinary_tensors()
    factors = run({**t, "sampler_logps": t["old_logps"]})["factors"]
    on = factors[t["mask"] > 0]
    assert bool(((on - 1).abs() < 1e-12).all()), "sampler and trainer agree, and its factors are not 1"


def _defines_places(plugin: KLPlacement) -> None:
    unknown = plugin.places - PLACES
    assert not unknown, f"unknown places {sorted(unknown)}. Choose from {', '.join(sorted(PLACES))}"
    for place in plugin.places:
        for kl in (torch.ones(3, 4, dtype=torch.float64), torch.ones(3, dtype=torch.float64)):
            penalty = getattr(plugin, f"{place}_penalty")(kl)
            assert penalty.shape == kl.shape, f"{place}_penalty turns {tuple(kl.shape)} into {tuple(penalty.shape)}"


def _penalises(plugin: KLPlacement) -> None:
    kl = rows_of(ordinary_tensors(), slice(0, 3))["entropy"]
    for place in sorted(plugin.places & PLACES):
        penalty = getattr(plugin, f"{place}_penalty")
        low, high = penalty(kl), penalty(2 * kl)
        assert bool((high >= low).all() and (high >= 0).all()), (
            f"{place}_penalty falls as the KL grows. It is subtracted from rewards and advantages, and added to the loss"
        )
