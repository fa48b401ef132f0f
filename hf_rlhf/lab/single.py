"""One combination of plugins, with every aggregation."""

from __future__ import annotations

from collections.abc import Iterable

from hf_rlhf.config.algorithm import Algorithm
from hf_rlhf.config.recipe import Recipe
from hf_rlhf.lab.choices import BETA, aggregations, beta_of, in_world, read, scaled
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
    """What its advantages, KLs and policy loss climb under each aggregation, its own first.

    algorithm: a recipe's name or path, a recipe, or an algorithm; None: reinforce without a KL, for `overrides` to change.
    overrides: `advantages.use=leave_one_out` and the like, of a recipe by name.
    beta: the largest beta is set to it, the others in proportion; None: as they are. At a small beta pi* is all on one
    completion, and whether it is stationary cannot be seen.
    values: what the critic knows, where one is needed.
    off_policy: rollouts come from another policy than the one that is updated.

    Rollouts, rewards, reference, critic and optimizer are the world's; filters, loss terms, rollout correction and all but
    the first optimizer step of a rollout are left out. Raises `UserError`, `RecipeError` for wrong choices.
    """
    if algorithm is None or isinstance(algorithm, str):
        algorithm = read(algorithm, overrides)
    chosen = algorithm.algorithm() if isinstance(algorithm, Recipe) else algorithm
    world = world or World()
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
    """`filters.0=zero_variance` and the like: what the lab does not take over."""
    return [
        f"{path}={plugin.name}"
        for path, plugin in algorithm.plugins()
        if path.split(".")[0] in ("filters", "loss_terms", "rollout_correction") and plugin.name != "none"
    ]
