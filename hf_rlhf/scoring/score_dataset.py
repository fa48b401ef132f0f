"""Scoring of existing completions (`hf-rlhf score`), and agreement with labels."""

from __future__ import annotations

import contextlib
import logging
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_rlhf.batch import Rollouts, Spans, TokenScores
from hf_rlhf.contract.chat import opening_of
from hf_rlhf.data.sources import Row, load_rows, missing_columns
from hf_rlhf.runtime.errors import UserError
from hf_rlhf.scoring.agreement import Agreement, Number, agreement
from hf_rlhf.scoring.lookup import NO_TOKENS, NamedRewards, NoTokens, scorer_of, tokenizer_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hf_rlhf.scoring.scorer import SourceResult

HEAD = 60
"""Maximum characters shown of a text."""


@dataclass(kw_only=True)
class Columns:
    """Columns of the parts of a row."""

    prompt: str | None = None
    """Column of the prompt; None: the recipe's `dataset.prompt`."""
    completion: str = "completion"
    finish_reason: str = "finish_reason"
    """Optional column with `stop`, or `length` for a truncated completion."""


@dataclass(kw_only=True)
class Scores:
    """Results of scoring a dataset."""

    rollouts: Rollouts
    asked: dict[str, SourceResult]
    totals: dict[str, list[Number]]
    """Total of each row by source label; None for a row without a score."""
    agreement: dict[str, Agreement]
    labels: list[Number]
    """Labels compared with, one per row; empty without a comparison."""

    @property
    def failed(self) -> int:
        """Number of failed rows, over all sources."""
        return sum(len(found.failures) for found in self.asked.values())


