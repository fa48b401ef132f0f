"""Completions by transformers' `generate`, which supports every architecture, stop strings and custom processors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria, StopStringCriteria

from hf_rlhf.axes import Policy, at_least_float32


@dataclass(kw_only=True)
class Generated:
    """Rows sampled by `generate`, up to the end of each."""

    ids: list[list[int]]
    stopped: list[bool]
    """False for truncated rows."""
    logps: list[list[float]] | None

    @classmethod
    def join(cls, parts: Sequence[Generated]) -> Generated:
        """Return the rows of all parts."""
        known = [part.logps for part in parts if part.logps is not None]
        return cls(
            ids=[row for part in parts for row in part.ids],
            stopped=[end for part in parts for end in part.stopped],
            logps=[row for logps in known for row in logps] if known else None,
        )

    def select(self, rows: Sequence[int]) -> Generated:
        """Return some rows, in this order."""
        return Generated(
            ids=[self.ids[i] for i in rows],
            stopped=[self.stopped[i] for i in rows],
            logps=None if self.logps is None else [self.logps[i] for i in rows],
        )


def by_length(
    sample: Callable[[Sequence[Sequence[int]]], Generated], prompts: Sequence[Sequence[int]], group: int
) -> Generated:
    """Sample prompts of equal length together, shortest first, and return `group` rows per prompt in the order of the prompts.

    Each length has a seed of its own, so that its rows do not depend on which other lengths there are.
    """
    lengths = [len(ids) for ids in prompts]
    order = sorted(range(len(prompts)), key=lambda i: lengths[i])  # stable
    seed = int(torch.randint(2**62, ()))
    parts = []
    for length in sorted(set(lengths)):
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed + length)
            parts.append(sample([prompts[i] for i in order if lengths[i] == length]))
    places = {i: place for place, i in enumerate(order)}
    return Generated.join(parts).select([places[i] * group + k for i in range(len(prompts)) for k in range(group)])


@dataclass(kw_only=True)
class Generator:
    """Sampler that calls `generate`; `settings` are fields of its `GenerationConfig`."""

    policy: Policy
    eos: Collection[int]
    settings: dict[str, Any]
    stop_strings: Sequence[str] = ()
    processors: Sequence[Any] = field(default_factory=list)

    def __call__(self, prompts: Sequence[Sequence[int]], group: int, temperature: float) -> Generated:
        """Sample `group` adjacent rows per prompt, without the tokens after their end. Prompts are padded on the left.

        Log-probs are of the full distribution at the temperature, before any truncation or penalty; greedy rows have none.
        """
        model, device, pad = self.policy.model, self.policy.device, self.policy.pad_token_id
        width = max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=device)
        attend = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        sampled = temperature > 0
        config = GenerationConfig(
            **{
                "num_return_sequences": group if sampled else 1,
                "eos_token_id": sorted(self.eos) or None,
                "pad_token_id": pad,
                "use_cache": True,
                "do_sample": sampled,
            }
            | self.settings
        )
        ends = _Ends(self.stop_strings, self.policy.tokenizer) if self.stop_strings else None
        with ExitStack() as stack:
            wanted = sampled and self.policy.wants_logps
            recorder = _Recorder(temperature, stack.enter_context(last_logits(model))) if wanted else None
            stack.enter_context(_alone(model))
            _forget(model, ids)
            rows = model.generate(
                input_ids=ids,
                attention_mask=attend,
                generation_config=config,
                logits_processor=[*([recorder] if recorder else ()), *self.processors] or None,
                stopping_criteria=[ends] if ends else None,
            )
        reported = recorder.finish(rows)[:, : rows.size(1) - width].tolist() if recorder else None
        found = self._cut(rows[:, width:].tolist(), reported, ends.lengths(width) if ends else None)
        return found if sampled else _repeat(found, group)

    def _cut(self, rows: list[list[int]], logps: list[list[float]] | None, stops: list[int] | None) -> Generated:
        """Truncate rows at an end-of-sequence token or a stop string, whichever comes first."""
        ids, stopped = [], []
        for i, row in enumerate(rows):
            ends = [place + 1 for place, token in enumerate(row) if token in self.eos][:1]
            ends += [stops[i]] if stops and stops[i] else []
            ids.append(row[: min(ends, default=len(row))])
            stopped.append(bool(ends))
        cut = [given[: len(row)] for given, row in zip(logps, ids, strict=True)] if logps else None
        return Generated(ids=ids, stopped=stopped, logps=cut)


def _repeat(found: Generated, group: int) -> Generated:
    ids = [list(row) for row in found.ids for _ in range(group)]
    return Generated(ids=ids, stopped=[end for end in found.stopped for _ in range(group)], logps=None)


class _Ends(StoppingCriteria):
    """Stopping criterion that ends a row at any of `strings` and records the position."""

    def __init__(self, strings: Sequence[str], tokenizer: Any):
        self._criteria = StopStringCriteria(tokenizer, list(strings))
        self._at: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        done: Tensor = self._criteria(input_ids, scores, **kwargs)
        if self._at is None:
            self._at = torch.zeros(len(done), dtype=torch.long, device=done.device)
        self._at = torch.where((self._at == 0) & done, input_ids.size(1), self._at)
        return done

    def lengths(self, width: int) -> list[int]:
        """Return the number of tokens of each completion up to and including its stop string; 0 without one."""
        assert self._at is not None
        return (self._at - width).clamp(min=0).tolist()


class _Recorder(LogitsProcessor):
    """Logits processor that changes nothing and records the log-prob of each sampled token.

    `raw` holds the model's logits (rows, V) of the next token, which is the last of `input_ids` in the following call.
    """

    def __init__(self, temperature: float, raw: list[Tensor]):
        self._temperature, self._raw = temperature, raw
        self._drawn: list[Tensor] = []
        self._last: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._note(input_ids)
        self._last = at_least_float32(self._raw[-1]) / self._temperature
        return scores

    def finish(self, rows: Tensor) -> Tensor:
        """Return the log-probs (rows, tokens) of the sampled tokens."""
        self._note(rows)
        return torch.stack(self._drawn, 1)

    def _note(self, rows: Tensor) -> None:
        if self._last is not None:
            self._drawn.append(self._last.log_softmax(-1).gather(1, rows[:, -1:]).squeeze(1))


@contextmanager
def last_logits(model: Any) -> Iterator[list[Tensor]]:
    """Yield a list that holds the logits (rows, V) at the last position of the model's latest forward."""
    latest: list[Tensor] = []

    def note(module: Any, args: Any, out: Any) -> None:
        latest[:] = [out.logits[:, -1]]

    handle = inner_of(model).register_forward_hook(note)
    try:
        yield latest
    finally:
        handle.remove()


@torch.no_grad()
def _forget(model: Any, ids: Tensor) -> None:
    """Run a forward without a cache if the model keeps its recurrent state in itself, where a prompt of one token would go on
    from the rows before."""
    if getattr(inner_of(model), "_is_stateful", False):
        model(input_ids=ids[:, :1], use_cache=False)


@contextmanager
def _alone(model: Any) -> Iterator[None]:
    """Ignore the model's generation config (suppressed tokens, n-gram bans, ...), with which transformers would fill in
    every setting that ours leaves unset."""
    parts: tuple[Any, ...] = (model, getattr(model, "base_model", None), inner_of(model))
    holders = [part for part in parts if hasattr(part, "generation_config")]
    own = [part.generation_config for part in holders]
    for part in holders:
        part.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for part, config in zip(holders, own, strict=True):
            part.generation_config = config


def inner_of(model: Any) -> Any:
    """Return the model under an adapter."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
