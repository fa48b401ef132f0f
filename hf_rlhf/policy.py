"""Token log-probs, and the module that is wrapped for training: the policy with its critic.

A `TokenBatch` holds rows of prompt and completion. Log-probs are computed for the tokens that the policy sampled and
nowhere else; every (B, T) result is 0 off the mask. Where the architecture allows it the rows enter packed (see
`hf_rlhf.packing`), else padded behind their completions, where causal attention never sees padding and neither positions
nor an attention mask are needed.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hf_rlhf.attention import Noting, attending, drops_attention, hidden_window, refusal
from hf_rlhf.head import Derivative, Head, Measure, Wanted, at_least_float32, head_of, score, whole
from hf_rlhf.packing import FlexPacked, Packed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerBase

    from hf_rlhf.axes import KLEstimator

logger = logging.getLogger(__name__)

Attention = Literal["packed", "flex", "padded"]


@dataclass(kw_only=True)
class Policy:
    """What a rollout engine gets: the unwrapped policy in evaluation mode, its tokenizer and device."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    wants_logps: bool = False
    """Whether something reads the sampler's log-probs: then `Completions.logps` must be there."""


class TokenBatch:
    """B rows for a forward, `mask` (B, T) saying which completion tokens were sampled.

    `rows` (n,), `columns` (n,) and `targets` (n,) name the n sampled tokens: their place in (B, T) and which they are.
    """

    def __init__(
        self,
        prompt_ids: Sequence[Sequence[int]],
        completion_ids: Sequence[Sequence[int]],
        mask: Tensor,
        pad: int,
        attention: Attention = "packed",
    ):
        self.prompt_ids, self.completion_ids, self.pad = prompt_ids, completion_ids, pad
        self.attention = attention
        self.shape, self.device = tuple(mask.shape), mask.device
        rows, columns = mask.cpu().nonzero(as_tuple=True)
        self._places = rows, columns
        self._pairs = list(zip(rows.tolist(), columns.tolist(), strict=True))
        chosen = [completion_ids[i][j] for i, j in self._pairs]
        self.rows, self.columns = rows.to(self.device), columns.to(self.device)
        self.targets = torch.tensor(chosen, dtype=torch.long, device=self.device)

    @property
    def tokens(self) -> int:
        """How many tokens were sampled."""
        return len(self.rows)

    def release(self) -> None:
        """Lets go of what attention keeps for a backward that is done."""
        if "packed" in vars(self):
            self.packed[0].release()

    @property
    def positions(self) -> int:
        """How many tokens pass the trunk, padding included."""
        input_ids = self.padded[0] if self.attention == "padded" else self.packed[0].input_ids
        return input_ids.numel()

    def place(self, x: Tensor) -> Tensor:
        """(n,) -> (B, T), 0 elsewhere."""
        return x.new_zeros(self.shape).index_put((self.rows, self.columns), x)

    @cached_property
    def padded(self) -> tuple[Tensor, Tensor]:
        """(B, L) token ids, padded on the right, and (n,) the place in B x L of the token before each sampled one."""
        lengths = [len(p) + len(c) for p, c in zip(self.prompt_ids, self.completion_ids, strict=True)]
        input_ids = torch.full((len(lengths), max(lengths)), self.pad, dtype=torch.long)
        for i, (prompt, completion) in enumerate(zip(self.prompt_ids, self.completion_ids, strict=True)):
            input_ids[i, : lengths[i]] = torch.tensor([*prompt, *completion], dtype=torch.long)
        rows, columns = self._places
        starts = torch.tensor([len(p) for p in self.prompt_ids], dtype=torch.long)
        before = rows * input_ids.size(1) + starts[rows] + columns - 1
        return input_ids.to(self.device), before.to(self.device)

    @cached_property
    def packed(self) -> tuple[Packed, Tensor]:
        """The rows behind one copy of each prompt, and (n,) the place in it of the token before each sampled one.

        A row enters up to the last token that something is predicted from; without any sampled token, the first row's
        prompt alone, so that there is something to run.
        """
        rows, columns = self._places
        used: list[int | None] = [None] * len(self.prompt_ids)
        for row, column in self._pairs:
            used[row] = column  # ascending: the last one stays
        if not self.tokens:
            used[0] = 0
        kind = FlexPacked if self.attention == "flex" else Packed
        layout = kind(self.prompt_ids, self.completion_ids, used, self.device)
        starts, lasts = torch.tensor(layout.starts), torch.tensor(layout.lasts)
        before = torch.where(columns == 0, lasts[rows], starts[rows] + columns - 1)
        return layout, before.to(self.device)

    def states(self, trunk: nn.Module) -> Tensor:
        """(n, H) a transformers trunk's last hidden states at the token before each sampled one."""
        if self.attention != "padded" and packs(trunk, self.attention):
            layout, before = self.packed
            with attending(trunk, layout) as keywords:
                hidden = trunk(
                    input_ids=layout.input_ids, position_ids=layout.position_ids, use_cache=False, **keywords
                ).last_hidden_state
        else:
            input_ids, before = self.padded
            hidden = trunk(input_ids=input_ids, use_cache=False).last_hidden_state
        return hidden.flatten(0, 1).index_select(0, before)

    def logits(self, model: Any) -> Tensor:
        """(n, V) what the model itself gives, in float32 or better, for models that are more than trunk and head."""
        input_ids, before = self.padded
        length = input_ids.size(1)
        keep = length - int((before % length).min()) if len(before) else 1
        kwargs: dict[str, Any] = {"logits_to_keep": keep} if _accepts(model, "logits_to_keep") else {}
        logits = model(input_ids=input_ids, use_cache=False, **kwargs).logits
        kept = before % length - (length - logits.size(1))
        return at_least_float32(logits[before // length, kept])


def _accepts(model: Any, argument: str) -> bool:
    return argument in inspect.signature(_inner(model).forward).parameters


def _inner(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


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
        batch: TokenBatch,
        *,
        logps: bool = True,
        entropy: bool = False,
        sum_sq_probs: bool = False,
        values: bool = False,
        measures: Mapping[str, Measure] | None = None,
        derivative: Derivative | None = None,
        temperature: float | None = None,
    ) -> dict[str, Tensor]:
        """`logps`, `entropy` (nats), `sum_sq_probs`, `values` and what `measures` makes of whole distributions, those
        asked for, each (B, T) and 0 off the mask. `derivative` as in `hf_rlhf.head.score`, which adds `loss`, a number."""
        flat: dict[str, Tensor] = {}
        on_trunk = values and self.critic is not None and bool(getattr(self.critic, "on_trunk", False))
        states: Tensor | None = None
        distributions = logps or entropy or sum_sq_probs or bool(measures)
        if distributions or on_trunk:
            states, head = sampled_states(self.policy, batch)
            if distributions:
                wanted = Wanted(entropy=entropy, sum_sq_probs=sum_sq_probs)
                heat = self.temperature if temperature is None else temperature
                flat = score(head, states, batch.targets, heat, wanted, measures, derivative)
        if values:
            if self.critic is None:
                raise ValueError("values were asked for and there is no critic")
            if on_trunk and states is not None and not isinstance(head, Head):
                raise ValueError("the policy is more than trunk and head: a value head on its trunk cannot work")
            flat["values"] = at_least_float32(self.critic(batch, states if on_trunk else None))
        return {name: x if name == "loss" else batch.place(x) for name, x in flat.items()}


def sampled_states(model: Any, batch: TokenBatch) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """(n, H) hidden states at the token before each sampled one, and the function from them to logits (n, V).

    A model that is more than trunk and head gives its logits instead, (n, V), and the function that returns its argument.
    """
    parts = _parts(model)
    if parts is None:
        return batch.logits(model), lambda logits: logits
    trunk, head = parts
    return batch.states(trunk), head


def distributions(model: Any, batch: TokenBatch, temperature: float) -> Tensor:
    """(n, V) log-probs of the whole vocabulary at each sampled token, all at once."""
    states, head = sampled_states(model, batch)
    return whole(head, states, temperature)


_PARTS: WeakKeyDictionary[nn.Module, tuple[nn.Module, Head] | None] = WeakKeyDictionary()
_PACKS: WeakKeyDictionary[nn.Module, dict[Attention, str | None]] = WeakKeyDictionary()


def _parts(model: Any) -> tuple[nn.Module, Head] | None:
    """The trunk and head of a causal model, where the head of the trunk's states is what the model gives. Looked up once."""
    causal = _inner(model)
    known = _PARTS.get(model)
    if model not in _PARTS or (known is not None and known[1].module is not causal.get_output_embeddings()):
        head = None if _learns_prompts(model) else head_of(causal)
        trunk = getattr(causal, "base_model", causal)
        fits = head is not None and trunk is not causal and _fit(causal, trunk, head)
        _PARTS[model] = (trunk, head) if head is not None and fits else None
        if not fits:
            logger.warning(
                "%s is more than a trunk with a linear head: its rows enter padded, and the logits of a micro-batch are held "
                "at once",
                type(causal).__name__,
            )
    return _PARTS[model]


def _fit(causal: Any, trunk: Any, head: Head) -> bool:
    """Whether the logits are the head's of the trunk's states."""
    with _probing(causal):
        vocabulary = trunk.get_input_embeddings().num_embeddings  # not one token alone: padding may be embedded as 0
        probe = torch.arange(min(8, vocabulary), device=causal.device).unsqueeze(0)
        states = trunk(input_ids=probe, use_cache=False).last_hidden_state
        logits = causal(input_ids=probe, use_cache=False).logits
        return torch.allclose(head(states).to(logits.dtype), logits, rtol=1e-4, atol=1e-5)


def _learns_prompts(model: Any) -> bool:
    """Whether peft puts learned tokens before the text: then its own forward has to run."""
    return any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values())


@contextmanager
def _probing(model: Any) -> Iterator[None]:
    """Nothing is learned, drawn or left behind."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
            yield
    finally:
        for module in training:
            module.training = True


def packs(trunk: nn.Module, attention: Attention = "packed") -> bool:
    """Whether rows may enter this trunk in such a layout. Looked up once, with a warning where they may not."""
    known = _PACKS.setdefault(trunk, {})
    if attention not in known:
        known[attention] = reason = _why_not_packed(trunk, attention)
        if reason:
            instead = "padded" if attention == "packed" else "without FlexAttention"
            logger.warning("%s: rows enter %s, which is slower: %s", type(trunk).__name__, instead, reason)
    return known[attention] is None


def _why_not_packed(trunk: Any, attention: Attention) -> str | None:
    """What speaks against it: the configuration, or a difference between packed and padded rows."""
    if (reason := refusal(trunk)) is not None:
        return reason
    if drops_attention(trunk):
        return "its attention has dropout (model.dropout)"
    vocabulary = trunk.get_input_embeddings().num_embeddings
    draw = [[(7 * i + 3 * j + 1) % vocabulary for j in range(n)] for i, n in enumerate((5, 3, 6, 1, 9))]
    mask = _ones([6, 1, 9]).to(trunk.device)
    rows = TokenBatch([draw[0], draw[0], draw[1]], [draw[2], draw[3], draw[4]], mask, 0, attention)
    with _probing(trunk):
        layout, before = rows.packed
        noting = Noting(layout)
        try:
            with attending(trunk, noting) as keywords:
                found = trunk(
                    input_ids=layout.input_ids, position_ids=layout.position_ids, use_cache=False, **keywords
                ).last_hidden_state[0, before]
        except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError) as error:
            return f"its layers cannot ({type(error).__name__}: {str(error).splitlines()[0]})"
        if (reason := hidden_window(trunk, noting.windows)) is not None:
            return reason
        input_ids, places = rows.padded
        due = trunk(input_ids=input_ids, use_cache=False).last_hidden_state.flatten(0, 1)[places]
    gap = ((found - due).abs().max() / due.abs().max()).item()
    bound = 1e-4 if due.dtype in (torch.float32, torch.float64) else 0.1
    return None if gap < bound else f"its states differ from those of padded rows by {gap:.1e} of the largest"


def why_not_packed(model: Any, attention: Attention = "packed") -> str | None:
    """Why the rows of this causal model do not enter in such a layout; None where they do."""
    parts = _parts(model)
    if parts is None:
        return "it is more than a trunk with a linear head"
    packs(parts[0], attention)
    return _PACKS[parts[0]][attention]


def _ones(lengths: Sequence[int]) -> Tensor:
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).float()


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
    def __call__(self, batch: TokenBatch) -> Tensor:
        """(B, T) log-probs, 0 off the mask."""
        with self._as_reference():
            found: Tensor = self.module(batch)["logps"]
            return found

    @torch.no_grad()
    def measures(self, batch: TokenBatch, named: Mapping[str, tuple[KLEstimator, bool]]) -> dict[str, Measure]:
        """For each estimator over whole distributions what `ActorCritic.forward` takes; with False it has no gradient.

        The reference's hidden states are computed here, its distributions chunk by chunk when they are asked for.
        """
        with self._as_reference():
            states, head = sampled_states(self.module.policy, batch)
        adapted = self._own is None  # an adapter or a trained copy of the head has to be off as well

        def log_probs(part: slice) -> Tensor:
            with torch.no_grad(), self._as_reference() if adapted else nullcontext():
                return (at_least_float32(head(states[part])) / self.module.temperature).log_softmax(-1)

        def make(estimator: KLEstimator, gradient: bool) -> Measure:
            def measure(own: Tensor, part: slice) -> Tensor:
                return estimator(own if gradient else own.detach(), log_probs(part))

            return measure

        return {name: make(estimator, gradient) for name, (estimator, gradient) in named.items()}

    @contextmanager
    def _as_reference(self) -> Iterator[None]:
        context: AbstractContextManager[Any] = nullcontext() if self._own is not None else self._active(self._policy)
        training = self.module.policy.training
        self.module.policy.eval()
        try:
            with context:
                yield
        finally:
            self.module.policy.train(training)
