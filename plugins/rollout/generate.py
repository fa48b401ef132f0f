"""Completions by transformers' own `generate`, sampled from the policy's full distribution unless a setting cuts it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Interval

from hf_rlhf import hookimpl
from hf_rlhf.axes import Count, Positive, RolloutEngine
from hf_rlhf.batch import Completions

if TYPE_CHECKING:
    from hf_rlhf.algorithm import Algorithm
    from hf_rlhf.policy import Policy
    from hf_rlhf.prompts import Prompt


@dataclass(kw_only=True)
class Generate(RolloutEngine):
    """Samples with `model.generate`."""

    name = "generate"
    provides = frozenset({"sampler_logps"})

    max_new_tokens: Count = 256
    """Longest completion in tokens, the end-of-sequence token included."""
    top_p: Annotated[float, Interval(gt=0, le=1)] = 1.0
    """Sample from the most likely tokens that hold this much probability; 1 is all."""
    top_k: Annotated[int, Ge(0)] = 0
    """Sample from this many of the most likely tokens; 0 is all."""
    min_p: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """Leave out tokens less likely than this factor times the most likely one."""
    repetition_penalty: Positive = 1.0
    """Divides the scores of tokens that have occurred; 1 is none."""
    max_rows: Count | None = None
    """Most rows that are decoded at a time; all when left out."""

    def remarks(self, algorithm: Algorithm) -> Iterable[str]:
        """Settings that keep the samples from being the policy's own."""
        cut = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
        for setting, off in cut.items():
            if getattr(self, setting) != off:
                yield (
                    f"{setting}={getattr(self, setting)} samples from another distribution than the one whose log-probs "
                    f"are trained on: gradients are biased; {setting}={off} is exact"
                )

    def __call__(
        self, policy: Policy, prompts: Sequence[Prompt], num_generations: int, *, temperature: float | None = None
    ) -> Completions:
        """See `RolloutEngine`. Prompts are padded on the left; what follows the first end-of-sequence token is cut off."""
        eos = self._eos(policy)
        step = max(1, (self.max_rows or len(prompts) * num_generations) // num_generations)
        ids: list[list[int]] = []
        logps: list[list[float]] = []
        reasons: list[str] = []
        for start in range(0, len(prompts), step):
            rows, reported = self._decode(policy, prompts[start : start + step], num_generations, temperature)
            for i, row in enumerate(rows):
                ends = [place for place, token in enumerate(row) if token in eos]
                ids.append(row[: ends[0] + 1] if ends else row)
                reasons.append("stop" if ends else "length")
                if reported:
                    logps.append(reported[i][: len(ids[-1])])
        return Completions(ids=ids, finish_reasons=reasons, logps=logps or None)

    def _decode(
        self, policy: Policy, prompts: Sequence[Prompt], num_generations: int, temperature: float | None
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Rows of tokens and, where something reads them, the log-probs with which they were drawn: of the whole vocabulary
        at the temperature, before top_p, top_k and min_p cut it. A greedy row has none."""
        import torch
        from transformers import GenerationConfig

        temperature = self.temperature if temperature is None else temperature
        pad = policy.tokenizer.pad_token_id
        width = max(len(prompt.ids) for prompt in prompts)
        ids = torch.tensor([[pad] * (width - len(p.ids)) + list(p.ids) for p in prompts], device=policy.device)
        attend = torch.tensor([[0] * (width - len(p.ids)) + [1] * len(p.ids) for p in prompts], device=policy.device)
        sampling = {"temperature": temperature, "top_p": self.top_p, "top_k": self.top_k, "min_p": self.min_p}
        config = GenerationConfig(
            do_sample=temperature > 0,
            max_new_tokens=self.max_new_tokens,
            num_return_sequences=num_generations if temperature > 0 else 1,
            repetition_penalty=self.repetition_penalty,
            eos_token_id=sorted(self._eos(policy)),
            pad_token_id=pad,
            use_cache=True,
            **(sampling if temperature > 0 else {}),
        )
        recorder = _recorder(temperature) if policy.wants_logps and temperature > 0 else None
        with _alone(policy.model):
            rows = policy.model.generate(
                input_ids=ids,
                attention_mask=attend,
                generation_config=config,
                logits_processor=[recorder] if recorder else None,
            )
        reported = recorder.finish(rows)[:, : rows.size(1) - width].tolist() if recorder else []
        drawn = rows[:, width:].tolist()
        return drawn if temperature > 0 else [row for row in drawn for _ in range(num_generations)], reported

    def _eos(self, policy: Policy) -> set[int]:
        own = policy.model.generation_config.eos_token_id
        found = {own} if isinstance(own, int) else set(own or ())
        return found | ({policy.tokenizer.eos_token_id} - {None})


def _recorder(temperature: float) -> Any:
    """A logits processor that changes nothing and remembers the log-prob of each token that was drawn."""
    import torch
    from torch import Tensor
    from transformers import LogitsProcessor

    class Recorder(LogitsProcessor):
        """Called with the scores of the coming token (rows, V), after which the last of `input_ids` shows what was drawn."""

        def __init__(self) -> None:
            self.drawn: list[Tensor] = []
            self.last: Tensor | None = None

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            self._note(input_ids)
            self.last = (scores.double() if scores.dtype == torch.float64 else scores.float()) / temperature
            return scores

        def finish(self, rows: Tensor) -> Tensor:
            """(rows, tokens) log-probs of what was drawn."""
            self._note(rows)
            return torch.stack(self.drawn, 1)

        def _note(self, rows: Tensor) -> None:
            if self.last is not None:
                self.drawn.append(self.last.log_softmax(-1).gather(1, rows[:, -1:]).squeeze(1))

    return Recorder()


@contextmanager
def _alone(model: Any) -> Iterator[None]:
    """Keeps the model's own generation settings (suppressed tokens, n-gram bans, ...) out of what is sampled: transformers
    would fill in every setting that ours leaves open."""
    from transformers import GenerationConfig

    parts: tuple[Any, ...] = (model, getattr(model, "base_model", None), _inner(model))
    holders = [part for part in parts if hasattr(part, "generation_config")]
    own = [part.generation_config for part in holders]
    for part in holders:
        part.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for part, config in zip(holders, own, strict=True):
            part.generation_config = config


def _inner(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@hookimpl
def rollout() -> list[type[RolloutEngine]]:
    return [Generate]
