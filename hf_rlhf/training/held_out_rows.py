"""Every row of an evaluation in a Parquet file, written as it is made: no process holds more than a few hundred rows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from hf_rlhf.metrics.row_file import RowFile

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)
Keep = Callable[[list[dict[str, Any]]], None]
CHUNK = 64
"""Prompts of each process that are gathered at a time."""


@contextmanager
def kept_rows(path: Path, types: dict[str, type], accelerator: Accelerator, group: int) -> Iterator[Keep]:
    """Yield a function that takes the next rows of this process, and write those of all processes, in the order of prompts.

    Prompt number i belongs to process i modulo their number, and has `group` rows. The file appears once it is whole. An error
    of the disk is a warning.
    """
    if accelerator.num_processes == 1:
        with _Rows(path, types) as whole:
            yield whole.add
        return
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        with _Rows(Path(folder) / path.name, types) as own:
            yield own.add
        parts = _gathered(own, group)
        if not accelerator.is_main_process:
            for _ in parts:
                pass
            return
        with _Rows(path, types) as whole:
            for rows in parts:
                whole.add(rows)


class _Rows:
    """A `RowFile` that takes no further rows after an error of the disk."""

    def __init__(self, path: Path, types: dict[str, type]):
        self.path = path
        self.count = 0
        """Rows that are in it; 0 after an error."""
        self._file: RowFile | None = RowFile(path, types)

    def __enter__(self) -> _Rows:
        self._try(lambda file: file.__enter__())
        return self

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Append rows."""
        self._try(lambda file: file.add(rows))
        self.count += len(rows) if self._file else 0

    def __exit__(self, *error: Any) -> None:
        self._try(lambda file: file.__exit__(*error))

    def _try(self, call: Callable[[RowFile], Any]) -> None:
        if self._file is not None:
            try:
                call(self._file)
            except OSError as error:
                self._file, self.count = None, 0
                logger.warning("held-out rows are not kept in %s: %s", self.path, error)

    def read(self, size: int) -> Iterator[list[dict[str, Any]]]:
        """Yield the rows, so many at a time."""
        import pyarrow.parquet as pq

        if self.count:
            for batch in pq.ParquetFile(self.path).iter_batches(batch_size=size):
                yield batch.to_pylist()


def _gathered(own: _Rows, group: int) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of all processes, a part at a time; every process takes part."""
    from accelerate.utils import gather_object

    parts = own.read(CHUNK * group)
    for _ in range(max(gather_object([-(-own.count // (CHUNK * group))]))):
        members = gather_object([next(parts, [])])
        prompts = range(max(len(rows) for rows in members) // group)
        yield [row for i in prompts for rows in members for row in rows[i * group : (i + 1) * group]]
