"""Right answers and the KL to the start on held-out problems, measured during a run in the same way for every recipe."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from hf_rlhf.runtime.seeding import seeded


def measured(
    policy: PreTrainedModel,
    start: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, str]],
    longest: int,
) -> tuple[float, float]:
    """Return the share of correct answers in one sample of each problem, and KL(policy || start) in nats per completion.

    The KL is exact in each state and averaged over the states that the samples visit. All prompts have one length.
    """
    prompts = tokenizer([row["prompt"] for row in rows], return_tensors="pt")["input_ids"]
    with seeded("watch"), torch.no_grad():
        sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": longest}
        ids = policy.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), **sampling)
        texts = tokenizer.batch_decode(ids[:, prompts.size(1) :], skip_special_tokens=True)
        right = sum(text == row["answer"] for text, row in zip(texts, rows, strict=True)) / len(rows)
        visited = _visited(ids, prompts.size(1), tokenizer.eos_token_id)
        logps, start_logps = (m(ids[:, :-1]).logits[:, prompts.size(1) - 1 :].log_softmax(-1) for m in (policy, start))
        kl = (logps.exp() * (logps - start_logps)).sum(-1)
    return right, ((kl * visited).sum() / len(rows)).item()


def _visited(ids: Tensor, width: int, eos: int) -> Tensor:
    """(B, T) 1 where a completion's token was sampled, the end of sequence included."""
    ends = (ids[:, width:] == eos).int()
    return (ends.cumsum(1) - ends == 0).float()


class Watch(TrainerCallback):
    """Measures before the first step, after every `every` rollouts and after the last step; `seconds` is what that took."""

    def __init__(self, rows: list[dict[str, str]], longest: int, steps_per_rollout: int, every: int):
        self.rows, self.longest = rows, longest
        self.steps_per_rollout, self.every = steps_per_rollout, every
        self.curve: list[dict[str, float]] = []
        self.seconds = 0.0
        self._start: PreTrainedModel | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep a copy of the policy, and measure it."""
        import copy

        self._start = copy.deepcopy(kwargs["model"]).eval()
        self._measure(state.global_step, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure if a point is scheduled."""
        if state.global_step % (self.every * self.steps_per_rollout) == 0 or state.global_step == state.max_steps:
            self._measure(state.global_step, **kwargs)

    def _measure(self, step: int, model: Any, processing_class: Any, **kwargs: Any) -> None:
        began, training = time.process_time(), model.training
        right, kl = measured(model.eval(), self._start, processing_class, self.rows, self.longest)
        model.train(training)
        self.curve.append({"rollouts": step / self.steps_per_rollout, "right": right, "kl": kl})
        self.seconds += time.process_time() - began
