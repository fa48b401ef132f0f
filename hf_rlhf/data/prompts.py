"""Turn a recipe's dataset into prompts: splits, checks, chat templates, tokens.

Invalid datasets raise `DatasetError` before a model is loaded: no rows, a missing column, an empty prompt (with its row
number), a prompt longer than the context.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import TYPE_CHECKING, Any, TypeVar

from hf_rlhf.batch import Prompt
from hf_rlhf.config.algorithm import Algorithm
from hf_rlhf.config.sections import Dataset
from hf_rlhf.contract import chat
from hf_rlhf.data.builtin_tasks import TASKS
from hf_rlhf.data.fingerprints import RowHash
from hf_rlhf.data.sources import DatasetError, Row, Rows, load_rows, missing_columns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

T = TypeVar("T")
CHUNK = 1000
"""Prompts tokenized at a time."""


def load_prompts(
    settings: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_tokens: int | None = None,
    tool_tokens: int = 0,
    train: Rows | None = None,
    evaluation: Rows | None = None,
) -> tuple[Prompts | StreamedPrompts, Prompts | StreamedPrompts | None]:
    """Return the training prompts, and the evaluation prompts or None.

    `max_prompt_tokens`: the room that the context leaves, of which descriptions of tools take `tool_tokens` beside each
    conversation; `settings.max_prompt_tokens` can only lower it. `train` and `evaluation` replace what `settings` would load.
    """
    rows, held_out = read_rows(settings, train, evaluation)

    def prompts(rows: _Subset | Iterable[Row], title: str) -> Prompts | StreamedPrompts:
        names = _columns(rows, title)
        _check_prompt(settings, names)
        maker = _Maker(
            settings=settings, tokenizer=tokenizer, room=max_prompt_tokens, tool_tokens=tool_tokens, names=names
        )
        return maker.prompts(rows, title)

    return prompts(rows, "dataset"), None if held_out is None else prompts(held_out, "evaluation dataset")


def prompt_room(config: Any, settings: Dataset, algorithm: Algorithm) -> int | None:
    """Return the prompt tokens that the context of a model with this configuration leaves beside the longest completion.

    Raises `ValueError` if there are none, or fewer than `settings.max_prompt_tokens`.
    """
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    bounds = algorithm.completion_bounds
    if context is None or not bounds:
        return context
    name = max(bounds, key=lambda bound: bounds[bound])
    longest = bounds[name]
    if longest >= context:
        raise ValueError(
            f"{name}={longest} leaves no room for a prompt in the model's context of {context} tokens: lower it"
        )
    if settings.max_prompt_tokens is not None and settings.max_prompt_tokens > context - longest:
        raise ValueError(
            f"dataset.max_prompt_tokens={settings.max_prompt_tokens} and {name}={longest} must fit together into "
            f"the model's context of {context} tokens: lower one of them"
        )
    return context - longest


def read_columns(
    settings: Dataset, train: Rows | None = None, evaluation: Rows | None = None
) -> tuple[set[str], int | None, int | None]:
    """Return the columns that rewards can read and the numbers of training and held-out rows (None for a stream), without a
    tokenizer."""
    rows, held_out = read_rows(settings, train, evaluation)
    columns = _columns(rows, "dataset")
    _check_prompt(settings, columns)
    if held_out is not None:
        columns &= _columns(held_out, "evaluation dataset")
    held = 0 if held_out is None else len(held_out) if isinstance(held_out, _Subset) else None
    return columns - _consumed(settings), len(rows) if isinstance(rows, _Subset) else None, held


def check_columns(columns: set[str], rewards: Iterable[Any]) -> None:
    """Check that rewards read existing columns. Raises `DatasetError`."""
    problems = [problem for reward in rewards for problem in missing_columns(reward, columns)]
    if problems:
        raise DatasetError(f"{'; '.join(problems)}: the dataset has {', '.join(sorted(columns)) or 'no such columns'}")


def read_rows(
    settings: Dataset, train: Rows | None = None, evaluation: Rows | None = None
) -> tuple[_Subset | Iterable[Row], _Subset | Iterable[Row] | None]:
    """Return the training rows and the evaluation rows: `evaluation`, `eval_path`, `eval_split`, or held-out rows."""
    if train is None and settings.path in TASKS:
        train, built_in = _built_in(settings)
        evaluation = built_in if evaluation is None and settings.eval_path is None else evaluation
    if train is None:
        train = _load(settings, settings.path, settings.split)
    if evaluation is None and settings.eval_path is not None:
        evaluation = _load(settings, settings.eval_path, settings.eval_split or "train")
    elif evaluation is None and settings.eval_split is not None:
        evaluation = _load(settings, settings.path, settings.eval_split)
    if evaluation is not None or settings.held_out == 0:
        return _sequence(train), None if evaluation is None else _sequence(evaluation)
    return _hold_out(_sequence(train), settings.held_out)


@dataclass
class _Subset(Sequence[Row]):
    """Some rows of a sequence, by index."""

    rows: Any
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[self.indices[index]]

    def number(self, index: int) -> int:
        """Return the row's number in the dataset, from 1."""
        place = self.indices[index]
        return self.rows.number(place) if isinstance(self.rows, _Subset) else place + 1


