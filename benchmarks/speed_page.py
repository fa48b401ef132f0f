"""docs/benchmarks.md and docs/scaling.png from the results of benchmarks.trl, benchmarks.scaling and benchmarks.micro."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import record
from benchmarks.pages import markdown, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"
PHASES = ("rollout", "forward", "reward", "update", "optimizer", "rest")
NAMES = {"ours": "ours", "trl": "TRL"}
Found = dict[str, Any]
MEASURED = ("trl", "scaling", "micro")
"""Results that the page is made of."""


# Next to TRL


def number(x: float | None, digits: int = 2) -> str:
    """Empty for nothing."""
    return "" if x is None else f"{x:.{digits}f}"


def seconds(row: Found, system: str) -> str:
    """Format the median and, of several, the minimum and maximum."""
    low, high = row[system]["range"]
    middle = f"{row[system]['seconds']:.2f}"
    return middle if low == high else f"{middle} ({low:.2f}-{high:.2f})"


def ratio(row: Found) -> str:
    """Format the ratio of seconds, with the range over pairs of cycles."""
    if row["ratio"] is None:
        return "**not the same work**"
    low, high = row["ratio_range"]
    return f"**{row['ratio']:.2f}**" if low == high else f"**{row['ratio']:.2f}** ({low:.2f}-{high:.2f})"


def times_table(rows: list[Found]) -> str:
    """One line per kind of work."""
    header = [
        "work",
        "TRL, s",
        "ours, s",
        "TRL / ours",
        "peak, MiB: TRL",
        "ours",
        "ours / TRL",
        "tokens/s: TRL",
        "ours",
    ]
    lines = [
        [
            row["work"],
            seconds(row, "trl"),
            seconds(row, "ours"),
            ratio(row),
            f"{row['trl']['peak_mib']:.0f}",
            f"{row['ours']['peak_mib']:.0f}",
            number(row["memory_ratio"]),
            f"{row['trl']['tokens_per_second']:.0f}",
            f"{row['ours']['tokens_per_second']:.0f}",
        ]
        for row in rows
    ]
    return markdown(header, lines)


def phases_table(rows: list[Found]) -> str:
    """Seconds of each phase, TRL's and ours."""
    lines = []
    for row in rows:
        cells = [
            " / ".join(f"{row[system]['phases'].get(name, 0.0):.2f}" for system in ("trl", "ours")) for name in PHASES
        ]
        lines.append([row["work"], *cells])
    return markdown(["work", *PHASES], lines)


def floors_table(rows: list[Found]) -> str:
    """Format the minimum seconds of a cycle, and their share of the measured ones."""
    names = ("rollout", "forward", "update", "optimizer", "total")

    def share(row: Found, system: str, name: str) -> str:
        x = row[system]["floor_fraction"].get(name)
        return "-" if x is None else f"{100 * x:.0f}"

    lines = [
        [
            row["work"],
            f"{row['floor_seconds']['total']:.2f}",
            *(" / ".join(share(row, system, name) for system in ("trl", "ours")) for name in names),
        ]
        for row in rows
    ]
    return markdown(["work", "floor, s", *(f"{name}, %" for name in names)], lines)


def means(found: Found) -> str:
    """Describe the geometric means in a sentence."""
    if found["geometric_mean"] is None:
        return "No line compares whole cycles."
    count = len([row for row in found["rows"] if row["exact"] and row["compared"] == "cycle"])
    return (
        f"Geometric means over the {count} lines that compare whole cycles: TRL takes "
        f"**{found['geometric_mean']:.2f}** times our time, our peak memory is **{found['memory_geometric_mean']:.2f}** of TRL's."
    )


def trl_section(found: Found) -> str:
    """Return the tables of `benchmarks.trl`."""
    rows = found["rows"]
    worst = max((row["gradient_difference"] or 0.0 for row in rows), default=0.0)
    rates = rows[0]["rates"] if rows else {}
    machine = ", ".join(f"{name} {found['versions'][name]}" for name in ("torch", "transformers", "trl"))
    return f"""{times_table(rows)}

{means(found)}

Medians over {found["rounds"]} processes of each system with {found["cycles"]} cycles each, in parentheses the least and the
most; {machine}; {found["machine"]["processor"]}, one thread, float32. Gradients of the two differ by at most {worst:.0e} of
their norm.

Seconds by phase, TRL / ours:

{phases_table(rows)}

Floor, and the share of it that was reached, in per cent, TRL / ours:

{floors_table(rows)}

Rates of this machine for the first line: {rates["forward"] / 1e9:.0f} GFLOP/s forward, {rates["update"] / 1e9:.0f} with the
backward, {rates["decode"] / 1e9:.0f} in products of a decoding step; {rates["read"] / 1e9:.0f} GB/s reading."""


