"""A teacher, or an anchor, that a vLLM server serves: log-probs of the rows' tokens over HTTP (on-policy distillation,
arXiv:2306.13649).

vLLM's completions take token ids and report `prompt_logprobs`: of each token, and of the k likeliest ones. They are at
temperature 1 whatever is asked for, so that the rollout's has to be 1. Whole distributions do not go over HTTP; the server's
`--max-logprobs` bounds k. Its tokens must be the policy's, which its tokenizer is asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge

from hf_rlhf import hookimpl
from hf_rlhf.axes import Count, Positive, Reference

from .._http import Endpoint, HttpError, check_url, secret, shown, together
from ..rollout._vllm_server import LARGEST, TRIES, HalfAnswer, wait_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_rlhf.axes import Algorithm, Context
    from hf_rlhf.batch import ReferenceRows

logger = logging.getLogger(__name__)

COMPLETIONS, DETOKENIZE, MODELS = "/v1/completions", "/detokenize", "/v1/models"


@dataclass(kw_only=True)
class RemoteModel(Reference):
    """Log-probs of the model of a vLLM server that shares the policy's tokens."""

    name = "remote"
    scores = frozenset({"logps", "top_logps"})

    url: str = "http://127.0.0.1:8000"
    """URL of the server."""
    model: str | None = None
    """Name that the server gives the model; None: its first one."""
    token_env: str | None = None
    """Environment variable with the server's API key, sent as `Authorization: Bearer ...`; None: no key."""
    request_timeout: Positive = 600.0
    """Seconds for the scores of one row, until those that the server has before it are done as well."""
    request_retries: Annotated[int, Ge(0)] = 12
    """Maximum retries of a request after connection errors, timeouts, and status 408, 429 or 5xx. Waits double from half a
    second, with jitter."""
    max_wait: Positive = 30.0
    """Maximum wait before a retry, in seconds."""
    num_workers: Count | None = 64
    """Concurrent requests of each process; None: no limit."""

    def __post_init__(self) -> None:
        check_url("url", self.url)
        self._top_k = 0
        self._completion: int | None = None
        self._vocabulary: int | None = None

    def in_words(self) -> str:
        return f"the model {self.model or 'served'} at {self.url}"

    def check(self, algorithm: Algorithm) -> Iterable[str]:
        if algorithm.rollout.temperature != 1:
            yield (
                f"the server's log-probs are at temperature 1, and rollout.temperature is {algorithm.rollout.temperature:g}. Set "
                "rollout.temperature=1, or use=model"
            )
        try:
            self._headers()
        except ValueError as error:
            yield str(error)
        read = [
            getattr(kl.estimator, "top_k", None) or 0
            for kl in algorithm.kl
            if (kl.reference or algorithm.reference) == self
        ]
        self._top_k = max(read, default=0)
        self._completion = getattr(algorithm.rollout, "max_new_tokens", None)

    def _headers(self) -> dict[str, str]:
        return (
            {} if self.token_env is None else {"Authorization": f"Bearer {secret('reference.remote', self.token_env)}"}
        )

    def token_problems(self, tokenizer: PreTrainedTokenizerBase) -> Iterable[str]:
        """Yield why the server cannot score the policy's tokens: it is asked for the text of all of them."""
        import httpx

        try:
            known = self._served
        except (httpx.HTTPError, LookupError, TypeError, ValueError) as error:
            said = f"{type(error).__name__}: {error}"
            yield f"{self.url} does not answer as vLLM does ({said}). Start it, and wait until it answers"
            return
        if self.model is not None and self.model not in known:
            yield f"{self.url} has no model {self.model!r}, but {', '.join(sorted(known))}. Set model=null"
            return
        ids = list(range(len(tokenizer)))
        try:
            text = wait_for(self._post(DETOKENIZE, model=self._name, tokens=ids))["prompt"]
        except HttpError as error:
            if error.status == 404:  # it was started without a tokenizer
                logger.warning("%s has no %s, so its tokens are taken for the policy's", self.url, DETOKENIZE)
                return
            yield f"{self.url} does not know the policy's {len(ids)} tokens: {error}. Serve a model of the policy's family"
            return
        if text != tokenizer.decode(ids):
            yield (
                f"the tokenizer of {self.url} must be the policy's, but it reads the policy's tokens as other text. Serve a "
                "model of the policy's family"
            )

    @cached_property
    def _served(self) -> dict[str, int | None]:
        """Name -> context of the models that the server has."""
        import httpx

        answer = httpx.get(f"{self.url.rstrip('/')}{MODELS}", headers=self._headers(), timeout=60.0)
        found = {str(x["id"]): x.get("max_model_len") for x in answer.raise_for_status().json()["data"]}
        if not found:
            raise ValueError("it serves no model")
        return found

    @property
    def _name(self) -> str:
        return self.model or next(iter(self._served))

    def setup(self, context: Context) -> None:
        """Ask for the scores of a row as the run will. Raises `ValueError` with what to start the server with."""
        if context.policy is None:
            return
        self._vocabulary = context.policy.config.get_text_config().vocab_size
        length = self._served[self._name]
        if self._completion is not None and length is not None:
            tokens = (context.prompt_tokens or 1) + self._completion + 1
            if length < tokens:
                raise ValueError(
                    f"reference=remote: {self.url} has a context of {length} tokens, and the longest prompt, a completion and "
                    f"the token that the server adds take {tokens}. Start it with --max-model-len {tokens}"
                )
        try:
            wait_for(self._row([0, 1], [2], self._top_k))
        except HttpError as error:
            raise ValueError(
                f"reference=remote: {error}. It must report the {self._top_k} likeliest tokens: start it with --max-logprobs "
                f"{max(self._top_k, 1)}"
            ) from error

    def build(self, policy: PreTrainedModel) -> None:
        return None

    def score(self, rows: ReferenceRows, needs: frozenset[str], top_k: int | None = None) -> dict[str, Any]:
        """Ask for the scores of every row."""
        import torch

        k = (top_k or 0) if "top_logps" in needs else 0
        pairs = zip(rows.prompt_ids, rows.completion_ids, strict=True)
        found = wait_for(together(self._row(prompt, completion, k) for prompt, completion in pairs))
        mask = rows.mask
        logps, top = mask.new_zeros(mask.shape), mask.new_zeros(*mask.shape, k)
        ids = torch.zeros(*mask.shape, k, dtype=torch.long, device=mask.device)
        for i, (own, likeliest) in enumerate(found):
            logps[i, : len(own)] = torch.tensor(own, dtype=mask.dtype)
            if k:
                ids[i, : len(own)] = torch.tensor([[token for token, _ in at] for at in likeliest])
                top[i, : len(own)] = torch.tensor([[x for _, x in at] for at in likeliest], dtype=mask.dtype)
        known = {"logps": logps * mask, "top_logps": top * mask[..., None], "top_ids": ids * (mask[..., None] > 0)}
        return {name: x for name, x in known.items() if name in needs or (name == "top_ids" and k)}

    async def _row(
        self, prompt: Sequence[int], completion: Sequence[int], k: int
    ) -> tuple[list[float], list[list[tuple[int, float]]]]:
        """Return the log-probs of a row's completion, and of each token the k likeliest ones in its place, in falling order."""
        failed: HalfAnswer | None = None
        ids = [*prompt, *completion]
        for _ in range(TRIES):
            answer = await self._post(
                COMPLETIONS, model=self._name, prompt=ids, max_tokens=1, temperature=1.0, prompt_logprobs=k
            )
            try:
                return self._scores(answer, len(prompt), completion, k)
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                failed = HalfAnswer(f"{self.url}: an incomplete answer ({error!r}): {shown(str(answer))}")
        assert failed is not None
        raise failed

    def _scores(
        self, answer: Any, prompt: int, completion: Sequence[int], k: int
    ) -> tuple[list[float], list[list[tuple[int, float]]]]:
        (choice,) = answer["choices"]
        places: list[Mapping[str, Any]] = choice["prompt_logprobs"][prompt:]
        read = [{int(token): float(x["logprob"]) for token, x in at.items()} for at in places]
        own = [at[token] for at, token in zip(read, completion, strict=True)]
        if not k:
            return own, []
        most = self._vocabulary or len(read[0]) + max(map(max, read), default=0)
        likeliest = [sorted(((t, x) for t, x in at.items() if t < most), key=lambda tx: -tx[1])[:k] for at in read]
        if any(len(at) < k for at in likeliest):
            raise ValueError(f"fewer than {k} of the policy's tokens")
        return own, likeliest

    async def _post(self, path: str, **body: Any) -> Any:
        return await self._endpoints[path].post(body, self._headers())

    @cached_property
    def _endpoints(self) -> dict[str, Endpoint]:
        limits = self.request_timeout, self.request_retries, self.max_wait, self.num_workers
        return {
            path: Endpoint(self.url.rstrip("/") + path, *limits, largest=LARGEST) for path in (COMPLETIONS, DETOKENIZE)
        }


@hookimpl
def reference() -> list[type[Reference]]:
    return [RemoteModel]
