"""Completions sampled from the policy, from its full distribution unless a setting truncates it.

Each distinct prompt is prefilled once and its completions share its keys and values; finished rows leave the batch; each
token is sampled by a uniform number that depends on its row and step alone. If a setting or the architecture requires it
(stop strings, logits processors, arguments of `generate`, recurrent layers), transformers' `model.generate` samples
instead, which is logged once. Both are tried against a plain forward. A model on which padding leaves traces (a recurrent
state, positions that are counted from the first column) gets prompts of one length at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from hf_rlhf import hookimpl
from hf_rlhf.axes import Context, Count, RolloutEngine, Session
from hf_rlhf.batch import Completions

from ._settings import SamplingEngine, end_tokens

if TYPE_CHECKING:
    import torch

    from hf_rlhf.axes import Algorithm, Policy
    from hf_rlhf.batch import Prompt

    from ._kernels import Lean, Reordered
    from ._sampling import Sampler
    from ._turns import Kept

Row = TypeVar("Row")


@dataclass(kw_only=True)
class Generate(SamplingEngine):
    """Samples completions from the policy."""

    name = "generate"
    provides = frozenset({"sampler_logps"})

    max_rows: Count | None = None
    """Maximum rows decoded at a time, in whole groups of one prompt; None: all."""
    generation_kwargs: dict[str, Any] = field(default_factory=dict)
    """Additional fields of transformers' GenerationConfig."""
    logits_processors: list[str] = field(default_factory=list)
    """Logits processors of transformers, as `package.module:Class`, created without arguments. A recipe's code is run."""
    decode_dtype: Literal["same", "bfloat16"] = "same"
    """Dtype of the weights for decoding. "bfloat16" copies them once per rollout and frees the copy after it."""
    kernel: Literal["auto", "model", "onednn", "lean"] = "auto"
    """Kernel of a decode step. "model": its modules; "onednn": those, float32 weights reordered for the CPU once per rollout;
    "lean": fused layers of plain Llama and Qwen models, reordered on a CPU. "auto": on a CPU the last of these that gives the
    model's logits, else "model". A checkpoint keeps the choice."""

    def __post_init__(self) -> None:
        self._found = ""
        self._kernel: str | None = None
        self._fell_back = ""
        self._awake = False
        self._ready: dict[Any, Any] = {}

    @property
    def exact_logps(self) -> bool:
        """True if the reported log-probs equal the trainer policy's, up to rounding."""
        return self.decode_dtype == "same"

    def check(self, algorithm: Algorithm) -> Iterable[str]:
        """Yield errors: unknown or redundant `generation_kwargs`, and processors that cannot be created."""
        from ._checks import generation_problems, load_processors

        yield from generation_problems(self.generation_kwargs)
        if self.max_rows is not None and self.max_rows < self.num_generations:
            yield (
                f"rollout.max_rows must be at least rollout.num_generations={self.num_generations}, as the completions of a "
                f"prompt are decoded together, got {self.max_rows}. Raise it"
            )
        yield from super().check(algorithm)
        try:
            load_processors(self.logits_processors)
        except ValueError as error:
            yield str(error)

    def remarks(self, algorithm: Algorithm) -> Iterable[str]:
        """Yield remarks on settings that change the sampling distribution."""
        yield from super().remarks(algorithm)
        for setting in ("generation_kwargs", "logits_processors"):
            if getattr(self, setting):
                yield (
                    f"{setting} may change the sampling distribution, which biases gradients; model.generate decodes, which "
                    "is slower"
                )
        if self.stop_strings:
            yield "stop_strings needs model.generate for decoding, which is slower"
        if self._found:
            yield self._found
        if self._fell_back:
            yield self._fell_back
        if not self.exact_logps:
            yield (
                f"decode_dtype={self.decode_dtype} samples from a rounded policy; rollout_correction weights the rows by the "
                "ratio of the policies"
            )

    def model_remarks(self, config: Any) -> Iterable[str]:
        """Yield how `model.generate` is known to sample from this architecture, which the decode loop does not support."""
        from ._architectures import EQUAL_LENGTHS, REFUSED, WITHOUT_CACHE

        kind, cache = config.model_type, self.generation_kwargs.get("use_cache", True)
        if kind in REFUSED or (kind in WITHOUT_CACHE and cache):
            fix = "set rollout.generation_kwargs={use_cache: false}, or " if kind in WITHOUT_CACHE else ""
            yield f"model.generate does not sample from models of type {kind}, so they are refused: {fix}choose another model"
        elif kind in EQUAL_LENGTHS or kind in WITHOUT_CACHE:
            yield self._one_length_at_a_time()

    def setup(self, context: Context) -> None:
        """Try the model, so that one that cannot be sampled from is refused before the first rollout."""
        from ._checks import load_processors

        load_processors(self.logits_processors)
        if context.policy is not None and context.tokenizer is not None:
            from hf_rlhf.axes import Policy

            policy = Policy(model=context.policy, tokenizer=context.tokenizer, device=context.device)
            if not self._needs_generate(policy, self.max_new_tokens):
                self._choose_kernel(policy)
            elif self._equal_lengths(policy):
                self._found = self._one_length_at_a_time()

    def settled(self) -> dict[str, Any]:
        """Return the kernel that decodes."""
        return {"kernel": self._kernel or "model"}

    def wake(self, part: Literal["weights", "cache"]) -> None:
        """Keep weights that a kernel has reordered from now on, as long as they are the policy's."""
        self._awake = True

    def sleep(self) -> None:
        """Free them."""
        self._awake, self._ready = False, {}

    def _choose_kernel(self, policy: Policy) -> str:
        """Choose the kernel, once."""
        from ._kernels import choose
        from ._trials import try_loop

        if self._kernel is None:
            asked = "model" if self.decode_dtype != "same" and self.kernel == "auto" else self.kernel
            self._kernel, why = choose(asked, policy.model, partial(try_loop, policy.model, policy.device))
            if why:
                self._fell_back = f"decoding steps run by kernel {self._kernel} ({'; '.join(why)})"
                logging.getLogger(__name__).info("rollout=%s: %s", self.name, self._fell_back)
        return self._kernel

    def _prepared(self, policy: Policy) -> Lean | Reordered | None:
        """Return what decodes with the policy's weights."""
        from ._kernels import prepare

        kernel, key = self._choose_kernel(policy), (policy.version, id(policy.model))
        if kernel == "model":
            return None
        if key not in self._ready:
            made = prepare(kernel, policy.model)
            self._ready = {key: made} if self._awake else {}
            return made
        return self._ready[key]

    def __call__(
        self, policy: Policy, prompts: Sequence[Prompt], num_generations: int, *, temperature: float | None = None
    ) -> Completions:
        """Sample completions (see `RolloutEngine`).

        Log-probs are of the full distribution at the temperature, before top_p and others truncate it; greedy rows have
        none.
        """
        temperature = self.temperature if temperature is None else temperature
        return self._sample(policy, self._rounded(policy), prompts, num_generations, temperature)

    @contextmanager
    def session(self, policy: Policy, *, temperature: float | None = None) -> Iterator[Session]:
        """Open a session in which the decode loop keeps keys and values of live rows, so that a turn prefills only what is new.

        With `max_rows`, which bounds them, they are not kept.
        """
        from ._turns import Kept

        temperature = self.temperature if temperature is None else temperature
        kept = Kept() if self.max_rows is None else None
        sample = partial(self._sample, policy, self._rounded(policy))
        yield _KeepingSession(self, policy, temperature, sample, kept)

    def _rounded(self, policy: Policy) -> Policy:
        """Return the policy that decodes."""
        if self.decode_dtype == "same":
            return policy
        import torch

        from ._decoding import copy_of

        return replace(policy, model=copy_of(policy.model, getattr(torch, self.decode_dtype)))

    def _sample(
        self,
        policy: Policy,
        rounded: Policy,
        prompts: Sequence[Prompt],
        num_generations: int,
        temperature: float,
        kept: Kept | None = None,
    ) -> Completions:
        """Sample with the decode loop if it supports the policy, else with `model.generate`."""
        slow = self._needs_generate(policy, max(len(prompt.ids) for prompt in prompts) + self.max_new_tokens)
        if not slow:
            return self._decode(rounded, prompts, num_generations, temperature, kept)
        return self._generate(rounded, prompts, num_generations, temperature, self._equal_lengths(policy))

    def sampler(
        self,
        prompts: Sequence[Prompt],
        num_generations: int,
        temperature: float,
        device: torch.device,
        logps: bool,
    ) -> Sampler:
        """Return the function that chooses the next tokens: `sampler(logits, rows, step) -> (tokens, logps)`.

        `logits` (B, V) are the model's for the rows `rows` (B,), numbered over prompts times generations, each of which has
        `step` tokens; `tokens` are (B,), `logps` (B,) or None, and required if `logps` here is True. Benchmarks override
        this, for example to end each row at a given length. Greedy rows are sampled once per prompt: `num_generations` is
        then 1.
        """
        from transformers import (
            MinPLogitsWarper,
            RepetitionPenaltyLogitsProcessor,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        from ._sampling import Greedy, History, Penalised, Random, Uniforms

        penalised = Penalised()
        if self.repetition_penalty != 1:
            ids = [prompt.ids for prompt in prompts for _ in range(num_generations)]
            history = History(ids, self.max_new_tokens, device)
            penalised = Penalised(processor=RepetitionPenaltyLogitsProcessor(self.repetition_penalty), history=history)
        if temperature == 0:
            return Greedy(penalised=penalised)
        cuts: list[Any] = [TopKLogitsWarper(self.top_k)] if self.top_k else []
        cuts += [TopPLogitsWarper(self.top_p)] if self.top_p < 1 else []
        cuts += [MinPLogitsWarper(self.min_p)] if self.min_p else []
        uniforms = Uniforms(len(prompts) * num_generations, device)
        return Random(uniforms=uniforms, temperature=temperature, penalised=penalised, cuts=cuts, logps=logps)

    def _decode(
        self, policy: Policy, prompts: Sequence[Prompt], num_generations: int, temperature: float, kept: Kept | None
    ) -> Completions:
        """Sample with the decode loop."""
        from ._decoding import Decoder

        group, eos = num_generations if temperature > 0 else 1, end_tokens(policy)
        own = [self.max_new_tokens if p.max_new_tokens is None else p.max_new_tokens for p in prompts]
        steps = min(self.max_new_tokens, max(own))
        decode = Decoder(model=policy.model, eos=eos, steps=steps, device=policy.device, kernel=self._prepared(policy))
        reports = policy.wants_logps and temperature > 0
        sampler = self.sampler(prompts, group, temperature, policy.device, reports)
        ids: list[list[int]] = []
        logps: list[list[float]] = []
        for start, part in self._parts(prompts, group):
            drawn, reported = decode([prompt.ids for prompt in part], group, sampler, start * group, kept)
            ids += drawn
            logps += reported or []
        if group < num_generations:
            ids = [list(row) for row in ids for _ in range(num_generations)]
        return Completions(
            exact=self.exact_logps,
            ids=ids,
            finish_reasons=["stop" if row[-1] in eos else "length" for row in ids],
            logps=logps if reports else None,
        )

    def _generate(
        self,
        policy: Policy,
        prompts: Sequence[Prompt],
        num_generations: int,
        temperature: float,
        equal_lengths: bool = False,
    ) -> Completions:
        """Sample with `model.generate`."""
        from ._checks import load_processors
        from ._generating import Generated, Generator, by_length

        cuts = {"temperature": temperature, "top_p": self.top_p, "top_k": self.top_k, "min_p": self.min_p}
        generate = Generator(
            policy=policy,
            eos=end_tokens(policy),
            settings={"max_new_tokens": self.max_new_tokens, "repetition_penalty": self.repetition_penalty}
            | (cuts if temperature > 0 else {})
            | self.generation_kwargs,
            stop_strings=self.stop_strings,
            processors=load_processors(self.logits_processors),
        )

        def sample(rows: Sequence[Sequence[int]]) -> Generated:
            parts = self._parts(rows, num_generations)
            return Generated.join([generate(part, num_generations, temperature) for _, part in parts])

        ids = [prompt.ids for prompt in prompts]
        found = by_length(sample, ids, num_generations) if equal_lengths else sample(ids)
        return Completions(
            ids=found.ids,
            finish_reasons=["stop" if end else "length" for end in found.stopped],
            logps=found.logps,
        )

    def _parts(self, prompts: Sequence[Row], group: int) -> Iterable[tuple[int, Sequence[Row]]]:
        """Yield prompts whose rows are decoded together, with the number of prompts before them."""
        size = max(1, (self.max_rows or len(prompts) * group) // group)
        for start in range(0, len(prompts), size):
            yield start, prompts[start : start + size]

    def _needs_generate(self, policy: Policy, longest: int) -> bool:
        """Return True if `model.generate` is required for rows of up to `longest` tokens, and log why."""
        from ._checks import say_once, unserved

        for setting in ("stop_strings", "logits_processors", "generation_kwargs"):
            if getattr(self, setting):
                say_once(logging.INFO, f"{setting} is set")
                return True
        reason = unserved(policy.model, policy.device, longest)
        if reason is not None:
            say_once(logging.WARNING, f"the decode loop does not support {type(policy.model).__name__}: {reason}")
        return reason is not None

    def _equal_lengths(self, policy: Policy) -> bool:
        """Return True if prompts have to be decoded one length at a time, and log why. Raises `ValueError` for a model from which
        `model.generate` does not sample."""
        from ._checks import say_once
        from ._trials import try_generate

        found = try_generate(policy, self.generation_kwargs)
        if found.equal_lengths:
            padding = f"where {type(policy.model).__name__} is padded on the left {found.what}"
            say_once(logging.WARNING, f"{padding}: {self._one_length_at_a_time()}")
        return found.equal_lengths

    def _one_length_at_a_time(self) -> str:
        return (
            "prompts of equal length are decoded together, one length after the other, since padding would change what the model "
            f"samples: the {self.prompts} prompts of a rollout take up to {self.prompts} times as long as one batch"
        )


class _KeepingSession(Session):
    """Session that names its rows to `kept`."""

    def __init__(
        self,
        engine: RolloutEngine,
        policy: Policy,
        temperature: float,
        sample: Callable[..., Completions],
        kept: Kept | None,
    ):
        super().__init__(engine, policy, temperature)
        self.kept, self._sample, self._greedy = kept, sample, temperature == 0

    def ask(self, rows: Sequence[int], prompts: Sequence[Prompt], num_generations: int = 1) -> Completions:
        if self.kept:
            self.kept.ask(rows[::num_generations] if self._greedy else rows)
        return self._sample(prompts, num_generations, self.temperature, self.kept)

    def drop(self, row: int) -> None:
        if self.kept:
            self.kept.rows.pop(row, None)


@hookimpl
def rollout() -> list[type[RolloutEngine]]:
    return [Generate]
