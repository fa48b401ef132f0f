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

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from hf_rlhf.modeling.offload import Keeper, keeper, tensors_of
from hf_rlhf.runtime.peak_memory import MIB

if TYPE_CHECKING:
    from hf_rlhf.config.algorithm import Algorithm
    from hf_rlhf.metrics.aggregator import MetricAggregator
    from hf_rlhf.modeling.ema import PolicyEMA
    from hf_rlhf.modeling.policy import ActorCritic


@dataclass(kw_only=True)
class Phases:
    """Load what a phase reads to the device, and offload the rest where `offload` is set."""

    reference: Keeper
    critic: Keeper
    update: Keeper
    """Optimizer state and the policy's average."""
    compares_in_update: bool
    """True if the update reads the reference."""
    blends_away: bool
    """True if `reference.offload` changes the rounding of the reference's updates: an average computed in main memory
    instead of on a device."""
    meters: MetricAggregator

    @classmethod
    def of(
        cls,
        algorithm: Algorithm,
        actor_critic: ActorCritic,
        reference: nn.Module | None,
        optimizer: Callable[[], Any],
        average: PolicyEMA | None,
        meters: MetricAggregator,
    ) -> Phases:
        """Return the phases of a run, and offload reference and critic where their `offload` is set. `reference` is the
        reference's own model, if it has one; weights that it shares with the policy stay."""
        critic, shared = actor_critic.critic, {id(x) for x in tensors_of(actor_critic.policy)()}
        everything = algorithm.update.offload

        def own_weights() -> Iterator[Tensor]:
            return (x for x in tensors_of(reference)() if id(x) not in shared)

        def state() -> Iterator[Tensor]:
            own = None if everything or critic is None else {id(p) for p in critic.parameters()}
            for parameter, kept in getattr(optimizer(), "state", {}).items():
                if own is None or id(parameter) in own:
                    yield from _leaves(kept)
            if everything and average is not None:
                yield from average.tensors()

        compared, device = bool(algorithm.kl_over_distributions("update")), meters.device
        moves_there = algorithm.reference.moves and compared
        blends = algorithm.reference.moves and getattr(algorithm.reference, "mixing", None) != 1  # 1 copies
        offload = [bool(getattr(part, "offload", False)) for part in (algorithm.reference, algorithm.critic)]
        made = cls(
            reference=keeper(own_weights, device, offload[0], changes=moves_there),
            critic=keeper(tensors_of(critic), device, offload[1], changes=True),
            update=keeper(state, device, offload[1] or everything, changes=True),
            compares_in_update=compared,
            blends_away=blends and device.type != "cpu" and not compared,
            meters=meters,
        )
        made.sampling()
        return made

    def sampling(self) -> None:
        """Enter the phase in which completions are sampled and scored."""
        parts = (self.reference, self.critic, self.update)
        for part in parts:
            part.offload()
        if away := sum(part.offloaded_bytes() for part in parts):
            self.meters.peak("memory/offloaded", away / MIB)

    def forward(self, *, critic: bool = False, reference: bool = False) -> ExitStack:
        """Return a context with the critic or the reference on the device, to be read only."""
        there = ExitStack()
        for part, wanted in ((self.critic, critic), (self.reference, reference)):
            if wanted:
                there.enter_context(part.on_device(changed=False))
        return there

    def updating(self) -> None:
        """Enter the phase in which the policy is updated."""
        self.critic.load()
        if self.compares_in_update:
            self.reference.load()

    def stepping(self) -> None:
        """Enter the optimizer's step. What it reads stays until completions are sampled again."""
        self.update.load()

    def moved(self) -> None:
        """Offload the reference again after it has moved."""
        if not self.compares_in_update:
            self.reference.offload()


def _leaves(kept: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested dicts and lists."""
    if isinstance(kept, Tensor):
        yield kept
    elif isinstance(kept, dict | list | tuple):
        for x in kept.values() if isinstance(kept, dict) else kept:
            yield from _leaves(x)
