"""Study of one combination of plugins with every aggregation."""

from __future__ import annotations

from collections.abc import Iterable

from hf_rlhf.config.algorithm import Algorithm
from hf_rlhf.config.recipe import Recipe
from hf_rlhf.lab.choices import BETA, aggregations, beta_of, in_world, read, rewards_of, scaled
from hf_rlhf.lab.expectation import Values
from hf_rlhf.lab.study import Lab, Row
from hf_rlhf.lab.world import World


def run(
    algorithm: Algorithm | Recipe | str | None = None,
    overrides: Iterable[str] = (),
    *,
    world: World | None = None,
    beta: float | None = BETA,
    values: Values = "exact",
    off_policy: bool = False,
) -> list[Row]:
    """Study which objective its advantages, KLs and policy loss optimize under each aggregation, its own first.

    algorithm: a recipe's name or path, a recipe, or an algorithm; None: reinforce without a KL, as changed by `overrides`.
    overrides: overrides such as `advantages.use=leave_one_out` of a recipe given by name.
    beta: the largest beta, to which all are scaled; None: unchanged. At a small beta pi* is concentrated on one completion,
    which hides whether it is stationary.
    values: the values of the critic, if one is needed.
    off_policy: sample rollouts from another policy than the updated one.

    Prompts, rollouts, rewards, reference, critic and optimizer are the world's; filters, loss terms, rollout correction and
    all but the first optimizer step of a rollout are ignored. Raises `UserError` and `RecipeError` for wrong choices.
    """
    if algorithm is None or isinstance(algorithm, str):
        algorithm = read(algorithm, overrides)
    chosen = algorithm.algorithm() if isinstance(algorithm, Recipe) else algorithm
    world = world or World(rewards=rewards_of(chosen))
    kl = scaled(chosen.kl, beta)
    lab = Lab(world=world, beta=beta_of(kl), values=values, off_policy=off_policy)
    return [
        lab.study(
            in_world(
                world, advantages=chosen.advantages, kl=kl, policy_loss=chosen.policy_loss, aggregation=aggregation
            )
        )
        for aggregation in aggregations(world, chosen.aggregation)
    ]


def left_out(algorithm: Algorithm) -> list[str]:
    """Return the parts of an algorithm that the lab ignores, such as `filters.0=zero_variance`.

    The world's reference stands for a recipe's only one; of several they are named.
    """
    several = len(algorithm.references) > 1
    return [
        f"{path}={plugin.name}"
        for path, plugin in algorithm.plugins()
        if (
            plugin.name != plugin.axis.default
            and (path == "sampler" or path.split(".")[0] in ("filters", "loss_terms", "rollout_correction"))
        )
        or (several and path.startswith("kl.") and path.endswith(".reference"))
    ]
