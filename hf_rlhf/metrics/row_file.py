"""Rows of completions in a Parquet file, written as they come and complete once it is closed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

ARROW = {str: "string", int: "int64", float: "float64", bool: "bool_"}


class RowFile:
    """A Parquet file with columns of known types. After an error in the `with` block, no file is left."""

    def __init__(self, path: Path, types: Mapping[str, type]):
        import pyarrow as pa

        self.path, self._draft = path, path.with_name(path.name + ".tmp")
        self.schema = pa.schema([(name, getattr(pa, ARROW[kind])()) for name, kind in types.items()])

    def __enter__(self) -> RowFile:
        import pyarrow.parquet as pq

        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._writer = pq.ParquetWriter(self._draft, self.schema)
        return self

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write rows; None is a missing value, messages are JSON."""
        import pyarrow as pa

        texts = [field.name for field in self.schema if field.type == pa.string()]
        plain = [{**row, **{name: None if row[name] is None else as_text(row[name]) for name in texts}} for row in rows]
        self._writer.write_table(pa.Table.from_pylist(plain, self.schema))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()
        if kind is None:
            self._draft.replace(self.path)
        else:
            with suppress(OSError):
                self._draft.unlink()


def as_text(value: Any) -> str:
    """Return text that every encoder accepts: messages as JSON, lone surrogates replaced."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text.encode("utf-8", "replace").decode("utf-8")
