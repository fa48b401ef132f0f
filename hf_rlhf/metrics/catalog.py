"""Core metrics: their class, sections and conditions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf.config.references import bases_of, drifts
from hf_rlhf.contract.metric import Metric

if TYPE_CHECKING:
    from hf_rlhf.config.algorithm import Algorithm


@dataclass(frozen=True)
class Given:
    """Condition under which a core metric is logged."""

    words: str
    holds: Callable[[Algorithm], bool]


def _trained_critic(a: Algorithm) -> bool:
    from hf_rlhf.axes import TrainedCritic

    return isinstance(a.critic, TrainedCritic)


def _value_clip(a: Algorithm) -> bool:
    return _trained_critic(a) and getattr(a.critic, "value_clip", "none") != "none"


def _old(a: Algorithm) -> bool:
    return "old_logps" in a.policy_loss.needs or bool(a.readers_of_old_logps)


def _compares(a: Algorithm) -> bool:
    return a.compares_sampler and (a.update.old_logps == "lazy" or bool(a.readers_of_old_logps))


def _corrects(a: Algorithm) -> bool:
    return "sampler_logps" in a.rollout_correction.needs


def _offloads(a: Algorithm) -> bool:
    return any(getattr(part, "offload", False) for part in (a.update, a.critic, *bases_of(a).values()))


GIVEN: dict[str, Given] = {
    "reference": Given("with a reference", lambda a: "ref_logps" in a.needs),
    "drift": Given(
        "with old and reference log-probs", lambda a: "ref_logps" in a.needs and bool(a.readers_of_old_logps)
    ),
    "own_drift": Given("with a reference of that placement's own, and old log-probs", lambda a: bool(drifts(a))),
    "old": Given("if something reads the old log-probs", _old),
    "sampler": Given("if something reads the sampler's log-probs, or it has a copy of the weights", _compares),
    "sampler_before": Given(
        "the same, if the trainer computes its own before the update",
        lambda a: a.compares_sampler and bool(a.readers_of_old_logps),
    ),
    "copy": Given("where the sampler has a copy of the weights", lambda a: not a.rollout.local),
    "correction": Given("with a rollout correction", _corrects),
    "rewards": Given("with rewards", lambda a: bool(a.rewards)),
    "environment": Given("with an environment", lambda a: bool(a.environment)),
    "groups": Given("with several generations per prompt", lambda a: a.rollout.num_generations > 1),
    "critic": Given("with a critic that learns", _trained_critic),
    "value_clip": Given("with a critic that learns and `value_clip`", _value_clip),
    "kl": Given("with that placement", lambda a: bool(a.kl)),
    "kl_loss": Given("with that placement in the loss", lambda a: bool(a.kl_in("loss"))),
    "beta": Given("with a placement that has a `beta`", lambda a: any(hasattr(kl, "controller") for kl in a.kl)),
    "clamp": Given("if `clamp` of that placement is set", lambda a: any(kl.clamp is not None for kl in a.kl)),
    "routing": Given("if something reads routing fractions", lambda a: "routing_fractions" in a.needs),
    "terms": Given("with that term", lambda a: bool(a.loss_terms)),
    "filters": Given("with that filter", lambda a: bool(a.filters)),
    "verifier": Given("with a verifier", lambda a: any(source.verifier for source in a.rewards)),
    "offload": Given("with `offload` of update, critic or reference", _offloads),
    "ema": Given("with `update.ema` and `evaluation.ema`", lambda a: a.update.ema is not None),
}


@dataclass(frozen=True)
class CoreMetric(Metric):
    """A core metric, by its full name."""

    section: str = ""
    given: str = ""
    """Keys of GIVEN, separated by spaces: all must hold."""

    @property
    def condition(self) -> Given:
        """Condition under which it is logged."""
        parts = [GIVEN[key] for key in self.given.split()]
        return Given(", ".join(part.words for part in parts), lambda a: all(part.holds(a) for part in parts))


REWARDS, KL, POLICY, CRITIC = "Rewards and advantages", "KL", "Policy", "Critic"
ROLLOUTS, THROUGHPUT, HEALTH, TRAINER = "Rollouts", "Throughput and memory", "Health", "Trainer's own"
SECTIONS = (REWARDS, KL, POLICY, CRITIC, ROLLOUTS, THROUGHPUT, HEALTH, TRAINER)
"""In the order of pages and dashboards."""

EVAL = "eval_"
"""Prefix of the names of an evaluation."""


def core(section: str, name: str, unit: str, meaning: str, given: str = "", **more: object) -> CoreMetric:
    """Return a metric of a section, logged if its `condition` holds."""
    return CoreMetric(name, unit, meaning, section=section, given=given, **more)  # type: ignore[arg-type]
