"""Terminal output of a run: plan, progress, result."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_callback import ProgressCallback

from hf_rlhf.config.plan import Plan, memory_rows
from hf_rlhf.contract.offline_trainer import OfflineTrainer
from hf_rlhf.metrics.live_view import SHOWN, LiveView, Numbers, console, number
from hf_rlhf.runtime.plain_text import escaped


def show_lines(plan: Plan, out: Console) -> None:
    """Print the plan in five lines: model, data, algorithm in words, batches, memory."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for title, text in plan.lines.items():
        table.add_row(Text(title, style="bold"), Text(escaped(text)))
    out.print(table)


def show_plan(plan: Plan, out: Console) -> None:
    """Print the plan in five lines, then plugins with provenance, models, forwards, skipped work, remarks, memory, and the
    arithmetic of batches."""
    show_lines(plan, out)
    out.print()
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("axis", "plugin", "package", "version"):
        table.add_column(name)
    for offer in plan.plugins:
        table.add_row(*(Text(escaped(str(offer[name]))) for name in ("axis", "name", "package", "version")))
    out.print(table)
    for title, rows in (
        ("models", plan.models),
        ("forward passes per rollout", plan.forwards),
        ("skipped", plan.skipped),
        ("remarks", plan.remarks),
        ("peak memory of a process, forecast, MiB", memory_rows(plan)),
    ):
        if rows:
            out.print(Text(f"\n{title}", style="bold"))
            for row in rows:
                out.print(_indented(Text(escaped(row))))
    out.print(Text("\nbatches", style="bold"))
    batches = Table(box=None, show_header=False, pad_edge=False)
    batches.add_column(no_wrap=True)
    batches.add_column(no_wrap=True)
    batches.add_column(ratio=1)
    for quantity, value, elsewhere in plan.arithmetic:
        if len(value) <= 12:
            batches.add_row(Text(quantity), Text(value), Text(elsewhere))
    out.print(_indented(batches))
    for quantity, value, elsewhere in plan.arithmetic:
        if len(value) > 12:
            out.print(_indented(Text(f"{quantity}: {value} ({elsewhere})")))


