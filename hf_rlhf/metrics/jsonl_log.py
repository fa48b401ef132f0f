"""Write metrics.jsonl, completions/*.parquet and rollouts/*.json."""

from __future__ import annotations

import json
import logging
import math
import re
import time
import weakref
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from hf_rlhf.metrics.row_file import ARROW, as_text

logger = logging.getLogger(__name__)
NUMBER = (int, float)
FOLDERS = ("completions", "rollouts", "evaluation")
"""Folders whose files belong to a step."""
TABLES_EVERY_S = 1.0
"""Seconds from one writing of tables to the next, so that short steps do not pay for it each."""
Table = tuple[list[dict[str, Any]], int]
"""(rows, step)."""


class RunLog(TrainerCallback):
    """One line of metrics.jsonl per log entry, a sample of completions in completions/step_*.parquet (with `keeps_all`, those of
    each rollout as `write_rows` gets them), and what the report shows of rollouts in rollouts/step_*.json.

    A resumed run drops what was written after its checkpoint, so that no step appears twice; a new run in the same folder
    overwrites both.

    A line is in its file when `on_log` returns. Tables are written in a thread during the next rollout, and are complete before
    that rollout's completions; of steps shorter than a second, those of a second together. Before a checkpoint, an evaluation,
    the end of training and of the process all are complete. A killed process loses the newest tables of at most a second, or
    one, and never part of a table. The next event raises what failed in the thread.
    """

    reads_checkpoints = False

    def __init__(self, output_dir: str | Path, record: dict[str, Any], keeps_all: bool = False):
        self.output_dir = Path(output_dir)
        self.record = record
        self.keeps_all = keeps_all
        self.sample: Any = None
        """Recorded groups of the newest rollout, which the next log entry or checkpoint writes."""
        self._completions: list[dict[str, Any]] = []
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="hf_rlhf-log")
        self._tables: list[Future[None]] = []
        self._waiting: list[Table] = []
        """Tables that no thread writes yet."""
        self._written = -math.inf
        weakref.finalize(self, _write_rest, self.output_dir, self._waiting)
        self._start: int | None = None
        self._evaluations: list[str] = []
        """Files of held-out rows that this log had written before training."""

    @property
    def completions(self) -> list[dict[str, Any]]:
        """Rows for the table of the next log entry."""
        return self._completions

    @completions.setter
    def completions(self, rows: list[dict[str, Any]]) -> None:
        self._wait()
        self._completions = rows

    def _wait(self) -> None:
        """Wait for the tables being written; the next event raises their error."""
        wait(self._tables)

    def _raise_errors(self) -> None:
        """Wait for the tables being written. Raises their error, once."""
        tables, self._tables = self._tables, []
        for table in tables:
            table.result()

    def flush(self) -> None:
        """Finish every table. Raises the error of those that could not be written, once."""
        self._write_tables()
        self._raise_errors()

    def _write_tables(self) -> None:
        if self._waiting:
            self._tables += [self._writer.submit(write_table, self.output_dir, *table) for table in self._waiting]
            self._waiting.clear()
            self._written = time.monotonic()

    def evaluation(self, step: int, prefix: str) -> Path:
        """Return the file for the held-out rows of an evaluation, whose metrics have this prefix."""
        path = self.output_dir / "evaluation" / f"step_{step:06d}{prefix.removeprefix('eval')}.parquet"
        self._evaluations += [path.name] if step == 0 else []
        return path

    def write_rows(self, rows: list[dict[str, Any]], step: int) -> None:
        """Write every row of a rollout, whose first optimizer step is number `step`, in the thread."""
        self._wait()
        if rows:
            self._waiting.append((rows, step))
        if time.monotonic() >= self._written + TABLES_EVERY_S:
            self._write_tables()

    def write_sample(self) -> None:
        """Write the recorded groups, if there are new ones. A failure is a warning: they are for the report."""
        sample, self.sample = self.sample, None
        if sample is None:
            return
        try:
            self._tables.append(self._writer.submit(self._json, sample.content(), sample.step + 1))
        except Exception as error:
            logger.warning("completions of step %d are left out of the report. %r", sample.step, error)

    @property
    def metrics(self) -> Path:
        """Path of metrics.jsonl."""
        return self.output_dir / "metrics.jsonl"

    @property
    def found_lines(self) -> bool:
        """True if metrics.jsonl has lines that this log did not write before training."""
        return self._start != 0 and self.metrics.exists()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop what an earlier run, or the run after the checkpoint, left in the files."""
        self._write_tables()
        self._wait()
        if not state.is_world_process_zero:
            return
        step, resumes = state.global_step, state.global_step > 0
        if self.metrics.exists():
            content = self.metrics.read_bytes()
            start = len(content) if self._start is None else self._start
            chosen = content[:start] if resumes else content[start:]  # an evaluation before training has its lines
            kept = [line for line in chosen.splitlines(keepends=True) if _step(line) <= step]
            if len(kept) < len(content.splitlines()):
                _replace(self.metrics, b"".join(kept))
        own = set() if resumes else set(self._evaluations)
        for path in (path for folder in FOLDERS for path in self.output_dir.glob(f"{folder}/step_*")):
            found = re.match(r"step_(\d+)", path.stem)
            if found and path.name not in own and (not resumes or int(found[1]) > step):
                path.unlink()
        self._start, self._evaluations = None, []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Write a line with the step and every finite number, and a parquet file if there are new completions."""
        rows, self._completions = self._completions, []
        if not state.is_world_process_zero:
            return
        numbers = {name: x for name, x in (logs or {}).items() if isinstance(x, NUMBER) and math.isfinite(x)}
        self._append(json.dumps({"step": state.global_step, **numbers}) + "\n", before=state.max_steps == 0)
        try:
            self._raise_errors()
        finally:
            if not self.keeps_all:
                self.write_rows(rows, state.global_step)
            self.write_sample()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Finish the tables before a checkpoint."""
        self.flush()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Finish the tables of an evaluation."""
        self.flush()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Finish the tables."""
        self.write_sample()
        self.flush()

    def _append(self, line: str, before: bool) -> None:
        with self._opened() as file:
            end, rest = file.tell(), line.encode()
            if before and self._start is None:
                self._start = end
            try:
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError:
                with suppress(OSError):
                    file.truncate(end)  # half a line would spoil the next
                raise

    def _opened(self) -> IO[bytes]:
        try:
            return open(self.metrics, "ab", buffering=0)
        except FileNotFoundError:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            return open(self.metrics, "ab", buffering=0)

    def _json(self, content: dict[str, Any], step: int) -> None:
        folder = self.output_dir / "rollouts"
        folder.mkdir(parents=True, exist_ok=True)
        draft = folder / "unfinished.tmp"
        draft.write_text(json.dumps(content, allow_nan=False, default=str), encoding="utf-8")
        draft.replace(folder / f"step_{step:06d}.json")


def _write_rest(output_dir: Path, tables: list[Table]) -> None:
    for table in tables:
        write_table(output_dir, *table)


def write_table(output_dir: Path, rows: list[dict[str, Any]], step: int) -> None:
    """Write completions/step_*.parquet, which is there whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = output_dir / "completions"
    folder.mkdir(parents=True, exist_ok=True)
    schema = pa.schema([(name, getattr(pa, ARROW[_type(name, rows)])()) for name in rows[0]])
    draft = folder / "unfinished.tmp"
    content = pa.BufferOutputStream()  # a third faster than a file
    pq.write_table(pa.Table.from_pylist(rows, schema), content, use_dictionary=False, write_statistics=False)
    draft.write_bytes(content.getvalue())
    draft.replace(folder / f"step_{step:06d}.parquet")


