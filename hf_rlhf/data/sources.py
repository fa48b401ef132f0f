"""Load rows of a dataset from a file, a folder or the Hub, with values as written."""

from __future__ import annotations

import csv
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_rlhf.axes import axis_of
from hf_rlhf.runtime.errors import UserError, did_you_mean
from hf_rlhf.runtime.hub import unavailable

FILES = (".json", ".jsonl", ".csv", ".parquet")

Row = Mapping[str, Any]
Rows = Sequence[Row] | Iterable[Row]
"""A sequence of rows (a list, a `datasets.Dataset`) or a stream of them (a `datasets.IterableDataset`)."""


class DatasetError(UserError, ValueError):
    """An invalid dataset; the message says what is wrong, where, and how to fix it."""


def load_rows(path: str, *, name: str | None = None, split: str = "train", streaming: bool = False) -> Rows:
    """Return the rows of a split; a file has one, `train`. Raises `DatasetError`."""
    place = Path(path).expanduser()
    if problem := unavailable(path, "dataset"):
        raise DatasetError(problem)
    if place.is_file():
        if place.suffix not in FILES:
            raise DatasetError(f"{path}: a dataset file must end in {', '.join(FILES)}, got {place.suffix!r}")
        if name is not None:
            raise DatasetError(f"dataset.name does not apply to the file {path}: remove it")
        if split != "train":
            raise DatasetError(f"{path}: a file has one split, 'train', got {split!r}")
        if place.suffix in (".json", ".jsonl"):
            return _json_stream(place) if streaming else _complete(list(_json_rows(place)))
        kind = place.suffix[1:]
        options: dict[str, Any] = {"data_files": {"train": str(place)}, "streaming": streaming}
        if kind == "csv":
            options |= {"features": _text_columns(place), "keep_default_na": False}
        return _load(kind, path, split, options)
    if any((place / marker).is_file() for marker in ("dataset_dict.json", "state.json")):
        if name is not None:
            raise DatasetError(f"dataset.name does not apply to the folder {path}: remove it")
        return _from_disk(place, split, streaming)
    return _load(str(place) if place.is_dir() else path, path, split, {"name": name, "streaming": streaming})


def _load(kind: str, path: str, split: str, options: dict[str, Any]) -> Rows:
    import datasets

    try:
        return datasets.load_dataset(kind, split=split, **options)
    except Exception as error:
        cause = f" ({type(error.__cause__).__name__}: {error.__cause__})" if error.__cause__ else ""
        raise DatasetError(
            f"cannot load split {split!r} of dataset {path}: {type(error).__name__}: {error}{cause}"
        ) from error


def _from_disk(place: Path, split: str, streaming: bool) -> Rows:
    import datasets

    loaded = datasets.load_from_disk(str(place))
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise DatasetError(f"{place} has no split {split!r}; it has: {', '.join(loaded)}")
        loaded = loaded[split]
    elif split != "train":
        raise DatasetError(f"{place} holds a dataset without splits, got split {split!r}: remove it")
    return loaded.to_iterable_dataset() if streaming else loaded


def _text_columns(file: Path) -> Any:
    """Return features that keep every CSV column as text: "007" stays "007", and integers with gaps do not become 18.0."""
    import datasets

    with open(file, encoding="utf-8-sig", newline="") as lines:
        header = next(csv.reader(lines), [])
    if not header:
        raise DatasetError(f"{file}: no header; the first line of a CSV file must name its columns")
    return datasets.Features({name: datasets.Value("string") for name in header})


def _json_rows(file: Path) -> Iterator[Row]:
    """Yield the objects of a JSON list, or of a file with one object per line.

    `datasets` is not used because it turns text that looks like a date into one: "2020-01-01" would no longer match.
    """
    with open(file, encoding="utf-8-sig") as lines:
        if lines.read(1) == "[":
            lines.seek(0)
            try:
                numbered: Iterable[tuple[int, Any]] = enumerate(json.load(lines), start=1)
            except json.JSONDecodeError as error:
                raise DatasetError(f"{file}: not JSON: {error}") from error
            what = "row"
        else:
            lines.seek(0)
            numbered, what = _json_lines(file, lines), "line"
        for number, row in numbered:
            if not isinstance(row, dict):
                raise DatasetError(
                    f"{file}, {what} {number}: must be an object with named columns, got a {type(row).__name__}"
                )
            yield row


def _json_lines(file: Path, lines: Iterable[str]) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise DatasetError(f"{file}, line {number}: not JSON: {error}") from error


def _json_stream(file: Path) -> Rows:
    import datasets

    return datasets.IterableDataset.from_generator(_json_rows, gen_kwargs={"file": file})


def _complete(rows: list[Row]) -> list[Row]:
    """Return the rows with None for columns that only other rows have."""
    names = {name: None for row in rows for name in row}
    return [{**names, **row} for row in rows]


def missing_columns(source: Any, columns: Collection[str]) -> list[str]:
    """Return `READER reads NAME` for each column that a reward source or another plugin reads and the dataset lacks."""
    name = f"{axis_of(type(source)) or 'rewards'}.{source.name}"
    reader, known = getattr(source, "reader", None) or name, {*columns, *getattr(source, "provided", ())}
    reads: list[tuple[str, Collection[str], Iterable[str]]] = [
        (reader, known, source.columns() if hasattr(source, "columns") else ())
    ]
    reads += [(f"{name}.when", columns, getattr(source, "when", None) or ())]
    found = []
    for who, choices, names in reads:
        for missing in lacking(names, columns):
            near = did_you_mean(missing, choices).strip()
            found.append(f"{who} reads {missing}" + (f" ({near})" if near else ""))
    return found


def lacking(reads: Iterable[str], columns: Collection[str]) -> list[str]:
    """Return the sorted names that are neither columns nor, if dotted, inside one."""
    return sorted(name for name in reads if name not in columns and name.split(".")[0] not in columns)
