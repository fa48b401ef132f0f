"""Check what plugins return: shape, dtype, device, finite numbers and gradient, as each axis declares it.

A result is checked once per run and shape, its numbers for the first `SHAPES` shapes. A result that costs an optimizer step
alone (`skips`) is warned of and kept for the error that ends the run when several steps in a row are lost.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from hf_rlhf.batch import Credit
from hf_rlhf.contract.axis import Output
from hf_rlhf.contract.base import nested_of
from hf_rlhf.runtime.errors import UserError

if TYPE_CHECKING:
    from hf_rlhf.contract.base import Plugin

SHAPES = 16
"""Results of a plugin in a run, of different shapes, whose numbers are read: reading waits for the device."""
logger = logging.getLogger(__name__)

SEEN, NOTED = "_shapes_checked", "_not_finite"
"""Attributes of a plugin: shapes whose numbers were read, and the message about those that were not finite."""


class PluginOutputError(UserError, ValueError):
    """A plugin returned something other than its axis declares."""


def check_output(
    axis: str,
    plugin: Plugin,
    value: Any,
    like: Any,
    *,
    method: str = "__call__",
    inputs: Mapping[str, Any] | None = None,
) -> Any:
    """Return `value`, which `plugin` of `axis` returned from `method`, if it is what the axis declares.

    `like` is the tensor whose sizes, dtype and device its shapes refer to. The plugin is not blamed for numbers that are not
    finite if its `inputs` are not either. Raises `PluginOutputError` naming the plugin, what it must return and what it gave.
    """
    first = value[0] if isinstance(value, tuple) and value else value
    sizes = tuple(getattr(like, "shape", ()))
    look = tuple(getattr(first, name, None) for name in ("shape", "dtype", "device", "requires_grad"))
    seen = plugin.__dict__.setdefault(SEEN, set())
    output = plugin.axis.outputs[method]
    due = output.gradient and _has_gradient(inputs or {})  # no rollout has one, and the same shapes
    if (key := (method, sizes, look, due)) in seen:
        return value
    title = f"{axis}={plugin.name}" + ("" if method == "__call__" else f": {method}")
    parts = output.parts(value)
    if parts is None:
        raise PluginOutputError(f"{title} must return {output.text}, got {_given(value)}")
    known = [x for x in (inputs or {}).values() if hasattr(x, "isfinite")]
    for problem in _form(output, *parts, like, due):
        raise PluginOutputError(f"{title} must return {output.text}: {problem}")
    if output.kind != "number":
        seen.add(key)
    if len(seen) <= SHAPES:
        problem = _not_finite(parts[0])
        if problem and all(bool(x.detach().isfinite().all()) for x in known):
            message = f"{title} must return {output.text}: {problem}"
            if not output.skips:
                raise PluginOutputError(". ".join(filter(None, [message, noted(nested_of(plugin))])))
            plugin.__dict__[NOTED] = message
            logger.warning("%s", message)
    return value


def noted(plugins: Iterable[Plugin], read_again: bool = False) -> str:
    """Return, and forget, what was noted of results that are not finite. With `read_again` the next results are read as well."""
    messages = []
    for plugin in plugins:
        messages.append(plugin.__dict__.pop(NOTED, ""))
        if read_again:
            plugin.__dict__.pop(SEEN, None)
    return ". ".join(filter(None, messages))


def _has_gradient(inputs: Mapping[str, Any]) -> bool:
    import torch

    return torch.is_grad_enabled() and any(getattr(x, "requires_grad", False) for x in inputs.values())


def _form(output: Output, main: dict[str, Any], metrics: dict[str, Any], like: Any, due: bool) -> Iterator[str]:
    for name, x in main.items():
        yield from _kind(name or "it", x, output.kind, output.shapes, like)
    name = next(iter(main), "")
    if due and not main[name].requires_grad:
        yield f"{name or 'it'} must have a gradient, got a tensor without one. Remove detach(), item() and torch.no_grad()"
    for name, x in metrics.items():
        if not (isinstance(x, int | float) and "number" in output.metric_shapes):
            shapes = tuple(shape for shape in output.metric_shapes if shape != "number")
            yield from _kind(f"the metric {name!r}", x, "any", shapes, like)


def _kind(name: str, x: Any, kind: str, shapes: tuple[str, ...], like: Any) -> Iterator[str]:
    """Yield why `x` is not of this kind: a tensor of one of these shapes, or another object."""
    import torch

    others: dict[str, Any] = {"module": torch.nn.Module, "optimizer": torch.optim.Optimizer, "number": int | float}
    if kind in others:
        if not isinstance(x, others[kind]) or isinstance(x, bool):
            yield f"got {_given(x)}"
        elif kind == "number" and not (math.isfinite(x) and x >= 0):
            yield f"got {x}"
        return
    if not isinstance(x, torch.Tensor):
        yield f"{name} must be a tensor, got {_given(x)}"
    elif tuple(x.shape) not in (due := {shape: _sizes(shape, like.shape) for shape in shapes}).values():
        yield f"{name} must have shape {' or '.join(f'{a} = {b}' for a, b in due.items())}, got {tuple(x.shape)}"
    elif kind == "bool" and x.dtype != torch.bool:
        yield f"{name} must be bool, got {_named(x.dtype)}. Compare, as in scores > 0"
    elif kind == "float" and x.dtype not in (torch.float32, torch.float64):
        yield f"{name} must be float32 or float64, got {_named(x.dtype)}. Convert it by .to({_named(like.dtype)})"
    elif kind == "floating" and not x.is_floating_point():
        yield f"{name} must be of a floating-point dtype, got {_named(x.dtype)}"
    elif x.device != like.device:
        yield f"{name} must be on {like.device}, got {x.device}. Make tensors on the device of the input"


def _sizes(shape: str, like: Any) -> tuple[int, ...]:
    """Return the sizes that a shape such as (N, T) stands for: T is the last size of `like`, other letters are its first."""
    if shape == "(...)":
        return tuple(like)
    letters = shape.strip("()").replace(",", " ").split()
    return tuple(1 if letter == "1" else like[-1] if letter == "T" else like[0] for letter in letters)


def _not_finite(main: dict[str, Any]) -> str:
    """Return where the first number is that is not finite, or nothing."""
    for name, x in main.items():
        if hasattr(x, "isfinite") and not x.is_meta and not bool((finite := x.detach().isfinite()).all()):
            place = (~finite).nonzero()[0].tolist()
            number = x[tuple(place)].item()
            where = ", ".join(f"{what} {i}" for what, i in zip(("row", "token"), place, strict=False))
            return f"{name or 'it'} must be finite, also off the mask, got {number} in {where}"
    return ""


def _given(value: Any) -> str:
    if value is None:
        return "None"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, tuple):
        return f"a tuple of {', '.join(type(x).__name__ for x in value) or 'nothing'}"
    return f"a {type(value).__name__}"


def _named(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


# What the axes declare


def _credit(value: Any) -> Any:
    credit = Credit.of(value)
    critic = {"returns": credit.returns, "value_mask": credit.value_mask}
    return {"advantages": credit.advantages, **{k: x for k, x in critic.items() if x is not None}}, credit.metrics


def _pair(value: Any) -> Any:
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], Mapping):
        return {"the loss": value[0]}, dict(value[1])
    return None


def _or_nothing(value: Any) -> Any:
    return ({}, {}) if value is None else ({"": value}, {})


ADVANTAGES = {
    "__call__": Output(
        text="advantages (N, T) or Credit", parts=_credit, metric_shapes=("number", "()", "(N)", "(N, T)")
    )
}
BASELINE = {"__call__": Output(text="a tensor (N, 1) or (N, T)", shapes=("(N, 1)", "(N, T)"))}
BETA = {"__call__": Output(text="beta, a finite number of at least 0", kind="number")}
CORRECTION = {"__call__": Output(text="factors (N, T)")}
CRITIC = {
    "build": Output(text="a torch.nn.Module", kind="module"),
    "forward": Output(text="values (n,) from its module", shapes=("(n)",), kind="floating", gradient=True),
}
ESTIMATOR = {"__call__": Output(text="a tensor of the shape of logps", shapes=("(...)",), gradient=True, skips=True)}
KEEP = {"__call__": Output(text="a tensor (N,) of bool", shapes=("(N)",), kind="bool")}
LOSS_TERM = {
    "__call__": Output(text="a tensor (B, T)", shapes=("(B, T)",), gradient=True, skips=True),
    "weights": Output(text="a tensor (N_u, T)", shapes=("(N_u, T)",)),
}
OPTIMIZER = {"build": Output(text="a torch.optim.Optimizer or None", kind="optimizer", parts=_or_nothing)}
PENALTY = {
    "reward_penalty": Output(text="a tensor of the shape of its input", shapes=("(...)",)),
    "loss_penalty": Output(text="a tensor of the shape of its input", shapes=("(...)",), gradient=True, skips=True),
    "advantage_penalty": Output(text="a tensor of the shape of its input", shapes=("(...)",)),
}
POLICY_LOSS = {
    "__call__": Output(
        text="a pair: the loss (B, T) and a dict of metrics (B, T)",
        parts=_pair,
        shapes=("(B, T)",),
        metric_shapes=("(B, T)",),
        gradient=True,
        skips=True,
    ),
    "select": Output(text="a tensor (N, T)"),
}
REFERENCE = {
    "build": Output(text="a torch.nn.Module or None", kind="module", parts=_or_nothing),
    "logps": Output(text="a model with log-probs (B, T)", shapes=("(B, T)",)),
}
WEIGHTS = {"__call__": Output(text="weights (N_u, T)", shapes=("(N_u, T)",))}
