"""Averages and peaks between two log entries."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from hf_rlhf.runtime.activity import doing
from hf_rlhf.runtime.distributed import sum_over_processes
from hf_rlhf.runtime.peak_memory import MIB, recorder

if TYPE_CHECKING:
    from accelerate import Accelerator

HEALTH = dict.fromkeys(
    (
        *("health/reward_missing", "health/reward_error", "health/reward_timeout"),
        *("health/empty_rollout", "health/nonfinite_step"),
    ),
    0.0,
)
"""Always logged, even if nothing was counted."""


class MetricAggregator:
    """Averages and peaks since the last log entry.

    `add` takes sums and counts of this process, which `read` sums over all processes; `put` takes numbers that are equal on
    every process; of the values of `peak`, `read` returns the largest over all processes. `device`: whose memory is measured.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cpu")
        self._peaks: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._sums: dict[str, tuple[Any, Any]] = {}
        self._values: dict[str, list[float]] = {}
        self._updates: dict[str, tuple[Any, Any]] = {}
        self.items: dict[str, float] = {}
        """Number of items behind each average of the last `read`."""

    def add(self, name: str, total: Tensor | float, count: Tensor | float) -> None:
        """Add `total` over `count` items to the average `name`, without waiting for the device."""
        detached = total.detach() if isinstance(total, Tensor) else total
        for sums in (self._sums, self._updates) if name.startswith("policy/") else (self._sums,):
            old_total, old_count = sums.get(name, (0.0, 0.0))
            sums[name] = (old_total + detached, old_count + count)

    def put(self, name: str, value: float) -> None:
        """Record a number of the whole run; several per log entry are averaged, those of `health/` summed."""
        self._values.setdefault(name, []).append(float(value))

    def count(self, name: str, number: int) -> None:
        """Add to a count, which is summed over processes and since the last log entry."""
        if number:
            self._counts[name] = self._counts.get(name, 0) + number

    def peak(self, name: str, value: float) -> None:
        """Record a number of this process; the largest since the last log entry counts."""
        self._peaks[name] = max(value, self._peaks.get(name, value))

    def mark(self) -> dict[str, int]:
        """Return a position among the values of `put`, for `since`."""
        return {name: len(values) for name, values in self._values.items()}

    def since(self, mark: dict[str, int]) -> dict[str, float]:
        """Return the average of the values put under each name after `mark`."""
        new = {name: values[mark.get(name, 0) :] for name, values in self._values.items()}
        return {name: sum(values) / len(values) for name, values in new.items() if values}

    def since_last_rollout(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the averages under `policy/` over all updates since the last call. One collective."""
        several = accelerator.num_processes > 1
        names = sorted(set(gather_object(list(self._updates)))) if several else sorted(self._updates)
        flat = sum_over_processes(accelerator, [x for name in names for x in self._updates.get(name, (0.0, 0.0))])
        self._updates = {}
        averages = {name: flat[2 * i] / flat[2 * i + 1] for i, name in enumerate(names) if flat[2 * i + 1] > 0}
        return {name: x for name, x in averages.items() if math.isfinite(x)}

    @contextmanager
    def time(self, name: str, activity: str | None = None) -> Iterator[None]:
        """Record the seconds inside as `time/<name>_s`, and the peak MiB, and that above the start, as `memory/<name>/peak` and
        `memory/<name>/above`; say that this process does `activity` (`name` by default)."""
        with doing(activity or name), recorder(self.device).phase() as phase:
            start = time.perf_counter()
            yield
            self.put(f"time/{name}_s", time.perf_counter() - start)
        self.peak(f"memory/{name}/peak", phase.peak / MIB)
        self.peak(f"memory/{name}/above", phase.above / MIB)

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the finite averages and start over.

        Processes may have added to different names, since reward functions log as they like. Two collectives.
        """
        own = (list(self._sums), self._peaks, self._counts)
        given = gather_object([own]) if accelerator.num_processes > 1 else [own]
        names = sorted({name for theirs, _, _ in given for name in theirs})
        peaks: dict[str, float] = {}
        tallies: dict[str, float] = {}
        for _, theirs, found in given:
            peaks |= {name: max(x, peaks.get(name, x)) for name, x in theirs.items()}
            tallies |= {name: tallies.get(name, 0.0) + x for name, x in found.items()}
        sums = [x for name in names for x in self._sums.get(name, (0.0, 0.0))]
        flat = sum_over_processes(accelerator, sums)
        averages = {name: flat[2 * i] / flat[2 * i + 1] for i, name in enumerate(names) if flat[2 * i + 1] > 0}
        counts = {name: sum(v) for name, v in self._values.items() if name.startswith("health/")} | tallies
        means = {name: sum(v) / len(v) for name, v in self._values.items()}
        self.items = {name: flat[2 * i + 1] for i, name in enumerate(names)}
        self.items |= {name: len(values) for name, values in self._values.items()}
        self._sums, self._values, self._peaks, self._counts = {}, {}, {}, {}
        return {name: x for name, x in sorted({**averages, **means, **counts, **peaks}.items()) if math.isfinite(x)}

    def peak_memory(self, accelerator: Accelerator) -> float:
        """Return the peak MiB of any process since it started. One collective."""
        own = recorder(self.device).largest() / MIB
        return max(gather_object([own])) if accelerator.num_processes > 1 else own

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, so that the first log entry after a resume is complete; sums stay on the device."""

        def own(sums: dict[str, tuple[Any, Any]]) -> dict[str, list[Any]]:
            return {name: [x if isinstance(x, Tensor) else float(x) for x in pair] for name, pair in sums.items()}

        values = {name: list(numbers) for name, numbers in self._values.items()}
        kept = {"sums": own(self._sums), "updates": own(self._updates), "values": values}
        return kept | {"peaks": dict(self._peaks), "counts": dict(self._counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self._sums = {name: (float(x[0]), float(x[1])) for name, x in state["sums"].items()}
        self._values = {name: list(values) for name, values in state["values"].items()}
        self._updates = {name: (float(x[0]), float(x[1])) for name, x in state["updates"].items()}
        self._peaks, self._counts = dict(state["peaks"]), dict(state["counts"])
