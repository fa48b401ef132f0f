"""Sample completions token by token, the completions of a prompt together.

Try it: `hf-rlhf train quickstart 'rollout={use: token_by_token, max_new_tokens: 4}'`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hf_rlhf import hookimpl
from hf_rlhf.axes import Count, Policy, Prompt, RolloutEngine
from hf_rlhf.batch import Completions

hf_rlhf_api = "1.0"


@dataclass(kw_only=True)
class TokenByToken(RolloutEngine):
    """Sample from the policy without a cache: short, and slow for long completions."""

    name = "token_by_token"

    max_new_tokens: Count = 32
    """Maximum length of a completion in tokens, the end-of-sequence token included."""

    def __call__(
        self, policy: Policy, prompts: Sequence[Prompt], num_generations: int, *, temperature: float | None = None
    ) -> Completions:
        end = policy.tokenizer.eos_token_id
        if temperature is None:
            temperature = self.temperature
        rows = [row for prompt in prompts for row in self._sample(policy, prompt.ids, num_generations, temperature)]
        ids = [row[: row.index(end) + 1] if end in row else row for row in rows]
        return Completions(ids=ids, finish_reasons=["stop" if row[-1] == end else "length" for row in ids])

    def _sample(self, policy: Policy, prompt: list[int], count: int, temperature: float) -> list[list[int]]:
        ids = torch.tensor([prompt] * count, device=policy.device)
        for _ in range(self.max_new_tokens):
            logits = policy.model(input_ids=ids).logits[:, -1].float()
            greedy = logits.argmax(-1, keepdim=True)
            drawn = torch.multinomial((logits / temperature).softmax(-1), 1) if temperature else greedy
            ids = torch.cat([ids, drawn], 1)
        return ids[:, len(prompt) :].tolist()


@hookimpl
def rollout() -> list[type[RolloutEngine]]:
    return [TokenByToken]
