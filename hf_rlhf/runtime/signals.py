"""Stop a run on a signal, and lock the output folder for one run."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from filelock import FileLock, Timeout
from transformers import TrainerCallback

from hf_rlhf.runtime.errors import UserError


class StoppedError(UserError):
    """The run was stopped by a signal, after a checkpoint. The exit code is that of the signal."""

    def __init__(self, number: int, step: int, folder: Path):
        self.code = 128 + number
        super().__init__(
            f"stopped by {signal.Signals(number).name} after step {step}, with a checkpoint in {folder}: "
            "the same command continues it, `hf-rlhf train` with --resume"
        )


class StopOnSignal(TrainerCallback):
    """Finish the optimizer step, save a checkpoint and end training on SIGTERM or SIGINT; a second signal ends it at once.

    Processes agree after each step, so that all stop after the same one. Active inside `with`, in the main thread.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.number: int | None = None
        """The signal received."""
        self.stopped_after: int | None = None
        """The step after which training ended because of it."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self.__exit__()  # the next signal has its previous handler

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Request a checkpoint and the end if any process received a signal."""
        number = self.number or 0
        if args.world_size > 1:
            flag = torch.tensor(number, device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            number = int(flag)
        if number:
            self.number, self.stopped_after = number, state.global_step
            control.should_save = control.should_training_stop = True

    def check(self, folder: Path) -> None:
        """Raise `StoppedError` if training ended because of a signal."""
        if self.number is not None and self.stopped_after is not None:
            raise StoppedError(self.number, self.stopped_after, folder)


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Lock the folder inside the block, in the first process. Raises `UserError` if another run holds it."""
    if int(os.environ.get("RANK", "0")) != 0:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"another run is writing into {folder}: wait until it ends, or choose another --output-dir"
        ) from None
    try:
        yield
    finally:
        lock.release()
