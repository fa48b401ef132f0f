"""Algorithms for the lab: the plugins of a recipe or of the whole matrix, with a world's rollouts and rewards."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin

from hf_rlhf.axes import AdvantageEstimator, Aggregation, KLPlacement, Plugin, PolicyLoss, RewardSource
from hf_rlhf.batch import Rollouts
from hf_rlhf.config.algorithm import Algorithm
from hf_rlhf.config.overrides import apply_overrides
from hf_rlhf.config.recipe import Recipe, load_plugin, read_recipe, resolve
from hf_rlhf.config.recipe_yaml import DEFAULTS
from hf_rlhf.config.references import on_one_reference
from hf_rlhf.lab.world import World
from hf_rlhf.registry.host import get_host
from hf_rlhf.registry.settings_schema import nested, setting_types, settings_of
from hf_rlhf.runtime.errors import UserError

BETA = 0.3
"""Default largest beta: near the size of the rewards, so that pi* is not concentrated on one completion."""
BARE: dict[str, Any] = {
    "rollout": {"use": "generate"},
    "rewards": [{"use": "exact_match"}],
    "advantages": {"use": "reinforce"},
    "policy_loss": {"use": "reinforce"},
    "aggregation": {"use": "seq_mean_token_sum"},
}
"""Base recipe for axis choices without a recipe."""
REQUIRED: dict[str, dict[str, Any]] = {
    "advantages.mix": {"parts": ["leave_one_out", "pass_at_k"], "weights": [0.5, 0.5]},
}
"""Settings in the matrix for plugins that require some."""


@dataclass(kw_only=True)
class Lookup(RewardSource):
    """Score of each completion, read from a table of the world."""

    name = "lookup"
    verifier = True

    scores: dict[tuple[int, ...], float] = field(default_factory=dict)
    """Score by token ids; the source does not apply to completions that are missing."""

    def __call__(self, rollouts: Rollouts) -> Sequence[float | None]:
        return [self.scores.get(tuple(ids)) for ids in rollouts.completion_ids]


def in_world(
    world: World,
    *,
    advantages: AdvantageEstimator,
    kl: Sequence[KLPlacement] = (),
    policy_loss: PolicyLoss | None = None,
    aggregation: Aggregation | None = None,
) -> Algorithm:
    """Combine these plugins with the world's rollouts, rewards, reference and critic.

    Parts that depend on a model or a dataset are replaced, so that only the chosen axes can be rejected; the world's reference
    stands for those of single KLs, which are taken on all rows. One optimizer step
    per rollout, no filters, no loss terms.
    """
    sources = [Lookup(label=label, weight=world.weights[label]) for label in world.scores]
    for source, scores in zip(sources, world.scores.values(), strict=True):
        source.scores = {s: float(x) for (_, s), x in zip(world.sequences, scores, strict=True)}
    left_out = {axis: load_plugin(axis, x) if isinstance(x, str) else list(x) for axis, x in DEFAULTS.items()}
    parts: dict[str, Any] = {
        **left_out,
        "rollout": load_plugin(
            "rollout", "generate", prompts=world.prompts, num_generations=world.group, max_new_tokens=world.length
        ),
        "rewards": sources,
        "kl": on_one_reference(kl),
        "advantages": advantages,
        "policy_loss": policy_loss or load_plugin("policy_loss", BARE["policy_loss"]["use"]),
    }
    parts["aggregation"] = aggregation or load_plugin("aggregation", BARE["aggregation"]["use"])
    bare = Algorithm(**parts, reference=load_plugin("reference", "none"))
    if world.turns > 1 or "turns" in bare.needs:
        bare = dataclasses.replace(bare, environment=[load_plugin("environment", "echo")])
    critic = load_plugin("critic", "value_head" if "values" in bare.needs else "none")
    reference = load_plugin("reference", "frozen" if "ref_logps" in bare.needs else "none")
    return dataclasses.replace(bare, critic=critic, reference=reference)


def read(name: str | None, overrides: Iterable[str]) -> Recipe:
    """Read a recipe by name or path, or the base recipe, with overrides such as `kl.0.estimator=k1`."""
    raw, notes = apply_overrides(BARE if name is None else read_recipe(name), overrides)
    recipe = resolve(raw, name=name or "the lab's")
    recipe.notes = notes
    return recipe


def rewards_of(algorithm: Algorithm) -> Literal["real", "none"]:
    """Return the rewards of the world in which to study an algorithm: none if it has none, or none with a weight."""
    return "real" if any(source.weight for source in algorithm.rewards) else "none"


def scaled(kls: Sequence[KLPlacement], beta: float | None) -> list[KLPlacement]:
    """Scale the KLs so that the largest beta is `beta`; None leaves them unchanged."""
    largest = beta_of(kls)
    if beta is None or largest is None:
        return list(kls)
    return [_with_beta(kl, beta * (getattr(kl, "beta", 1.0) / largest)) for kl in kls]


def _with_beta(kl: Any, beta: float) -> Any:
    return dataclasses.replace(kl, beta=beta) if hasattr(kl, "beta") else kl


def beta_of(kls: Iterable[KLPlacement]) -> float | None:
    """Return the largest beta of the KLs that affect the gradient, None if none does."""
    return max((float(getattr(kl, "beta", 1.0)) for kl in kls if kl.places), default=None)


def aggregations(world: World, own: Aggregation | None = None) -> list[Aggregation]:
    """Return all aggregations, `own` first with its settings; constant lengths are the world's longest completion."""
    made = [x for x in defaults("aggregation") if own is None or x.name != own.name]
    chosen = [own, *made] if own else made
    return [dataclasses.replace(x, length=world.turns * world.length) if hasattr(x, "length") else x for x in chosen]


