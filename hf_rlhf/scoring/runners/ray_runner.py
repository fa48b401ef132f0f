"""Runner in actors on a Ray cluster: the one at RAY_ADDRESS, or a local one."""

from __future__ import annotations

import contextlib
from typing import Any

from hf_rlhf.batch import Context
from hf_rlhf.contract.reward_source import RewardSource
from hf_rlhf.runtime.worker_pool import READY, Events, WorkerDied
from hf_rlhf.scoring.answers import RewardStartError
from hf_rlhf.scoring.runners.process_runner import RewardPool, count_of, packed_source
from hf_rlhf.scoring.runners.reward_call import CallResult, RewardCall


class _Scorer:
    """Code that runs in an actor."""

    def __init__(self, body: bytes, device: str) -> None:
        from hf_rlhf.scoring.runners.worker_source import Served

        self._served = Served(body, device)

    def ready(self) -> bool:
        return True

    def run(self, state: bytes | None, unit: RewardCall) -> dict[str, Any]:
        return self._served.run(state, unit)


class Actor:
    """Worker: an actor of the cluster."""

    def __init__(self, events: Events, body: bytes, options: dict[str, Any]) -> None:
        import ray

        self._events, self._ray = events, ray
        made: Any = ray.remote(**options, max_restarts=0)(_Scorer)
        self._actor: Any = made.remote(body, "cuda" if options.get("num_gpus") else "cpu")
        self._when(self._actor.ready.remote(), lambda _: READY)

    def send(self, state: bytes, units: list[RewardCall]) -> None:
        """Send the units one by one."""
        for unit in units:
            self._when(self._actor.run.remote(state, unit), CallResult.from_json)

    def stop(self, idle: bool = False) -> None:
        """Kill the actor."""
        with contextlib.suppress(Exception):
            self._ray.kill(self._actor)

    def _when(self, reference: Any, read: Any) -> None:
        def done(future: Any) -> None:
            error = future.exception()
            said = WorkerDied(f"its actor ended: {error}".strip()) if error is not None else read(future.result())
            self._events.put((self, said))

        reference.future().add_done_callback(done)


def _options(source: RewardSource) -> dict[str, Any]:
    """Return the options of an actor of the source."""
    found: dict[str, Any] = {"num_cpus": 0, **(source.resources or {})}
    place = found.pop("placement", None)
    if place == "spread":
        found["scheduling_strategy"] = "SPREAD"
    elif place is not None:
        found["resources"] = {f"node:{place}": 0.001}  # every node has 1 of it
    return found


def _missing(options: dict[str, Any], count: int, cluster: dict[str, float]) -> str | None:
    """Return what the cluster lacks for so many actors."""
    asked = {"CPU": options["num_cpus"], "GPU": options.get("num_gpus", 0), **options.get("resources", {})}
    for name, each in asked.items():
        have = cluster.get(name, 0.0)
        if each * count > have:
            if name in options.get("resources", {}):
                nodes = sorted(x for x in cluster if x.startswith("node:") and not x.startswith("node:__"))
                return f"the Ray cluster has no {name}; it has {', '.join(nodes)}. Correct resources.placement"
            return (
                f"{count} actors of {each:g} {name} each need {each * count:g}, and the Ray cluster has {have:g}. Set a "
                f"smaller num_workers or resources.num_{name.lower()}s"
            )
    return None


def actors(label: str, source: RewardSource, context: Context | None, requests: int = 1) -> RewardPool:
    """Create a pool of actors. Raises `RewardError` if Ray is not installed, or has not what `resources` asks for."""
    if problem := next(source.resource_errors(), None):
        raise RewardStartError(f"reward {label!r}: {problem}")
    try:
        import ray
    except ImportError as error:
        raise RewardStartError(
            f"reward {label!r}: `workers=ray` needs Ray. Run pip install 'hf_rlhf[ray]', or set "
            f"{source.override('workers=processes')}"
        ) from error
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False, configure_logging=False)
    options = _options(source)
    if missing := _missing(options, count_of(source, requests), ray.cluster_resources()):
        raise RewardStartError(f"reward {label!r}: {missing}")
    body = packed_source(label, source, context)
    return RewardPool(label, source, lambda events: Actor(events, body, options), requests)
