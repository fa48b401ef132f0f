"""Runner in actors on a Ray cluster: the one at RAY_ADDRESS, or a local one."""

from __future__ import annotations

import contextlib
from typing import Any

from hf_rlhf.batch import Context
from hf_rlhf.contract.reward_source import RewardSource
from hf_rlhf.runtime.worker_pool import READY, Events, WorkerDied
from hf_rlhf.scoring.answers import RewardStartError
from hf_rlhf.scoring.runners.process_runner import RewardPool, packed_source
from hf_rlhf.scoring.runners.reward_call import CallResult, RewardCall


class _Scorer:
    """Code that runs in an actor."""

    def __init__(self, body: bytes) -> None:
        from hf_rlhf.scoring.runners.worker_source import Served

        self._served = Served(body)

    def ready(self) -> bool:
        return True

    def run(self, state: bytes | None, unit: RewardCall) -> dict[str, Any]:
        return self._served.run(state, unit)


class Actor:
    """Worker: an actor of the cluster."""

    def __init__(self, events: Events, body: bytes) -> None:
        import ray

        self._events, self._ray = events, ray
        made: Any = ray.remote(num_cpus=0, max_restarts=0)(_Scorer)
        self._actor: Any = made.remote(body)
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


def actors(label: str, source: RewardSource, context: Context | None, requests: int = 1) -> RewardPool:
    """Create a pool of actors. Raises `RewardError` if Ray is not installed."""
    try:
        import ray
    except ImportError as error:
        raise RewardStartError(
            f"reward {label!r}: `workers=ray` needs Ray. Run pip install 'hf_rlhf[ray]', or set "
            f"{source.override('workers=processes')}"
        ) from error
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False, configure_logging=False)
    body = packed_source(label, source, context)
    return RewardPool(label, source, lambda events: Actor(events, body), requests)
