"""Token log-probs, and the module that is wrapped for training: the policy with its critic.

A `TokenBatch` holds rows of prompt and completion. Log-probs are computed for the tokens that the policy sampled and
nowhere else; every (B, T) result is 0 off the mask. Where the architecture allows it rows are packed (see
`hf_rlhf.modeling.packing`), else padded on the right, where causal attention never sees padding and neither positions nor an
attention mask are needed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hf_rlhf.modeling.lm_head import Derivative, Head, Measure, TokenStatistics, at_least_float32, head_of, score, whole
from hf_rlhf.modeling.token_batch import _PACKS, Attention, TokenBatch, _inner, _probing, packs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hf_rlhf.modeling.ema import PolicyEMA
    from hf_rlhf.modeling.sharding import WholeModel

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Policy:
    """The policy as rollout engines get it: unwrapped, in evaluation mode, with its tokenizer and device."""

    model: Any
    """The plain model; that of a sharded policy has weights inside `gathered` alone."""
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    wants_logps: bool = False
    """True if anything reads the sampler's log-probs; `Completions.logps` is then required."""
    version: str = ""
    """`RUN_ID:step`, followed by `:ema` while `model` holds the moving average; empty outside a run. It changes whenever what
    `model` computes may have changed: an optimizer step, a loaded checkpoint, an evaluation of the average."""

    whole: WholeModel | None = None
    """The twin of a sharded policy; None where each process holds the whole one."""

    @property
    def own(self) -> Any:
        """The model that trains, which may be sharded."""
        return self.model if self.whole is None else self.whole.sharded

    def gathered(self) -> AbstractContextManager[Any]:
        """Give `model` its weights inside the block, for all processes together."""
        return nullcontext() if self.whole is None else self.whole.gathered()

    @property
    def pad_token_id(self) -> int:
        """The id with which rows are padded; padding is masked, so that the padding token needs no embedding."""
        return pad_token_id(self.tokenizer, self.model)

    @contextmanager
    def averaged(self, average: PolicyEMA) -> Iterator[None]:
        """Hold the moving average in place of the weights of `model`, under a version of its own."""
        version, self.version = self.version, f"{self.version}:ema"
        try:
            with average.as_policy(self.own):
                yield
        finally:
            self.version = version


def pad_token_id(tokenizer: PreTrainedTokenizerBase, model: Any) -> int:
    """Return the id of the padding token, or of the end-of-sequence token if the model has no embedding for the former."""
    pad: Any = tokenizer.pad_token_id
    end: Any = tokenizer.eos_token_id
    return pad if pad < len(model.get_input_embeddings().weight) else end


@contextmanager
def embedded_padding(tokenizer: PreTrainedTokenizerBase, model: Any) -> Iterator[None]:
    """Pad with `pad_token_id` inside the block."""
    own = tokenizer.pad_token
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_token_id(tokenizer, model))
    try:
        yield
    finally:
        tokenizer.pad_token = own


