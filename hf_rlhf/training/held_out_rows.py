"""Every row of an evaluation in a Parquet file, written as it is made: no process holds more than a few hundred rows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

from hf_rlhf.metrics.jsonl_log import arrow_schema, as_text

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)
Keep = Callable[[list[dict[str, Any]]], None]
CHUNK = 64
"""Prompts of each process that are gathered at a time."""


@contextmanager
def kept_rows(path: Path, types: dict[str, type], accelerator: Accelerator, group: int) -> Iterator[Keep]:
    """Yield a function that takes the next rows of this process, and write those of all processes, in the order of prompts.

    Prompt number i belongs to process i modulo their number, and has `group` rows. The file appears when it is whole. An error
    of the disk is a warning.
    """
    processes, first = accelerator.num_processes, accelerator.is_main_process
    whole = _Rows(path, types) if first else None
    try:
        if processes == 1:
            assert whole is not None
            yield whole.write
        else:
            with TemporaryFile() as file:
                own = _Rows(file, types)
                yield own.write
                own.close()
                for rows in _gathered(own, group, processes):
                    if whole is not None:
                        whole.write(rows)
        if whole is not None:
            whole.finish()
    finally:
        if whole is not None:
            whole.close()
            with suppress(OSError):
                whole.draft.unlink()


def _gathered(own: _Rows, group: int, processes: int) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of all processes, a part at a time; every process takes part."""
    from accelerate.utils import gather_object

    parts = own.read(CHUNK * group)
    for _ in range(max(gather_object([-(-own.count // (CHUNK * group))]))):
        members = gather_object([next(parts, [])])
        prompts = range(max(len(rows) for rows in members) // group)
        yield [row for i in prompts for rows in members for row in rows[i * group : (i + 1) * group]]


class _Rows:
    """A Parquet file that grows; after an error of the disk it takes no further rows."""

    def __init__(self, target: Any, types: dict[str, type]):
        self.path, self.types = target, types
        self.draft: Any = target.with_name("unfinished.tmp") if isinstance(target, Path) else target
        self._writer: Any = None
        self._failed = False
        self.count = 0
        """Rows so far; 0 after an error."""

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Append rows."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self._failed:
            return
        texts = [name for name, kind in self.types.items() if kind is str]
        plain = [{**row, **{x: None if row[x] is None else as_text(row[x]) for x in texts}} for row in rows]
        schema = arrow_schema(self.types)
        try:
            if self._writer is None:
                if isinstance(self.draft, Path):
                    self.draft.parent.mkdir(parents=True, exist_ok=True)
                self._writer = pq.ParquetWriter(self.draft, schema)
            self._writer.write_table(pa.Table.from_pylist(plain, schema))
            self.count += len(rows)
        except OSError as error:
            self._fail(error)

    def read(self, size: int) -> Iterator[list[dict[str, Any]]]:
        """Yield the rows of a closed file, so many at a time."""
        import pyarrow.parquet as pq

        if self.count:
            self.draft.seek(0)
            for batch in pq.ParquetFile(self.draft).iter_batches(batch_size=size):
                yield batch.to_pylist()

    def close(self) -> None:
        """Write what is left of the file; without a row, an empty one."""
        if self._writer is None and not self._failed:
            self.write([])
        writer, self._writer = self._writer, None
        try:
            if writer is not None:
                writer.close()
        except OSError as error:
            self._fail(error)
        self._failed = True

    def finish(self) -> None:
        """Give the file its name."""
        if self._writer is not None:
            whole = not self._failed
            self.close()
            if whole and self.draft.exists():
                self.draft.replace(self.path)

    def _fail(self, error: OSError) -> None:
        self._failed, self.count = True, 0
        logger.warning("held-out rows are not kept in %s: %s", self.path, error)
