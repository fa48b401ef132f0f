"""The page of `benchmarks.gpu`: what has not been run says so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.pages import markdown

PHASES = ("rollout", "forward", "reward", "update", "optimizer", "rest")
Found = dict[str, Any]
LOGNORMAL = ("flex", "packed", "padded", "trl")
WHOLE = ("full", "vllm-folder", "vllm-ipc", "vllm-nccl", "trl-vllm")


def state(case: Found | None) -> str | None:
    """Return why a case has no figures; None if it has some."""
    if case is None:
        return "not run"
    if "not_run" in case:
        return f"not run: {case['not_run']}"
    return f"failed: {case['failed']}" if "failed" in case else None


def cycles_table(cases: Mapping[str, Found], titles: Mapping[str, str], names: tuple[str, ...]) -> str:
    """One line per system: seconds of a cycle and its phases, tokens per second, peak."""
    lines = []
    for name in names:
        case = cases.get(name)
        if (why := state(case)) is not None or case is None:
            lines.append([titles[name], str(why), *[""] * (len(PHASES) + 2)])
            continue
        low, high = case["range"]
        cells = [f"{case['phases'].get(phase, 0.0):.2f}" for phase in PHASES]
        seconds = f"{case['seconds']:.2f} ({low:.2f}-{high:.2f})"
        lines.append([titles[name], seconds, *cells, f"{case['tokens_per_second']:,.0f}", f"{case['peak_gib']:.2f}"])
    return markdown(["", "seconds of a cycle", *PHASES, "tokens/s", "peak, GiB"], lines)


def memory_table(cases: Mapping[str, Found], titles: Mapping[str, str]) -> str:
    """Forecast and measured peak of each phase."""
    lines = []
    for name in (*LOGNORMAL, *WHOLE):
        for phase, (forecast, held) in cases.get(name, {}).get("memory", {}).items():
            ratio = f"{forecast / held:.2f}" if held else ""
            lines.append([titles[name], phase, f"{forecast:.2f}", f"{held:.2f}", ratio])
    return markdown(["", "phase", "forecast, GiB", "measured, GiB", "ratio"], lines) if lines else "Not run."


def rows_table(case: Found | None, label: str, columns: Mapping[str, str]) -> str:
    """Variants of a part; `columns` key -> heading."""
    if (why := state(case)) is not None or case is None:
        return f"{str(why).capitalize()}."
    lines = [[name, *(f"{row[key]:.3g}" for key in columns)] for name, row in case["rows"].items()]
    return markdown([label, *columns.values()], lines)


def loop_table(case: Found | None) -> str:
    """Format sampling alone."""
    if (why := state(case)) is not None or case is None:
        return f"{str(why).capitalize()}."
    lines = [[name, f"{s:.2f}", f"{case['tokens'] / s:,.0f}"] for name, s in case["seconds"].items()]
    return markdown(["", "seconds", "tokens/s"], lines)


def page(found: Found, titles: Mapping[str, str]) -> str:
    """Format the result as a page."""
    cases = found["cases"]
    if cases:
        names = ", ".join(f"{name} {x}" for name, x in found["versions"].items() if name in ("torch", "transformers"))
        where = f"On {found['device']}, {names}."
        if found.get("tiny"):
            where += " **A rehearsal of the code on a small model: the figures say nothing about speed.**"
    else:
        where = "**Not run: nobody has run it on a GPU yet.** Its code is tested on a CPU with `--tiny`."
    return f"""# On a GPU

`python -m benchmarks.gpu`: cycles of GRPO and their parts, with the shape of Qwen3-0.6B and random weights, float32 weights
that compute in bfloat16, 64 prompts of 64 to 128 tokens with 8 completions of up to 256. {where}

## Completions of lognormal lengths

{cycles_table(cases, titles, LOGNORMAL)}

## Completions of full length

{cycles_table(cases, titles, WHOLE)}

## Sampling alone

{loop_table(cases.get("loop"))}

## Layouts of rows

Forward and backward of one micro-batch; *first*: with compiling; *apart*: the largest distance of log-probs and gradients
from those of padded rows, relative to them.

{rows_table(cases.get("layouts"), "layout", {"seconds": "seconds", "first": "first", "peak_gib": "peak, GiB", "apart": "apart"})}

## The head in tiles

Forward and backward of 1,024 tokens, with entropy.

{rows_table(cases.get("head"), "tokens in a tile", {"seconds": "seconds", "peak_gib": "peak, GiB"})}

## Memory

{memory_table(cases, titles)}
"""
