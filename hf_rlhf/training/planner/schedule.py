"""A discrete-event model of rollouts and updates on devices that wait for each other."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

STEPS = 64
"""Rollouts of a simulation."""


@dataclass
class Clock:
    """Devices that do one thing at a time, in the order asked for."""

    free: dict[str, float] = field(default_factory=dict)
    busy: dict[str, float] = field(default_factory=dict)

    def run(self, device: str, seconds: float, *after: float) -> float:
        """Return when work ends that begins once the device is free and what comes before has ended."""
        end = max([self.free.get(device, 0.0), *after]) + seconds
        self.free[device] = end
        self.busy[device] = self.busy.get(device, 0.0) + seconds
        return end


@dataclass(frozen=True)
class Timing:
    """Seconds of a step, and the share of it that trainer and engine are idle."""

    step: float
    idle: dict[str, float]


def simulate(
    rollout: float, send: float, learn: float, *, ahead: int | None = None, spread: float = 0.0, steps: int = STEPS
) -> Timing:
    """Return the timing of steps whose rollout, sending of weights and learning take so many seconds.

    `ahead`: rollouts asked for before the update they wait for, on an engine with devices of its own; None: in turn on
    the same devices. A rollout takes `rollout` seconds on average, with a relative deviation of `spread`.
    """
    draw, clock = random.Random(0), Clock()
    engine = "trainer" if ahead is None else "engine"
    k = ahead or 0
    lengths = [rollout * max(0.0, draw.gauss(1.0, spread)) for _ in range(steps)]
    done = [clock.run(engine, seconds) for seconds in lengths[:k]]
    learned = 0.0
    for i in range(steps):
        sent = clock.run("trainer", send, done[i] if k else learned)
        if i + k < steps:  # with several ahead the engine is at work while weights are sent, and loads them afterwards
            done.append(clock.run(engine, lengths[i + k] + (send if k > 1 else 0.0), sent))
        learned = clock.run("trainer", learn, done[i], sent)
    return Timing(learned / steps, {name: 1 - seconds / learned for name, seconds in clock.busy.items()})
