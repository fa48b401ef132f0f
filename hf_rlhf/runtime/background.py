"""Work in a thread of its own, beside what the main thread does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import TypeVar

import torch

T = TypeVar("T")


@contextmanager
def run_in_thread(work: Callable[[], T], device: torch.device) -> Iterator[Future[T]]:
    """Runs `work` in a thread, without gradients and with `device` as the current one, while the block runs.

    The future gives its result or raises its error. The block is left only when `work` has ended, also after an error in
    the block, which is then the one that is raised: nothing is left running.
    """

    def run() -> T:
        # the gradient mode and the current device are a thread's own
        with torch.no_grad(), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return work()

    with ThreadPoolExecutor(1, thread_name_prefix="hf_rlhf-beside") as pool:
        yield pool.submit(run)
