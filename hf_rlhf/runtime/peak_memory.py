"""Measure the peak memory of the phases of a run, with a high-water mark that is read and reset.

A process has one recorder per device, because there is one mark. Phases may nest, and overlap in threads: whenever one
starts or ends, the mark is recorded for every open phase and then reset, so each phase gets the largest value reached while
it was open.

On CUDA and similar devices the mark is the allocator's (tensors, not the context or the allocator's reserve). On a CPU it is
the resident set of this process: the kernel's mark if it can be reset (Linux), otherwise the largest of samples.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch

MIB = 2**20
STATUS, CLEAR_REFS = "/proc/self/status", "/proc/self/clear_refs"
INTERVAL_S = 0.01
"""Seconds between two samples on systems without a mark."""


class Mark(Protocol):
    """A high-water mark of memory, in bytes."""

    def take(self) -> tuple[int, int]:
        """Return (most held since the last reset, held now), and reset the mark."""

    def watch(self, on: bool) -> None:
        """Start or stop sampling, if the mark needs it."""


class ResidentMark:
    """The kernel's mark of this process's resident set (`VmHWM`), reset by writing 5 to `clear_refs`; Linux."""

    @classmethod
    def works(cls) -> bool:
        """Return whether this system has the mark and lets this process reset it."""
        try:
            cls().take()
        except (OSError, KeyError):
            return False
        return True

    def take(self) -> tuple[int, int]:
        """See `Mark`."""
        fields = dict(
            line.split(b":", 1) for line in _read(STATUS).splitlines() if line.startswith((b"VmHWM", b"VmRSS"))
        )
        peak, held = (int(fields[name].split()[0]) * 1024 for name in (b"VmHWM", b"VmRSS"))
        _write(CLEAR_REFS, b"5")
        return max(peak, held), held

    def watch(self, on: bool) -> None:
        """Do nothing: the kernel always records."""


class AllocatorMark:
    """The mark of a device's caching allocator (`torch.cuda`, `torch.xpu`): bytes in tensors."""

    def __init__(self, device: torch.device):
        self.device, self.module = device, torch.get_device_module(device)

    def take(self) -> tuple[int, int]:
        """See `Mark`."""
        peak = self.module.max_memory_allocated(self.device)
        self.module.reset_peak_memory_stats(self.device)
        return peak, self.module.memory_allocated(self.device)

    def watch(self, on: bool) -> None:
        """Do nothing: the allocator always records."""


class SampledMark:
    """The largest of samples, taken every `INTERVAL_S` by a thread while watched."""

    def __init__(self, read: Callable[[], int]):
        self.read = read
        self._largest = 0
        self._stop: threading.Event | None = None

    def take(self) -> tuple[int, int]:
        """See `Mark`."""
        held = self.read()
        largest, self._largest = max(self._largest, held), held
        return largest, held

    def watch(self, on: bool) -> None:
        """Start or stop the thread."""
        if self._stop is not None:
            self._stop.set()
            self._stop = None
        if on:
            self._stop = threading.Event()
            threading.Thread(target=self._sample, args=(self._stop,), name="hf_rlhf-memory", daemon=True).start()

    def _sample(self, stop: threading.Event) -> None:
        while not stop.wait(INTERVAL_S):
            self._largest = max(self._largest, self.read())


def mark_of(device: torch.device) -> Mark:
    """Return the best mark that this system has for `device`."""
    if device.type != "cpu":
        module: Any = torch.get_device_module(device)
        if hasattr(module, "reset_peak_memory_stats"):
            return AllocatorMark(device)
        if hasattr(module, "driver_allocated_memory"):  # MPS has no mark
            return SampledMark(module.driver_allocated_memory)
    return ResidentMark() if ResidentMark.works() else SampledMark(resident)


def resident() -> int:
    """Return the bytes of this process's resident set, by psutil."""
    import psutil

    return int(psutil.Process().memory_info().rss)


@dataclass(eq=False)
class Phase:
    """Memory while a phase was open, in bytes."""

    held: int
    """Held at the start."""
    peak: int
    """The most held. Final once the phase is closed."""

    @property
    def above(self) -> int:
        """The peak above what was held at the start."""
        return self.peak - self.held


class Recorder:
    """Record a mark for the open phases."""

    def __init__(self, mark: Mark):
        self._mark = mark
        self._lock = threading.Lock()
        self._open: list[Phase] = []
        self._largest = 0

    @contextmanager
    def phase(self) -> Iterator[Phase]:
        """Record a phase until the block ends, in any thread."""
        with self._lock:
            phase = Phase(held := self._count(), held)
            self._open.append(phase)
            if len(self._open) == 1:
                self._mark.watch(True)
        try:
            yield phase
        finally:
            with self._lock, suppress(OSError):  # a phase that ends in an error keeps that error
                self._count()
            self._close(phase)

    def _close(self, phase: Phase) -> None:
        with self._lock:
            self._open.remove(phase)
            if not self._open:
                self._mark.watch(False)

    def largest(self) -> int:
        """Return the most ever held, between and before phases too."""
        with self._lock:
            self._count()
            return self._largest

    def _count(self) -> int:
        peak, held = self._mark.take()
        self._largest = max(self._largest, peak)
        for phase in self._open:
            phase.peak = max(phase.peak, peak)
        return held


@cache
def recorder(device: torch.device) -> Recorder:
    """Return the recorder of `device` in this process."""
    return Recorder(mark_of(device))


os.register_at_fork(after_in_child=recorder.cache_clear)  # a forked child has a resident set and threads of its own


def _read(path: str) -> bytes:
    file = os.open(path, os.O_RDONLY)
    try:
        return os.read(file, 8192)
    finally:
        os.close(file)


def _write(path: str, content: bytes) -> None:
    file = os.open(path, os.O_WRONLY)
    try:
        os.write(file, content)
    finally:
        os.close(file)
