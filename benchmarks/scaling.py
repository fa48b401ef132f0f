"""Growth of a cycle's time and memory with completions, their length, the vocabulary, the model and the plugins.

`python -m benchmarks.scaling [--quick] [--rounds 2] [--only AXIS ...] [--json PATH]`: each point is a line as in
benchmarks.trl, run by us and, where TRL has what is swept, by TRL, in processes of their own. KLs beyond the first and
filters are ours alone. Sizes get the exponent of their growth, by least squares on logarithms: seconds ~ size^exponent.
Numbers of things get the seconds that each further one costs, by least squares: completions of up to 128 tokens in a group
with a prompt of 192, and plugins, on a model so small that they show.

The result goes to benchmarks/results/scaling.json after every axis and to docs/benchmarks.md and docs/scaling.png; of a
quick run to scaling_quick.json and scaling_quick.md alone.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.record import head
from benchmarks.trl import RESULTS, SYSTEMS, lengths_met, spawn
from benchmarks.work import Line

BASE = Line(name="scaling", prompts=2, longest=64)
"""Smaller than a line of benchmarks.trl: a sweep has many."""
GROUP = replace(BASE, prompts=1, longest=128, lengths="quantiles", shortest_prompt=192, longest_prompt=192)
GOAL = 6
"""A further completion is to cost at most 1 / `GOAL` of what it costs TRL."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Lines that differ in one size."""

    name: str
    title: str
    axis: str
    points: tuple[tuple[int, Line], ...]
    """(where on the axis, the line)."""
    scale: str = "log"
    """log: a power is fitted; linear: a slope."""
    systems: tuple[str, ...] = SYSTEMS
    cycles: int = 1
    """Measured cycles of each process, times what the command line says."""