# The matrix


def defaults(axis: str) -> list[Any]:
    """Return all plugins of an axis with default settings, or those of `REQUIRED`, except plugins that need others."""
    made = []
    for name in get_host().names(axis):
        with contextlib.suppress(UserError):
            made.append(load_plugin(axis, name, **REQUIRED.get(f"{axis}.{name}", {})))
    return made


def variants(estimator: AdvantageEstimator) -> Iterator[AdvantageEstimator]:
    """Yield the estimator with one setting changed at a time: every other choice, switch and nested plugin, and
    fractions set to 1."""
    hints = setting_types(type(estimator))
    for setting in settings_of(type(estimator)):
        hint, now = hints[setting.name], getattr(estimator, setting.name)
        held = nested(hint)
        others: list[Any] = []
        if held and held.axis and not held.many and isinstance(now, Plugin):
            others = [x for x in defaults(held.axis) if x.name != now.name]
        elif get_origin(hint) is Literal:
            others = [x for x in get_args(hint) if x != now]
        elif isinstance(now, bool):
            others = [not now]
        elif isinstance(now, float) and now < 1 and "le=1" in repr(hint):
            others = [1.0]
        for other in others:
            yield dataclasses.replace(estimator, **{setting.name: other})


def kl_choices(beta: float) -> list[list[KLPlacement]]:
    """Return all placements that affect the gradient, with every estimator at both levels; then reward and loss together."""
    single: dict[frozenset[str], list[KLPlacement]] = {}
    estimates = defaults("kl_estimator")
    for placement in defaults("kl"):
        if placement.places:
            single[placement.places] = single.get(placement.places, []) + [
                dataclasses.replace(_with_beta(placement, beta), estimator=estimator, level=level)
                for estimator in estimates
                for level in ("token", "sequence")
            ]
    reward, loss = (single.get(frozenset({place}), []) for place in ("reward", "loss"))
    pairs = [[a, b] for a in reward for b in loss if (a.estimator, a.level) == (b.estimator, b.level)]
    return [[kl] for kls in single.values() for kl in kls] + pairs
