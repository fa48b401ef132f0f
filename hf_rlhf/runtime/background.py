"""Run work in threads while the calling one continues."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import TypeVar

import torch

T = TypeVar("T")


@contextmanager
def run_in_thread(work: Callable[[], T], device: torch.device) -> Iterator[Future[T]]:
    """Run `work` in a thread while the block runs, without gradients and with `device` as the current device.

    The future returns its result or raises its error. The block exits only after `work` has ended, even if the block raises,
    in which case the block's error is raised: nothing is left running.
    """

    def run() -> T:
        # the gradient mode and the current device are a thread's own
        with torch.no_grad(), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return work()

    with ThreadPoolExecutor(1, thread_name_prefix="hf_rlhf-beside") as pool:
        yield pool.submit(run)


def run_by_device(works: Sequence[tuple[torch.device, Callable[[], T]]]) -> list[T]:
    """Run works of one device one after another, and those of different devices at the same time.

    Those of the first device run in the calling thread. Returns the results in the order of `works`.
    """
    queues: dict[torch.device, list[int]] = {}
    for i, (device, _) in enumerate(works):
        queues.setdefault(device, []).append(i)

    def run(numbers: list[int]) -> dict[int, T]:
        return {i: works[i][1]() for i in numbers}

    found: dict[int, T] = {}
    with ExitStack() as threads:
        others = [threads.enter_context(run_in_thread(partial(run, x), d)) for d, x in list(queues.items())[1:]]
        found |= run(next(iter(queues.values()), []))
        for other in others:
            found |= other.result()
    return [found[i] for i in range(len(works))]
