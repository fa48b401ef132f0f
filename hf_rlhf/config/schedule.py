"""Placement of models and rows: devices, forwards of a rollout that run at the same time, and what crosses processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from hf_rlhf.axes import RewardSource, TrainedCritic
from hf_rlhf.config.references import bases_of

if TYPE_CHECKING:
    import torch

    from hf_rlhf.config.algorithm import Algorithm


BY_TOKEN = frozenset(
    {"values", "old_logps", "sampler_logps", "old_entropy", "sum_sq_probs", "completion_ids", "turns", "states"}
)
"""Needs that are numbers by token."""


def device_of(part: Any, own: torch.device) -> torch.device:
    """Return the device that a plugin's `device` names, or else the run's `own`."""
    import torch

    chosen = getattr(part, "device", None)
    found = own if chosen in (None, "auto") else torch.device(chosen)
    return own if found.type == own.type and found.index is None else found


def device_problems(a: Algorithm, args: Any) -> Iterator[str]:
    """Yield why critic and references cannot be on the devices that are named."""
    import torch

    chosen = getattr(a.critic, "device", None)
    named = {"critic": chosen} | {label: getattr(base, "device", None) for label, base in bases_of(a).items()}
    for path, name in named.items():
        try:
            torch.device(name or "cpu")
        except RuntimeError:
            yield f"{path}.device must be cpu, cuda:N or another device of torch, got {name!r}"
    if chosen is not None and args.world_size > 1:
        yield (
            f"critic.device={chosen}: {args.world_size} processes average the gradients of one device each. Leave it out, or "
            "start one process"
        )


def looking_across(a: Algorithm) -> list[str]:
    """Return the estimator and filters that need the rows of every process."""
    parts: list[tuple[str, Any]] = [
        ("advantages", a.advantages),
        *((f"filters.{i}", x) for i, x in enumerate(a.filters)),
    ]
    return [f"{path}={plugin.name}" for path, plugin in parts if plugin.across_groups]


def crossing(a: Algorithm, processes: int) -> str:
    """Return what a process gets of the rows of the others in a rollout, with an upper bound of its bytes."""
    rows = a.rollout.prompts * a.rollout.num_generations * a.agents
    by_token, by_row = 1, 8 * (7 + 2 * len(a.rewards))
    if across := looking_across(a):
        read = a.needs | ({"old_logps"} if a.readers_of_old_logps else set())
        by_token = 4 * (2 + len(read & BY_TOKEN) + len(a.references) * ("ref_logps" in read) + bool(a.kl_in("reward")))
    longest = max(a.completion_bounds.values(), default=None)
    size = rows * (processes - 1) / processes * (by_token * (longest or 0) + by_row) / 2**20
    bytes_ = "" if longest is None else f", up to {size:,.2f} MiB a rollout"
    if across:
        return f"everything{bytes_}: {' and '.join(across)} look{'s' * (len(across) == 1)} across groups"
    return f"masks and scores alone{bytes_}: no estimator or filter looks across groups"


def remains_here(source: RewardSource) -> bool:
    """Return whether a reward source runs a model in this process."""
    return source.runs_model and source.workers != "ray"


def forward_devices(a: Algorithm, own: torch.device) -> dict[torch.device, list[str]]:
    """Return device -> the models whose forwards of a rollout run there, one after another.

    Those of different devices run at the same time. A reference that is compared over whole distributions runs within the
    policy's forward, and one that waits for the rewards is left out.
    """
    found: dict[torch.device, list[str]] = {own: ["policy"]}
    if isinstance(a.critic, TrainedCritic) and not a.critic.shares_forward:
        found.setdefault(device_of(a.critic, own), []).append("critic")
    for key, use in a.references.items():
        if use.in_rollout and "scores" not in use.reference.needs:
            where = own if use.rollout else device_of(use.reference.base, own)
            found.setdefault(where, []).append(f"kl.{key}.reference" if key else "reference")
    return found


def beside_forwards(a: Algorithm, own: torch.device) -> bool:
    """Return whether the rewards are scored while the forwards run: no reward source runs a model on a device of theirs."""
    busy = forward_devices(a, own)
    return not any(remains_here(source) and device_of(source, own) in busy for source in a.rewards)


def schedule(a: Algorithm, own: torch.device) -> Iterator[str]:
    """Yield what runs at the same time, where the models are on several devices."""
    lanes = {str(device): list(names) for device, names in forward_devices(a, own).items()}
    if beside := beside_forwards(a, own):
        for label, source in zip(a.labels(), a.rewards, strict=True):
            if source.runs_model:
                where = "Ray" if source.workers == "ray" else str(device_of(source, own))
                lanes.setdefault(where, []).append(f"reward model {label}")
    if len(lanes) > 1:
        late = "" if beside or not a.rewards else "; then the rewards"
        yield "at the same time: " + " | ".join(f"{', '.join(names)} on {x}" for x, names in lanes.items()) + late
