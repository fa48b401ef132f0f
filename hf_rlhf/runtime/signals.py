"""Stop a run on a signal, at the end of its optimizer step."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback

from hf_rlhf.runtime.errors import UserError


class StoppedError(UserError):
    """The run was stopped by a signal, after a checkpoint or the final model. The exit code is that of the signal."""

    def __init__(self, number: int, left: str):
        self.code = 128 + number
        super().__init__(f"stopped by {signal.Signals(number).name} {left}")


class StopOnSignal(TrainerCallback):
    """Finish the optimizer step, save a checkpoint and end training on SIGTERM, SIGINT or SIGHUP.

    A second signal ends the run at once. Processes agree after each step, so that all stop after the same one. Active inside
    `with`, which may be nested, in the main thread; the handlers from before are put back. A SIGHUP that is ignored, as under
    nohup, stays ignored.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))

    def __init__(self) -> None:
        self.number: int | None = None
        """The signal received."""
        self.stopped_after: int | None = None
        """The step after which training ended because of it."""
        self._before: dict[int, Any] = {}
        self._depth = 0

    def __enter__(self) -> StopOnSignal:
        self._depth += 1
        if self._depth == 1 and threading.current_thread() is threading.main_thread():
            self.number = self.stopped_after = None
            for number in self.SIGNALS:
                before = signal.getsignal(number)
                nohup = before is signal.SIG_IGN and number not in (signal.SIGTERM, signal.SIGINT)
                if before is not None and not nohup:  # None: a handler of C code, which Python could not put back
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._put_back()

    def _put_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._put_back()  # the next signal has its previous handler

    def agreed(self, args: Any) -> int:
        """Return the signal that any process received, or 0."""
        number = self.number or 0
        if args.world_size > 1:
            flag = torch.tensor(number, device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            number = int(flag)
        if number:
            self.number = number
        return number

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Request a checkpoint and the end if any process received a signal."""
        if self.agreed(args):
            self.stopped_after = state.global_step
            control.should_save = control.should_training_stop = True

    def check(self, folder: Path) -> None:
        """Raise `StoppedError` if training ended because of a signal."""
        if self.number is not None and self.stopped_after is not None:
            raise StoppedError(
                self.number,
                f"after step {self.stopped_after}, with a checkpoint in {folder}: the same command continues it, "
                "`hf-rlhf train` with --resume, `train` with resume_from_checkpoint=True",
            )