# Growth


def scaling_section(found: Found) -> str:
    """Return the tables of `benchmarks.scaling`."""
    parts = []
    for sweep in found["sweeps"]:
        header = [sweep["axis"], "TRL, s", "ours, s", "TRL / ours", "peak, MiB: TRL", "ours"]
        lines = [
            [
                f"{point['at']:,}",
                number(point["seconds"].get("trl")),
                number(point["seconds"].get("ours")),
                number(point["ratio"]),
                number(point["peak_mib"].get("trl"), 0),
                number(point["peak_mib"].get("ours"), 0),
            ]
            for point in sweep["points"]
        ]
        parts.append(f"**{sweep['title']}.** {growth(sweep)}\n\n{markdown(header, lines)}")
    return "\n\n".join(parts)


def growth(sweep: Found) -> str:
    """Describe the fits in words."""
    words = []
    for system, fit in sweep["fits"].items():
        if "exponent" in fit:
            words.append(f"{NAMES[system]}: seconds grow with the power {fit['exponent']:.2f}")
        else:
            error = f" (± {1e3 * fit['slope_error']:.1f})" if "slope_error" in fit else ""
            words.append(f"{NAMES[system]}: {1e3 * fit['slope']:.1f} ms{error} for each further one")
    if (share := sweep.get("slope_ratio")) is not None:
        words.append(f"TRL's over ours {share:.1f}")
    return "; ".join(words) + "." if words else ""


COLUMNS = 2
"""Panels in a row of the picture."""


