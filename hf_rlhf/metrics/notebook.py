"""The live view of a run in a notebook: a table that updates in the output of its cell; it needs no widgets."""

from __future__ import annotations

import contextvars
import threading
import time
from html import escape
from typing import Any

from transformers import PrinterCallback, TrainerCallback
from transformers.utils import is_in_notebook

from hf_rlhf.metrics.live_view import SHOWN, Numbers, activities, duration
from hf_rlhf.runtime.activity import current
from hf_rlhf.runtime.plain_text import escaped

EVERY_S = 1.0
"""Seconds between updates."""
WIDTH = 40
"""Characters of a sparkline."""


class NotebookView:
    """The view in a cell. A thread redraws it as long as this process does anything (`hf_rlhf.runtime.activity`)."""

    def __init__(self, shown: dict[str, str] = SHOWN):
        self.numbers = Numbers(shown)
        self.step = self.total = self._first = 0
        self._began = time.monotonic()
        self._handle: Any = None

    def watch(self) -> None:
        """Show it in the cell that runs now, until nothing is done any more."""
        from IPython.display import HTML, display

        handle = self._handle = display(HTML(self.html()), display_id=True)

        def redraw() -> None:
            while self._handle is handle and current():
                handle.update(HTML(self.html()))
                time.sleep(EVERY_S)
            if self._handle is handle:  # an error has ended it
                self.finish()

        if handle is not None:
            # the context holds which cell the output belongs to
            threading.Thread(target=contextvars.copy_context().run, args=(redraw,), daemon=True).start()

    def finish(self) -> None:
        """Redraw it a last time."""
        from IPython.display import HTML

        handle, self._handle = self._handle, None
        if handle is not None:
            handle.update(HTML(self.html()))

    def begin(self, total: int, step: int) -> None:
        """Begin a training run of `total` steps."""
        self.total, self.step, self._first, self._began = total, step, step, time.monotonic()
        self.numbers.restart()

    def html(self) -> str:
        """Return what is shown now."""
        cells = "".join(
            f"<tr><td style='text-align:left'>{escape(label)}</td><td><b>{value}</b></td><td>{direction}</td>"
            f"<td style='font-family:monospace;text-align:left'>{bars}</td></tr>"
            for label, value, direction, bars in self.numbers.rows(WIDTH)
        )
        return f"<div>{self._head()}</div>" + (f"<table><tbody>{cells}</tbody></table>" if cells else "")

    def _head(self) -> str:
        now = escape(escaped(activities())) if self._handle is not None else ""
        if not self.total:
            return now
        gone, done = time.monotonic() - self._began, self.step - self._first
        left = [f"{duration(gone / done * (self.total - self.step))} left"] if done and self.step < self.total else []
        facts = [f"step {self.step}/{self.total}", duration(gone), *left, *([now] if now else [])]
        return f"<progress value='{self.step}' max='{self.total}'></progress> {' &middot; '.join(facts)}"


class NotebookProgress(TrainerCallback):
    """Feed a notebook's view from a training run."""

    def __init__(self, view: NotebookView):
        self.view = view

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the view in the cell that trains."""
        if state.is_world_process_zero:
            self.view.begin(state.max_steps, state.global_step)
            self.view.watch()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance the bar."""
        self.view.step = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Take the newest numbers."""
        self.view.numbers.add(logs or {})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the last numbers in the cell."""
        self.view.finish()


def notebook_view(shown: dict[str, str] = SHOWN) -> NotebookView | None:
    """Return a view that shows what this process does while a trainer is made; None outside of notebooks."""
    if not is_in_notebook():
        return None
    view = NotebookView(shown)
    view.watch()
    return view


def show_in_notebook(trainer: Any, view: NotebookView | None) -> None:
    """Let a trainer that is made show its runs in `view`, instead of by transformers' own callbacks."""
    if view is None:
        return
    from transformers.utils.notebook import NotebookProgressCallback

    view.finish()
    for callback in (PrinterCallback, NotebookProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(NotebookProgress(view))
