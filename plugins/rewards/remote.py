"""Scores from your own server, over HTTP: prompts and completions in, scores out.

The protocol is one JSON object each way, documented in docs/remote_rewards.md; `hf-rlhf serve-reward` serves any source
with it. A server can be restarted during a run: requests are retried while it is down.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from hf_rlhf import Metric, hookimpl
from hf_rlhf.axes import Count, RewardSource
from hf_rlhf.batch import Rollouts, Spans, TokenScores

from .._http import HttpError, check_url, shown, together
from ._http import HttpReward

logger = logging.getLogger(__name__)

VERSION = 1
"""Protocol version in every request and response."""
TOKENS = ("prompt_ids", "completion_ids", "masks")


@dataclass(kw_only=True)
class Remote(HttpReward):
    """The server's answer for each row: a number, null (no score), per-step rewards or per-token rewards."""

    name = "remote"
    metrics = (
        Metric(
            "failed_frac",
            "share of rows",
            "reported as failed by the server",
            (None, 0.0),
            "A source fails on the server: its log has the reason.",
            optional=True,
        ),
    )

    url: str
    """URL that requests are posted to, such as http://127.0.0.1:8765/score."""
    send: list[str] = field(default_factory=list)
    """Dataset columns sent with the texts."""
    send_ids: bool = False
    """Send token ids and masks too, for a server that counts or scores tokens."""
    batch_size: Count | None = 64
    """Rows per request; None: all rows in one, for a server that compares the rows of a prompt."""
    num_workers: Count | None = 4
    """Concurrent requests of each process of the run; None: no limit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_url("url", self.url)
        self._server = self._endpoint(self.url)
        self._failed: list[float] = []

    def columns(self) -> set[str]:
        return set(self.send)

    async def __call__(self, rollouts: Rollouts) -> list[float | Spans | TokenScores | None]:
        size = self.batch_size or max(1, len(rollouts))
        batches = [range(i, min(i + size, len(rollouts))) for i in range(0, len(rollouts), size)]
        headers = self._sent_headers()
        given = await together(self._server.post(self._request(rollouts, rows), headers) for rows in batches)
        answered = [self._answers(data, rows) for data, rows in zip(given, batches, strict=True)]
        return [score for scores in answered for score in scores]

    def take_logs(self) -> tuple[dict[str, list[Any]], dict[str, list[float]]]:
        """Return the share of rows that the server reports as failed, if it reports any."""
        failed, self._failed = self._failed, []
        return {}, {"failed_frac": failed} if any(failed) else {}

    def _request(self, rollouts: Rollouts, rows: range) -> dict[str, Any]:
        part = slice(rows.start, rows.stop)
        more = (*(TOKENS if self.send_ids else ()), *(("openings",) if any(rollouts.openings) else ()))
        fields = ("prompts", "completions", "finish_reasons", "group_ids", *more)
        columns = {name: rollouts.column(name)[part] for name in sorted(self.send)}
        return {"version": VERSION, **{name: getattr(rollouts, name)[part] for name in fields}, "columns": columns}

    def _answers(self, data: Any, rows: range) -> list[float | Spans | TokenScores | None]:
        if not isinstance(data, dict) or not isinstance(data.get("scores"), list):
            raise self._wrong(f'the answer must be {{"version": {VERSION}, "scores": [...]}}', data)
        if data.get("version") != VERSION:
            raise self._wrong(f"protocol version must be {VERSION}, not {data.get('version')!r}", data)
        scores = data["scores"]
        if len(scores) != len(rows):
            raise self._wrong(f"scores must be one per completion ({len(rows)}), not {len(scores)}", data)
        self._report(data, rows)
        return [self._answer(row, value) for row, value in zip(rows, scores, strict=True)]

    def _answer(self, row: int, value: Any) -> float | Spans | TokenScores | None:
        try:
            match value:
                case None:
                    return None
                case {"spans": list(steps)}:
                    return Spans([(_whole(end), _number(reward)) for end, reward in steps])
                case {"tokens": list(rewards)}:
                    return TokenScores([_number(reward) for reward in rewards])
                case _:
                    return _number(value)
        except (TypeError, ValueError, OverflowError):
            raise self._wrong(
                f'row {row} must be a number, null, {{"spans": [[end, number], ...]}} or {{"tokens": [number, ...]}}',
                value,
            ) from None

    def _report(self, data: dict[str, Any], rows: range) -> None:
        """Record the rows that the server reports as failed."""
        failed, errors = data.get("failed", 0), data.get("errors", [])
        if not isinstance(failed, int) or not 0 <= failed <= len(rows) or not isinstance(errors, list):
            raise self._wrong("failed must be a number of rows and errors a list", data)
        self._failed += [failed / len(rows)] * len(rows)
        if failed:
            reason = shown(str(errors[0]), 300) if errors else "no reason reported"
            logger.warning("rewards.remote: %d of %d rows failed at %s: %s", failed, len(rows), self.url, reason)

    def _wrong(self, why: str, came: Any) -> HttpError:
        return HttpError(f"{self.url}: {why}; got {shown(str(came))}")


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError
    return float(value)


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError
    return value


@hookimpl
def rewards() -> list[type[RewardSource]]:
    return [Remote]
