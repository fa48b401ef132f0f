"""Our grpo and rloo next to TRL's trainers: the same work, seconds of a cycle, peak memory, and how far from the floor.

`python -m benchmarks.trl [--quick] [--rounds 3] [--cycles 2] [--only NAME ...] [--json PATH]`: every run is a process of
its own on one thread in float32, ours and TRL's in turn; the first cycle of each is dropped. Weights, prompts and lengths
of completions are the same (benchmarks/work.py); cycles, phases and peaks are defined in
benchmarks/systems.py, what a floor is in benchmarks/floor.py.
`python -m benchmarks.trl --one ours|trl --line NAME`: one run in this process, printed as JSON.
`python -m benchmarks.trl --page`: docs/benchmarks.md from the results, without a run.

A line has a ratio only where both systems made completions of the given lengths and, on one scripted rollout, gradients
that agree to 1e-4 in every optimizer step. Where one does not, the command ends with an error.

The result goes to benchmarks/results/trl.json after every line and, as a table, to docs/benchmarks.md; of a quick run to
trl_quick.json and trl_quick.md alone.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import floor, record
from benchmarks.work import Line, forced_lengths

RESULTS = Path(__file__).parent / "results"
SYSTEMS = ("trl", "ours")
TOLERANCE = 1e-4
"""Maximum difference of the gradients, relative to TRL's."""
WIDE: dict[str, Any] = {"hidden": 512, "layers": 8, "intermediate": 2048}
LINES = [
    Line(name="grpo", title="GRPO, vocabulary 4k, completions up to 128"),
    Line(name="grpo-256", title="same, up to 256", longest=256),
    Line(name="grpo-prompts", title="same, prompts of 128-256 tokens", shortest_prompt=128, longest_prompt=256),
    Line(name="grpo-epochs", title="same, two epochs per rollout", epochs=2),
    Line(name="grpo-kl", title="same, KL to a reference", beta=0.04),
    Line(name="grpo-full", title="same, every completion full length", lengths="full"),
    Line(name="grpo-16", title="same, 16 completions per prompt", group=16),
    Line(name="grpo-152k", title="GRPO, vocabulary 152k, up to 64", vocabulary=151936, longest=64),
    Line(name="rloo", title="RLOO", algorithm="rloo"),
    Line(name="rloo-kl", title="RLOO, KL to a reference", algorithm="rloo", beta=0.05),
    Line(name="grpo-wide", title="GRPO, hidden 512, 8 layers", **WIDE),
    Line(name="grpo-dead", title="GRPO, half of the groups with equal rewards: the update", dead=0.5),
]
QUICK = ("grpo", "rloo-kl")
QUIET = {"CI": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
"""The environment in which nothing is sent, fetched or warned of."""
Sides = dict[str, list[dict[str, Any]]]


# Runs


def one(system: str, line: Line, cycles: int, gradients: Path | None) -> dict[str, Any]:
    """One run in this process, as plain data."""
    os.environ |= QUIET  # read where TRL is imported
    from transformers.utils import logging

    from benchmarks.systems import run

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    found = run(system, line, cycles + 1, gradients)
    return {
        "cycles": [asdict(cycle) for cycle in found.cycles[1:]],
        "peak_mib": found.peak_mib,
        "lengths": found.lengths,
    }


def spawn(system: str, line: Line, cycles: int, gradients: Path | None = None) -> dict[str, Any]:
    """Run one system in a separate process."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.trl", "--one", system, "--cycles", str(cycles)]
    command += ["--line", json.dumps(asdict(line))]
    if gradients is not None:
        command += ["--gradients", str(gradients)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{system} failed on the line {line.name}:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def apart(folder: Path) -> float:
    """Return the largest relative difference of the systems' saved gradients."""
    import torch

    from benchmarks.systems import difference

    return difference(torch.load(folder / "ours.pt"), torch.load(folder / "trl.pt"))


def compare(line: Line, rounds: int, cycles: int) -> dict[str, Any]:
    """Measure the row of a line: systems in turn, and the machine's rates before and after."""
    rates = floor.measure(line)
    runs: Sides = {system: [] for system in SYSTEMS}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(rounds):
            for system in SYSTEMS if i % 2 == 0 else reversed(SYSTEMS):
                path = Path(folder, f"{system}.pt") if i == 0 else None
                runs[system].append(spawn(system, line, cycles, path))
        difference = apart(Path(folder))
    return row_of(line, runs, difference, rates.better(floor.measure(line)))


# Numbers


def lengths_met(line: Line, runs: Sides) -> bool:
    """Return True if every completion had its prescribed length."""
    found = [lengths for system in runs for run in runs[system] for lengths in enumerate(run["lengths"])]
    return bool(found) and all(lengths == forced_lengths(line, cycle).tolist() for cycle, lengths in found)


def floors(line: Line, cycles: int, rates: floor.Rates) -> dict[str, float]:
    """Return the minimum seconds of each phase, averaged over the measured cycles."""
    from benchmarks.systems import prompts_and_lengths

    each = []
    for cycle in range(1, cycles + 1):
        prompts, lengths = prompts_and_lengths(line, cycle)
        each.append(floor.seconds(line, floor.count(prompts, lengths), floor.live(line, prompts, lengths), rates))
    return {name: sum(found[name] for found in each) / len(each) for name in each[0]}


def seconds_of(line: Line, cycle: dict[str, Any]) -> float:
    """Return the compared seconds of a cycle."""
    found: float = cycle["phases"]["update"] if line.compared == "update" else cycle["seconds"]
    return found


def side(line: Line, runs: list[dict[str, Any]], least: dict[str, float]) -> dict[str, Any]:
    """Numbers of one system: medians over the cycles of all rounds."""
    cycles = [cycle for run in runs for cycle in run["cycles"]]
    compared = [seconds_of(line, cycle) for cycle in cycles]
    names = sorted({name for cycle in cycles for name in cycle["phases"]})
    phases = {name: median(cycle["phases"].get(name, 0.0) for cycle in cycles) for name in names}
    whole = median(cycle["seconds"] for cycle in cycles)
    measured = {**phases, "total": whole}
    count = len(runs[0]["cycles"])
    tokens = sum(int(forced_lengths(line, cycle).sum()) for cycle in range(1, count + 1)) / count
    return {
        "seconds": median(compared),
        "range": [min(compared), max(compared)],
        "wall_seconds": median(cycle["wall"] for cycle in cycles),
        "phases": phases,
        "peak_mib": median(run["peak_mib"] for run in runs),
        "tokens_per_second": tokens / whole,
        "floor_fraction": {
            name: x / measured[name] for name, x in least.items() if x > 0 and measured.get(name, 0.0) > 0
        },
    }


def row_of(line: Line, runs: Sides, difference: float, rates: floor.Rates) -> dict[str, Any]:
    """Build a row of the result. Its ratios are None if the systems did not do the same work."""
    count = len(runs["ours"][0]["cycles"])
    least = floors(line, count, rates)
    sides = {system: side(line, runs[system], least) for system in SYSTEMS}
    met = lengths_met(line, runs)
    exact = met and difference < TOLERANCE
    whole = "update" if line.compared == "update" else "total"
    row = {
        "work": line.title or line.name,
        "name": line.name,
        "compared": line.compared,
        "exact": exact,
        "gradient_difference": difference if math.isfinite(difference) else None,
        "lengths_met": met,
        "ratio": None,
        "ratio_range": None,
        "wall_ratio": None,
        "memory_ratio": None,
        "floor_fraction": sides["ours"]["floor_fraction"][whole],
        "floor_seconds": least,
        "rates": asdict(rates),
        **sides,
    }
    if exact:
        ratios = pairs(line, runs)
        row |= {
            "ratio": median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
            "memory_ratio": sides["ours"]["peak_mib"] / sides["trl"]["peak_mib"],
        }
        if line.compared == "cycle":
            row["wall_ratio"] = sides["trl"]["wall_seconds"] / sides["ours"]["wall_seconds"]
    return row


def pairs(line: Line, runs: Sides) -> list[float]:
    """TRL's seconds over ours for each cycle of each round: the same prompts and lengths, side by side in time."""
    return [
        seconds_of(line, theirs) / seconds_of(line, ours)
        for trl_run, our_run in zip(runs["trl"], runs["ours"], strict=True)
        for theirs, ours in zip(trl_run["cycles"], our_run["cycles"], strict=True)
    ]


def geometric_mean(numbers: list[float]) -> float | None:
    """None of no numbers."""
    return math.exp(sum(map(math.log, numbers)) / len(numbers)) if numbers else None


def result(rows: list[dict[str, Any]], command: str, rounds: int, cycles: int) -> dict[str, Any]:
    """Build the result to write; means are over the lines that compare whole cycles."""
    whole = [row for row in rows if row["exact"] and row["compared"] == "cycle"]
    return {
        **record.head(command),
        "rounds": rounds,
        "cycles": cycles,
        "geometric_mean": geometric_mean([row["ratio"] for row in whole]),
        "memory_geometric_mean": geometric_mean([row["memory_ratio"] for row in whole]),
        "rows": rows,
    }


# The command


def write(found: dict[str, Any], path: Path) -> None:
    """Write the result and its tables."""
    from benchmarks.speed_page import publish, trl_section

    publish(found, path, "Next to TRL", trl_section(found))


def say(row: dict[str, Any]) -> str:
    """Format a row as one line of text."""
    if not row["exact"]:
        return f"{row['name']}: gradients differ by {row['gradient_difference']}, lengths met: {row['lengths_met']}: no ratio"
    seconds = " / ".join(f"{row[system]['seconds']:.2f}" for system in SYSTEMS)
    return (
        f"{row['name']}: {row['ratio']:.2f} ({seconds} s), memory {row['memory_ratio']:.2f}, "
        f"{row['floor_fraction']:.0%} of the floor, gradients apart by {row['gradient_difference']:.0e}"
    )


def read_line(text: str) -> Line:
    """Parse a line from its name or from JSON."""
    if text.startswith("{"):
        return Line(**json.loads(text))
    names = [line.name for line in LINES]
    if text not in names:
        raise argparse.ArgumentTypeError(f"no line {text!r}; there are: {', '.join(names)}")
    return LINES[names.index(text)]


def read_options() -> argparse.Namespace:
    """Parse the command line and fill in dependent options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"only {' and '.join(QUICK)}, one round of one cycle")
    parser.add_argument("--rounds", type=int, help="processes of each system per line, 3 when left out")
    parser.add_argument("--cycles", type=int, help="measured cycles of each process, 2 when left out")
    parser.add_argument("--only", nargs="+", type=read_line, metavar="NAME", help="lines; all when left out")
    parser.add_argument("--json", type=Path, help="where the result goes")
    parser.add_argument("--page", action="store_true", help="no run, only docs/benchmarks.md")
    parser.add_argument("--one", choices=SYSTEMS, help="one run in this process")
    parser.add_argument("--line", type=read_line, default=LINES[0], help="of --one: a name, or a Line as JSON")
    parser.add_argument("--gradients", type=Path, help="of --one: where gradients of scripted completions go")
    options = parser.parse_args()
    options.rounds = options.rounds or (1 if options.quick else 3)
    options.cycles = options.cycles or (1 if options.quick else 2)
    options.json = options.json or RESULTS / ("trl_quick.json" if options.quick else "trl.json")
    if options.rounds < 1 or options.cycles < 1:
        parser.error("--rounds and --cycles are at least 1")
    return options


def main() -> None:
    """Compare the lines; exits with 1 if the systems did not do the same work."""
    options = read_options()
    if options.one:
        print(json.dumps(one(options.one, options.line, options.cycles, options.gradients)))
        return
    if options.page:
        from benchmarks.speed_page import write_page

        write_page()
        return
    import torch

    torch.set_num_threads(1)
    lines = options.only or [line for line in LINES if not options.quick or line.name in QUICK]
    rows: list[dict[str, Any]] = []
    command = "python -m benchmarks.trl" + (" --quick" if options.quick else "")
    for line in lines:
        rows.append(compare(line, options.rounds, options.cycles))
        print(say(rows[-1]), flush=True)
        found = result(rows, command, options.rounds, options.cycles)
        write(found, options.json)
    if found["geometric_mean"]:
        print(f"geometric mean {found['geometric_mean']:.2f}, of memory {found['memory_geometric_mean']:.2f}")
    if not all(row["exact"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