class LiveProgress(TrainerCallback):
    """Feed the live view; off a terminal, print a line every few seconds."""

    def __init__(self, view: LiveView, shown: dict[str, str] = SHOWN, every_s: float = 10.0):
        self.view, self.every_s = view, every_s
        view.numbers = Numbers(shown)
        self._said = 0.0
        self._every: int | None = None
        self._rows: Callable[[], list[dict[str, Any]]] = list
        self._sampled: int | None = None

    def sample(self, every: int, rows: Callable[[], list[dict[str, Any]]]) -> None:
        """Print the first of the newest rollout's `rows` at the first step, and then every so many steps."""
        self._every, self._rows = every, rows

    def _sample_is_due(self, step: int) -> bool:
        return self._every is not None and (self._sampled is None or step - self._sampled >= self._every)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the bar."""
        if state.is_world_process_zero:
            self.view.begin(state.max_steps, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance the bar."""
        if state.is_world_process_zero:
            self.view.advance(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Show the newest numbers."""
        if not state.is_world_process_zero or not logs:
            return
        numbers = self.view.numbers
        numbers.add(logs)
        if "loss" in logs and self._sample_is_due(state.global_step) and (rows := self._rows()):
            self._sampled = state.global_step
            show_sample(rows[0], state.global_step, self.view.out)
        if "loss" not in logs or self.view.live:
            return
        if time.monotonic() - self._said > self.every_s or state.global_step == state.max_steps:
            self._said = time.monotonic()
            text = "  ".join(f"{label} {value}" for label, value, *_ in numbers.rows(0))
            self.view.out.print(f"step {state.global_step}/{state.max_steps}  {text}", soft_wrap=True)


class TerminalProgress(LiveProgress, ProgressCallback):
    """The live view of a trainer that is made in Python, in place of the bar of transformers: `remove_callback` of
    `ProgressCallback` removes it too."""

    def __init__(self, view: LiveView, shown: dict[str, str] = SHOWN):
        ProgressCallback.__init__(self)
        LiveProgress.__init__(self, view, shown)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw the view."""
        self.view.start()
        super().on_train_begin(args, state, control, **kwargs)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Draw no second bar."""

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the last numbers on the terminal."""
        self.view.stop()


def show_in_terminal(trainer: Any, shown: dict[str, str], quiet: bool) -> None:
    """Let a trainer that is made show its runs by a live view instead of by transformers' own callbacks, on a terminal where
    nothing shows them yet and unless `quiet`."""
    callbacks = trainer.callback_handler.callbacks
    view = LiveView(console(), shown)
    if quiet or not view.draws or any(isinstance(each, LiveProgress) for each in callbacks):
        return
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(TerminalProgress(view, shown))
    trainer.live_view = view


def show_sample(row: dict[str, Any], step: int, out: Console) -> None:
    """Print a completion with its rewards, prompt and reference; `row`: of the table of completions.

    Of a conversation, what has mask 0 is dim.
    """
    rewards = {name.removeprefix("reward/"): x for name, x in row.items() if name.startswith("reward/")}
    total = rewards.pop("total", None)
    parts = "" if len(rewards) < 2 else f" ({', '.join(f'{label} {number(x)}' for label, x in rewards.items())})"
    scored = f", reward {number(total)}{parts}" if total is not None else ""
    out.print(Text(escaped(f"completion at step {step}{scored}"), style="bold"), soft_wrap=True)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name in ("prompt", "reference", "conversation" if row.get("conversation") else "completion"):
        if row.get(name):
            spans = json.loads(row[name]) if name == "conversation" else [{"mask": 1, "text": row[name]}]
            table.add_row(Text(name, style="dim"), _excerpt([_styled(x) for x in spans]))
    out.print(_indented(table))


def _styled(span: dict[str, Any]) -> tuple[str, str]:
    """Return the text of a part of a conversation, the context of a fork on a line of its own, and its style."""
    return ("\n" if span.get("fork") else "") + span["text"], "" if span["mask"] else "dim"


def _excerpt(spans: Sequence[tuple[str, str]], lines: int = 12, characters: int = 1200) -> Text:
    """Return the beginning of (text, style) as plain text, line ends kept, and say how much is left out."""
    whole = "".join(text for text, _ in spans)
    room = len("\n".join(whole[:characters].split("\n")[:lines]))
    rest, shown = len(whole) - room, Text()
    for text, style in spans:
        shown.append(escaped(text[:room], "\n"), style)
        room = max(0, room - len(text))
    return shown.append(f"\n... {rest:,} more characters" if rest else "")


def show_result(
    summary: dict[str, Any],
    samples: dict[str, list[dict[str, Any]]],
    out: Console,
    trained: OfflineTrainer | None = None,
    next_steps: Sequence[tuple[str, str]] = (),
) -> None:
    """Print held-out metrics before and after, some completions, where the files are and what to type next.

    `trained`: the trainer of a recipe without rollouts; `next_steps`: (command, its purpose).
    """
    before, after = summary["before"] or {}, summary["after"] or {}
    if after:
        rows = "held-out prompts" if trained is None else f"{summary['rows']['evaluation']} held-out rows"
        out.print(Text(f"\n{rows}", style="bold"))
        table = Table(box=None, header_style="bold", pad_edge=False)
        for title in ("", "before", "after"):
            table.add_column(title, justify="right" if title else "left", no_wrap=not title)
        for name in _listed(before, after):
            table.add_row(name, *(_with_interval(x, name) for x in (before, after)))
        out.print(_indented(table))
    pairs = list(zip(samples.get("before", []), samples.get("after", []), strict=False))[:4]
    if pairs:
        out.print(Text("\nsome of them", style="bold"))
        table = Table(box=None, header_style="bold", pad_edge=False)
        scored = ["reward"] if "reward" in pairs[0][0] else []
        for title in ("prompt", "before", *scored, "after", *scored):
            table.add_column(title, overflow="fold", justify="right" if title == "reward" else "left")
        for pair in pairs:
            cells = [_short(pair[0]["prompt"], 44)]
            for sample in pair:
                cells += [_short(sample["completion"]), *(number(sample[name]) for name in scored)]
            table.add_row(*map(Text, cells))
        out.print(_indented(table))
    folder = summary["output_dir"]
    out.print(Text(f"\n{summary['steps']} steps in {summary['seconds']:.0f} s. In {escaped(folder)}:"), soft_wrap=True)
    model, more = ("policy", ", completions/, evaluation/") if trained is None else ("model", "")
    where = f"  the {model} (weights, tokenizer), recipe.yaml, summary.json,\n  metrics.jsonl{more}, report.html"
    out.print(Text(where), soft_wrap=True)
    show_next_steps(next_steps, out)


def show_next_steps(steps: Sequence[tuple[str, str]], out: Console) -> None:
    """Print commands to paste, each with its purpose below."""
    if steps:
        out.print(Text("next:"))
    for command, purpose in steps:
        out.print(Text(f"  {escaped(command)}"), soft_wrap=True)
        out.print(Text(f"      {purpose}"), soft_wrap=True)


def _listed(before: dict[str, float], after: dict[str, float]) -> list[str]:
    """Return the names to print: the loss and a plugin's own metrics where it has any; neither ends of intervals, nor errors that
    did not occur, nor a second name of the same numbers (the reward of a verifier alone is the accuracy)."""
    ends = {f"{name}{end}" for name in after for end in ("_low", "_high")}
    named = [name for name in after if name not in ends]
    own = [name for name in named if "/" in name]
    if own and "loss" in named:
        return ["loss", *own]
    shown: list[str] = []
    for name in sorted(named, key=lambda name: "/" in name):  # accuracy, pass@k and maj@k first
        values = before.get(name), after[name]
        again = name.startswith("reward/") and any(values == (before.get(x), after[x]) for x in shown)
        if not again and (any(values) or not name.startswith("health/")):
            shown.append(name)
    return shown


def _with_interval(metrics: dict[str, float], name: str) -> str:
    if name not in metrics:
        return "-"
    low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
    return number(metrics[name]) + ("" if low is None or high is None else f" ({number(low)} to {number(high)})")


def _indented(what: RenderableType) -> Padding:
    return Padding(what, (0, 0, 0, 2), expand=False)


def _short(value: Any, width: int = 60) -> str:
    """Return one line of plain text."""
    text = value if isinstance(value, str) else " ".join(str(message.get("content")) for message in value)
    text = escaped(" ".join(text.split()))
    return text if len(text) <= width else text[: width - 3] + "..."
