"""The live view of a run: what it is doing, how far it is, and the newest numbers with their trends.

On a terminal the view is drawn in place by `rich`; text that anything prints meanwhile appears above it. `LiveView` imports
neither torch nor transformers, so that it is there from the first second.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterable, Sequence
from io import TextIOWrapper
from statistics import fmean, pstdev
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from hf_rlhf.runtime.activity import current

SHOWN = {
    "reward": "reward/total/mean",
    "KL to the reference": "kl/ref",
    "length": "rollout/length/mean",
    "entropy": "policy/entropy",
    "value loss": "value/loss",
    "held-out accuracy": "eval_accuracy",
    "held-out reward": "eval_reward/total/mean",
    "tokens/s": "perf/tokens_per_s",
}
"""Label -> metric of a run with rollouts. Each label says what the metric is, whatever the recipe: `kl/ref` is the same for
every placement and estimator of a KL, and absent without a reference."""
OFFLINE_SHOWN = {
    "loss": "loss",
    "accuracy": "accuracy",
    "margin": "margin",
    "preferred": "rewards/accuracies",
    "reward margin": "rewards/margins",
    "held-out loss": "eval_loss",
    "gradient": "grad_norm",
    "learning rate": "learning_rate",
}
"""The same for runs without rollouts."""
TRENDS = frozenset(
    {"reward", "KL to the reference", "length", "entropy", "loss", "accuracy", "preferred", "reward margin"}
)
"""Labels with an arrow and a sparkline."""
ENDLESS = 100_000
"""Width of lines that do not go to a terminal."""
BARS = "▁▂▃▄▅▆▇█"
UP, DOWN, LEVEL = "↑", "↓", "→"
PER_SECOND = 2
"""Redraws per second."""
_running: list[LiveView] = []


def console() -> Console:
    """Return the console of the view that is running, else a new one: as wide as the terminal, or wide enough that no line
    breaks; unencodable characters are escaped."""
    if _running:
        return _running[-1].out
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    return Console(width=None if sys.stdout.isatty() else ENDLESS, highlight=False)


class Numbers:
    """The newest numbers by label, and the history of those with a trend."""

    def __init__(self, shown: dict[str, str]):
        self.shown = shown
        self.newest: dict[str, float] = {}
        self.history: dict[str, list[float]] = {}
        self._changes = 0
        self._made: tuple[tuple[int, int], list[tuple[str, str, str, str]]] | None = None

    def add(self, logs: dict[str, float]) -> None:
        """Take what a log entry holds of them."""
        for label, metric in self.shown.items():
            if metric in logs and not (label == "held-out reward" and self.shown["held-out accuracy"] in logs):
                self.newest[label] = logs[metric]
                if label in TRENDS:
                    self.history.setdefault(label, []).append(logs[metric])
        self._changes += 1

    def restart(self) -> None:
        """Forget what an earlier training run has logged; held-out numbers stay."""
        self.newest = {label: x for label, x in self.newest.items() if label.startswith("held-out")}
        self.history.clear()
        self._changes += 1

    def rows(self, width: int) -> list[tuple[str, str, str, str]]:
        """Return label, number, arrow and sparkline of up to `width` characters, in the order of `shown`."""
        key = (width, self._changes)  # a thread draws while another one adds
        if self._made is None or self._made[0] != key:
            found = []
            for label, x in list(self.newest.items()):
                past = list(self.history.get(label, []))
                found.append((label, number(x), arrow(past), sparkline(past, width)))
            order = {label: place for place, label in enumerate(self.shown)}
            self._made = (key, sorted(found, key=lambda row: order[row[0]]))
        return self._made[1]


def arrow(values: Sequence[float]) -> str:
    """Return the direction of the newest values, or "" for fewer than six.

    The last fifth, of at least three and at most twenty, is compared with as many before: an arrow that is not level means a
    difference of the means of more than two standard errors.
    """
    k = min(20, max(3, len(values) // 5))
    if len(values) < 2 * k:
        return ""
    new, old = values[-k:], values[-2 * k : -k]
    moved = fmean(new) - fmean(old)
    spread = ((pstdev(new) ** 2 + pstdev(old) ** 2) / (k - 1)) ** 0.5
    return LEVEL if abs(moved) <= 2 * spread else UP if moved > 0 else DOWN


def sparkline(values: Sequence[float], width: int) -> str:
    """Return the whole history as bars from its lowest to its highest value, one for the mean of as many as do not fit."""
    if len(values) < 2 or width < 1:
        return ""
    cells = min(width, len(values))
    ends = [round(i * len(values) / cells) for i in range(cells + 1)]
    means = [fmean(values[a:b]) for a, b in itertools.pairwise(ends)]
    low, high = min(means), max(means)
    if not high > low:
        return BARS[0] * cells
    return "".join(BARS[min(7, int(8 * (x - low) / (high - low)))] for x in means)


def number(x: float | None) -> str:
    """Format with three digits, without an exponent if possible: 0.0312, 12.5, 1,840; 2e-07; - for None."""
    if x is None:
        return "-"
    if x != 0 and abs(x) < 1e-3:
        return f"{x:.0e}"
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"


def duration(seconds: float) -> str:
    """Format as 0.7 s, 17 s, 2:05 or 1:02:05."""
    whole = int(seconds)
    if seconds < 10:
        return f"{seconds:.1f} s"
    if whole < 60:
        return f"{whole} s"
    hours, minutes = divmod(whole // 60, 60)
    return (f"{hours}:{minutes:02d}" if hours else f"{minutes}") + f":{whole % 60:02d}"


def activities() -> str:
    """Return what this process does now, with the time since it began."""
    found = current()
    parts = ((activity.name, activity.progress, duration(activity.seconds)) for activity in found[-2:])
    return ", ".join(" ".join(filter(None, part)) for part in parts)


class LiveView:
    """The view on a terminal; elsewhere, and on other processes than the first, it draws nothing.

    As a context manager it gives the terminal back however the block ends.
    """

    def __init__(self, out: Console | None = None, shown: dict[str, str] = SHOWN):
        self.out = console() if out is None else out
        self.bar: Progress | None = None
        self.live: Live | None = None
        self.numbers = Numbers(shown)

    @property
    def draws(self) -> bool:
        """True where a view can be drawn in place: on a terminal that moves its cursor."""
        return self.out.is_interactive and self.out.width < ENDLESS and int(os.environ.get("RANK", "0")) == 0

    def __enter__(self) -> LiveView:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def start(self) -> None:
        """Draw it from now on."""
        if self.live is None and self.draws:
            self.live = Live(get_renderable=self.picture, console=self.out, refresh_per_second=PER_SECOND)
            self.live.start()
            _running.append(self)

    def begin(self, total: int, completed: int) -> None:
        """Begin a training run of `total` steps; numbers of an evaluation before it stay."""
        self.numbers.restart()
        columns = (TextColumn("step"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=self.out)
        self.task = self.bar.add_task("train", total=total, completed=completed)

    def advance(self, completed: int) -> None:
        """Move the bar."""
        if self.bar is not None:
            self.bar.update(self.task, completed=completed)

    def stop(self) -> None:
        """Give the terminal back, also after an error; what training has shown stays, the rest is erased."""
        if self.live is None:
            return
        live, self.live = self.live, None
        _running.remove(self)
        live.transient = self.bar is None
        live.stop()
        self.bar = None

    def picture(self) -> RenderableType:
        """Return what is drawn now."""
        parts: list[RenderableType] = []
        if self.bar is not None:
            parts.append(self.bar)
        if self.live is not None and (now := activities()):
            parts.append(Text(now, style="dim", no_wrap=True, overflow="ellipsis"))
        if self.numbers.newest:
            parts.append(table(self.numbers.rows(min(40, self.out.width - 36)), ascii_only=self.out.options.ascii_only))
        return Group(*parts)


def table(rows: Iterable[tuple[str, str, str, str]], ascii_only: bool = False) -> Table:
    """Return the rows of `Numbers` as a table; without arrows and bars for an encoding that lacks them."""
    made = Table(box=None, show_header=False, pad_edge=False)
    for justify in ("left", "right", "left", "left"):
        made.add_column(justify=justify, no_wrap=True)
    for label, value, direction, bars in rows:
        made.add_row(label, Text(value, style="bold"), *(("", "") if ascii_only else (direction, Text(bars, "cyan"))))
    return made