def _type(name: str, rows: list[dict[str, Any]]) -> type:
    """Return the type of a column from its first value; one without any holds text or numbers by its name."""
    given = (type(row[name]) for row in rows if row[name] is not None)
    return next(given, str if name in ("reference", "dropped") else float)


def completion_rows(
    step: int, texts: dict[str, list[Any]], numbers: dict[str, Tensor], advantages: Tensor, mask: Tensor, limit: int
) -> list[dict[str, Any]]:
    """Return the first `limit` rows of this process for the table of completions: rewards, mean advantage, length.

    `step`: optimizer steps of the policy that wrote them.
    """
    mask = mask[:limit]
    lengths = mask.sum(1)
    mean = (advantages[:limit] * mask).sum(1) / lengths.clamp(min=1)
    columns: dict[str, list[Any]] = {name: [as_text(x) for x in values[:limit]] for name, values in texts.items()}
    for name, values in {**numbers, "advantage": mean}.items():
        columns[name] = [x if math.isfinite(x) else None for x in values[:limit].tolist()]
    columns["tokens"] = lengths.to(torch.int64).tolist()
    names = list(columns)
    return [{"step": step, **dict(zip(names, row, strict=True))} for row in zip(*columns.values(), strict=True)]


def _step(line: bytes) -> float:
    """Return the step of a line; infinite if the process died while writing it."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def _replace(path: Path, content: bytes) -> None:
    draft = path.with_name(path.name + ".tmp")
    draft.write_bytes(content)
    draft.replace(path)
