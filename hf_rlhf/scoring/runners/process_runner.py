"""Runner in separate processes, and what runners with a pool of workers share."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, ClassVar

from hf_rlhf.batch import Context
from hf_rlhf.contract.plugin_copy import fresh, packed
from hf_rlhf.contract.reward_source import RewardSource
from hf_rlhf.runtime.worker_pool import Events, Lost, Worker, WorkerError, WorkerPool, cores
from hf_rlhf.runtime.worker_process import worker_processes
from hf_rlhf.scoring.answers import RewardError, RewardStartError
from hf_rlhf.scoring.runners.reward_call import CallResult, RewardCall

CHUNK = 8
"""Maximum rows sent to a process at a time."""


class RewardPool(WorkerPool):
    """Runner with a pool of workers for one source."""

    inline = False
    _error: ClassVar[type[WorkerError]] = RewardError
    _start_error: ClassVar[type[WorkerError]] = RewardStartError

    def __init__(
        self,
        label: str,
        source: RewardSource,
        start: Callable[[Events], Worker],
        requests: int,
        *,
        chunk: int = 1,
        shared: bool = False,
    ) -> None:
        self.source, self.shared = source, shared
        inline = source.override("workers=inline")
        super().__init__(
            f"reward {label!r}",
            start,
            count=count_of(source, requests),
            chunk=chunk,
            timeout=source.timeout,
            kind=source.workers,
            advice=f". Set {inline}, or keep only plain data in the dataset's columns",
        )

    def run(
        self, units: list[RewardCall], is_cancelled: Callable[[], bool] | None = None, **_: Any
    ) -> list[CallResult]:
        """Return one result per unit. Raises `RewardError` if workers do not start, or the pool is closed meanwhile."""
        found = super().run(units, is_cancelled, state=pickle.dumps(self.source.state_dict()))
        return [CallResult(kind=x.kind, reason=x.reason) if isinstance(x, Lost) else x for x in found]


def count_of(source: RewardSource, requests: int = 1) -> int:
    """Return the number of workers of a source: if a call gets all rows, one for each of the requests at a time."""
    count = source.num_workers or (min(32, cores() + 4) if source.workers == "threads" else cores())
    return count if source.rowwise else min(count, requests)


def packed_source(label: str, source: RewardSource, context: Context | None) -> bytes:
    """Pickle the parts from which a worker builds its source. Raises `RewardError` if they cannot be pickled."""
    own = fresh(source)
    own.label, own.recipe_path = label, source.recipe_path
    try:
        return packed(own, context, label=label)
    except Exception as error:
        raise RewardStartError(
            f"reward {label!r}: cannot send it to {source.workers}: {type(error).__name__}: {error}. Name its function "
            f"as file.py:name, or set {source.override('workers=inline')}"
        ) from error


def processes(label: str, source: RewardSource, context: Context | None, requests: int = 1) -> RewardPool:
    """Create a pool of processes."""
    start = worker_processes(
        "hf_rlhf.scoring.runners.worker_source:Served",
        packed_source(label, source, context),
        timeout=source.timeout,
        memory_mib=source.memory_mib,
        read=CallResult.from_json,
    )
    return RewardPool(label, source, start, requests, chunk=CHUNK)
