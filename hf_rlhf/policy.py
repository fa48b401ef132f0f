"""Token log-probs, and the module that is wrapped for training: the policy with its critic.

A `TokenBatch` holds rows of prompt and completion without left padding: padding follows the completion, so causal
attention never sees it and neither positions nor an attention mask are needed. Log-probs are computed for the tokens
that the policy sampled and nowhere else; every (B, T) result is 0 off the mask.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerBase

    from hf_rlhf.axes import KLEstimator


@dataclass(kw_only=True)
class Policy:
    """What a rollout engine gets: the unwrapped policy in evaluation mode, its tokenizer and device."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    wants_logps: bool = False
    """Whether something reads the sampler's log-probs: then `Completions.logps` must be there."""


def token_batch(
    prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], mask: Tensor, pad: int
) -> dict[str, Tensor]:
    """Tensors of B rows for `ActorCritic.forward`.

    `mask` is (B, T). Gives `input_ids` (B, L), and for each of the n sampled tokens `rows` (n,), `columns` (n,), its
    place in (B, T), and `positions` (n,), the place in L of the token before it.
    """
    lengths = [len(p) + len(c) for p, c in zip(prompt_ids, completion_ids, strict=True)]
    input_ids = torch.full((len(lengths), max(lengths)), pad, dtype=torch.long)
    for i, (prompt, completion) in enumerate(zip(prompt_ids, completion_ids, strict=True)):
        input_ids[i, : lengths[i]] = torch.tensor([*prompt, *completion], dtype=torch.long)
    rows, columns = mask.cpu().nonzero(as_tuple=True)
    starts = torch.tensor([len(p) for p in prompt_ids], dtype=torch.long)
    return {"input_ids": input_ids, "rows": rows, "columns": columns, "positions": starts[rows] + columns - 1}


class ActorCritic(nn.Module):
    """The policy and its critic behind one forward: what DistributedDataParallel wraps.

    `self.policy` stays the plain transformers (or PEFT) model that is saved.
    """

    def __init__(self, policy: nn.Module, critic: nn.Module | None, temperature: float):
        super().__init__()
        self.policy = policy
        self.critic = critic
        self.temperature = temperature

    def forward(
        self,
        input_ids: Tensor,
        rows: Tensor,
        columns: Tensor,
        positions: Tensor,
        shape: tuple[int, int],
        entropy: bool = False,
        values: bool = False,
        logps: bool = True,
        sum_sq_probs: bool = False,
        measures: Mapping[str, Measure] | None = None,
        temperature: float | None = None,
    ) -> dict[str, Tensor]:
        """`logps`, `entropy` (nats), `sum_sq_probs`, `values` and what `measures` makes of whole distributions, those
        asked for, each of `shape` (B, T) and 0 off the mask."""
        flat: dict[str, Tensor] = {}
        on_trunk = values and self.critic is not None and bool(getattr(self.critic, "on_trunk", False))
        states: Tensor | None = None
        distributions = logps or entropy or sum_sq_probs or bool(measures)
        if distributions or on_trunk:
            logits, states = sampled_logits(self.policy, input_ids, rows, positions, states=on_trunk)
            if distributions:
                log_probs = (logits / (self.temperature if temperature is None else temperature)).log_softmax(-1)
                flat["logps"] = log_probs.gather(1, input_ids[rows, positions + 1].unsqueeze(1)).squeeze(1)
                if entropy:
                    flat["entropy"] = -(log_probs.exp() * log_probs).sum(-1)
                if sum_sq_probs:
                    flat["sum_sq_probs"] = (2 * log_probs).exp().sum(-1)
                for name, measure in (measures or {}).items():
                    flat[name] = by_chunks(measure, log_probs)
        if values:
            if self.critic is None:
                raise ValueError("values were asked for and there is no critic")
            flat["values"] = at_least_float32(self.critic(input_ids, rows, positions, states))
        return {name: x.new_zeros(shape).index_put((rows, columns), x) for name, x in flat.items()}


CHUNK = 256
"""Tokens whose whole distributions, policy's and reference's, are compared at a time."""

Measure = Callable[[Tensor, slice], Tensor]
"""((c, V) log-probs of c sampled tokens, which of the n they are) -> (c,)."""


def by_chunks(measure: Measure, log_probs: Tensor, chunk: int = CHUNK) -> Tensor:
    """(n, V) -> (n,): `measure` on `chunk` tokens at a time; what it makes on the way is made again in the backward."""
    pieces = []
    for start in range(0, len(log_probs), chunk):
        part = slice(start, min(start + chunk, len(log_probs)))
        if log_probs.requires_grad and torch.is_grad_enabled():
            pieces.append(checkpoint(measure, log_probs[part], part, use_reentrant=False, preserve_rng_state=False))
        else:
            pieces.append(measure(log_probs[part], part))
    return torch.cat(pieces) if pieces else log_probs.new_zeros(0)


