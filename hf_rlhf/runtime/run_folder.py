"""The output folder of a run: locked while a run writes into it, and never taken over by another one unasked."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from hf_rlhf.runtime.errors import UserError

METRICS = "metrics.jsonl"
LOCK = "_lock"
"""Locked while a run writes into its folder; Trainer pushes no file whose name begins so."""
RUN_FILES = ("summary.json", METRICS, "recipe.yaml")
PATIENCE_S = 3.0
"""Seconds to wait for a lock: child processes of a killed run hold it until they have ended too."""


def run_in(folder: Path, but: tuple[str, ...] = ()) -> bool:
    """Return whether a folder contains a run: one of its files, except those named in `but`, or a checkpoint."""
    return any((folder / name).exists() for name in RUN_FILES if name not in but) or any(folder.glob("checkpoint-*"))


def remove_run(folder: Path) -> None:
    """Delete a run's summary, report and checkpoints; training overwrites its other files."""
    for name in ("summary.json", "report.html"):
        (folder / name).unlink(missing_ok=True)
    for checkpoint in folder.glob("checkpoint-*"):
        if checkpoint.is_dir() and checkpoint.name.removeprefix("checkpoint-").isdigit():
            shutil.rmtree(checkpoint)


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Lock the folder inside the block, in the first process. Raises `UserError` if another run holds it.

    The thread that holds it may enter again.
    """
    if int(os.environ.get("RANK", "0")) != 0:
        yield
        return
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.resolve() / LOCK, timeout=PATIENCE_S, is_singleton=True)
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
        if made and [path.name for path in folder.iterdir()] == [LOCK]:  # the run was refused before it wrote anything
            shutil.rmtree(folder, ignore_errors=True)
