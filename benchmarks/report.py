"""A report of a long run: its size, how long Chromium takes to open it, and what logging, doctor and report cost.

`python -m benchmarks.report [--steps 1000] [--json PATH] [KEY=VALUE ...]`

One run of `hf-rlhf train quickstart` that logs every step. Its parts are timed as in `benchmarks.logging`, here without a
tracker; what writing the report takes at the end is added to their share. The page is then opened in a fresh headless Chromium
five times, until it has read its data and drawn its open section. The result goes to benchmarks/results/report.json and, as a
table, to benchmarks/results/report.md.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.logging import FIRST, LOGGING, Stopwatch, install
from benchmarks.record import measured

BARS = {"bytes": 5_000_000, "open_s": 2.0, "errors": 0, "requests": 0, "share": 0.02}
"""The most that each may be."""
READY = """new Promise((done) => {
  const asked = setInterval(() => {
    if ("complete" in document.documentElement.dataset) {
      clearInterval(asked);
      requestAnimationFrame(() => requestAnimationFrame(done));
    }
  }, 5);
})"""
"""Resolves once the page has read its data and what it drew is on the screen."""
TIMES = 5


def measure(steps: int, overrides: list[str]) -> dict[str, Any]:
    """One run, what its logging costs, and its page in Chromium."""
    from hf_rlhf.cli.runs.run import train
    from hf_rlhf.config.recipe import load_recipe
    from hf_rlhf.report import build

    watch, written = Stopwatch(), []
    install(watch)
    write = build.write_or_warn

    def write_or_warn(folder: Path) -> None:
        wall, cpu = time.perf_counter(), time.thread_time()
        write(folder)
        written.append((time.perf_counter() - wall, time.thread_time() - cpu))

    build.write_or_warn = write_or_warn
    words = [f"training.max_steps={steps}", "training.logging_steps=1", *overrides]
    with tempfile.TemporaryDirectory() as folder:
        train(load_recipe("quickstart", words), folder)
        page = Path(folder) / build.FILE
        found = {"steps": steps, "bytes": page.stat().st_size, **in_browser(page)}
    counted = watch.steps[FIRST:-1]
    wall, cpu = (b - a for a, b in zip(watch.began[FIRST], watch.began[-1], strict=True))
    parts = {
        part: 1000 * sum(step[part][1] for step in counted if part in step) / len(counted)
        for part, kind in watch.kinds.items()
        if kind == LOGGING
    }
    ((report_wall, report_cpu),) = written
    parts["report.html, per step of the run"] = 1000 * report_cpu / steps
    step_ms = 1000 * cpu / len(counted)
    return {
        **found,
        "step_cpu_ms": step_ms,
        "step_wall_ms": 1000 * wall / len(counted),
        "report_s": report_wall,
        "parts_cpu_ms": {part: ms for part, ms in parts.items() if ms},
        "share": sum(parts.values()) / step_ms,
    }


def in_browser(page: Path) -> dict[str, Any]:
    """Seconds to open the page, console errors and requests."""
    from tests.helpers.browser import browser

    seconds, errors, requests = [], 0, 0
    for _ in range(TIMES):
        with browser() as tab:
            started = time.perf_counter()
            tab.open(page)
            tab.evaluate(READY)
            seconds.append(time.perf_counter() - started)
            errors, requests = errors + len(tab.errors), requests + len(tab.requests)
    return {"open_s": max(seconds), "open_median_s": statistics.median(seconds), "errors": errors, "requests": requests}


def table(found: dict[str, Any]) -> str:
    """Format the result as a page."""
    lines = [
        "# Report",
        "",
        f"`python -m benchmarks.report`: one quickstart of {found['steps']:,} steps of {found['step_cpu_ms']:.0f} ms processor "
        f"time ({found['step_wall_ms']:.0f} ms wall), each with an entry in the log; its page opened {TIMES} times.",
        "",
        "| what | measured | bar |",
        "|---|---|---|",
        f"| size of the page | {found['bytes'] / 1e6:.2f} MB | 5 MB |",
        f"| opened and drawn, the longest of {TIMES} | {found['open_s']:.2f} s (median {found['open_median_s']:.2f} s) | 2 s |",
        f"| console errors | {found['errors']} | 0 |",
        f"| requests | {found['requests']} | 0 |",
        f"| logging, doctor and report, of a step's processor time | {100 * found['share']:.2f} % | 2 % |",
        f"| writing the page, once | {found['report_s']:.2f} s | |",
        "",
        "| part | ms of a step | % of it |",
        "|---|---|---|",
        *(
            f"| {part} | {ms:.3f} | {100 * ms / found['step_cpu_ms']:.3f} |"
            for part, ms in found["parts_cpu_ms"].items()
        ),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures, writes the results, and fails where a bar is missed."""
    found = measured("report", __doc__ or "", 1000, measure, table)
    missed = [name for name, most in BARS.items() if found[name] > most]
    if missed:
        raise SystemExit(f"more than its bar: {', '.join(missed)}")


if __name__ == "__main__":
    main()
