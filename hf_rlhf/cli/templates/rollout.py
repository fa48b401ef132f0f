"""Samples with a hotter first token, so that the completions of a prompt begin in different ways.

The log-probs that it reports are those of the distribution that was sampled from: a `rollout_correction` weighs tokens
by their ratio to the policy's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from hf_rlhf import Metric, hookimpl
from hf_rlhf.axes import Count, Positive, RolloutEngine
from hf_rlhf.batch import Completions

if TYPE_CHECKING:
    from hf_rlhf.axes import Algorithm, Policy
    from hf_rlhf.batch import Prompt

hf_rlhf_api = "1.0"


@dataclass(kw_only=True)
class MyName(RolloutEngine):
    """Samples token by token; the first token of a completion at `heat` times the temperature."""

    name = "my_name"
    provides = frozenset({"sampler_logps"})
    metrics = (
        Metric(
            "fill",
            "share of max_new_tokens",
            "mean length of the completions over the longest that is allowed",
            (None, 0.9),
            "Completions are cut off: raise `rollout.max_new_tokens`.",
        ),
    )

    heat: Positive = 2.0
    """Temperature of the first token, over that of the others."""
    max_new_tokens: Count = 64
    """Longest completion in tokens, the end-of-sequence token included."""

    def __post_init__(self) -> None:
        self._length: float | None = None

    def check(self, algorithm: Algorithm) -> Iterable[str]:
        if "sampler_logps" not in algorithm.needs:
            yield (
                f"heat={self.heat:g} samples from another distribution than the policy's, which nothing corrects: set "
                "rollout_correction.use=truncated, or rollout.use=generate"
            )

    def __call__(
        self,
        policy: Policy,
        prompts: Sequence[Prompt],
        num_generations: int,
        *,
        temperature: float | None = None,
    ) -> Completions:
        end = policy.tokenizer.eos_token_id
        if end is None:
            raise ValueError(f"rollout={self.name}: the tokenizer has no eos_token; set one, or no completion ends")
        ids: list[list[int]] = []
        logps: list[list[float]] = []
        for prompt in prompts:
            drawn = self._draw(policy, prompt.ids, num_generations, temperature, end)
            for tokens, own in zip(*drawn, strict=True):
                length = tokens.index(end) + 1 if end in tokens else len(tokens)
                ids.append(tokens[:length])
                logps.append(own[:length])
        reasons = ["stop" if row[-1] == end else "length" for row in ids]
        return Completions(ids=ids, finish_reasons=reasons, logps=None if temperature == 0 else logps)

    def _draw(
        self, policy: Policy, prompt: list[int], rows: int, temperature: float | None, end: int
    ) -> tuple[list[list[int]], list[list[float]]]:
        """`rows` completions of one prompt with their log-probs; what follows an end-of-sequence token is noise."""
        chosen = self.temperature if temperature is None else temperature
        given = torch.tensor([prompt] * rows, device=policy.device)
        ended = torch.zeros(rows, dtype=torch.bool, device=policy.device)
        tokens, logps, cache = [], [], None
        for step in range(self.max_new_tokens):
            out = policy.model(input_ids=given, past_key_values=cache, use_cache=True)
            heat = chosen * self.heat if step == 0 else chosen
            log_probs = (out.logits[:, -1].float() / (heat or 1.0)).log_softmax(-1)
            drawn = torch.multinomial(log_probs.exp(), 1) if chosen else log_probs.argmax(-1, keepdim=True)
            tokens.append(drawn)
            logps.append(log_probs.gather(1, drawn))
            ended |= drawn.squeeze(1) == end
            if bool(ended.all()):
                break
            given, cache = drawn, out.past_key_values
        return torch.cat(tokens, 1).tolist(), torch.cat(logps, 1).tolist()

    def observe(self, statistics: Mapping[str, float]) -> None:
        self._length = statistics.get("rollout/length/mean", self._length)

    def report(self) -> Mapping[str, float]:
        return {} if self._length is None else {"fill": self._length / self.max_new_tokens}

    def state_dict(self) -> dict[str, Any]:
        return {"length": self._length}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._length = state["length"]


@hookimpl
def rollout() -> list[type[RolloutEngine]]:
    return [MyName]
