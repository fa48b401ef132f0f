"""What a person at the terminal sees of a run: the plan, the progress, the result."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback

from hf_rlhf.plan import Plan

SHOWN = {
    "reward": "reward/total/mean",
    "after KL": "reward/after_kl/mean",
    "KL": "kl/ref",
    "length": "rollout/length/mean",
    "entropy": "policy/entropy",
    "clipped": "policy/clip_frac_high",
    "value loss": "value/loss",
    "tokens/s": "perf/tokens_per_s",
}
"""Column of the progress display -> metric."""


def console() -> Console:
    """A terminal of its own width; elsewhere wide enough that nothing is cut."""
    return Console(width=None if sys.stdout.isatty() else 200, highlight=False)


def show_plan(plan: Plan, out: Console) -> None:
    """Plugins with provenance, models, forwards, what is skipped, remarks, and the arithmetic of batches."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("axis", "plugin", "package", "version"):
        table.add_column(name)
    for offer in plan.plugins:
        table.add_row(*(Text(str(offer[name])) for name in ("axis", "name", "package", "version")))
    out.print(table)
    for title, rows in (
        ("models", plan.models),
        ("forward passes per rollout", plan.forwards),
        ("skipped", plan.skipped),
        ("remarks", plan.remarks),
    ):
        if rows:
            out.print(Text(f"\n{title}", style="bold"))
            for row in rows:
                out.print(Text(f"  {row}"))
    out.print(Text("\nbatches", style="bold"))
    batches = Table(box=None, show_header=False, pad_edge=False)
    for quantity, value, elsewhere in plan.arithmetic:
        batches.add_row(Text(f"  {quantity}"), Text(value), Text(elsewhere))
    out.print(batches)


class LiveProgress(TrainerCallback):
    """A progress bar with the newest numbers; off a terminal a line every few seconds."""

    def __init__(self, out: Console, every_s: float = 10.0):
        self.out, self.every_s = out, every_s
        self.numbers: dict[str, float] = {}
        self.live: Live | None = None
        self._said = 0.0
        columns = (TextColumn("step"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=out)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts the display."""
        if not state.is_world_process_zero:
            return
        self.task = self.bar.add_task("train", total=state.max_steps, completed=state.global_step)
        if self.out.is_terminal:
            self.live = Live(self._render(), console=self.out, refresh_per_second=4)
            self.live.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Moves the bar."""
        if state.is_world_process_zero:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Takes in the newest numbers."""
        self.numbers |= {name: logs[key] for name, key in SHOWN.items() if logs and key in logs}
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        if self.live:
            self.live.update(self._render())
        elif time.monotonic() - self._said > self.every_s or state.global_step == state.max_steps:
            self._said = time.monotonic()
            numbers = "  ".join(f"{name} {value:.3g}" for name, value in self.numbers.items())
            self.out.print(f"step {state.global_step}/{state.max_steps}  {numbers}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stops the display."""
        self.stop()

    def stop(self) -> None:
        """Gives the terminal back, also after an error."""
        if self.live:
            self.live.stop()
            self.live = None

    def _render(self) -> Group:
        table = Table(box=None, header_style="bold", pad_edge=False)
        for name in self.numbers:
            table.add_column(name, justify="right")
        table.add_row(*(f"{value:.4g}" for value in self.numbers.values()))
        return Group(self.bar, table)


def show_result(summary: dict[str, Any], samples: dict[str, list[dict[str, Any]]], out: Console) -> None:
    """Before and after, some completions, where everything is, what to type next."""
    before, after = summary["before"] or {}, summary["after"] or {}
    if after:
        table = Table(box=None, header_style="bold", pad_edge=False, title_justify="left", title="held-out prompts")
        for name in ("", "before", "after"):
            table.add_column(name, justify="right" if name else "left")
        for name in after:
            table.add_row(name, *(f"{numbers[name]:.4g}" if name in numbers else "-" for numbers in (before, after)))
        out.print(table)
    pairs = list(zip(samples.get("before", []), samples.get("after", []), strict=False))[:4]
    if pairs:
        table = Table(box=None, header_style="bold", pad_edge=False, title="some of them", title_justify="left")
        for name in ("prompt", "before", "reward", "after", "reward"):
            table.add_column(name, overflow="fold")
        for old, new in pairs:
            cells = (_short(old["prompt"]), _short(old["completion"]), f"{old['reward']:.3g}")
            table.add_row(*map(Text, (*cells, _short(new["completion"]), f"{new['reward']:.3g}")))
        out.print(table)
    folder = summary["output_dir"]
    out.print(f"{summary['steps']} steps in {summary['seconds']:.0f} s. In {folder}:", soft_wrap=True)
    out.print("  the policy (model.safetensors, tokenizer), recipe.yaml, summary.json, metrics.jsonl, completions/")
    out.print("next:")
    out.print(
        f"  hf-rlhf recipes                        # other algorithms; hf-rlhf train NAME --model {folder} goes on from here"
    )
    out.print(
        "  hf-rlhf plugins                        # what can be swapped; hf-rlhf show advantages group_norm explains one"
    )
    out.print(
        f"  hf-rlhf check {summary['recipe']} advantages.use=leave_one_out   # what a change would do, without loading a model"
    )


def _short(value: Any, width: int = 120) -> str:
    text = value if isinstance(value, str) else " ".join(str(message.get("content")) for message in value)
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 3] + "..."
