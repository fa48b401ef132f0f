"""Completions that vLLM servers were asked for, which land prompt by prompt."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator, Sequence
from queue import SimpleQueue
from typing import Any

from hf_rlhf.axes import Pending
from hf_rlhf.batch import Completions

from ._vllm_server import Row, begin

Landed = Callable[[int, list[Row]], None]
"""Called with the number of a prompt and its rows."""


class Landing(Pending):
    """Rows of prompts that are sampled meanwhile."""

    def __init__(
        self,
        work: Callable[[Landed], Coroutine[Any, Any, list[list[Row]]]],
        prompts: int,
        version: str,
        copies: int,
        reports: bool,
    ) -> None:
        """Begin. `copies`: times that each row counts; `reports`: whether rows have log-probs."""
        self._prompts, self._version, self._copies, self._reports = prompts, version, copies, reports
        self._queue: SimpleQueue[tuple[int, list[Row]] | None] = SimpleQueue()
        self._done = begin(work(lambda i, rows: self._queue.put((i, rows))))
        self._done.add_done_callback(lambda _: self._queue.put(None))

    def __iter__(self) -> Iterator[tuple[int, Completions]]:
        """Yield the prompts' completions as they land, once. Raises the error of a request that failed."""
        while (found := self._queue.get()) is not None:
            i, rows = found
            yield i, self._completions([rows])
        self._done.result()

    def result(self) -> Completions:
        """Return all completions, in the order of the prompts."""
        return self._completions(self._done.result())

    def _completions(self, groups: Sequence[list[Row]]) -> Completions:
        return completions([row for group in groups for row in group * self._copies], self._version, self._reports)


def completions(rows: Sequence[Row], version: str, reports: bool) -> Completions:
    """Return rows as the host takes them; `reports`: whether they have log-probs."""
    return Completions(
        ids=[list(row.ids) for row in rows],
        finish_reasons=[row.finish_reason for row in rows],
        logps=[row.logps for row in rows] if reports else None,  # type: ignore[misc]
        versions=[version] * len(rows),
    )
