"""Which parts of a run are on the device in which phase.

| part | sampling, scoring | forward | update |
| --- | --- | --- | --- |
| reference (`offload`) | away | there | there where a KL over whole distributions is in the loss, else away |
| separate critic (`offload`) | away | there | there |
| its optimizer state (either `offload`) | away | away | from the first step of the optimizer on |
| the policy's optimizer state and average (`update.offload`) | away | away | from the first step of the optimizer on |

Gradients are in no row: Trainer frees them after every optimizer step, so that none is there before the next backward.
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
    """Has what a phase reads on the device, and the rest where its `offload` says."""

    reference: Keeper
    critic: Keeper
    update: Keeper
    """Optimizer state and the policy's average."""
    compares_in_update: bool
    """Whether the update reads the reference."""
    blends_away: bool
    """Whether the reference's moves would be rounded in another way where its `offload` were another: an average that is
    computed in main memory, or on a device."""
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
        """Those of a run; `reference` is its own model, if it has one, of which what it shares with the policy stays. It and
        the critic are away from now on where their `offload` says so."""
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
        """From here on completions are sampled and scored."""
        parts = (self.reference, self.critic, self.update)
        for part in parts:
            part.offload()
        if away := sum(part.offloaded_bytes() for part in parts):
            self.meters.peak("memory/offloaded", away / MIB)

    def forward(self, *, critic: bool = False, reference: bool = False) -> ExitStack:
        """A context in which the critic, or the reference, is there to be read; nothing changes it."""
        there = ExitStack()
        for part, wanted in ((self.critic, critic), (self.reference, reference)):
            if wanted:
                there.enter_context(part.on_device(changed=False))
        return there

    def updating(self) -> None:
        """From here on the policy is updated."""
        self.critic.load()
        if self.compares_in_update:
            self.reference.load()

    def stepping(self) -> None:
        """From here on the optimizer steps. What it reads stays until completions are sampled again."""
        self.update.load()

    def moved(self) -> None:
        """The reference has been moved, where it lay."""
        if not self.compares_in_update:
            self.reference.offload()


def _leaves(kept: Any) -> Iterator[Tensor]:
    """The tensors in nested dicts and lists."""
    if isinstance(kept, Tensor):
        yield kept
    elif isinstance(kept, dict | list | tuple):
        for x in kept.values() if isinstance(kept, dict) else kept:
            yield from _leaves(x)