def picture(found: Found) -> Figure:
    """Small multiples of seconds by each axis, both logarithmic where the growth is a power."""
    from matplotlib.figure import Figure

    rows = -(-len(found["sweeps"]) // COLUMNS)
    figure = Figure(figsize=(3.4 * COLUMNS, 2.6 * rows), layout="constrained")
    panels = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
    for panel in panels[len(found["sweeps"]) :]:
        panel.set_axis_off()
    for panel, sweep in zip(panels, found["sweeps"], strict=False):
        for system in ("trl", "ours"):
            points = [(p["at"], p["seconds"][system]) for p in sweep["points"] if system in p["seconds"]]
            if points:
                color = "C0" if system == "trl" else "C1"
                panel.plot(*zip(*points, strict=True), marker="o", markersize=4, color=color, label=NAMES[system])
        panel.set_title(sweep["title"], fontsize=9)
        panel.set_xlabel(sweep["axis"], fontsize=8)
        panel.set_ylabel("seconds", fontsize=8)
        panel.tick_params(labelsize=7)
        panel.legend(fontsize=7)
        if sweep["scale"] == "log":
            ats = [point["at"] for point in sweep["points"]]
            ends = [end(s for point in sweep["points"] for s in point["seconds"].values()) for end in (min, max)]
            panel.set(xscale="log", yscale="log")
            panel.minorticks_off()
            panel.set_xticks(ats, [f"{at:,}" for at in ats])
            panel.set_yticks(ends, [f"{s:.2g}" for s in ends])
        else:
            panel.set_ylim(0, None)
    return figure


# Parts alone


def duration(seconds: float) -> str:
    """In the unit that suits it."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{1e6 * seconds:.3g} us"


def figure(name: str, x: float | None) -> str:
    """Format a cell of a column of `benchmarks.micro`."""
    if x is None:
        return ""
    return f"{x:.1e}" if name == "apart by" else f"{x:,.0f}"


def micro_section(found: Found) -> str:
    """Return the tables of `benchmarks.micro`."""
    parts = []
    for part in found["parts"]:
        base = next((entry["seconds"] for entry in part["entries"] if entry["variant"] == part["base"]), None)
        lines = [
            [
                entry["variant"],
                duration(entry["seconds"]),
                *([] if base is None else [f"{base / entry['seconds']:.2f}"]),
                *(figure(name, entry.get(name)) for name in part["extra"]),
            ]
            for entry in part["entries"]
        ]
        header = ["variant", "time", *([] if base is None else ["times faster"]), *part["extra"]]
        parts.append(f"**{part['title']}.** {part['text']}\n\n{markdown(header, lines)}")
    return "\n\n".join(parts)


# The page


def page(found: dict[str, Found]) -> str:
    """docs/benchmarks.md; `found` holds the results that are there, by name."""
    not_yet = "Not measured yet."
    trl = trl_section(found["trl"]) if "trl" in found else not_yet
    scaling = (scaling_section(found["scaling"]) + "\n\n![growth](scaling.png)") if "scaling" in found else not_yet
    micro = micro_section(found["micro"]) if "micro" in found else not_yet
    return f"""# Speed

<!-- Made by `python -m benchmarks.trl --page` from benchmarks/results/. -->

Seconds are CPU time, which depends little on other work on the machine. Ratios carry over to other machines, seconds do
not: run the commands on yours.

| command | what it measures |
| --- | --- |
| `python -m benchmarks.trl` | cycles of `grpo` and `rloo` next to TRL's trainers; `--quick`: two lines, `--only NAME ...`: some |
| `python -m benchmarks.scaling` | scaling with completions per prompt, length, vocabulary, model and number of plugins |
| `python -m benchmarks.micro` | single parts: head, sampling, packing, dispatch of plugins, rows of reward sources |
| `python -m benchmarks.estimators` | advantage estimators: [estimators.md](../benchmarks/results/estimators.md) |
| `python -m benchmarks.logging` | share of the quickstart in logging, plugins: [logging.md](../benchmarks/results/logging.md) |
| `python -m benchmarks.report` | a report of 1,000 steps, share of all logging: [report.md](../benchmarks/results/report.md) |
| `python -m benchmarks.checkpoint` | checkpoints next to Trainer's: [checkpoint.md](../benchmarks/results/checkpoint.md) |

What a run survives:

| command | what it tries |
| --- | --- |
| `python -m benchmarks.gpu` | cycles and parts on a GPU, not run yet: [gpu.md](../benchmarks/results/gpu.md) |
| `python -m benchmarks.reproduce` | Qwen3-1.7B on GSM8K, MATH, not run: [reproduce.md](../benchmarks/results/reproduce.md) |
| `python -m benchmarks.gate` | next to the commit in benchmarks/baseline, every night: fails if 5 % slower |
| `python -m benchmarks.faults` | 51 faults in real runs; numbers after it: some of them. [faults.md](faults.md) |
| `python -m benchmarks.soak` | 2,000 steps with 20 kills, full disks and a lost tracker: equal weights, constant memory |
| `python -m benchmarks.fuzz` | 10,000 random overrides: each is accepted or refused with a reason; 100 accepted ones train |

## Compared with TRL

A cycle lasts from the end of one optimizer step to the end of the next, including the rollout; the first of a process is
dropped. Both systems get the same weights, prompts and settings, and completions of the same lengths: lognormal with a mean
of 0.4 times the maximum, unless all have full length. The model is a Qwen2 with tied embeddings, hidden size 256, 6 layers
with 8 attention heads and 4 key-value heads, and intermediate size 1024; the wide one has 512, 8 layers and 2048. A rollout
has 4 prompts of 16-64 tokens with 8 completions each, unless stated otherwise. We run the recipes `grpo@trl` and `rloo`, with
micro-batches of at most 1024 tokens; TRL runs micro-batches of 8 rows, its default. Both compute the exact entropy of every
distribution for their metrics. A line has a ratio only if the lengths were as intended and the gradients of one scripted
rollout agree within 1e-4 in each optimizer step. Peak memory is the maximum during training minus what the process held
before, with the weights loaded.

The floor is the work of any exact implementation, at the rates that this machine reaches for such shapes
([benchmarks/floor.py](../benchmarks/floor.py)).

{trl}

## Scaling

{scaling}

## Single parts

{micro}
"""


def results(folder: Path = RESULTS) -> dict[str, Found]:
    """Return the results so far, by name."""
    paths = {name: folder / f"{name}.json" for name in MEASURED}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.is_file()}


def publish(found: Found, path: Path, title: str, section: str) -> None:
    """Write a result to `path`: its tables to docs/benchmarks.md or, of a quick run, to a page beside it."""
    record.write(path, found)
    if path in (RESULTS / f"{name}.json" for name in MEASURED):
        write_page()
    else:
        path.with_suffix(".md").write_text(f"# {title}\n\n`{found['command']}`\n\n{section}\n", encoding="utf-8")


def write_page(folder: Path = DOCS) -> None:
    """Write the page and, if growth was measured, its picture."""
    found = results()
    (folder / "benchmarks.md").write_text(page(found), encoding="utf-8")
    if "scaling" in found:
        save(picture(found["scaling"]), folder / "scaling.png")