def configure_padding(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Replace a padding token without an embedding in the model's configurations, with which it could not be loaded again."""
    rows = len(model.get_input_embeddings().weight)
    configs: list[Any] = [model.config.get_text_config(), getattr(model, "generation_config", None)]
    for config in configs:
        if (getattr(config, "pad_token_id", None) or 0) >= rows:
            config.pad_token_id = pad_token_id(tokenizer, model)


class ActorCritic(nn.Module):
    """Policy and critic behind one forward, wrapped as one module for training.

    `self.policy` stays the plain transformers (or PEFT) model that is saved.
    """

    def __init__(self, policy: nn.Module, critic: nn.Module | None, temperature: float):
        super().__init__()
        self.policy = policy
        self.critic = critic
        self.temperature = temperature

    def forward(
        self,
        batch: TokenBatch,
        *,
        logps: bool = True,
        entropy: bool = False,
        sum_sq_probs: bool = False,
        values: bool = False,
        router_logits: bool = False,
        measures: Mapping[str, Measure] | None = None,
        derivative: Derivative | None = None,
        temperature: float | None = None,
    ) -> dict[str, Tensor]:
        """Return those of `logps`, `entropy` (nats), `sum_sq_probs`, `values` and the `measures` of whole distributions that are
        wanted, each (B, T) and 0 off the mask, and `router_logits` (B, T, L, E), of L
        routers for E experts. With a `derivative` (see `modeling.lm_head.score`) also `loss`, a scalar."""
        flat: dict[str, Tensor] = {}
        on_trunk = values and self.critic is not None and bool(getattr(self.critic, "on_trunk", False))
        states: Tensor | None = None
        distributions = logps or entropy or sum_sq_probs or bool(measures)
        routers: list[Tensor] | None = [] if router_logits else None
        if distributions or on_trunk or router_logits:
            states, head = self.states(batch, routers)
            if distributions:
                wanted = TokenStatistics(entropy=entropy, sum_sq_probs=sum_sq_probs)
                heat = self.temperature if temperature is None else temperature
                flat = score(head, states, batch.targets, heat, wanted, measures, derivative)
        if values:
            if self.critic is None:
                raise ValueError("values=True needs a critic, and this policy has none")
            if on_trunk and states is not None and not isinstance(head, Head):
                raise ValueError(
                    "a value head needs a policy that is a trunk with a linear head. Set critic.use=separate"
                )
            there = batch.device if on_trunk else next(self.critic.parameters()).device
            rows = batch if there == batch.device else batch.to(there)
            found = self.critic(rows, states if on_trunk else None)
            flat["values"] = at_least_float32(found.to(batch.device))
        flat |= {} if routers is None else {"router_logits": routers[0]}
        return {name: x if name == "loss" else batch.place(x) for name, x in flat.items()}

    def states(
        self, batch: TokenBatch, routers: list[Tensor] | None = None
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Return `sampled_states` of the policy."""
        return sampled_states(self.policy, batch, routers)


def sampled_states(
    model: Any, batch: TokenBatch, routers: list[Tensor] | None = None
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return hidden states (n, H) at the token before each sampled one, and the function from them to logits (n, V).

    For a model that is more than trunk and head: its logits (n, V), and the identity. `routers` as in `TokenBatch.states`.
    """
    parts = _parts(model)
    if parts is None:
        return batch.logits(model, routers), lambda logits: logits
    trunk, head = parts
    return batch.states(trunk, routers), head


def distributions(model: Any, batch: TokenBatch, temperature: float) -> Tensor:
    """Return log-probs (n, V) of the whole vocabulary at each sampled token, all at once."""
    states, head = sampled_states(model, batch)
    return whole(head, states, temperature)


_PARTS: WeakKeyDictionary[nn.Module, tuple[nn.Module, Head] | None] = WeakKeyDictionary()


def _parts(model: Any) -> tuple[nn.Module, Head] | None:
    """Return trunk and head of a causal model, or None if its logits are not the head of the trunk's states. Tested once."""
    causal = _inner(model)
    known = _PARTS.get(model)
    if model not in _PARTS or (known is not None and known[1].module is not causal.get_output_embeddings()):
        head = head_of(causal)
        trunk = getattr(causal, "base_model", causal)
        fits = head is not None and trunk is not causal and _fit(causal, trunk, head)
        _PARTS[model] = (trunk, head) if head is not None and fits else None
        if not fits:
            logger.warning(
                "%s is more than a trunk with a linear head: using padded rows, with all logits of a micro-batch in memory",
                type(causal).__name__,
            )
    return _PARTS[model]


def _fit(causal: Any, trunk: Any, head: Head) -> bool:
    """Return whether the model's logits are those of the head on the trunk's states."""
    with _probing(causal):
        vocabulary = len(trunk.get_input_embeddings().weight)  # not one token alone: padding may be embedded as 0
        probe = torch.arange(min(8, vocabulary), device=causal.device).unsqueeze(0)
        states = trunk(input_ids=probe, use_cache=False).last_hidden_state
        logits = causal(input_ids=probe, use_cache=False).logits
        return torch.allclose(head(states).to(logits.dtype), logits, rtol=1e-4, atol=1e-5)


def why_not_packed(model: Any, attention: Attention = "packed") -> str | None:
    """Return why a causal model does not support a layout; None if it does."""
    parts = _parts(model)
    if parts is None:
        return "it is more than a trunk with a linear head"
    packs(parts[0], attention)
    return _PACKS[parts[0]][attention]
