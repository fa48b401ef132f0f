"""Offloading: which parts of a run are on the device in which phase.

| part | sampling, scoring | forward | update |
| --- | --- | --- | --- |
| reference (`offload`) | offloaded | on device | on device if a KL over distributions is in the loss, else offloaded |
| separate critic (`offload`) | offloaded | on device | on device |
| its optimizer state (either `offload`) | offloaded | offloaded | on device from the first optimizer step on |
| optimizer state and average of the policy (`update.offload`) | offloaded | offloaded | the same |

Gradients have no row: Trainer frees them after every optimizer step, so that there are none before the next backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from hf_rlhf.config.references import base_label
from hf_rlhf.modeling.offload import Keeper, keeper, tensors_of
from hf_rlhf.runtime.peak_memory import MIB

if TYPE_CHECKING:
    from hf_rlhf.axes import Reference
    from hf_rlhf.config.algorithm import Algorithm
    from hf_rlhf.metrics.aggregator import MetricAggregator
    from hf_rlhf.modeling.ema import PolicyEMA
    from hf_rlhf.modeling.policy import ActorCritic


@dataclass(kw_only=True)
class Phases:
    """Load what a phase reads to the device, and offload the rest where `offload` is set."""

    references: dict[str, Keeper]
    """By the label of their models."""
    critic: Keeper
    update: Keeper
    """Optimizer state and the policy's average."""
    compared_in_update: frozenset[str]
    """Labels of the references that the update runs."""
    blends_away: bool
    """True if `offload` changes the rounding of the updates of a reference: an average computed in main memory instead of on
    a device."""
    meters: MetricAggregator

    @classmethod
    def of(
        cls,
        algorithm: Algorithm,
        actor_critic: ActorCritic,
        references: dict[str, tuple[Reference, nn.Module | None]],
        optimizer: Callable[[], Any],
        average: PolicyEMA | None,
        meters: MetricAggregator,
    ) -> Phases:
        """Return the phases of a run, and offload references and critic where their `offload` is set. `references`: label ->
        reference and its own model, if it has one; weights that it shares with the policy stay."""
        critic, shared = actor_critic.critic, {id(x) for x in tensors_of(actor_critic.policy)()}
        everything = algorithm.update.offload

        def own_weights(model: nn.Module | None) -> Callable[[], Iterator[Tensor]]:
            return lambda: (x for x in tensors_of(model)() if id(x) not in shared)

        def state() -> Iterator[Tensor]:
            own = None if everything or critic is None else {id(p) for p in critic.parameters()}
            for parameter, kept in getattr(optimizer(), "state", {}).items():
                if id(parameter) not in apart and (own is None or id(parameter) in own):
                    yield from _leaves(kept)
            if everything and average is not None:
                yield from average.tensors()

        device, here = meters.device, next(actor_critic.policy.parameters()).device
        apart = {id(p) for p in critic.parameters() if p.device != here} if critic is not None else set()
        uses = [use.reference.base for use in algorithm.references.values() if use.in_update]
        compared = frozenset(base_label(algorithm, base) for base in uses)
        # one that is mixed with the policy; a share of 1 copies
        mixed = {x for x, (base, _) in references.items() if base.moves and getattr(base, "mixing", None) != 1}
        made = cls(
            references={
                label: keeper(own_weights(model), device, _offloads(base), changes=base.moves and label in compared)
                for label, (base, model) in references.items()
            },
            critic=keeper(tensors_of(critic), device, _offloads(algorithm.critic), changes=True),
            update=keeper(state, device, _offloads(algorithm.critic) or everything, changes=True),
            compared_in_update=compared,
            blends_away=device.type != "cpu" and bool(mixed - compared),
            meters=meters,
        )
        made.sampling()
        return made

    def sampling(self) -> None:
        """Enter the phase in which completions are sampled and scored."""
        parts = (*self.references.values(), self.critic, self.update)
        for part in parts:
            part.offload()
        if away := sum(part.offloaded_bytes() for part in parts):
            self.meters.peak("memory/offloaded", away / MIB)

    def forward(self, *, critic: bool = False, references: Iterable[str] = ()) -> ExitStack:
        """Return a context with the critic or some references on the device, to be read only."""
        there = ExitStack()
        for part in ([self.critic] if critic else []) + [self.references[label] for label in references]:
            there.enter_context(part.on_device(changed=False))
        return there

    def updating(self) -> None:
        """Enter the phase in which the policy is updated."""
        self.critic.load()
        for label in self.compared_in_update:
            self.references[label].load()

    def stepping(self) -> None:
        """Enter the optimizer's step. What it reads stays until completions are sampled again."""
        self.update.load()

    def moved(self) -> None:
        """Offload references again after they have moved."""
        for label, part in self.references.items():
            if label not in self.compared_in_update:
                part.offload()


def _offloads(part: Any) -> bool:
    return bool(getattr(part, "offload", False))


def _leaves(kept: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested dicts and lists."""
    if isinstance(kept, Tensor):
        yield kept
    elif isinstance(kept, dict | list | tuple):
        for x in kept.values() if isinstance(kept, dict) else kept:
            yield from _leaves(x)
