"""The most memory that a process held inside a block, above what it held before."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hf_rlhf.runtime.peak_memory import MIB, Phase, recorder


@contextmanager
def peak(device: str = "cpu") -> Iterator[Phase]:
    """Measure a phase of `hf_rlhf.runtime.peak_memory` on a device.

    Freed memory is returned to the system first, so that the phase cannot reuse it.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    with recorder(torch.device(device)).phase() as phase:
        yield phase


def mib(phase: Phase) -> float:
    """Return the peak of a finished phase above its start."""
    return phase.above / MIB
