"""Metrics between two log entries, and where they go: metrics.jsonl, completions/*.parquet, Weights & Biases."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from hf_rlhf.distributed import sum_over_processes

if TYPE_CHECKING:
    from accelerate import Accelerator


class Meters:
    """Averages since the last log entry.

    `add` takes sums and counts of this process, which are added up over all processes when they are read; `put` takes
    numbers that are equal on every process.
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Any, Any]] = {}
        self._values: dict[str, list[float]] = {}

    def add(self, name: str, total: Tensor | float, count: Tensor | float) -> None:
        """Adds `total` over `count` items to the average `name`, without waiting for the device."""
        old_total, old_count = self._sums.get(name, (0.0, 0.0))
        detached = total.detach() if isinstance(total, Tensor) else total
        self._sums[name] = (old_total + detached, old_count + count)

    def put(self, name: str, value: float) -> None:
        """One number of the whole run; several between two log entries are averaged."""
        self._values.setdefault(name, []).append(float(value))

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Seconds spent inside, as `time/<name>_s`."""
        start = time.perf_counter()
        yield
        self.put(f"time/{name}_s", time.perf_counter() - start)

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """The averages, and a fresh start. Names without a finite number are left out. One collective."""
        names = sorted(self._sums)
        flat = sum_over_processes(accelerator, [float(x) for name in names for x in self._sums[name]])
        averages = {name: flat[2 * i] / flat[2 * i + 1] for i, name in enumerate(names) if flat[2 * i + 1] > 0}
        counts = {name: sum(v) for name, v in self._values.items() if name.startswith("health/")}
        means = {name: sum(v) / len(v) for name, v in self._values.items()}
        self._sums, self._values = {}, {}
        return {name: x for name, x in sorted({**averages, **means, **counts}.items()) if math.isfinite(x)}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that the first log entry after a resume is complete."""
        return {"sums": {k: [float(x) for x in v] for k, v in self._sums.items()}, "values": self._values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self._sums = {name: (x[0], x[1]) for name, x in state["sums"].items()}
        self._values = {name: list(values) for name, values in state["values"].items()}


class RunLog(TrainerCallback):
    """Writes every log entry to metrics.jsonl and a sample of completions to completions/*.parquet and to W&B.

    Nothing here can stop training: what cannot be written is dropped with a warning.
    """

    def __init__(self, output_dir: str | Path, record: dict[str, Any]):
        self.output_dir = Path(output_dir)
        self.record = record
        self.completions: list[dict[str, Any]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Puts the resolved recipe, the plan and the plugin manifest into the W&B run's config."""
        run = _wandb_run(args)
        if run is not None and state.is_world_process_zero:
            run.config.update(self.record, allow_val_change=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """One line of metrics.jsonl, one parquet file, one W&B table."""
        if not state.is_world_process_zero:
            return
        self.output_dir.mkdir(parents=True, exist_ok=True)
        entry = {"step": state.global_step, **{k: v for k, v in (logs or {}).items() if _is_number(v)}}
        with open(self.output_dir / "metrics.jsonl", "a") as file:
            file.write(json.dumps(entry) + "\n")
        rows, self.completions = self.completions, []
        if rows:
            self._parquet(rows, state.global_step)
            run = _wandb_run(args)
            if run is not None:
                import wandb

                table = wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
                run.log({"samples/completions": table, "train/global_step": state.global_step})

    def _parquet(self, rows: list[dict[str, Any]], step: int) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        folder = self.output_dir / "completions"
        folder.mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), folder / f"step_{step:06d}.parquet")


def _wandb_run(args: Any) -> Any:
    if "wandb" not in (args.report_to or []):
        return None
    import wandb

    return wandb.run


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def completion_rows(
    step: int, texts: dict[str, list[Any]], numbers: dict[str, Tensor], advantages: Tensor, mask: Tensor, limit: int
) -> list[dict[str, Any]]:
    """The first `limit` rows of this process for the table of completions: every reward, the mean advantage, the length."""
    lengths = mask.sum(1)
    mean = (advantages * mask).sum(1) / lengths.clamp(min=1)
    columns: dict[str, list[Any]] = {name: [_text(x) for x in values[:limit]] for name, values in texts.items()}
    for name, values in numbers.items():
        columns[name] = [x if math.isfinite(x) else None for x in values[:limit].tolist()]
    columns["advantage"] = mean[:limit].tolist()
    columns["tokens"] = lengths[:limit].to(torch.int64).tolist()
    names = list(columns)
    return [{"step": step, **dict(zip(names, row, strict=True))} for row in zip(*columns.values(), strict=True)]


def _text(value: Any) -> str:
    """Text that every encoder takes: messages as JSON, lone surrogates replaced."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text.encode("utf-8", "replace").decode("utf-8")
