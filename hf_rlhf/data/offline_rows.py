"""Read, split, check and encode the rows of a recipe without rollouts, before a model is loaded."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from hf_rlhf.config.offline_sections import OfflineDataset
from hf_rlhf.contract.offline_trainer import OfflineTrainer
from hf_rlhf.data.addition_rows import demo_rows
from hf_rlhf.data.addition_task import BUILTIN
from hf_rlhf.data.sources import DatasetError, Row, load_rows

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class Numbered(Sequence[Row]):
    """Rows with their numbers in the dataset, from 1, and columns under the names that the trainer reads.

    `names`: name that the trainer reads -> column, or None for a column that is not read.
    """

    def __init__(self, rows: Any, places: Sequence[int], names: Mapping[str, str | None]):
        self.rows, self.places, self.names = rows, places, names

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        row = self.rows[self.places[index]]
        taken = {*self.names.values(), *self.names}
        kept = {name: value for name, value in row.items() if name not in taken}
        return {**kept, **{name: None if own is None else row[own] for name, own in self.names.items()}}

    def number(self, index: int) -> int:
        """Return the row's number in the dataset."""
        return self.places[index] + 1

    def part(self, indices: Iterable[int]) -> Numbered:
        """Return some of the rows."""
        return Numbered(self.rows, [self.places[i] for i in indices], self.names)


def read_rows(settings: OfflineDataset, trainer: OfflineTrainer) -> tuple[Numbered, Numbered | None]:
    """Return training and held-out rows with checked columns. Raises `DatasetError`."""
    if settings.path is None:
        raise DatasetError(
            f"no dataset: set dataset.path (--dataset) to a file, a folder, a name on the Hub, or {BUILTIN}"
        )
    if settings.path == BUILTIN:
        train, built_in = _built_in(settings, trainer)
    else:
        train, built_in = _load(settings, settings.path, settings.split), None
    if settings.eval_path is not None:
        held_out = _load(settings, settings.eval_path, settings.eval_split or "train")
    elif settings.eval_split is not None:
        held_out = _load(settings, settings.path, settings.eval_split)
    else:
        held_out = built_in
    whole = _numbered(train, settings, trainer, "dataset")
    if held_out is not None:
        return whole, _numbered(held_out, settings, trainer, "evaluation dataset")
    return _hold_out(whole, settings.held_out)


def encode(
    rows: Numbered, trainer: OfflineTrainer, tokenizer: PreTrainedTokenizerBase, context: int | None, title: str
) -> datasets.Dataset:
    """Encode each row with the trainer. Raises `DatasetError` naming the first invalid row."""
    import datasets

    limit = min((x for x in (trainer.max_length, context) if x is not None), default=None)
    examples: list[dict[str, Any]] = []
    empty = long = 0
    for index in range(len(rows)):
        try:
            made = trainer.encode(rows[index], tokenizer)
        except (ValueError, TypeError, KeyError) as error:
            raise DatasetError(f"{title}, row {rows.number(index)} (the first is 1): {error}") from error
        if made is None:
            empty += 1
        elif limit is not None and length(made) > limit:
            long += 1
        else:
            examples.append(made)
    for count, why in ((empty, "have nothing to learn from"), (long, f"are longer than {limit} tokens")):
        if count:
            logger.warning("%d of %d rows of the %s %s: dropped", count, len(rows), title, why)
    if not examples:
        raise DatasetError(
            f"the {title} has no usable row: {empty} of {len(rows)} have nothing to learn from and {long} are longer than "
            f"{limit} tokens (trainer.max_length, and the model's context)"
        )
    return datasets.Dataset.from_list(examples)


def length(example: Mapping[str, Any]) -> int:
    """Return the tokens of an encoded row: the length of its longest list."""
    return max((len(value) for value in example.values() if isinstance(value, list)), default=0)


def longest(examples: datasets.Dataset) -> int:
    """Return the tokens of the longest encoded row."""
    import pyarrow
    import pyarrow.compute

    lists = [column for column in examples.data.columns if pyarrow.types.is_list(column.type)]
    return max((pyarrow.compute.max(pyarrow.compute.list_value_length(column)).as_py() for column in lists), default=0)


def _built_in(settings: OfflineDataset, trainer: OfflineTrainer) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    for key, default in (
        ("name", None),
        ("split", "train"),
        ("eval_split", None),
        ("columns", {}),
        ("prompt_column", "prompt"),
    ):
        if getattr(settings, key) != default:
            raise DatasetError(f"dataset.{key} does not apply to {BUILTIN}: remove it")
    return demo_rows(trainer)


def _load(settings: OfflineDataset, path: str, split: str) -> Any:
    return load_rows(path, name=settings.name, split=split)


def _numbered(rows: Any, settings: OfflineDataset, trainer: OfflineTrainer, title: str) -> Numbered:
    first = next(iter(rows), None)
    if first is None:
        raise DatasetError(f"the {title} has no rows")
    names = _names(settings)
    own = {column for column in names.values() if column is not None}
    absent = sorted(own - set(first))
    missing = sorted(trainer.columns() - {name for name in {*names, *(set(first) - own)} if names.get(name, name)})
    if absent:
        has = ", ".join(sorted(first))
        key = "columns" if settings.columns else "prompt_column"
        raise DatasetError(f"dataset.{key}: the {title} has no column {', '.join(map(repr, absent))}; it has: {has}")
    if missing:
        raise DatasetError(
            f"trainer={trainer.name} reads {', '.join(sorted(trainer.columns()))}; the {title} has no "
            f"{', '.join(map(repr, missing))}, but {', '.join(sorted(first))}. If a column has another name, set "
            f"dataset.columns={{{missing[0]}: NAME}}"
        )
    return Numbered(rows, range(len(rows)), names)


def _names(settings: OfflineDataset) -> dict[str, str | None]:
    """Return the column of each name that the trainer reads under another one; None for none."""
    if settings.prompt_column == "prompt":
        return dict(settings.columns)
    if "prompt" in settings.columns:
        raise DatasetError(
            f"dataset.columns and dataset.prompt_column both name the prompt's column ({settings.columns['prompt']!r}, "
            f"{settings.prompt_column!r}). Remove one"
        )
    return {**settings.columns, "prompt": settings.prompt_column}


def _hold_out(rows: Numbered, count: int) -> tuple[Numbered, Numbered | None]:
    """Hold out a tenth of the rows, at most about `count`, by whole prompts, whatever the run's seed."""
    count = min(count, len(rows) // 10)
    groups: dict[str, list[int]] = {}
    for index in range(len(rows)):
        groups.setdefault(_group(rows[index], index), []).append(index)
    order = list(groups.values())
    random.Random("held-out").shuffle(order)
    kept: list[int] = []
    for group in order:
        if len(kept) + len(group) <= count:
            kept += group
    if not kept:
        return rows, None
    taken = set(kept)
    return rows.part(i for i in range(len(rows)) if i not in taken), rows.part(sorted(kept))


def _group(row: Row, index: int) -> str:
    """Return a key shared by the rows of a prompt; a row without a prompt is its own group.

    The prompt of a pair without one is the common start of both, in whole messages or lines.
    """
    prompt: Any = row.get("prompt")
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if prompt is None and isinstance(chosen, list | str) and isinstance(rejected, type(chosen)):
        start = [a for a, b in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))]
        prompt = "".join(start).rpartition("\n")[0] if isinstance(chosen, str) else start
        prompt = prompt or None
    return f"row {index}" if prompt is None else json.dumps(prompt, sort_keys=True, default=str)
