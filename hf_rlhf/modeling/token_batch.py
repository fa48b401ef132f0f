"""Batches of prompt and completion tokens for a forward, packed or padded."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hf_rlhf.modeling.attention import RecordingLayout, attend, attention_refusal, drops_attention, hidden_window
from hf_rlhf.modeling.lm_head import at_least_float32
from hf_rlhf.modeling.packing import FlexPacked, Packed
from hf_rlhf.modeling.router import router_logits

logger = logging.getLogger(__name__)

Attention = Literal["packed", "flex", "padded"]


class TokenBatch:
    """B rows for a forward; `mask` (B, T) is 1 on completion tokens that were sampled.

    `rows` (n,) and `columns` (n,) index the n sampled tokens in (B, T), `targets` (n,) are their ids.
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
        self.mask, self.shape, self.device = mask, tuple(mask.shape), mask.device
        rows, columns = mask.cpu().nonzero(as_tuple=True)
        self._places = rows, columns
        self._pairs = list(zip(rows.tolist(), columns.tolist(), strict=True))
        chosen = [completion_ids[i][j] for i, j in self._pairs]
        self.rows, self.columns = rows.to(self.device), columns.to(self.device)
        self.targets = torch.tensor(chosen, dtype=torch.long, device=self.device)

    def behind(self, prompt_ids: Sequence[Sequence[int]]) -> TokenBatch:
        """Return the same completions behind other prompts."""
        return TokenBatch(prompt_ids, self.completion_ids, self.mask, self.pad, self.attention)

    def to(self, device: torch.device) -> TokenBatch:
        """Return the same rows on another device."""
        return TokenBatch(self.prompt_ids, self.completion_ids, self.mask.to(device), self.pad, self.attention)

    @property
    def tokens(self) -> int:
        """Number of sampled tokens."""
        return len(self.rows)

    def release(self) -> None:
        """Free what attention keeps for the backward, once that is done."""
        if "packed" in vars(self):
            self.packed[0].release()

    @property
    def positions(self) -> int:
        """Number of tokens that pass through the trunk, padding included."""
        input_ids = self.padded[0] if self.attention == "padded" else self.packed[0].input_ids
        return input_ids.numel()

    def place(self, x: Tensor) -> Tensor:
        """Scatter (n, ...) to (B, T, ...), 0 elsewhere."""
        return x.new_zeros((*self.shape, *x.shape[1:])).index_put((self.rows, self.columns), x)

    @cached_property
    def padded(self) -> tuple[Tensor, Tensor]:
        """Token ids (B, L), padded on the right, and the flat index in B x L of the token before each sampled one (n,)."""
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
        """Rows packed behind one copy of each prompt, and the index of the token before each sampled one (n,).

        A row enters up to the last token that predicts a sampled one. Without any sampled token only the first row's prompt
        enters, so that there is something to run.
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

    def states(self, trunk: nn.Module, routers: list[Tensor] | None = None) -> Tensor:
        """Return the trunk's last hidden states (n, H) at the token before each sampled one.

        The logits (n, L, E) of its L routers there are added to `routers`, if it is given.
        """
        more = {} if routers is None else {"output_router_logits": True}
        if self.attention != "padded" and packs(trunk, self.attention):
            layout, before = self.packed
            with attend(trunk, layout) as keywords:
                output = trunk(
                    input_ids=layout.input_ids, position_ids=layout.position_ids, use_cache=False, **keywords, **more
                )
        else:
            input_ids, before = self.padded
            output = trunk(input_ids=input_ids, use_cache=False, **more)
        if routers is not None:
            routers.append(router_logits(trunk, output, before))
        hidden: Tensor = output.last_hidden_state
        return hidden.flatten(0, 1).index_select(0, before)

    def logits(self, model: Any, routers: list[Tensor] | None = None) -> Tensor:
        """Return the model's own logits (n, V) in float32 or better, for models that are more than trunk and head; `routers` as
        in `states`."""
        input_ids, before = self.padded
        length = input_ids.size(1)
        keep = length - int((before % length).min()) if len(before) else 1
        kwargs: dict[str, Any] = {"logits_to_keep": keep} if _accepts(model, "logits_to_keep") else {}
        if routers is not None:
            kwargs["output_router_logits"] = True
        output = model(input_ids=input_ids, use_cache=False, **kwargs)
        if routers is not None:
            routers.append(router_logits(model, output, before))
        logits = output.logits
        kept = before % length - (length - logits.size(1))
        return at_least_float32(logits[before // length, kept])


def _accepts(model: Any, argument: str) -> bool:
    return argument in inspect.signature(_inner(model).forward).parameters


def _inner(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


_PACKS: WeakKeyDictionary[nn.Module, dict[Attention, str | None]] = WeakKeyDictionary()


@contextmanager
def _probing(model: Any) -> Iterator[None]:
    """Run a model in evaluation mode without gradients or autocast, then restore its modes."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
            yield
    finally:
        for module in training:
            module.training = True


def packs(trunk: nn.Module, attention: Attention = "packed") -> bool:
    """Return whether the trunk supports a layout. Tested once, with a warning if it does not."""
    known = _PACKS.setdefault(trunk, {})
    if attention not in known:
        known[attention] = reason = _why_not_packed(trunk, attention)
        if reason:
            instead = "padded rows" if attention == "packed" else "packed rows without FlexAttention"
            logger.warning("%s: using %s, which is slower: %s", type(trunk).__name__, instead, reason)
    return known[attention] is None


def _why_not_packed(trunk: Any, attention: Attention) -> str | None:
    """Return why the trunk does not support a layout: its configuration, or a difference between packed and padded rows."""
    if (reason := attention_refusal(trunk)) is not None:
        return reason
    if drops_attention(trunk):
        return "its attention has dropout (model.dropout)"
    vocabulary = len(trunk.get_input_embeddings().weight)
    draw = [[(7 * i + 3 * j + 1) % vocabulary for j in range(n)] for i, n in enumerate((5, 3, 6, 1, 9))]
    mask = _ones([6, 1, 9]).to(trunk.device)
    rows = TokenBatch([draw[0], draw[0], draw[1]], [draw[2], draw[3], draw[4]], mask, 0, attention)
    with _probing(trunk):
        layout, before = rows.packed
        noting = RecordingLayout(layout)
        try:
            with attend(trunk, noting) as keywords:
                found = trunk(
                    input_ids=layout.input_ids, position_ids=layout.position_ids, use_cache=False, **keywords
                ).last_hidden_state[0, before]
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:  # whatever the model's own code raises
            return f"its layers cannot ({type(error).__name__}: {str(error).splitlines()[0]})"
        if (reason := hidden_window(trunk, noting.windows)) is not None:
            return reason
        input_ids, places = rows.padded
        due = trunk(input_ids=input_ids, use_cache=False).last_hidden_state.flatten(0, 1)[places]
    gap = ((found - due).abs().max() / due.abs().max()).item()
    bound = 1e-4 if due.dtype in (torch.float32, torch.float64) else 0.1
    return None if gap < bound else f"its states differ from those of padded rows by {gap:.1e} of the largest"


def _ones(lengths: Sequence[int]) -> Tensor:
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).float()