def _sequence(rows: Any) -> _Subset | Iterable[Row]:
    """Wrap rows with a length and indices as a `Sequence`, which `datasets.Dataset` is not."""
    if hasattr(rows, "__len__") and hasattr(rows, "__getitem__"):
        return _Subset(rows, range(len(rows)))
    return rows


def _hold_out(
    rows: _Subset | Iterable[Row], count: int
) -> tuple[_Subset | Iterable[Row], _Subset | Iterable[Row] | None]:
    """Hold out a tenth of the rows, at most `count`, whatever the run's seed.

    Of a `datasets.IterableDataset` the first `count` rows are held out, of other iterables none.
    """
    stream: Any = rows
    if not isinstance(rows, _Subset):
        return (stream.skip(count), stream.take(count)) if hasattr(stream, "skip") else (rows, None)
    count = min(count, len(rows) // 10)
    if count == 0:
        return rows, None
    order = list(range(len(rows)))
    random.Random("held-out").shuffle(order)
    return _Subset(rows, sorted(order[count:])), _Subset(rows, sorted(order[:count]))


def _built_in(settings: Dataset) -> tuple[Rows, Rows]:
    for key, default in (("name", None), ("split", "train"), ("eval_split", None), ("streaming", False)):
        if getattr(settings, key) != default:
            raise DatasetError(f"dataset.{key} does not apply to {settings.path}: remove it")
    return TASKS[str(settings.path)].rows()


def _load(settings: Dataset, path: str | None, split: str) -> Rows:
    if path is None:
        raise DatasetError(
            f"no dataset: set dataset.path (--dataset) to a file, a folder, a name on the Hub, or {' or '.join(TASKS)}"
        )
    return load_rows(path, name=settings.name, split=split, streaming=settings.streaming)


def _columns(rows: Rows, title: str) -> set[str]:
    """Return the columns of the first row. Raises `DatasetError` if there are no rows."""
    first = next(iter(rows), None)
    if first is None:
        raise DatasetError(f"the {title} has no rows")
    return set(first)


def _places(settings: Dataset) -> list[str]:
    """Return the columns that make the prompt."""
    if settings.prompt_template is None:
        return [settings.prompt]
    return [place for _, place, _, _ in Formatter().parse(settings.prompt_template) if place is not None]


def _consumed(settings: Dataset) -> set[str]:
    """Return the columns that rewards do not see: the prompt's. They see a template's columns."""
    return {settings.prompt} if settings.prompt_template is None else set()


def _check_prompt(settings: Dataset, columns: set[str]) -> None:
    missing = sorted(set(_places(settings)) - columns)
    if missing:
        key = "prompt" if settings.prompt_template is None else "prompt_template"
        raise DatasetError(
            f"dataset.{key}: there is no column {', '.join(map(repr, missing))}; the dataset has: "
            f"{', '.join(sorted(columns))}. Name the prompt's column with dataset.prompt, or make the prompt from "
            "others with dataset.prompt_template"
        )


@dataclass(kw_only=True)
class Prompts(Sequence[Prompt]):
    """Prompts with an order and a length; tokens and open tags are stored, other columns are read on access."""

    tokens: list[tuple[list[int], str]]
    rows: _Subset
    maker: _Maker
    content: str
    """Hash of the rows that were read, with their tokens."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def longest(self) -> int | None:
        """Tokens of the longest prompt, with the tools that it shows; None without prompts."""
        longest = max((len(ids) for ids, _ in self.tokens), default=None)
        return None if longest is None else longest + self.maker.beside(self[0].prompt)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[position] for position in range(len(self))[index]]
        row, (ids, opening) = self.rows[index], self.tokens[index]
        prompt = self.maker.form(row, self.rows.number(index))
        return Prompt(ids=ids, prompt=prompt, columns=self.maker.columns(row), opening=opening)


@dataclass(kw_only=True)
class StreamedPrompts:
    """Prompts made on iteration, which starts at the first row each time."""

    rows: Iterable[Row]
    maker: _Maker
    longest = None

    def __iter__(self) -> Iterator[Prompt]:
        for number, row in enumerate(self.rows, start=1):
            prompt = self.maker.form(row, number)
            ids, opening = self.maker.tokenize([prompt], [number])[0]
            if not self.maker.too_long(ids, number, prompt):
                yield Prompt(ids=ids, prompt=prompt, columns=self.maker.columns(row), opening=opening)


@dataclass(kw_only=True)
class _Maker:
    """Makes prompts of rows."""

    settings: Dataset
    tokenizer: PreTrainedTokenizerBase
    room: int | None
    tool_tokens: int
    names: set[str]

    def prompts(self, rows: _Subset | Iterable[Row], title: str) -> Prompts | StreamedPrompts:
        if not isinstance(rows, _Subset):
            return StreamedPrompts(rows=rows, maker=self)
        tokens: list[tuple[list[int], str]] = []
        running = RowHash()
        for start in range(0, len(rows), CHUNK):
            chunk = range(start, min(start + CHUNK, len(rows)))
            numbers = [rows.number(index) for index in chunk]
            read = [rows[index] for index in chunk]
            tokens += self.tokenize(
                [self.form(row, number) for row, number in zip(read, numbers, strict=True)], numbers
            )
            for row, made in zip(read, tokens[start:], strict=True):
                running.add(row, made)
        first = self.form(rows[0], rows.number(0))
        kept = [index for index in range(len(rows)) if not self.too_long(tokens[index][0], rows.number(index), first)]
        allowed = f"{self.limit(first)} tokens{self._taken(first)}"
        if not kept:
            raise DatasetError(f"all {len(rows)} prompts of the {title} are longer than {allowed}")
        if len(kept) < len(rows):
            logger.warning("%d of %d prompts are longer than %s: dropped", len(rows) - len(kept), len(rows), allowed)
        subset, digest = _Subset(rows, kept), running.hexdigest()
        return Prompts(tokens=[tokens[index] for index in kept], rows=subset, maker=self, content=digest)

    def form(self, row: Row, number: int) -> str | list[dict[str, Any]]:
        """Return the prompt of a row: text, or chat messages."""
        settings = self.settings
        for place in _places(settings):
            if row.get(place) is None or (settings.prompt_template is None and not row[place]):
                raise DatasetError(
                    f"dataset: the prompt of row {number} is empty (column {place!r}; the first row is 1)"
                )
        template = settings.prompt_template
        prompt = row[settings.prompt] if template is None else template.format_map(row)
        if isinstance(prompt, str):
            if not prompt.strip():
                raise DatasetError(f"dataset: the prompt of row {number} is empty (the first row is 1)")
            if settings.system is not None and not settings.chat:
                raise DatasetError("dataset.system requires chat prompts: set dataset.chat=true, or remove it")
            if not settings.chat:
                return prompt
            prompt = [{"role": "user", "content": prompt}]
        elif settings.chat:
            raise DatasetError("dataset.chat wraps text prompts, and these are chat messages already: remove it")
        messages = self._of_row(number, chat.messages_of, prompt, "the prompt")
        if settings.system is None:
            return messages
        if messages[0]["role"] == "system":
            raise DatasetError(f"dataset.system: row {number} has a system message of its own (the first row is 1)")
        return [{"role": "system", "content": settings.system}, *messages]

    def _of_row(self, number: int, do: Callable[..., T], *arguments: Any) -> T:
        try:
            return do(*arguments)
        except chat.ChatError as error:
            raise DatasetError(f"dataset, row {number} (the first is 1): {error}") from error

    def tokenize(self, prompts: list[Any], numbers: list[int]) -> list[tuple[list[int], str]]:
        """Return the tokens of each prompt, and the tag that it leaves open.

        A conversation ends with the start of the assistant's turn, or inside an open one.
        """
        texts = [
            prompt if isinstance(prompt, str) else self._of_row(number, self._chat, prompt)
            for prompt, number in zip(prompts, numbers, strict=True)
        ]
        for number, text in zip(numbers, texts, strict=True):
            if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
                raise DatasetError(
                    f"dataset: the prompt of row {number} must be valid Unicode, got a lone surrogate, half of a "
                    "character (the first row is 1). Repair or remove the row"
                )
        special = [isinstance(prompt, str) for prompt in prompts]
        if all(special) or not any(special):
            ids = self.tokenizer(texts, add_special_tokens=special[0])["input_ids"]
        else:
            raise DatasetError("dataset: prompts must be all text or all chat messages, got both")
        for number, row in zip(numbers, ids, strict=True):
            if not row:
                raise DatasetError(f"dataset: the prompt of row {number} has no tokens (the first row is 1)")
        return [
            (chat.one_bos(self.tokenizer, row), chat.opening_of(text)) for row, text in zip(ids, texts, strict=True)
        ]

    def _chat(self, messages: chat.Messages) -> str:
        if not self.tokenizer.chat_template:
            raise DatasetError(
                "chat prompts require a chat template, and the tokenizer has none: set model.chat_template"
            )
        end: Any = "open" if messages[-1]["role"] == "assistant" else "answer"
        try:
            return chat.render(self.tokenizer, chat.Conversation(messages, end))[0]
        except chat.ChatError as error:
            if self.settings.system is None or not self._renders(messages[1:], end):
                raise
            raise chat.ChatError(
                f"dataset.system is a message that the chat template does not take: {error}. Remove dataset.system, or put it "
                "into the prompts"
            ) from error

    def _renders(self, messages: chat.Messages, end: Any) -> bool:
        try:
            chat.render(self.tokenizer, chat.Conversation(messages, end))
        except chat.ChatError:
            return False
        return True

    def beside(self, prompt: Any) -> int:
        """Return the tokens that descriptions of tools take in a prompt: none in plain text, which shows no tools."""
        return 0 if isinstance(prompt, str) else self.tool_tokens

    def limit(self, prompt: Any) -> int | None:
        """Return the most tokens of a prompt, without its tools."""
        room = None if self.room is None else self.room - self.beside(prompt)
        return min((x for x in (self.settings.max_prompt_tokens, room) if x is not None), default=None)

    def _taken(self, prompt: Any) -> str:
        return f" beside {taken} of the tools" if (taken := self.beside(prompt)) else ""

    def too_long(self, ids: list[int], number: int, prompt: Any) -> bool:
        limit = self.limit(prompt)
        if limit is None or len(ids) <= limit:
            return False
        if self.settings.overlong_prompts == "error":
            raise DatasetError(
                f"dataset: the prompt of row {number} has {len(ids)} tokens and {limit} are allowed{self._taken(prompt)} (the "
                "first row is 1): set dataset.overlong_prompts=drop, or allow more with dataset.max_prompt_tokens or a "
                "smaller rollout.max_new_tokens or environment.0.max_tokens"
            )
        return True

    def columns(self, row: Row) -> dict[str, Any]:
        """Return the columns that rewards see, the same in every row."""
        return {name: row.get(name) for name in sorted(self.names - _consumed(self.settings))}
