"""Run work in a thread while the main thread continues."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
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
