"""The score that a language model gives by a rubric (a judge, arXiv:2306.05685), over any OpenAI-compatible server.

Departures: one response is graded by itself, never two against each other; a reply without a readable score is an error of its
row and not a score of 0.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from hf_rlhf import Metric, hookimpl
from hf_rlhf.axes import Count, NonNegative, Positive, RewardSource
from hf_rlhf.batch import Rollouts

from ._http import HttpError, HttpReward, check_url, shown, together
from ._judge.cache import Replies, Turns
from ._judge.costs import Costs
from ._judge.reply import SCORE, UnreadableError, content_of, default_template, filled, finite_range, number_in, places

OWN = frozenset({"model", "messages", "temperature", "max_tokens", "seed", "stream", "n"})
"""Fields of a request that settings fill, or that would give another kind of reply."""


@dataclass(kw_only=True)
class Judge(HttpReward):
    """(grade - minimum) / (maximum - minimum): 0 to 1. No score where a column that the template names is null."""

    name = "judge"
    metrics = (
        Metric("prompt_tokens", "tokens", "of a request, as the server counts", optional=True),
        Metric("completion_tokens", "tokens", "of a reply, as the server counts", optional=True),
        Metric("cost", "as the prices", "of a request", optional=True),
        Metric("cached", "share of judgements", "that the cache held", optional=True),
        Metric("tokens_total", "tokens", "since the run began", optional=True, summary="max"),
        Metric("cost_total", "as the prices", "since the run began", optional=True, summary="max"),
    )
    rowwise = True

    base_url: str
    """The server up to /chat/completions, such as https://api.openai.com/v1 or http://127.0.0.1:8000/v1."""
    model: str
    """The judge's name at that server."""
    template: str | None = None
    """What the judge is asked, with places {prompt}, {completion}, {minimum}, {maximum} and {any dataset column}; a rubric
    of correctness, obedience and clarity when left out. Chat prompts are written as `role: content`."""
    system: str | None = None
    """A system message before it."""
    pattern: str | None = None
    """A regular expression whose first group is the grade; its last match counts. `Score: 7` and the like when left out."""
    json_field: str | None = None
    """Instead of `pattern`: the field of the reply's JSON object that holds the grade, `grades.overall` inside another."""
    minimum: float = 0.0
    """The lowest grade, which scores 0. A grade outside the range is an error of its row."""
    maximum: float = 10.0
    """The highest grade, which scores 1."""
    temperature: NonNegative | None = 0.0
    """Temperature of the judge; the server's own when left out."""
    max_tokens: Count | None = 1024
    """Most tokens of a reply; the server's own bound when left out."""
    seed: int | None = None
    """Sent as it is; no server is bound by it."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further fields of each request, such as {reasoning_effort: low} or {response_format: {type: json_object}}."""
    requests_per_minute: Positive | None = None
    """Requests are sent at this rate at most, evenly, by each process of the run."""
    cache: str | None = None
    """A file in which replies are kept and found again, in later runs too: equal requests are then paid once."""
    prompt_price: NonNegative | None = None
    """Price of a million tokens of the prompt, for the metric `cost`."""
    completion_price: NonNegative | None = None
    """Price of a million tokens of the reply, for the metric `cost`."""
    timeout: Positive | None = None
    """Seconds for a row with all its tries and waits; when left out `request_timeout` and `request_retries` bound it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_url("base_url", self.base_url)
        self._check_reading()
        mine = sorted(OWN & self.extra.keys())
        if mine:
            raise ValueError(f"extra: {', '.join(mine)} cannot stand there; the settings say what may be set")
        self._template = default_template(self.json_field) if self.template is None else self.template
        self._pattern = SCORE if self.pattern is None else re.compile(self.pattern)
        self._server = self._endpoint(f"{self.base_url.rstrip('/')}/chat/completions", self.requests_per_minute)
        self._replies = None if self.cache is None else Replies(self.cache)
        self._turns = Turns()
        self._costs = Costs(self.prompt_price, self.completion_price, self.cache is not None)

    def _check_reading(self) -> None:
        if self.pattern is not None and self.json_field is not None:
            raise ValueError("pattern and json_field both say where the grade stands: leave one out")
        try:
            groups = re.compile(self.pattern or "()").groups
        except re.error as error:
            raise ValueError(f"pattern {self.pattern!r} is not a regular expression: {error}") from error
        if not groups:
            raise ValueError(f"pattern {self.pattern!r} has no group: put the grade in parentheses")
        if not finite_range(self.minimum, self.maximum):
            raise ValueError(f"maximum ({self.maximum:g}) must be above minimum ({self.minimum:g})")
        if self.template is not None and "completion" not in places(self.template):
            raise ValueError("template: it has no place {completion}: the judge would not see what it grades")

    def columns(self) -> set[str]:
        return places(self._template) - {"prompt", "completion", "minimum", "maximum"}

    def close(self) -> None:
        if self._replies is not None:
            self._replies.close()

    async def __call__(self, rollouts: Rollouts) -> list[float | None]:
        headers = self._sent_headers()
        return await together(self._judge(rollouts, row, headers) for row in range(len(rollouts)))

    def take_logs(self) -> tuple[dict[str, list[Any]], dict[str, list[float]]]:
        """Tokens and cost of each row, whether its reply was known, and totals since the run began or was resumed."""
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
        request = self._request(filled(self._template, {**values, "minimum": self.minimum, "maximum": self.maximum}))
        if self._replies is None:
            return (await self._ask(request, headers))[0]
        key = self._replies.key(self.base_url, request)
        async with self._turns.of(key):  # equal rows of a batch wait for the first one's reply
            known = self._replies.find(key)
            score = None if known is None else self._known(known)
            if score is None:
                score, reply = await self._ask(request, headers)
                self._replies.keep(key, request, reply)
            return score

    def _request(self, text: str) -> dict[str, Any]:
        messages = [{"role": "system", "content": self.system}] if self.system is not None else []
        sampling = {"temperature": self.temperature, "max_tokens": self.max_tokens, "seed": self.seed}
        given = {name: value for name, value in sampling.items() if value is not None}
        return {"model": self.model, "messages": [*messages, {"role": "user", "content": text}], **given, **self.extra}

    def _known(self, reply: str) -> float | None:
        """The score in a kept reply; None where these settings cannot read it, and it is asked for once more."""
        try:
            score = self._score(reply)
        except UnreadableError:
            return None
        self._costs.found()
        return score

    async def _ask(self, request: dict[str, Any], headers: dict[str, str]) -> tuple[float, str]:
        """The score and the reply in which it stands."""
        data = await self._server.post(request, headers)
        try:
            reply, cut = content_of(data)
        except UnreadableError as error:
            raise HttpError(f"{self._server.url}: {error}: {shown(str(data))}") from error
        self._costs.paid(data.get("usage"))
        try:
            return self._score(reply), reply
        except UnreadableError as error:
            why = ", cut off at max_tokens" if cut else ""
            raise UnreadableError(
                f"{self.model} at {self._server.url} gave no score: {error}; its reply{why} ends {reply[-200:]!r}"
            ) from None

    def _score(self, reply: str) -> float:
        return number_in(reply, self._pattern, self.json_field, self.minimum, self.maximum)


@hookimpl
def rewards() -> list[type[RewardSource]]:
    return [Judge]
