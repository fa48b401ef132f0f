"""Requests and responses of `hf-rlhf serve-reward`, the protocol of `rewards.remote`: one JSON object each way."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from hf_rlhf.batch import Rollouts
from hf_rlhf.data.sources import lacking
from hf_rlhf.scoring.lookup import NO_TOKENS, NoTokens

if TYPE_CHECKING:
    from hf_rlhf.scoring.scorer import SourceResult

VERSION = 1
"""Protocol version in every request and response."""
SHOWN_ERRORS = 100
"""Maximum failed rows named in a response."""


class RequestError(Exception):
    """Error for an invalid request: HTTP `status`, and a message that says what to send instead."""

    def __init__(self, status: int, text: str):
        super().__init__(text)
        self.status = status


def read_request(body: bytes, reads: set[str]) -> Rollouts:
    """Parse the rows of a request; `reads` are the columns that the source needs. Raises `RequestError`."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the request must be JSON: {error}") from error
    if not isinstance(data, dict):
        raise RequestError(400, 'the request must be {"version": 1, "prompts": [...], "completions": [...]}')
    if data.get("version") != VERSION:
        raise RequestError(400, f"this server speaks protocol version {VERSION}, got {data.get('version')!r}")
    completions = _list(data, "completions", None, _is_text, "texts")
    rows = len(completions)
    prompts = _list(data, "prompts", rows, _is_prompt, "texts or lists of messages with role and content")
    reasons = _list(
        data, "finish_reasons", rows, lambda x: x in ("stop", "length"), "'stop' or 'length'", ["stop"] * rows
    )
    groups = _list(data, "group_ids", rows, _is_whole, "whole numbers", list(range(rows)))
    openings = _list(data, "openings", rows, _is_text, "texts", [""] * rows)
    columns = data.get("columns", {})
    if not isinstance(columns, dict):
        raise RequestError(400, "columns must be a mapping of names to lists")
    missing = lacking(reads, columns)
    if missing:
        raise RequestError(
            422, f"this source reads the columns {', '.join(missing)}. Send them (`send` of rewards.remote)"
        )
    return Rollouts(
        prompts=prompts,
        completions=completions,
        finish_reasons=reasons,
        group_ids=groups,
        openings=openings,
        columns={name: _list(columns, name, rows, lambda x: True, "values") for name in columns},
        **_tokens(data, rows),
    )


def _tokens(data: dict[str, Any], rows: int) -> dict[str, list[Any]]:
    """Return prompt_ids, completion_ids and masks; those not sent are placeholders that raise an error when read."""
    unknown: list[Any] = [NoTokens()] * rows
    found = {
        name: _list(data, name, rows, _are_whole, "lists of whole numbers", unknown)
        for name in ("prompt_ids", "completion_ids", "masks")
    }
    if ("masks" in data) != ("completion_ids" in data) or (
        "masks" in data and list(map(len, found["masks"])) != list(map(len, found["completion_ids"]))
    ):
        raise RequestError(400, "completion_ids and masks must be sent together, with 0 or 1 for each token")
    return found


def _list(data: dict[str, Any], name: str, rows: int | None, good: Any, what: str, default: Any = None) -> list[Any]:
    if name not in data and default is not None:
        return list(default)
    values = data.get(name)
    if not isinstance(values, list):
        raise RequestError(400, f"{name} must be a list of one value per completion")
    if rows is not None and len(values) != rows:
        raise RequestError(400, f"{name} must have one value per completion ({rows}), got {len(values)}")
    wrong = next((i for i, value in enumerate(values) if not good(value)), None)
    if wrong is not None:
        raise RequestError(400, f"{name} must be {what}, got {str(values[wrong])[:60]!r} in row {wrong}")
    return values


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_whole(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_whole, value))


def _is_prompt(value: Any) -> bool:
    messages = isinstance(value, list) and bool(value) and all(isinstance(m, dict) and "role" in m for m in value)
    return isinstance(value, str) or messages


def answer(asked: SourceResult) -> dict[str, Any]:
    """Build the response to a request. Raises `RequestError` if the source needs token ids that were not sent."""
    import math

    from hf_rlhf.scoring.answers import as_json

    if any(NO_TOKENS in failure.reason for failure in asked.failures):
        raise RequestError(
            422,
            "this source reads token ids or masks. Send prompt_ids, completion_ids and masks (send_ids=true of "
            "rewards.remote)",
        )
    scores = [None if isinstance(x, float) and math.isnan(x) else as_json(x) for x in asked.answers]
    errors = [{"row": f.row, "kind": f.kind, "reason": f.reason} for f in asked.failures[:SHOWN_ERRORS]]
    return {"version": VERSION, "scores": scores, "errors": errors, "failed": len(asked.failures)}
