"""Seconds of work on a device: a roofline by default, or constants fitted to the phases of runs.

A phase takes `launch * calls + slowdown * roofline` seconds and the time that bytes between devices take; the roofline is the
longer of operations over peak and bytes over bandwidth. With one run the slowdown of each phase is fitted, with two both.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import starmap

from hf_rlhf.training.planner.work import Phases, Work


@dataclass(frozen=True, kw_only=True)
class Device:
    """Data sheet of a device: operations per second in 16 and in 32 bits, bytes per second of its memory and to another device,
    and GiB of memory."""

    half: float
    single: float
    bandwidth: float
    link: float
    memory: float
    launch: float = 1e-4
    """Seconds of a call of a layer, however small: about 25 kernels of 4 microseconds."""


DEVICES = {
    "cpu": Device(half=5e10, single=5e10, bandwidth=2e10, link=5e9, memory=16, launch=2e-4),
    "a100": Device(half=3.12e14, single=1.56e14, bandwidth=2.0e12, link=3.0e11, memory=80),
    "h100": Device(half=9.89e14, single=4.95e14, bandwidth=3.35e12, link=4.5e11, memory=80),
    "h200": Device(half=9.89e14, single=4.95e14, bandwidth=4.8e12, link=4.5e11, memory=141),
    "b200": Device(half=2.25e15, single=1.1e15, bandwidth=8.0e12, link=9.0e11, memory=180),
}
"""Dense products without sparsity, 32 bits as TF32, NVLink in one direction; a CPU's numbers are those of a core."""
SLOWDOWN = 2.5
"""Factor on the roofline where nothing was measured: 40 % of the peak."""


@dataclass(frozen=True)
class Constants:
    """Seconds of a layer's call and slowdown of the roofline, of each phase."""

    device: Device
    fitted: dict[str, tuple[float, float]]

    def seconds(self, phase: str, works: Sequence[Work]) -> float:
        """Return the seconds of a phase."""
        launch, slowdown = self.fitted.get(phase, (self.device.launch, SLOWDOWN))
        sent = sum(work.sent for work in works) / self.device.link
        return launch * calls_of(works) + slowdown * roofline(works, self.device) + sent


def roofline(works: Sequence[Work], device: Device) -> float:
    """Return the least seconds that operations and bytes of the device's memory take."""
    return sum(max(w.flops / (device.half if w.half else device.single), w.moved / device.bandwidth) for w in works)


def calls_of(works: Sequence[Work]) -> float:
    """Return the calls of layers."""
    return sum(work.calls for work in works)


def fit(device: Device, runs: Sequence[tuple[Phases, dict[str, float]]]) -> Constants:
    """Return the constants that give the measured seconds of each phase: `runs` are (work, phase -> seconds).

    Least squares of the relative error, with no constant below 0.
    """
    fitted = {}
    for phase in {name for _, seconds in runs for name in seconds}:
        known = [(work[phase], seconds[phase]) for work, seconds in runs if work.get(phase) and phase in seconds]
        points = [(calls_of(works), roofline(works, device), x) for works, x in known if x > 0]
        if known:
            fitted[phase] = _least_squares(points, device.launch) if points else (0.0, 0.0)
    return Constants(device, fitted)


def _least_squares(points: Sequence[tuple[float, float, float]], launch: float) -> tuple[float, float]:
    """Return (seconds per call, slowdown) of (calls, roofline, seconds)."""
    if len(points) == 1:
        ((calls, floor, seconds),) = points
        scale = seconds / (launch * calls + SLOWDOWN * floor)
        return scale * launch, scale * SLOWDOWN
    scaled = [(calls / seconds, floor / seconds) for calls, floor, seconds in points]
    xx, xy, yy = (
        sum(starmap(product, scaled)) for product in (lambda x, y: x * x, lambda x, y: x * y, lambda x, y: y * y)
    )
    x, y = sum(p[0] for p in scaled), sum(p[1] for p in scaled)
    both = xx * yy - xy * xy
    found = [(x / xx, 0.0), (0.0, y / yy)]
    if both > 1e-9 * xx * yy:
        inner = (x * yy - y * xy) / both, (y * xx - x * xy) / both
        found += [inner] if min(inner) >= 0 else []
    return min(found, key=lambda c: statistics.fmean((c[0] * p + c[1] * q - 1) ** 2 for p, q in scaled))
