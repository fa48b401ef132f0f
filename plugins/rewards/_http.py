"""Base class of reward sources that query a server."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge

from hf_rlhf.axes import Context, Count, Positive, RewardSource

from .._http import Endpoint, certificates, secret

if TYPE_CHECKING:
    from hf_rlhf.axes import Algorithm

SECRET = frozenset({"authorization", "proxy-authorization", "x-api-key", "api-key", "cookie"})
"""Headers with secrets, whose values must name environment variables."""
VARIABLE = re.compile(r"\$\{(\w+)\}")


@dataclass(kw_only=True)
class HttpReward(RewardSource):
    """Base class of reward sources that query a server."""

    token_env: str | None = None
    """Environment variable with the server's API key or token, sent as `Authorization: Bearer ...`; None: no token."""
    headers: dict[str, str] = field(default_factory=dict)
    """Additional headers; `${NAME}` in a value is the environment variable NAME. Secrets must come from the environment."""
    request_timeout: Positive = 60.0
    """Seconds for one request, from connecting to the end of the answer."""
    request_retries: Annotated[int, Ge(0)] = 6
    """Maximum retries of a request after connection errors, timeouts, and status 408, 429 or 5xx. Waits double from half a
    second, with jitter, and are at least as long as `Retry-After`."""
    max_wait: Positive = 30.0
    """Maximum wait before a retry, in seconds. There is no retry if the server asks for a longer one."""
    num_workers: Count | None = 16
    """Concurrent requests of each process of the run; None: no limit."""

    def __post_init__(self) -> None:
        known = {name.lower() for name in self.headers}
        if self.token_env is not None and "authorization" in known:
            raise ValueError("only one of token_env and a header Authorization may be set, got both. Remove one")
        for name, value in self.headers.items():
            if name.lower() in SECRET and not VARIABLE.search(value):
                raise ValueError(
                    f"headers: {name} must not contain a secret, because recipes are saved with a run. Put the secret "
                    f"into an environment variable and write {name}: ${{NAME}}"
                )

    def check(self, algorithm: Algorithm) -> Iterable[str]:
        try:
            self._sent_headers()
        except ValueError as error:
            yield str(error)

    def prepare(self) -> None:
        certificates()

    def setup(self, context: Context) -> None:
        self._sent_headers()

    def _sent_headers(self) -> dict[str, str]:
        """Return the headers with their secrets. Raises `ValueError` naming a variable that is not set."""
        given = {"Authorization": f"Bearer ${{{self.token_env}}}"} if self.token_env is not None else {}
        return {name: VARIABLE.sub(self._variable, value) for name, value in {**given, **self.headers}.items()}

    def _variable(self, found: re.Match[str]) -> str:
        return secret(f"rewards.{self.name}", found[1])

    def _endpoint(self, url: str, per_minute: float | None = None) -> Endpoint:
        return Endpoint(url, self.request_timeout, self.request_retries, self.max_wait, self.num_workers, per_minute)
