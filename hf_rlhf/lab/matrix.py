"""The whole matrix: every combination of the installed plugins, including rejected ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from hf_rlhf.axes import AdvantageEstimator, Aggregation, KLPlacement, PolicyLoss
from hf_rlhf.config.algorithm import Algorithm
from hf_rlhf.config.recipe import load_plugin, read_recipe
from hf_rlhf.lab.choices import BETA, aggregations, defaults, in_world, kl_choices, read, rewards_of, scaled, variants
from hf_rlhf.lab.expectation import Values
from hf_rlhf.lab.study import Lab, Row
from hf_rlhf.lab.world import World
from hf_rlhf.registry.host import get_host


def rollout_recipes() -> list[str]:
    """Return the names of recipes with rollouts."""
    return [offer.name for offer in get_host().recipes() if not offer.problem and "rollout" in read_recipe(offer.name)]


@dataclass(kw_only=True)
class Matrix:
    """Sections of the matrix for one seed and one beta."""

    beta: float = BETA
    seed: int = 0
    _labs: dict[tuple[World, Values, bool], Lab] = field(default_factory=dict)

    def sections(self) -> dict[str, list[Row]]:
        """Return the rows of every section by name."""
        made = (
            self.recipes,
            self.whole,
            self.settings,
            self.critics,
            self.binary,
            self.two_prompts,
            self.losses,
            self.off_policy,
        )
        return {section.__name__: list(section()) for section in made}

    def recipes(self) -> Iterator[Row]:
        """Yield rows for every recipe's advantages, KLs, policy loss and aggregation, with exact critics."""
        for name in rollout_recipes():
            algorithm = self.recipe(name)
            row = self._lab(self._world_of(algorithm), "exact", False).study(algorithm)
            row.recipe = name
            yield row

    def recipe(self, name: str) -> Algorithm:
        """Return a recipe's choices in the matrix's world, or in one without rewards."""
        chosen = read(name, ()).algorithm()
        world = self._world_of(chosen)
        return in_world(
            world,
            advantages=chosen.advantages,
            kl=scaled(chosen.kl, self.beta),
            policy_loss=chosen.policy_loss,
            aggregation=aggregations(world, chosen.aggregation)[0],
        )

    def _world_of(self, algorithm: Algorithm) -> World:
        return dataclasses.replace(self.world, rewards=rewards_of(algorithm))

    def whole(self) -> Iterator[Row]:
        """Yield rows for every estimator with default settings, every KL and every aggregation."""
        yield from self._cross(self.world, defaults("advantages"), [[], *self.kls])

    def settings(self) -> Iterator[Row]:
        """Yield rows for estimators with one setting changed, without a KL and with k1 in the reward."""
        yield from self._cross(self.world, self._changed(), [[], self.k1])

    def critics(self) -> Iterator[Row]:
        """Yield rows for estimators that need values, with an untrained critic."""
        found = [x for x in [*defaults("advantages"), *self._changed()] if self._needs_values(x)]
        yield from self._cross(self.world, found, [[], self.k1], values="arbitrary")

    def binary(self) -> Iterator[Row]:
        """Yield rows with rewards of 0 and 1 in groups of four, without a KL (in groups of three, nonzero stds are equal)."""
        world = World(seed=self.seed, rewards="binary", group=4)
        plain = [load_plugin("aggregation", "seq_mean_token_sum")]
        yield from self._cross(world, [*defaults("advantages"), *self._changed()], [[]], weighed=plain)

    def two_prompts(self) -> Iterator[Row]:
        """Yield rows for rollouts of two prompts with two completions of up to two tokens, without a KL."""
        world = World(seed=self.seed, prompts=2, group=2, length=2)
        yield from self._cross(world, defaults("advantages"), [[]])

    def losses(self) -> Iterator[Row]:
        """Yield rows for every policy loss with leave_one_out, on-policy."""
        yield from self._cross(self.world, self._one, [[]], losses=self._losses)

    def off_policy(self) -> Iterator[Row]:
        """Yield the same on the rollouts of an older policy; then every KL in the loss, with the surrogate."""
        yield from self._cross(self.world, self._one, [[]], losses=self._losses, off_policy=True)
        kls = [kl for kl in self.kls if all(placement.places == {"loss"} for placement in kl)]
        surrogate = [load_plugin("policy_loss", "surrogate")]
        yield from self._cross(self.world, self._one, kls, losses=surrogate, off_policy=True)

    @cached_property
    def kls(self) -> list[list[KLPlacement]]:
        """Every KL of the matrix."""
        return kl_choices(self.beta)

    @cached_property
    def k1(self) -> list[KLPlacement]:
        """k1 in the reward."""
        return [load_plugin("kl", "in_reward", beta=self.beta, estimator="k1")]

    @cached_property
    def world(self) -> World:
        """Three tokens, at most three steps, groups of three, real-valued rewards."""
        return World(seed=self.seed)

    @property
    def _one(self) -> list[AdvantageEstimator]:
        return [load_plugin("advantages", "leave_one_out")]

    @property
    def _losses(self) -> list[PolicyLoss]:
        return defaults("policy_loss")

    def _changed(self) -> list[AdvantageEstimator]:
        return [variant for estimator in defaults("advantages") for variant in variants(estimator)]

    def _needs_values(self, estimator: AdvantageEstimator) -> bool:
        return "values" in in_world(self.world, advantages=estimator).needs

    def _lab(self, world: World, values: Values, off_policy: bool) -> Lab:
        made = Lab(world=world, beta=self.beta, values=values, off_policy=off_policy)
        return self._labs.setdefault((world, values, off_policy), made)

    def _cross(
        self,
        world: World,
        chosen: Sequence[AdvantageEstimator],
        kls: Sequence[Sequence[KLPlacement]],
        *,
        losses: Sequence[PolicyLoss | None] = (None,),
        weighed: Sequence[Aggregation] | None = None,
        values: Values = "exact",
        off_policy: bool = False,
    ) -> Iterator[Row]:
        lab = self._lab(world, values, off_policy)
        weighed = weighed or aggregations(world)
        for estimator in chosen:
            for kl in kls:
                for loss in losses:
                    for aggregation in weighed:
                        yield lab.study(
                            in_world(lab.world, advantages=estimator, kl=kl, policy_loss=loss, aggregation=aggregation)
                        )
