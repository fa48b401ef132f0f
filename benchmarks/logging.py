"""Cost of logging, the run doctor included, and of the plugin layer in the quickstart, as shares of an optimizer step.

`python -m benchmarks.logging [--steps 80] [--json PATH] [KEY=VALUE ...]`

One run of `hf-rlhf train quickstart` that logs every step, writes metrics.jsonl and completions/ and logs to Weights &
Biases offline. The parts are timed inside of that run, each without the parts that it calls; a step goes from one
`get_batch_samples` to the next, the first five left out. Seconds are processor time of the thread that does the work, over
the processor time of the whole process in these steps, which other work on the machine changes little; the share of wall time
stands beside it. The timers themselves count as cost of what they time. The process of Weights & Biases is another one: its
processor time is given for the whole run. The result goes to benchmarks/results/logging.json and, as a table, to
benchmarks/results/logging.md.
"""

from __future__ import annotations

import functools
import os
import resource
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.record import measured

FIRST = 5
LOGGING, PLUGINS, SCORING = "logging", "plugin layer", "scoring"
BARS = {LOGGING: 0.02, PLUGINS: 0.005}
"""The most that each may cost."""


@dataclass
class Stopwatch:
    """Adds up what functions cost, each without the timed ones that it calls, in each step."""

    steps: list[dict[str, tuple[float, float]]] = field(default_factory=list)
    kinds: dict[str, str] = field(default_factory=dict)
    began: list[tuple[float, float]] = field(default_factory=list)
    _local: threading.local = field(default_factory=threading.local)

    def step(self) -> None:
        """Start a step."""
        self.began.append((time.perf_counter(), time.process_time()))
        self.steps.append(defaultdict(lambda: (0.0, 0.0)))

    def timed(self, kind: str, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function to record its cost."""
        self.kinds[part] = kind

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            inside = self._local.__dict__.setdefault("inside", [])
            inside.append([0.0, 0.0])
            wall, cpu = time.perf_counter(), time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                whole = (time.perf_counter() - wall, time.thread_time() - cpu)
                others = inside.pop()
                if inside:
                    inside[-1] = [a + b for a, b in zip(inside[-1], whole, strict=True)]
                if self.steps:
                    before = self.steps[-1][part]
                    own = (x - y for x, y in zip(whole, others, strict=True))
                    self.steps[-1][part] = tuple(a + b for a, b in zip(before, own, strict=True))  # type: ignore[assignment]

        return call


def install(watch: Stopwatch) -> None:
    """Instrument the parts in this process."""
    from hf_rlhf.config.algorithm import Algorithm
    from hf_rlhf.metrics import jsonl_log, trackers
    from hf_rlhf.metrics.aggregator import MetricAggregator
    from hf_rlhf.metrics.doctor_callback import DoctorCallback
    from hf_rlhf.metrics.jsonl_log import RunLog
    from hf_rlhf.scoring.scorer import Scorer
    from hf_rlhf.training import collector
    from hf_rlhf.training.collector import Collector
    from hf_rlhf.training.recording import Recorder
    from hf_rlhf.training.trainer import RLHFTrainer
    from hf_rlhf_plugins.rewards.exact_match import ExactMatch

    parts = {
        (RLHFTrainer, "log"): (LOGGING, "Trainer's log and the progress on the terminal"),
        (Recorder, "keep"): (LOGGING, "rows of the completions table"),
        (RunLog, "on_log"): (LOGGING, "metrics.jsonl"),
        (DoctorCallback, "on_log"): (LOGGING, "the run doctor"),
        (jsonl_log, "write_table"): (LOGGING, "completions/*.parquet, in a thread"),
        (trackers.WandbTracker, "on_log"): (LOGGING, "Weights & Biases, table included"),
        **{
            (Recorder, name): (LOGGING, "rollouts recorded for the report")
            for name in ("begin", "saw", "select", "credited", "note", "take")
        },
        (RunLog, "write_sample"): (LOGGING, "rollouts recorded for the report"),
        (RunLog, "_json"): (LOGGING, "rollouts/*.json, in a thread"),
        (MetricAggregator, "read"): (LOGGING, "averages since the last entry"),
        **{(collector, name): (LOGGING, "numbers of the rollout") for name in ("report_rewards", "report_credit")},
        (collector, "report_drift"): (LOGGING, "numbers of the rollout"),
        (Collector, "_observe"): (PLUGINS, "observe and report"),
        (Scorer, "ask"): (SCORING, "copies, time limits and checks around each call of a reward"),
        **{(Algorithm, name): (PLUGINS, "dispatch") for name in ("extras", "titled", "kl_in", "labels")},
        (ExactMatch, "__call__"): (SCORING, "the reward itself"),
    }
    for (owner, name), (kind, part) in parts.items():
        setattr(owner, name, watch.timed(kind, part, getattr(owner, name)))
    collected = RLHFTrainer.get_batch_samples

    def get_batch_samples(self: Any, *args: Any, **kwargs: Any) -> Any:
        watch.step()
        return collected(self, *args, **kwargs)

    RLHFTrainer.get_batch_samples = get_batch_samples  # type: ignore[method-assign]


def measure(steps: int, overrides: list[str]) -> dict[str, Any]:
    """One run, and what its parts cost."""
    from hf_rlhf.cli.runs.run import train
    from hf_rlhf.config.recipe import load_recipe

    watch = Stopwatch()
    install(watch)
    words = [f"training.max_steps={steps}", "training.logging_steps=1", "training.report_to=wandb", *overrides]
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"WANDB_MODE": "offline", "WANDB_DIR": folder, "WANDB_SILENT": "true"}
        train(load_recipe("quickstart", words), f"{folder}/run")
        import wandb

        wandb.finish()
        wandb.teardown()
    whole = [b - a for a, b in zip(watch.began[FIRST][:2], watch.began[-1][:2], strict=True)]
    counted = watch.steps[FIRST:-1]
    sums = {part: [sum(step[part][i] for step in counted if part in step) for i in range(2)] for part in watch.kinds}
    rows = [
        {
            "part": part,
            "kind": kind,
            "cpu_ms": 1000 * sums[part][1] / len(counted),
            "cpu_share": sums[part][1] / whole[1],
            "wall_share": sums[part][0] / whole[0],
        }
        for part, kind in watch.kinds.items()
    ]
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "steps": len(counted),
        "step_cpu_ms": 1000 * whole[1] / len(counted),
        "step_wall_ms": 1000 * whole[0] / len(counted),
        "rows": rows,
        "shares": {
            kind: {key: sum(row[key] for row in rows if row["kind"] == kind) for key in ("cpu_share", "wall_share")}
            for kind in BARS
        },
        "wandb_process_s": children.ru_utime + children.ru_stime,
    }


def table(found: dict[str, Any]) -> str:
    """Format the result as a page."""
    lines = [
        "# Logging and the plugin layer",
        "",
        f"`python -m benchmarks.logging`: the quickstart, {found['steps']} steps of {found['step_cpu_ms']:.0f} ms processor time "
        f"({found['step_wall_ms']:.0f} ms wall), each with an entry in metrics.jsonl and in Weights & Biases (offline) and with "
        f"16 completions in both tables. Weights & Biases' own process took {found['wandb_process_s']:.1f} s of processor time "
        "over the whole run, its start included.",
        "",
        "| part | of | ms | % of a step | % of its wall time |",
        "|---|---|---|---|---|",
    ]

    def row(part: str, kind: str, ms: float, cpu: float, wall: float) -> str:
        return f"| {part} | {kind} | {ms:.2f} | {100 * cpu:.3f} | {100 * wall:.3f} |"

    for kind, bar in BARS.items():
        own = [r for r in found["rows"] if r["kind"] == kind]
        lines += [row(r["part"], kind, r["cpu_ms"], r["cpu_share"], r["wall_share"]) for r in own]
        share = found["shares"][kind]
        said = f"**{kind}**, at most {100 * bar:g} %"
        lines.append(row(said, "", sum(r["cpu_ms"] for r in own), share["cpu_share"], share["wall_share"]))
    lines += [
        row(r["part"], SCORING, r["cpu_ms"], r["cpu_share"], r["wall_share"])
        for r in found["rows"]
        if r["kind"] == SCORING
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures and writes the results."""
    measured("logging", __doc__ or "", 80, measure, table)


if __name__ == "__main__":
    main()
