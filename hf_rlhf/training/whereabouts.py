"""Processes that train together and wait for each other: how long they do, and which one is missing, last seen where.

Each process writes what it does into the output folder, at each change and once a second. When a collective fails, the others
read it there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from hf_rlhf.runtime.activity import current, listeners

FOLDER = "_processes"
"""Folder in the output folder; Trainer pushes no file below a name that begins so."""
BEAT_S = 1.0
"""Seconds between two notes of a process."""
WIDEST = 200
"""Characters of a note's activity."""
SILENCE_S = 3.0
"""Seconds without a note after which a process does not answer."""


class LostProcess(RuntimeError):
    """Raised in place of a failed collective: it names the processes that do not answer, and where they were last seen."""


def bound_waits(args: Any) -> None:
    """Let `ddp_timeout` hold on a CPU too, where transformers leaves gloo its 30 minutes."""
    if args.world_size > 1 and torch.distributed.get_backend() == "gloo":
        from torch.distributed.distributed_c10d import _set_pg_timeout

        _set_pg_timeout(timedelta(seconds=args.ddp_timeout))


def is_collective(error: BaseException) -> bool:
    """Return whether an error is that of a process that the others do not answer."""
    text = r"\bgloo\b|\bNCCL\b|Connection (closed|reset) by peer|Broken pipe"
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and re.search(text, str(error)) is not None
    )


@dataclass
class Whereabouts:
    """Notes of what this process does, and what the others noted."""

    folder: Path
    rank: int
    processes: int
    step: Callable[[], int]
    """Returns the number of finished optimizer steps."""
    _file: int | None = None
    _stopped: threading.Event = field(default_factory=threading.Event)

    def begin(self) -> None:
        """Write a note now, whenever an activity begins, and once a second."""
        self.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.folder / f"{self.rank}.json", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        self._stopped = threading.Event()
        listeners.append(self.note)
        self.note()
        threading.Thread(target=self._beat, args=(self._stopped,), name="hf_rlhf-whereabouts", daemon=True).start()

    def stop(self) -> None:
        """Write no more."""
        self._stopped.set()
        if self._file is not None:
            listeners.remove(self.note)
            file, self._file = self._file, None
            os.close(file)

    def end(self) -> None:
        """Write no more, after a run that every process ended; the first one removes the notes."""
        self.stop()
        if self.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _beat(self, stopped: threading.Event) -> None:
        while not stopped.wait(BEAT_S):
            self.note()

    def note(self) -> None:
        """Write down what this process does."""
        doing = " and ".join(f"{x.name} {x.progress}".strip() for x in current()) or "training"
        note = json.dumps({"step": self.step(), "doing": doing[:WIDEST], "at": time.time()})
        file = self._file
        if file is not None:
            with suppress(OSError):  # closed meanwhile; a full disk ends the run elsewhere
                os.pwrite(file, note.ljust(2 * WIDEST).encode(), 0)

    def _others(self) -> dict[int, dict[str, Any]]:
        found = {}
        for rank in range(self.processes):
            with suppress(OSError, ValueError):
                if rank != self.rank:
                    found[rank] = json.loads((self.folder / f"{rank}.json").read_text(encoding="utf-8"))
        return found

    def missing(self) -> str:
        """Return which other processes do not answer, and where each was last seen; all others where every one does."""
        before = self._others()
        time.sleep(SILENCE_S)
        after = self._others()
        silent = {rank: note for rank, note in after.items() if note == before.get(rank)}
        words = "does not answer; it was last seen in" if silent else "answers; it is in"
        return "; ".join(
            f"process {rank} {words} {note['doing']} of step {note['step'] + 1}, {max(0.0, time.time() - note['at']):.0f} s ago"
            for rank, note in sorted((silent or after).items())
        )
