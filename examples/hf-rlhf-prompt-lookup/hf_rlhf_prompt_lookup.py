"""Prompt-lookup decoding (transformers' `prompt_lookup_num_tokens`): several tokens per forward for repetitive text.

Drafts are the tokens that followed an earlier occurrence of the latest n-gram; one forward gives the policy's distribution
at each of them; tokens are sampled from these and kept up to the first that differs from its draft. So each token is sampled
from the policy as without drafts. Rows are decoded one at a time: this pays off for few long completions that copy from
their prompt (edits, summaries, quotations), and costs time for short ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import Metric, hookimpl
from hf_rlhf.axes import Count, RolloutEngine
from hf_rlhf.batch import Completions

if TYPE_CHECKING:
    from hf_rlhf.axes import Policy
    from hf_rlhf.batch import Prompt


@dataclass(kw_only=True)
class PromptLookup(RolloutEngine):
    """Samples completions from the policy row by row, verifying tokens drafted from the text so far."""

    name = "prompt_lookup"
    metrics = (
        Metric(
            "tokens_per_forward",
            "tokens",
            "sampled tokens per forward of the model; 1 if no draft is accepted",
            healthy=(1.2, None),
            unhealthy="Drafts are hardly ever accepted: completions do not repeat their prompts. Use the engine `generate`, "
            "which decodes rows in batches.",
        ),
    )

    max_new_tokens: Count = 256
    """Maximum tokens of a completion, the end-of-sequence token included."""
    draft_tokens: Count = 8
    """Maximum tokens drafted before a forward."""
    max_ngram: Count = 3
    """Longest n-gram to look up, before shorter ones."""

    def __post_init__(self) -> None:
        self._tokens = self._forwards = 0

    def __call__(
        self, policy: Policy, prompts: Sequence[Prompt], num_generations: int, *, temperature: float | None = None
    ) -> Completions:
        """Sample completions (see `RolloutEngine`), without log-probs, which the trainer computes."""
        temperature = self.temperature if temperature is None else temperature
        calls: list[int] = []
        handle = policy.model.register_forward_hook(lambda *_: calls.append(1))
        try:
            ids = [self._row(policy, prompt.ids, temperature) for prompt in prompts for _ in range(num_generations)]
        finally:
            handle.remove()
        self._tokens += sum(map(len, ids))
        self._forwards += len(calls)
        ends = self._ends(policy)
        return Completions(ids=ids, finish_reasons=["stop" if row[-1] in ends else "length" for row in ids])

    def report(self) -> Mapping[str, float]:
        """Return metrics over all rollouts and evaluations since the last call, and over all processes."""
        import torch
        from accelerate.utils import reduce

        tokens, forwards = reduce(torch.tensor([self._tokens, self._forwards], dtype=torch.float64)).tolist()
        self._tokens = self._forwards = 0
        return {"tokens_per_forward": tokens / forwards} if forwards else {}

    def _row(self, policy: Policy, prompt: Sequence[int], temperature: float) -> list[int]:
        import torch
        from transformers import GenerationConfig

        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}
        config = GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            prompt_lookup_num_tokens=self.draft_tokens,
            max_matching_ngram_size=self.max_ngram,
            eos_token_id=sorted(self._ends(policy)) or None,
            pad_token_id=policy.tokenizer.pad_token_id,
            use_cache=True,
            **sampling,
        )
        ids = torch.tensor([prompt], device=policy.device)
        row = policy.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[0]
        return row[len(prompt) :].tolist()

    def _ends(self, policy: Policy) -> set[int]:
        own = policy.model.generation_config.eos_token_id
        return ({own} if isinstance(own, int) else set(own or ())) | ({policy.tokenizer.eos_token_id} - {None})


@hookimpl
def rollout() -> list[type[RolloutEngine]]:
    return [PromptLookup]
