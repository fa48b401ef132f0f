"""Random inputs with every tensor that a plugin may get, and one call per axis.

`hf_rlhf.conformance.invariances` and `hf_rlhf.conformance.gradients` check facts about them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_rlhf.axes import LossTerm, Plugin
from hf_rlhf.batch import Credit, Scored
from hf_rlhf.conformance.common import with_nested

Tensors = dict[str, Tensor]
Run = Callable[[Tensors], Tensors]

ALWAYS = ("mask", "token_rewards", "group_ids", "episode_ids", "agents", "kl_penalties", "finished")
"""Fields of `Scored` that are always set."""
FIELDS = (
    "values",
    "old_logps",
    "ref_logps",
    "sampler_logps",
    "old_entropy",
    "sum_sq_probs",
    "greedy",
    "completion_ids",
    "turns",
    "states",
    "advantages",
)
"""Fields of `Scored` that are set for plugins that need them, besides the scores."""
SOURCES = {"score": ("reward", 1.0), "style": ("style", 0.5)}
"""Tensor -> its reward source and weight."""
PLACES = frozenset({"reward", "loss", "advantage"})
VOCABULARY = 5
ROUTERS = (2, 3)
"""Layers and experts."""


def draw_tensors(
    *,
    group_sizes: Sequence[int] = (4, 3, 1, 2),
    length: int = 8,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Tensors:
    """Draw every tensor that a plugin may get, rows first. Values off the mask are noise that must not matter.

    Of two reward sources `reward` and `style` the weighted sum is `total_score`; less `kl_penalties`, which are negative
    here, it makes up `token_rewards`, so returns are not negative. `log_probs` are of a whole vocabulary, (N, T, V).
    """
    generator, rows = torch.Generator().manual_seed(seed), sum(group_sizes)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    lengths = (1 + draw(rows) * length).long().clamp(max=length)
    lengths[0] = length
    place = torch.arange(length)
    sampled = (place < lengths[:, None]) & (draw(rows, length) > 0.25)
    sampled[0, length // 2] = False
    mask = (sampled | (place == lengths[:, None] - 1)).to(torch.float64)
    last = (place == lengths[:, None] - 1).double()
    groups = torch.repeat_interleave(torch.arange(len(group_sizes)), torch.tensor(group_sizes))
    score, style = (draw(rows) * 4).round() / 4, draw(rows)
    total = score + SOURCES["style"][1] * style
    penalties = -0.1 * draw(rows, length) * mask
    logps = -0.5 - 2 * draw(rows, length)
    old_logps = logps + 0.4 * draw(rows, length) - 0.2
    most = old_logps.exp() ** 2
    tensors = {
        "mask": mask,
        "token_rewards": total[:, None] * last - penalties,
        "kl_penalties": penalties,
        "group_ids": groups * 3 + 5,
        "episode_ids": torch.arange(rows),
        "agents": torch.zeros(rows, dtype=torch.long),
        "values": 2 * draw(rows, length) - 1,
        "score": score,
        "style": style,
        "total_score": total,
        "greedy": 2 * draw(len(group_sizes))[groups],
        "logps": logps,
        "old_logps": old_logps,
        "ref_logps": logps + 0.8 * draw(rows, length) - 0.4,
        "sampler_logps": logps + 0.2 * draw(rows, length) - 0.1,
        "sum_sq_probs": most + (1 - old_logps.exp()) ** 2 * draw(rows, length),
        "entropy": draw(rows, length),
        "advantages": (2 * draw(rows, length) - 1) * mask,
        "finished": draw(rows) > 0.3,
        "completion_ids": (3 + 60 * draw(rows, length)).long() * (place < lengths[:, None]),
        "log_probs": (2 * draw(rows, length, VOCABULARY)).log_softmax(-1),
        "ref_log_probs": (2 * draw(rows, length, VOCABULARY)).log_softmax(-1),
        "old_entropy": draw(rows, length),
        "router_logits": 2 * draw(rows, length, *ROUTERS),
    }
    tensors |= _of_turns(mask, 1 + (2 * draw(rows, length)).long())
    tensors["routing_fractions"] = (2 * draw(*ROUTERS).softmax(-1)).expand(
        rows, length, *ROUTERS
    )  # two experts per token
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in tensors.items()}


def _of_turns(mask: Tensor, later: Tensor) -> Tensors:
    """Return `turns`, each of which ends where the mask does, and `states`: a turn after the first begins in one of `later`."""
    starts = (mask[:, 1:] > mask[:, :-1]).cumsum(1)
    turns = torch.cat([torch.zeros_like(starts[:, :1]), starts], 1)
    return {"turns": turns, "states": later.gather(1, turns) * (turns > 0)}


def ordinary_tensors(dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensors:
    """Draw non-degenerate input: groups of different sizes, none of a single row."""
    return draw_tensors(group_sizes=(4, 3, 2), seed=seed, dtype=dtype)


def as_scored(t: Tensors, needs: frozenset[str] | None = None) -> Scored:
    """Return the tensors as a `Scored`, with every field or with those that come with `needs`."""
    fields = [name for name in FIELDS if needs is None or name in needs]
    with_scores = needs is None or "scores" in needs
    of_turns: Tensors = {name: t[name].masked_fill(t["mask"] == 0, -1) for name in ("turns", "states") if name in t}
    t = {**t, **of_turns}
    return Scored(
        **{name: t[name] for name in (*ALWAYS, *fields) if name in t},
        scores={source: t[name] for name, (source, _) in SOURCES.items()} if with_scores else None,
        weights=dict(SOURCES.values()) if with_scores else None,
    )


def declared_needs(plugin: Plugin) -> frozenset[str]:
    """Return the needs of the plugin and of the plugins inside it."""
    return frozenset().union(*(each.needs for each in with_nested(plugin)))


# One call per axis. `strict` hands over what the plugin declares and nothing else, as a run does; otherwise it gets every
# field, and the keywords that it declares or takes.


def _keywords(plugin: Any, call: Any, t: Tensors, strict: bool, *positional: str) -> Tensors:
    names = set(plugin.needs)
    if not strict:
        parameters = inspect.signature(call).parameters.values()
        takes = {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
        names = (names | takes) if any(p.kind is p.VAR_KEYWORD for p in parameters) else takes
    return {name: t[name] for name in sorted(names - {"logps", "mask", *positional}) if name in t}


def _scored(plugin: Any, t: Tensors, strict: bool) -> Scored:
    return as_scored(t, declared_needs(plugin) if strict else None)


def _advantages(plugin: Any, t: Tensors, strict: bool = False) -> Tensors:
    out = plugin(_scored(plugin, t, strict))
    if "values" in declared_needs(plugin):
        returns = out.returns if isinstance(out, Credit) else None
        assert returns is not None, (
            "it needs values and returns no returns. Give a Credit with returns, which the critic learns"
        )
        given = {} if out.value_mask is None else {"value_mask": out.value_mask}
        return {"advantages": out.advantages, "returns": returns, **given}
    credit = Credit.of(out)
    assert credit.returns is None, "it gives returns without needing values, and nothing reads them"
    return {"advantages": credit.advantages}


def _baseline(plugin: Any, t: Tensors, strict: bool = False) -> Tensors:
    out, (rows, width) = plugin(_scored(plugin, t, strict)), t["mask"].shape
    due = isinstance(out, Tensor) and tuple(out.shape) in ((rows, 1), (rows, width))
    assert due, f"it must return (N, 1) = {(rows, 1)} or (N, T) = {(rows, width)}, got {_shape(out)}"
    return {"baseline": out.expand(rows, width)}


def _shape(out: Any) -> str:
    return f"the shape {tuple(out.shape)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"


def with_selected(plugin: Any, t: Tensors) -> Tensors:
    """Add what a policy loss selects of a rollout or step, if it does."""
    if "selected" not in plugin.needs or "selected" in t:
        return t
    extras = {"old_entropy": t["old_entropy"]} if "old_entropy" in plugin.needs else {}
    return {**t, "selected": plugin.select(t["old_logps"], t["advantages"], t["mask"], **extras)}


def _policy_loss(plugin: Any, t: Tensors, strict: bool = False) -> Tensors:
    t = with_selected(plugin, t)
    extras = _keywords(plugin, plugin.__call__, t, strict, "old_logps", "advantages")
    out = plugin(t["logps"], t["old_logps"], t["advantages"], t["mask"], **extras)
    is_pair = isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], dict)
    assert is_pair, "a policy loss must return a pair: the loss (B, T) and a dict of metrics"
    selected = {"selected": t["selected"]} if "selected" in plugin.needs else {}
    return {"loss": out[0], **{f"metric {name}": x for name, x in out[1].items()}, **selected}


def _kl_estimator(plugin: Any, t: Tensors, strict: bool = False) -> Tensors:
    if "full_distribution" in plugin.needs:
        own, ref = (t[name].flatten(0, 1) for name in ("log_probs", "ref_log_probs"))
        return {"kl": plugin(own, ref).view(t["mask"].shape)}
    return {"kl": plugin(t["logps"], t["ref_logps"], **_keywords(plugin, plugin.__call__, t, strict, "ref_logps"))}


def _kl(plugin: Any, t: Tensors, strict: bool = False) -> Tensors:
    if "full_distribution" in plugin.estimator.needs:
        kl = plugin.limit(_kl_estimator(plugin.estimator, t)["kl"] * t["mask"])
    else:
        extras = _keywords(plugin.estimator, plugin.estimator.__call__, t, strict, "ref_logps")
        kl = plugin.measure(t["logps"], t["ref_logps"], t["mask"], **extras)
    return {"kl": kl, **{f"{p}_penalty": getattr(plugin, f"{p}_penalty")(kl) for p in sorted(plugin.places & PLACES)}}


def _loss_term(plugin: LossTerm, t: Tensors, strict: bool = False) -> Tensors:
    per_row = {name: t[name] for name in ("group_ids", "total_score")}
    weights = plugin.weights(t["mask"], **_keywords(plugin, plugin.weights, per_row, strict))
    return {
        "loss": plugin(t["logps"], t["mask"], **_keywords(plugin, plugin.__call__, t, strict, "group_ids")),
        "weights": weights,
    }


def _aggregation(plugin: Any, t: Tensors, strict: bool = False) -> Tensors:
    per_row = {name: t[name] for name in ("group_ids", "total_score")}
    return {"weights": plugin(t["mask"], **_keywords(plugin, plugin.__call__, per_row, strict))}


OUTPUTS: dict[str, Callable[..., Tensors]] = {
    "advantages": _advantages,
    "baseline": _baseline,
    "kl": _kl,
    "kl_estimator": _kl_estimator,
    "policy_loss": _policy_loss,
    "rollout_correction": lambda p, t, strict=False: {"factors": p(t["old_logps"], t["sampler_logps"], t["mask"])},
    "aggregation": _aggregation,
    "loss_terms": _loss_term,
    "filters": lambda p, t, strict=False: {"keep": p(_scored(p, t, strict))},
}
"""Axis -> function (plugin, tensors) -> outputs by name."""


# The same rollout, written down differently


def rows_of(t: Tensors, rows: Any) -> Tensors:
    """Return the tensors of these rows (a slice, or indices)."""
    return {name: x[rows] for name, x in t.items()}


def widened(t: Tensors, at: int, columns: int = 1, fill: Mapping[str, float] | None = None) -> Tensors:
    """Insert columns of 0, or of the values in `fill`, before column `at`."""

    def insert(name: str, x: Tensor) -> Tensor:
        new = torch.full_like(x[:, :1], (fill or {}).get(name, 0)).expand(-1, columns, *x.shape[2:])
        return torch.cat([x[:, :at], new, x[:, at:]], 1)

    return {name: insert(name, x) if x.dim() >= 2 else x for name, x in t.items()}


def on_mask(t: Tensors, outputs: Tensors) -> Tensors:
    """Multiply outputs by the mask, as the core does: an infinity off the mask becomes NaN."""
    return {name: x * t["mask"] if x.dim() == 2 else x for name, x in outputs.items()}
