"""Score by a language model with a rubric (LLM-as-a-judge, arXiv:2306.05685), over any OpenAI-compatible server.

Departures: responses are graded individually, never in pairs; a reply without a readable score is an error of its row, not
a score of 0.
"""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass, field
from typing import Any

from hf_rlhf import Metric, hookimpl
from hf_rlhf.axes import Count, NonNegative, Positive, RewardSource
from hf_rlhf.batch import Rollouts

from .._http import HttpError, check_url, shown, together
from ._http import HttpReward
from ._judge.cache import Replies, Turns
from ._judge.costs import Costs
from ._judge.reply import (
    SCORE,
    UnreadableError,
    content_of,
    default_template,
    filled,
    finite_range,
    marked,
    number_in,
    places,
)
from ._patterns import compiled

OWN = frozenset({"model", "messages", "temperature", "max_tokens", "seed", "stream", "n"})
"""Request fields that settings fill, or that would change the kind of reply."""


@dataclass(kw_only=True)
class Judge(HttpReward):
    """(grade - minimum) / (maximum - minimum): 0 to 1. No score if a column that the template names is null."""

    name = "judge"
    metrics = (
        Metric("prompt_tokens", "tokens", "of a request, as counted by the server", optional=True),
        Metric("completion_tokens", "tokens", "of a reply, as counted by the server", optional=True),
        Metric("cost", "as the prices", "of a request", optional=True),
        Metric("cached", "share of judgements", "found in the cache", optional=True),
        Metric("tokens_total", "tokens", "since the run began", optional=True, summary="max"),
        Metric("cost_total", "as the prices", "since the run began", optional=True, summary="max"),
    )
    rowwise = True

    base_url: str
    """URL of the server up to /chat/completions, such as https://api.openai.com/v1 or http://127.0.0.1:8000/v1."""
    model: str
    """Name of the judge model on that server."""
    template: str | None = None
    """The judge's prompt, with placeholders {prompt}, {completion}, {minimum}, {maximum} and {any dataset column}; None: a
    rubric of correctness, instruction following and clarity. Chat prompts are written as `role: content`. {completion}
    is put between marks with a random number of each request, which no completion can forge; a template with {boundary},
    that number, writes its own marks."""
    system: str | None = None
    """System message before the prompt."""
    pattern: str | None = None
    """Regular expression whose first group is the grade; its last match counts. None: `Score: 7` and similar. A reply in
    which matching takes over a second is an error of its row."""
    json_field: str | None = None
    """Instead of `pattern`: the field of the reply's JSON object with the grade; `grades.overall` for a nested one."""
    minimum: float = 0.0
    """Lowest grade, which scores 0. A grade outside the range is an error of its row."""
    maximum: float = 10.0
    """Highest grade, which scores 1."""
    temperature: NonNegative | None = 0.0
    """Sampling temperature of the judge; None: the server's default."""
    max_tokens: Count | None = 1024
    """Maximum tokens of a reply; None: the server's default."""
    seed: int | None = None
    """Seed sent with each request; servers need not honor it."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Additional fields of each request, such as {reasoning_effort: low} or {response_format: {type: json_object}}."""
    requests_per_minute: Positive | None = None
    """Maximum request rate of each process of the run; requests are spaced evenly."""
    cache: str | None = field(default=None, metadata={"written": True})
    """File that caches replies across runs, so that equal requests are paid once."""
    prompt_price: NonNegative | None = None
    """Price per million prompt tokens, for the metric `cost`."""
    completion_price: NonNegative | None = None
    """Price per million reply tokens, for the metric `cost`."""
    timeout: Positive | None = None
    """Seconds for a row including all retries; None: bounded by `request_timeout` and `request_retries` alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_url("base_url", self.base_url)
        self._check_reading()
        mine = sorted(OWN & self.extra.keys())
        if mine:
            raise ValueError(
                f"extra must not contain {', '.join(mine)}. Use the settings of these names, if there are any"
            )
        self._template = marked(default_template(self.json_field) if self.template is None else self.template)
        self._pattern = SCORE if self.pattern is None else self.pattern
        self._server = self._endpoint(f"{self.base_url.rstrip('/')}/chat/completions", self.requests_per_minute)
        self._replies = None if self.cache is None else Replies(self.cache)
        self._turns = Turns()
        self._costs = Costs(self.prompt_price, self.completion_price, self.cache is not None)

    def _check_reading(self) -> None:
        if self.pattern is not None and self.json_field is not None:
            raise ValueError("only one of pattern and json_field may be set, got both. Remove one")
        if not compiled("pattern", self.pattern or "()").groups:
            raise ValueError(f"pattern must have a group, got {self.pattern!r}. Put the grade in parentheses")
        if not finite_range(self.minimum, self.maximum):
            raise ValueError(f"maximum must be above minimum={self.minimum:g}, got {self.maximum:g}")
        if self.template is not None and "completion" not in places(self.template):
            raise ValueError("template must contain {completion}, the text to grade")

    def columns(self) -> set[str]:
        return places(self._template) - {"prompt", "completion", "minimum", "maximum", "boundary"}

    def close(self) -> None:
        if self._replies is not None:
            self._replies.close()

    async def __call__(self, rollouts: Rollouts) -> list[float | None]:
        headers = self._sent_headers()
        return await together(self._judge(rollouts, row, headers) for row in range(len(rollouts)))

    def take_logs(self) -> tuple[dict[str, list[Any]], dict[str, list[float]]]:
        """Return tokens, cost and cache hits of each row, and totals since the run began or was resumed."""
        return {}, self._costs.take()

    def state_dict(self) -> dict[str, Any]:
        return self._costs.totals.copy()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._costs.totals |= state

    async def _judge(self, rollouts: Rollouts, row: int, headers: dict[str, str]) -> float | None:
        values = {name: rollouts.column(name)[row] for name in self.columns()}
        if any(value is None for value in values.values()):
            return None
        values |= {"prompt": rollouts.prompts[row], "completion": rollouts.completions[row]}
        values |= {"minimum": self.minimum, "maximum": self.maximum}
        request = self._request(filled(self._template, {**values, "boundary": secrets.token_hex(16)}))
        if self._replies is None:
            return (await self._ask(request, headers))[0]
        # equal but for the boundary
        key = self._replies.key(self.base_url, self._request(filled(self._template, {**values, "boundary": ""})))
        async with self._turns.of(key):  # equal rows of a batch wait for the first one's reply
            known = self._replies.find(key)
            score = None if known is None else await self._known(known)
            if score is None:
                score, reply = await self._ask(request, headers)
                self._replies.keep(key, request, reply)
            return score

    def _request(self, text: str) -> dict[str, Any]:
        messages = [{"role": "system", "content": self.system}] if self.system is not None else []
        sampling = {"temperature": self.temperature, "max_tokens": self.max_tokens, "seed": self.seed}
        given = {name: value for name, value in sampling.items() if value is not None}
        return {"model": self.model, "messages": [*messages, {"role": "user", "content": text}], **given, **self.extra}

    async def _known(self, reply: str) -> float | None:
        """Return the score in a cached reply; None if these settings cannot read it, so that it is requested again."""
        try:
            score = await self._score(reply)
        except UnreadableError:
            return None
        self._costs.found()
        return score

    async def _ask(self, request: dict[str, Any], headers: dict[str, str]) -> tuple[float, str]:
        """Request a grade and return the score with the reply."""
        data = await self._server.post(request, headers)
        try:
            reply, cut = content_of(data)
        except UnreadableError as error:
            raise HttpError(f"{self._server.url}: {error}: {shown(str(data))}") from error
        self._costs.paid(data.get("usage"))
        try:
            return await self._score(reply), reply
        except UnreadableError as error:
            why = ", truncated at max_tokens," if cut else ""
            raise UnreadableError(
                f"{self.model} at {self._server.url} gave no score: {error}; its reply{why} ends {reply[-200:]!r}"
            ) from None

    async def _score(self, reply: str) -> float:
        # in a thread, as a pattern may take its time and other rows wait for their replies
        return await asyncio.to_thread(number_in, reply, self._pattern, self.json_field, self.minimum, self.maximum)


@hookimpl
def rewards() -> list[type[RewardSource]]:
    return [Judge]