def at_least_float32(x: Tensor) -> Tensor:
    """Half-precision numbers as float32; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def sampled_logits(
    model: nn.Module, input_ids: Tensor, rows: Tensor, positions: Tensor, *, states: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(n, V) logits at `positions` of `rows`, in float32 or better, and the (n, H) hidden states that the head saw."""
    length = input_ids.size(1)
    keep = length - int(positions.min()) if len(positions) else 1
    kwargs: dict[str, Any] = {"logits_to_keep": keep} if _accepts(model, "logits_to_keep") else {}
    with head_input(model) if states else _nothing() as captured:
        logits = model(input_ids=input_ids, use_cache=False, **kwargs).logits
    kept = positions - (length - logits.size(1))
    return at_least_float32(logits[rows, kept]), captured[0][rows, kept] if states else None


@contextmanager
def head_input(model: Any) -> Iterator[list[Tensor]]:
    """Collects what the language-model head is given: the trunk's last hidden states (B, K, H)."""
    captured: list[Tensor] = []
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output embeddings: a value head on its trunk cannot work")
    handle = head.register_forward_pre_hook(lambda _, args: captured.append(args[0]))
    try:
        yield captured
    finally:
        handle.remove()


@contextmanager
def _nothing() -> Iterator[list[Tensor]]:
    yield []


def sampled_states(
    model: Any, input_ids: Tensor, rows: Tensor, positions: Tensor
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """(n, H) hidden states at `positions` of `rows`, and the function from them to logits (n, V).

    A model that does more than apply its head to them (a scale, a soft cap) gives its logits instead, (n, V), and the
    function that returns its argument.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    trunk, head = causal.base_model, causal.get_output_embeddings()
    if head is None or not _is_trunk_and_head(causal, trunk, head, input_ids[:1, :1]):
        return sampled_logits(model, input_ids, rows, positions)[0], lambda logits: logits
    return trunk(input_ids=input_ids, use_cache=False).last_hidden_state[rows, positions], head


def _is_trunk_and_head(causal: Any, trunk: Any, head: Any, probe: Tensor) -> bool:
    """Whether the logits of one token are the head's of the trunk's states: the same shapes, so that rounding is the same."""
    states = trunk(input_ids=probe, use_cache=False).last_hidden_state
    logits = causal(input_ids=probe, use_cache=False).logits
    return torch.allclose(head(states).to(logits.dtype), logits, rtol=1e-5, atol=1e-6)


def _accepts(model: Any, argument: str) -> bool:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return argument in inspect.signature(base.forward).parameters


class ReferencePolicy:
    """The reference's log-probs: of a model of its own, or of the policy inside `active` (an adapter switched off)."""

    def __init__(self, model: nn.Module | None, policy: Any, active: Any, temperature: float):
        self._active = active
        self._policy = policy
        self._own = model
        self.module = ActorCritic(model if model is not None else policy, None, temperature)

    @property
    def own(self) -> nn.Module | None:
        """The reference's own model, or None where the policy serves."""
        return self._own

    @torch.no_grad()
    def __call__(self, batch: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        """(B, T) log-probs, 0 off the mask."""
        with self._as_reference():
            return self.module(**batch, shape=shape)["logps"]

    @torch.no_grad()
    def measures(self, batch: dict[str, Tensor], named: Mapping[str, tuple[KLEstimator, bool]]) -> dict[str, Measure]:
        """For each estimator over whole distributions what `ActorCritic.forward` takes; with False it has no gradient.

        The reference's hidden states are computed here, its distributions chunk by chunk when they are asked for.
        """
        with self._as_reference():
            states, head = sampled_states(self.module.policy, batch["input_ids"], batch["rows"], batch["positions"])
        adapted = self._own is None  # an adapter or a trained copy of the head has to be off as well

        def log_probs(part: slice) -> Tensor:
            with torch.no_grad(), self._as_reference() if adapted else _nothing():
                return (at_least_float32(head(states[part])) / self.module.temperature).log_softmax(-1)

        def make(estimator: KLEstimator, gradient: bool) -> Measure:
            def measure(own: Tensor, part: slice) -> Tensor:
                return estimator(own if gradient else own.detach(), log_probs(part))

            return measure

        return {name: make(estimator, gradient) for name, (estimator, gradient) in named.items()}

    @contextmanager
    def _as_reference(self) -> Iterator[None]:
        context: AbstractContextManager[Any] = _nothing() if self._own is not None else self._active(self._policy)
        training = self.module.policy.training
        self.module.policy.eval()
        try:
            with context:
                yield
        finally:
            self.module.policy.train(training)
