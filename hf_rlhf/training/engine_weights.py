"""The rollout engine while it is awake: it has the weights that the policy has."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from accelerate.utils import gather_object

from hf_rlhf.axes import RolloutEngine, Weights
from hf_rlhf.metrics.aggregator import MetricAggregator
from hf_rlhf.runtime.activity import doing
from hf_rlhf.training.parallel import whole_parameters

if TYPE_CHECKING:
    from accelerate import Accelerator

    from hf_rlhf.modeling.policy import Policy


class AwakeEngine:
    """Wake an engine for all calls of one rollout or evaluation, send it weights that it does not have, and let it sleep."""

    def __init__(self, engine: RolloutEngine, policy: Policy, accelerator: Accelerator, meters: MetricAggregator):
        self.engine, self.policy, self.accelerator, self.meters = engine, policy, accelerator, meters
        self.loaded: str | None = None
        """`Policy.version` of the weights that the engine has."""

    @contextmanager
    def __call__(self) -> Iterator[None]:
        try:
            self.engine.wake("weights")
            if type(self.engine).load is not RolloutEngine.load and self.loaded != self.policy.version:
                with doing("weights to the engine"):
                    self._load()
            self.engine.wake("cache")
            self._together()
            yield
            self._together()
        finally:
            self.engine.sleep()

    def _together(self) -> None:
        """Wait for the other processes: servers that all of them ask are woken, and put to sleep, by one."""
        if not self.engine.local:
            self.accelerator.wait_for_everyone()

    def _load(self) -> None:
        """Call `load` on all processes; each raises if it failed on one of them."""
        failed, self.loaded, start = None, None, time.perf_counter()
        try:
            self.engine.load(Weights(policy=self.policy, named=lambda: whole_parameters(self.policy.own)))
        except Exception as error:
            failed = error
        said = [None if failed is None else str(failed)]
        for process, why in enumerate(gather_object(said) if self.accelerator.num_processes > 1 else said):
            if why is not None:
                raise failed or RuntimeError(
                    f"rollout={self.engine.name} did not take the weights on process {process}: {why}"
                )
        self.loaded = self.policy.version
        self.meters.put("time/sync_s", time.perf_counter() - start)