def model_of(hidden: int, layers: int) -> dict[str, Any]:
    """Return settings of a line with an inner width of 4 times the hidden size and heads of 32."""
    heads = hidden // 32
    return {"hidden": hidden, "layers": layers, "intermediate": 4 * hidden, "heads": heads, "kv_heads": heads // 2}


def parameters(line: Line) -> int:
    """Numbers in the matrices."""
    from benchmarks.floor import head_weights, trunk_weights

    return trunk_weights(line) + head_weights(line)


def sweeps(quick: bool = False) -> list[Sweep]:
    """All axes; of a quick run each has its least and its second point."""
    counts = (1, 16, 64)
    tiny = replace(BASE, **model_of(64, 2), vocabulary=512, longest=16)
    models = [replace(BASE, **model_of(*size)) for size in ((128, 4), (256, 6), (512, 8))]
    swept = [
        Sweep(
            name="completions",
            title="Completions",
            axis="completions of one prompt",
            points=tuple((n, replace(GROUP, group=n)) for n in (8, 16, 24, 32)),
            scale="linear",
        ),
        Sweep(
            name="length",
            title="Length",
            axis="tokens of every completion",
            points=tuple((n, replace(BASE, longest=n, lengths="full")) for n in (32, 64, 128, 256)),
        ),
        Sweep(
            name="vocabulary",
            title="Vocabulary",
            axis="tokens in the vocabulary",
            points=tuple((n, replace(BASE, vocabulary=n)) for n in (4096, 32768, 151936)),
        ),
        Sweep(
            name="model",
            title="Model",
            axis="parameters",
            points=tuple((parameters(line), line) for line in models),
        ),
        Sweep(
            name="rewards",
            title="Reward functions",
            axis="reward functions",
            points=tuple((n, replace(tiny, rewards=n)) for n in counts),
            scale="linear",
            cycles=8,
        ),
        Sweep(
            name="kls",
            title="KLs in the loss",
            axis="KLs to one reference",
            points=tuple((n, replace(tiny, beta=0.04, kls=n)) for n in counts),
            scale="linear",
            cycles=8,
            systems=("ours",),
        ),
        Sweep(
            name="filters",
            title="Filters",
            axis="filters",
            points=tuple((n, replace(tiny, filters=n)) for n in counts),
            scale="linear",
            cycles=8,
            systems=("ours",),
        ),
    ]
    return [replace(sweep, points=sweep.points[:2]) for sweep in swept] if quick else swept


# Fits


def straight(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """(start, slope) of the line through the points by least squares."""
    middle = sum(xs) / len(xs)
    height = sum(ys) / len(ys)
    spread = sum((x - middle) ** 2 for x in xs)
    if spread == 0:
        raise ValueError("a line needs two different places on its axis")
    slope = sum((x - middle) * (y - height) for x, y in zip(xs, ys, strict=True)) / spread
    return height - slope * middle, slope


def fit(ats: Sequence[float], seconds: Sequence[float], scale: str) -> dict[str, float]:
    """`exponent` and `factor` of factor * at^exponent, or `slope` and `start` of start + slope * at, with
    `slope_error`, the slope's standard error, of three points or more."""
    if scale == "log":
        start, slope = straight([math.log(x) for x in ats], [math.log(s) for s in seconds])
        return {"exponent": slope, "factor": math.exp(start)}
    start, slope = straight(ats, seconds)
    found = {"slope": slope, "start": start}
    if len(ats) > 2:
        middle = sum(ats) / len(ats)
        rest = sum((s - start - slope * x) ** 2 for x, s in zip(ats, seconds, strict=True)) / (len(ats) - 2)
        found["slope_error"] = math.sqrt(rest / sum((x - middle) ** 2 for x in ats))
    return found


# Runs


def measure(sweep: Sweep, rounds: int, cycles: int) -> dict[str, Any]:
    """Seconds and memory at each point, medians over rounds and cycles, and the fits."""
    points = []
    for at, line in sweep.points:
        runs: dict[str, list[dict[str, Any]]] = {system: [] for system in SYSTEMS}
        for i in range(rounds):
            for system in sweep.systems if i % 2 == 0 else reversed(sweep.systems):
                runs[system].append(spawn(system, line, cycles * sweep.cycles))
        points.append(point_of(at, line, {system: runs[system] for system in sweep.systems}))
        print(f"{sweep.name} {at:,}: {said(points[-1])}", flush=True)
    return swept(sweep, points)


def point_of(at: int, line: Line, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """One point; its ratio is None where the lengths were not met, or TRL has no such thing."""
    seconds = {
        system: median(cycle["seconds"] for run in found for cycle in run["cycles"]) for system, found in runs.items()
    }
    met = lengths_met(line, runs)
    return {
        "at": at,
        "lengths_met": met,
        "seconds": seconds,
        "peak_mib": {system: median(run["peak_mib"] for run in found) for system, found in runs.items()},
        "ratio": seconds["trl"] / seconds["ours"] if met and "trl" in seconds else None,
    }


def swept(sweep: Sweep, points: list[dict[str, Any]]) -> dict[str, Any]:
    """Add the fits to a sweep, for completions also the ratio of TRL's slope to ours."""
    ats = [float(point["at"]) for point in points]
    fits = {system: fit(ats, [point["seconds"][system] for point in points], sweep.scale) for system in sweep.systems}
    found: dict[str, Any] = {"name": sweep.name, "title": sweep.title, "axis": sweep.axis, "scale": sweep.scale}
    found |= {"points": points, "fits": fits}
    if sweep.name == "completions":
        ours, theirs = fits["ours"]["slope"], fits["trl"]["slope"]
        found |= {"slope_ratio": theirs / ours if ours > 0 else None, "goal": GOAL}
    return found


def said(point: dict[str, Any]) -> str:
    """Describe a point in words."""
    return ", ".join(
        f"{system} {point['seconds'][system]:.2f} s {point['peak_mib'][system]:.0f} MiB" for system in point["seconds"]
    )


def write(found: dict[str, Any], path: Path) -> None:
    """Write the result and its tables."""
    from benchmarks.speed_page import publish, scaling_section

    publish(found, path, "Growth", scaling_section(found))


def main() -> None:
    """Run the sweeps."""
    names = [sweep.name for sweep in sweeps()]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two points of each axis, one round of one cycle")
    parser.add_argument("--rounds", type=int, help="processes of each system per point, 2 when left out")
    parser.add_argument("--cycles", type=int, default=1, help="measured cycles of each process")
    parser.add_argument("--only", nargs="+", choices=names, metavar="AXIS", help=f"of {', '.join(names)}")
    parser.add_argument("--json", type=Path, help="where the result goes")
    options = parser.parse_args()
    path = options.json or RESULTS / ("scaling_quick.json" if options.quick else "scaling.json")
    rounds = options.rounds or (1 if options.quick else 2)
    if rounds < 1 or options.cycles < 1:
        parser.error("--rounds and --cycles are at least 1")
    command = "python -m benchmarks.scaling" + (" --quick" if options.quick else "")
    found: dict[str, Any] = {**head(command), "rounds": rounds, "cycles": options.cycles, "sweeps": []}
    for sweep in sweeps(options.quick):
        if options.only is None or sweep.name in options.only:
            found["sweeps"].append(measure(sweep, rounds, options.cycles))
            write(found, path)


if __name__ == "__main__":
    main()
