"""Completions from vLLM servers, each in a process and an environment of its own, with the policy's weights in place.

`hf-rlhf serve-engine RECIPE` prints the command that starts a server. Token ids go to it; ids, log-probs at the temperature,
finish reasons and the version of the weights come back. Whenever the policy has moved, `sync` sends its weights, and the
servers load them in place. A completion from other weights than those is never used: a server that was started again gets them
again. In each rollout the log-probs of server and trainer are compared (`rollout/sampler_gap`).
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import urlsplit

from annotated_types import Ge

from hf_rlhf import Metric, hookimpl
from hf_rlhf.axes import Context, Count, Positive, RolloutEngine, WeightSync, choice

from .._http import check_url, secret, together
from ._settings import SamplingEngine, end_tokens
from ._vllm_child import Children, Serve, served

if TYPE_CHECKING:
    from hf_rlhf.axes import Algorithm, ModelSettings, Pending, Policy, Weights
    from hf_rlhf.batch import Completions, Prompt

    from ._vllm_landing import Landed
    from ._vllm_server import Row, Sent, Server
    from ._vllm_trust import Trust

GAP = "rollout/sampler_gap/mean"


@dataclass(kw_only=True)
class Vllm(SamplingEngine):
    """Samples completions with vLLM servers, to which the policy's weights are sent."""

    name = "vllm"
    local = False
    deterministic = False
    needs = frozenset({"plain_weights"})
    metrics = (
        Metric(
            "sampler_gap/limit",
            "nats",
            "largest mean difference of log-probs of server and trainer that does not end the run",
            setting="max_sampler_gap",
            optional=True,
        ),
    )

    url: str | list[str] = "http://127.0.0.1:8000"
    """URL of the server, or of several, which get prompts in turn."""
    sync: WeightSync = choice("folder")
    """Transport of the policy's weights to the servers."""
    max_sampler_gap: Positive | None = 0.05
    """Ends the run if the log-probs of server and trainer differ by more, in nats, as a mean over a rollout's tokens: in float32,
    where they agree to about 1e-5, over any, in half precision over the first one, and later by three times the first one's
    difference. Mixtures of experts and 8-bit caches only warn. None: only log the difference."""
    serve: Serve | None = None
    """Servers that the first process starts and ends with the run, as {python, devices, args, timeout} (docs/vllm_placement.md);
    None: they are there."""
    token_env: str | None = None
    """Environment variable with the servers' API key, sent as `Authorization: Bearer ...`; None: no key."""
    request_timeout: Positive = 1800.0
    """Seconds for one request: all completions of a prompt, until those that the server has before them are done as well, or
    loading the weights."""
    request_retries: Annotated[int, Ge(0)] = 20
    """Maximum retries of a request after connection errors, timeouts, and status 408, 429 or 5xx, while a server starts again for
    instance. Waits double from half a second, with jitter."""
    max_wait: Positive = 30.0
    """Maximum wait before a retry, in seconds."""
    num_workers: Count | None = 256
    """Concurrent requests of each process to each server; None: no limit."""

    def __post_init__(self) -> None:
        for url in self.urls:
            check_url("url", url)
        if not self.urls or len(set(self.urls)) < len(self.urls):
            raise ValueError(f"url must name one server or several different ones, got {self.url}")
        self._servers: list[Server] = []
        self._sent: Sent | None = None
        self._context: int | None = None
        self._process, self._processes = 0, 1
        self._trust: Trust | None = None
        self._children: Children | None = None
        self._sleepers: list[Server] = []
        self._found: list[str] = []

    @property
    def urls(self) -> list[str]:
        """URLs of the servers."""
        return [self.url] if isinstance(self.url, str) else self.url

    @property
    def provides(self) -> frozenset[str]:  # type: ignore[override]
        """`sampler_logps`, unless a setting truncates the distribution: the server's are then those of what is left."""
        return frozenset() if self.cuts() else frozenset({"sampler_logps"})

    def check(self, algorithm: Algorithm) -> Iterable[str]:
        yield from super().check(algorithm)
        try:
            self._headers()
        except ValueError as error:
            yield str(error)
        yield from () if self.serve is None else self.serve.problems(self.urls)

    def remarks(self, algorithm: Algorithm) -> Iterable[str]:
        yield from super().remarks(algorithm)
        if self.cuts():
            yield f"{', '.join(self.cuts())}: log-probs of server and trainer cannot be compared"
        yield from self._found

    def setup(self, context: Context) -> None:
        """Start the servers if they are the run's own, and ask each what it is. Raises `ValueError` with everything that does not
        fit, and the command that does."""
        self._servers = self._made()
        self._process, self._processes = context.process_index, context.num_processes
        if context.policy is None:
            return
        try:
            self._start(context)
            self._compare(context)
        except BaseException:
            self.close()
            raise

    def _start(self, context: Context) -> None:
        """Start the servers from the first process; the others wait for them."""
        from ._vllm_checks import computed_in

        if self.serve is None:
            return
        if self._process:
            for server in self._servers:
                server.wait(self.serve.timeout)
            return
        self._children = children = Children()
        model = served(context, children.folder)
        commands = self.serve_commands(model, computed_in(context), context.prompt_tokens)
        children.start(self.serve, self.urls, commands)
        for server, child in zip(self._servers, children.all, strict=True):
            server.child = child

    def _compare(self, context: Context) -> None:
        """Compare the servers with the policy."""
        from ._vllm_checks import check_servers
        from ._vllm_repeats import trial
        from ._vllm_trust import Trust, remark

        self._context, self._found = check_servers(self._servers, context, self.max_new_tokens, self.sync)
        self._sleepers = [
            x for x in self._servers if x.facts["config"].get("model_config", {}).get("enable_sleep_mode")
        ]
        if self.max_sampler_gap is not None:
            self._trust = Trust.of(context, self.max_sampler_gap, self._servers)
            self._found += [] if self.cuts() else remark(self._trust)
        self._each("/wake_up")
        if not self._process:
            vocabulary = context.policy.config.get_text_config().vocab_size  # type: ignore[union-attr]
            self._found.append(trial(self._servers, vocabulary, self._context))

    def wake(self, part: Literal["weights", "cache"]) -> None:
        """Let servers in sleep mode, which may share the trainer's GPU, take memory for their weights, or for their cache."""
        if self._sleepers:
            import torch

            torch.cuda.empty_cache()
        self._each("/wake_up?tags=" + {"weights": "weights", "cache": "kv_cache"}[part])

    def sleep(self) -> None:
        """Let servers in sleep mode move their weights into main memory and drop their cache."""
        self._each("/sleep?level=1")

    def _each(self, path: str) -> None:
        from ._vllm_server import wait_for

        if self._sleepers and not self._process:
            wait_for(together(server.post(path) for server in self._sleepers))

    def _made(self) -> list[Server]:
        from ._vllm_server import Server

        limits = self.request_timeout, self.request_retries, self.max_wait, self.num_workers
        headers = self._headers()
        return [Server(url, headers, *limits) for url in self.urls]

    def _headers(self) -> dict[str, str]:
        return {} if self.token_env is None else {"Authorization": f"Bearer {secret('rollout.vllm', self.token_env)}"}

    def load(self, weights: Weights) -> None:
        """Send the weights from the first process to every server; each is tried with one prompt."""
        from ._vllm_server import Sent, wait_for

        self.sync.collect(weights)
        adapter = hasattr(weights.policy.model, "peft_config")
        self._sent = Sent(weights.version, self.sync.send, adapter)
        if self._process:
            return
        wait_for(together(server.load(self._sent) for server in self._servers))
        self._try(weights.policy)

    def _try(self, policy: Policy) -> None:
        """Compare log-probs for one prompt."""
        from ._vllm_checks import probe

        if self._trust is not None:
            assert self._sent is not None
            with self._trust.computing():
                gap = probe(self._servers, policy, self._sent)
            self._trust.probed(gap, self._sent.version)

    def close(self) -> None:
        """End the servers that the run started."""
        if self._children is not None:
            self._children.close()
            self._children = None

    def __call__(
        self, policy: Policy, prompts: Sequence[Prompt], num_generations: int, *, temperature: float | None = None
    ) -> Completions:
        """Sample completions (see `RolloutEngine`). Greedy rows have no log-probs."""
        return self.start(policy, prompts, num_generations, temperature=temperature).result()

    def start(
        self, policy: Policy, prompts: Sequence[Prompt], num_generations: int, *, temperature: float | None = None
    ) -> Pending:
        """Send the requests, and return what waits for the answers."""
        import torch

        from ._vllm_landing import Landing

        sampling = self._sampling(policy, num_generations, temperature)
        self._check_lengths(prompts)
        seeds = torch.randint(2**53, (len(prompts),)).tolist()
        assert self._sent is not None, "load was not called"
        copies = num_generations // sampling["n"]
        work = self._asking(prompts, sampling, seeds)
        return Landing(work, len(prompts), self._sent.version, copies, "logprobs" in sampling)

    async def sample(
        self, policy: Policy, row: int, prompt: Prompt, *, temperature: float | None = None
    ) -> Completions:
        """Sample one completion; all of a conversation go to the same server, which keeps keys and values of its beginning."""
        from ._vllm_landing import completions

        sampling = self._sampling(policy, 1, temperature)
        self._check_lengths([prompt])
        assert self._sent is not None, "load was not called"
        if prompt.stop:
            stop = [*sampling.get("stop", ()), *prompt.stop]
            sampling |= {"stop": stop, "include_stop_str_in_output": True, "detokenize": True}
        rows = await self._one(row, prompt, sampling, prompt.seed or 0, self._sent)
        return completions(rows, self._sent.version, "logprobs" in sampling)

    def _sampling(self, policy: Policy, num_generations: int, temperature: float | None) -> dict[str, Any]:
        """Return vLLM's sampling parameters."""
        temperature = self.temperature if temperature is None else temperature
        greedy = temperature == 0
        sampling: dict[str, Any] = {
            "n": 1 if greedy else num_generations,
            "temperature": temperature,
            "repetition_penalty": self.repetition_penalty,
            "stop_token_ids": sorted(end_tokens(policy)),
            "detokenize": bool(self.stop_strings),
        }
        if not greedy:
            sampling |= {"top_p": self.top_p, "top_k": self.top_k, "min_p": self.min_p}
            sampling |= {} if self.cuts() else {"logprobs": 0}
        if self.stop_strings:
            sampling |= {"stop": self.stop_strings, "include_stop_str_in_output": True}
        return sampling

    def _asking(
        self, prompts: Sequence[Prompt], sampling: Mapping[str, Any], seeds: Sequence[int]
    ) -> Callable[[Landed], Coroutine[Any, Any, list[list[Row]]]]:
        """Return what asks the servers in turn for the completions of each prompt, and tells of each that lands."""
        assert self._sent is not None, "load was not called"
        sent = self._sent

        async def all_of_them(landed: Landed) -> list[list[Row]]:
            async def one(i: int, prompt: Prompt, seed: int) -> list[Row]:
                rows = await self._one(i, prompt, sampling, seed, sent)
                landed(i, rows)
                return rows

            return await together(
                one(i, prompt, seed) for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
            )

        return all_of_them

    async def _one(self, i: int, prompt: Prompt, sampling: Mapping[str, Any], seed: int, sent: Sent) -> list[Row]:
        """Return the completions of prompt or conversation number `i`."""
        server = self._servers[(self._process + self._processes * i) % len(self._servers)]
        steps = min(self.max_new_tokens, prompt.max_new_tokens or self.max_new_tokens)
        return await server.complete(prompt.ids, {**sampling, "seed": seed, "max_tokens": steps}, sent)

    def _check_lengths(self, prompts: Sequence[Prompt]) -> None:
        longest = max(len(p.ids) + min(self.max_new_tokens, p.max_new_tokens or self.max_new_tokens) for p in prompts)
        if self._context is not None and longest > self._context:
            raise ValueError(
                f"a prompt with its completion takes up to {longest} tokens, and the context of the vLLM server has "
                f"{self._context}. Start it with --max-model-len {longest}, or lower rollout.max_new_tokens"
            )

    def observe(self, statistics: Mapping[str, float]) -> None:
        """End the run if server and trainer are not the same model."""
        if self._trust is not None and (gap := statistics.get(GAP)) is not None:
            self._trust.rolled_out(gap)

    def report(self) -> Mapping[str, float]:
        """Return the bound of the next rollout's difference."""
        return {} if self._trust is None or self._trust.limit is None else {"sampler_gap/limit": self._trust.limit}

    def serve_commands(
        self, model: ModelSettings, dtype: str, prompt_tokens: int | None
    ) -> list[tuple[dict[str, str], list[str]]]:
        """Return variables and arguments of the command that starts each server, without the Python that runs it."""
        from ._vllm_checks import LORA_RANKS
        from ._vllm_server import EXTENSION

        worker = Path(__file__).parent / "_vllm_worker"
        key = {} if self.token_env is None else {"VLLM_API_KEY": f"${self.token_env}"}
        named = {"--tokenizer": model.tokenizer, "--revision": model.revision}
        of_model = [word for flag, value in named.items() if value is not None for word in (flag, value)]
        of_sync, sync_flags = self.sync.serve_flags()
        adapter = []
        if model.lora is not None:
            rank = next((rank for rank in LORA_RANKS if rank >= model.lora.r), model.lora.r)
            adapter = ["--enable-lora", "--max-lora-rank", str(rank)]
            of_sync = {**of_sync, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
        found = []
        for url in self.urls:
            parts = urlsplit(url)
            port = parts.port or (443 if parts.scheme == "https" else 80)
            context = [] if prompt_tokens is None else ["--max-model-len", str(prompt_tokens + self.max_new_tokens)]
            flags = ["--host", str(parts.hostname), "--port", str(port), "--dtype", dtype, *context]
            needed = [
                "--enable-scale-out",
                "--logprobs-mode",
                "processed_logprobs",
                "--worker-extension-cls",
                EXTENSION,
            ]
            variables = {"PYTHONPATH": str(worker), "VLLM_SERVER_DEV_MODE": "1", **key, **of_sync}
            words = [str(model.path), *of_model, *flags, *needed, *sync_flags, *adapter]
            found.append((variables, ["-m", EXTENSION.partition(".")[0], "serve", *words]))
        return found


@hookimpl
def rollout() -> list[type[RolloutEngine]]:
    return [Vllm]