def score(
    rewards: NamedRewards,
    dataset: str,
    *,
    columns: Columns | None = None,
    against: str | None = None,
    tokenizer: str | None = None,
    split: str = "train",
) -> Scores:
    """Score the completions of a dataset. Raises `UserError` for invalid input; failed rows are counted."""
    places = columns or Columns()
    rows = _rows(dataset, split)
    names = {name for row in rows for name in row}
    _check_columns(rewards, places, names, against)
    chosen = tokenizer_of(rewards, tokenizer)
    rollouts = rollouts_of(rewards, rows, places, names, chosen)
    labels = [] if against is None else [_label(row[against], number, against) for number, row in enumerate(rows)]
    with scorer_of(rewards.sources, chosen, rewards.model.chat_template_kwargs) as scorer, _without_warnings():
        asked = scorer.ask(rollouts, 0, counts=False)
    _check_tokens(asked)
    totals = {label: [total(answer) for answer in found.answers] for label, found in asked.items()}
    compared = {label: agreement(found, labels) for label, found in totals.items()} if labels else {}
    return Scores(rollouts=rollouts, asked=asked, totals=totals, agreement=compared, labels=labels)


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Suppress the logging of failures, which are listed with the scores."""
    from hf_rlhf.scoring.failures import logger

    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def total(answer: float | Spans | TokenScores) -> Number:
    """Return the score of a row: the number, or the sum over its steps or tokens; None without one."""
    if isinstance(answer, Spans):
        return math.fsum(value for _, value in answer.values)
    if isinstance(answer, TokenScores):
        return math.fsum(answer.values)
    return None if math.isnan(answer) else answer


def _rows(dataset: str, split: str) -> list[Row]:
    rows: list[Row] = [dict(row) for row in load_rows(dataset, split=split)]
    if not rows:
        raise UserError(f"{dataset} has no rows")
    return rows


def _check_columns(rewards: NamedRewards, places: Columns, names: set[str], against: str | None) -> None:
    """Check that all columns exist. Raises `UserError` naming the missing ones."""
    prompts = _prompt_columns(rewards, places)
    wanted = [(name, "the prompt; set --prompt-column") for name in prompts]
    wanted += [(places.completion, "the completion; set --completion-column")]
    wanted += [(against, "the labels of --against")] if against is not None else []
    missing = [f"no column {name!r} ({what})" for name, what in wanted if name not in names]
    try:
        missing += [problem for _, source in rewards.sources for problem in missing_columns(source, names)]
    except ValueError as error:
        raise UserError(str(error)) from error
    if missing:
        raise UserError(f"{'; '.join(missing)}. The dataset has: {', '.join(sorted(names))}")


def _prompt_columns(rewards: NamedRewards, places: Columns) -> list[str]:
    from string import Formatter

    template = rewards.dataset.prompt_template
    if places.prompt is not None or template is None:
        return [places.prompt or rewards.dataset.prompt]
    return [name for _, name, _, _ in Formatter().parse(template) if name]


def rollouts_of(
    rewards: NamedRewards,
    rows: Sequence[Row],
    places: Columns,
    names: set[str],
    tokenizer: PreTrainedTokenizerBase | None,
) -> Rollouts:
    """Convert rows of a dataset to the input of sources; without a tokenizer they have no tokens."""
    from dataclasses import replace

    from hf_rlhf.data.prompts import _Maker

    settings = rewards.dataset
    if places.prompt is not None:
        settings = replace(settings, prompt=places.prompt, prompt_template=None)
    maker = _Maker(settings=settings, tokenizer=tokenizer, room=None, tool_tokens=0, names=names)  # type: ignore[arg-type]
    prompts = [maker.form(row, number) for number, row in enumerate(rows, start=1)]
    completions = [completion_of(row[places.completion], number) for number, row in enumerate(rows)]
    reasons = [_reason(row.get(places.finish_reason), number) for number, row in enumerate(rows)]
    taken = {places.completion, places.finish_reason}
    columns = {name: [row.get(name) for row in rows] for name in sorted(maker.columns({}).keys() - taken)}
    prompt_ids: list[Any] = [NoTokens()] * len(rows)
    completion_ids: list[Any] = [NoTokens()] * len(rows)
    masks: list[Any] = [NoTokens()] * len(rows)
    openings = [opening_of(prompt) if isinstance(prompt, str) else "" for prompt in prompts]
    if tokenizer is not None:
        tokens = maker.tokenize(prompts, list(range(1, len(rows) + 1)))
        prompt_ids, openings = [ids for ids, _ in tokens], [opening for _, opening in tokens]
        completion_ids = [_ids(tokenizer, text, why) for text, why in zip(completions, reasons, strict=True)]
        masks = [[1] * len(ids) for ids in completion_ids]
    return Rollouts(
        prompts=prompts,
        completions=completions,
        prompt_ids=prompt_ids,
        completion_ids=completion_ids,
        masks=masks,
        finish_reasons=reasons,
        columns=columns,
        group_ids=_groups(prompts),
        openings=openings,
        messages=_conversations(prompts, [row[places.completion] for row in rows]),
    )


def _conversations(prompts: Sequence[Any], given: Sequence[Any]) -> list[list[dict[str, Any]]]:
    """Return the conversations of rows whose completions are messages, as an environment gives them; none if all are texts."""
    if all(isinstance(each, str) for each in given):
        return []

    def messages(role: str, said: Any) -> list[dict[str, Any]]:
        if isinstance(said, str):
            return [{"role": role, "content": said}]
        return [{"role": role, **message} for message in ([said] if isinstance(said, Mapping) else said)]

    pairs = zip(prompts, given, strict=True)
    return [[*messages("user", prompt), *messages("assistant", said)] for prompt, said in pairs]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, why: str) -> list[int]:
    """Tokenize the completion, with an end-of-sequence token unless it was truncated."""
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return [*ids, tokenizer.eos_token_id] if why == "stop" else ids


def completion_of(value: Any, row: int) -> str:
    """Return a completion as text: itself, or the contents of the assistant's messages, joined by line breaks."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        value = [value]
    if isinstance(value, Sequence) and all(isinstance(part, Mapping) for part in value) and value:
        said = [_content(part.get("content")) for part in value if part.get("role", "assistant") == "assistant"]
        if said:
            return "\n".join(said)
    raise UserError(f"row {row}: the completion must be a text or assistant messages, got {str(value)[:HEAD]!r}")


def _content(content: Any) -> str:
    if isinstance(content, Sequence) and not isinstance(content, str):
        return "".join(str(part.get("text") or "") for part in content if isinstance(part, Mapping))
    return "" if content is None else str(content)


def _reason(value: Any, row: int) -> str:
    if value in (None, ""):
        return "stop"
    if value not in ("stop", "length"):
        raise UserError(f"row {row}: the finish reason must be 'stop' or 'length', got {value!r}")
    return str(value)


def _groups(prompts: Sequence[Any]) -> list[int]:
    """Return group ids, equal for rows with equal prompts."""
    seen: dict[str, int] = {}
    return [seen.setdefault(repr(prompt), len(seen)) for prompt in prompts]


