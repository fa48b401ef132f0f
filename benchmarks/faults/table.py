"""The table of faults, in its order, and the verdict on a row."""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks.faults import checkpoints, data, numbers, rewards, trackers, trust, world  # noqa: F401
from benchmarks.faults.world import CannotRun, Failed, World

FAULTS = dict(sorted(world.FAULTS.items()))


def verdict(number: int, folder: Path, program: list[str] | None = None, patience: float = 1.0) -> tuple[str, str]:
    """Return pass, fail or "cannot run", and what happened. With CI=true, a row that cannot run fails.

    `program` holds the words that run a module, `patience` multiplies every time limit.
    """
    place = World(folder, program, patience)
    try:
        return "pass", FAULTS[number].inject(place)
    except Failed as error:
        return "fail", str(error)
    except CannotRun as error:
        return ("fail" if os.environ.get("CI") == "true" else "cannot run"), f"cannot run: {error}"
    finally:
        place.close()