def _label(value: Any, row: int, column: str) -> Number:
    """Convert a label to a number; None for a row without one."""
    if value is None or value == "":
        return None
    if isinstance(value, str):
        value = {"true": 1.0, "false": 0.0}.get(value.strip().lower(), value)
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise UserError(f"row {row}: {column} must be a number, true or false for --against, got {value!r}") from None
    return None if math.isnan(number) else number


def _check_tokens(asked: Mapping[str, SourceResult]) -> None:
    for label, found in asked.items():
        if any(NO_TOKENS in failure.reason for failure in found.failures):
            raise UserError(
                f"reward {label!r} reads token ids or masks, but the dataset has only texts. Set the policy's tokenizer with "
                "--tokenizer FOLDER"
            )


# Output


def as_json(scores: Scores) -> dict[str, Any]:
    """Convert the results to plain data. Rows count from 0."""
    return {
        "scores": scores.totals,
        "agreement": {label: found.number for label, found in scores.agreement.items()},
        "errors": [
            {"source": label, "row": failure.row, "kind": failure.kind, "reason": failure.reason}
            for label, found in scores.asked.items()
            for failure in found.failures
        ],
    }


HEADER = ["source", "rows", "scored", "missing", "failed", "mean", "std", "min", "max", "s/row"]


def table(scores: Scores) -> list[list[str]]:
    """Return a row per source for the columns HEADER. `missing`: no score without failure; std: population std."""
    lines = []
    for label, totals in scores.totals.items():
        found = scores.asked[label]
        given = [x for x in totals if x is not None]
        failed = {failure.row for failure in found.failures}
        missing = sum(x is None and row not in failed for row, x in enumerate(totals))
        numbers = [statistics.fmean(given), statistics.pstdev(given), min(given), max(given)] if given else [None] * 4
        counts = [len(totals), len(given), missing, len(failed)]
        lines.append([label, *map(str, counts), *map(shown, numbers), f"{found.seconds / len(totals):.2g}"])
    return lines


def shown(number: Number) -> str:
    """Format a number for a table; `-` for None, 0 for -0."""
    return "-" if number is None else f"{number + 0.0:.4g}"


def remarks(scores: Scores, most: int) -> list[str]:
    """Return further lines: metrics of the sources, failures, agreement and differences; at most `most` of a kind."""
    lines: list[str] = []
    for label, found in scores.asked.items():
        said = [f"{name} {shown(statistics.fmean(values))}" for name, values in found.metrics.items() if values]
        lines += [f"{label}, mean over rows: {', '.join(said)}"] if said else []
    for label, found in scores.asked.items():
        for failure in found.failures[:most]:
            lines.append(f"{label}, row {failure.row}: {failure.kind}: {failure.reason}")
        lines += _rest(len(found.failures), most, "rows failed")
    for label, compared in scores.agreement.items():
        lines += ["", *_compared(label, compared, scores, most)]
    return lines


def _compared(label: str, found: Agreement, scores: Scores, most: int) -> list[str]:
    if not found.rows:
        return [f"{label}: no row has both a score and a label"]
    if not found.binary:
        numbers = f"Pearson {shown(found.pearson)}, Spearman {shown(found.spearman)}"
        return [f"{label}: {numbers} with the labels, over {found.rows} rows"]
    equal = found.rows - len(found.differing)
    lines = [f"{label}: equal to the label in {equal} of {found.rows} rows ({shown(found.equal)})"]
    lines += [f"{'':>12}{'score 1':>10}{'score 0':>10}{'no score':>10}"]
    for name, value in (("label 1", 1), ("label 0", 0), ("no label", None)):
        counts = [found.confusion[value, score] for score in (1, 0, None)]
        lines.append(f"{name:>12}" + "".join(f"{count:>10}" for count in counts))
    for row in found.differing[:most]:
        prompt, completion = scores.rollouts.prompts[row], scores.rollouts.completions[row]
        given = f"label {scores.labels[row]:g}, score {scores.totals[label][row]:g}"
        lines.append(f"  row {row}: {given}: {_head(prompt)} -> {_head(completion)}")
    return lines + _rest(len(found.differing), most, "rows differ")


def _rest(count: int, most: int, what: str) -> list[str]:
    return [f"  {count} {what}; the first {most} are shown"] if count > most else []


def _head(text: Any) -> str:
    if isinstance(text, list):
        text = _content(text[-1].get("content"))
    return repr(text[:HEAD] + ("..." if len(text) > HEAD else ""))
