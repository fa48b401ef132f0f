"""Batches of prompt and completion tokens for a forward, packed or padded."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
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
Forks = Sequence[Sequence[tuple[int, list[int]]]]
"""For each row: (start, tokens) of what stands before its completion's token number `start`, in place of the row's tokens."""


def pieces_of(
    prompt: Sequence[int], length: int, forks: Sequence[tuple[int, list[int]]]
) -> list[tuple[int, int, Sequence[int]]]:
    """Return (start, stop, tokens before it) of each piece of a completion of `length` tokens."""
    starts = [(0, prompt), *forks]
    stops = [*(start for start, _ in forks), length]
    return [(start, stop, ids) for (start, ids), stop in zip(starts, stops, strict=True) if start < stop]


class TokenBatch:
    """B rows for a forward; `mask` (B, T) is 1 on completion tokens that were sampled.

    `rows` (n,) and `columns` (n,) index the n sampled tokens in (B, T), `targets` (n,) are their ids. Forks enter the forward as
    rows of their own (`pieces`); `nested` rows share what they begin with, be it longer or shorter than their prompts. `once`:
    equal rows enter a packed forward once, which is right where it draws nothing.
    """

    def __init__(
        self,
        prompt_ids: Sequence[Sequence[int]],
        completion_ids: Sequence[Sequence[int]],
        mask: Tensor,
        pad: int,
        attention: Attention = "packed",
        forks: Forks | None = None,
        nested: bool = False,
        once: bool = True,
    ):
        self.prompt_ids, self.completion_ids, self.pad = prompt_ids, completion_ids, pad
        self.attention, self.nested, self.once = attention, nested, once
        self.forks = forks if forks is not None and any(forks) else None
        self.mask, self.shape, self.device = mask, tuple(mask.shape), mask.device
        rows, columns = mask.cpu().nonzero(as_tuple=True)
        self._places = rows, columns
        self._pairs = list(zip(rows.tolist(), columns.tolist(), strict=True))
        chosen = [completion_ids[i][j] for i, j in self._pairs]
        self.rows, self.columns = rows.to(self.device), columns.to(self.device)
        self.targets = torch.tensor(chosen, dtype=torch.long, device=self.device)

    def behind(self, prompt_ids: Sequence[Sequence[int]]) -> TokenBatch:
        """Return the same completions behind other prompts, with which forks that begin with a row's prompt then begin."""
        forks = None
        if self.forks is not None:
            rows = zip(self.prompt_ids, prompt_ids, self.forks, strict=True)
            forks = [[(start, exchanged(own, new, ids)) for start, ids in cuts] for own, new, cuts in rows]
        return TokenBatch(prompt_ids, self.completion_ids, self.mask, self.pad, self.attention, forks, once=self.once)

    def to(self, device: torch.device) -> TokenBatch:
        """Return the same rows on another device."""
        mask = self.mask.to(device)
        return TokenBatch(
            self.prompt_ids, self.completion_ids, mask, self.pad, self.attention, self.forks, self.nested, self.once
        )

    @cached_property
    def pieces(self) -> TokenBatch:
        """The rows as a forward gets them, each fork as a row of its own: the same sampled tokens in the same order."""
        if self.forks is None:
            return self
        rows = zip(self.prompt_ids, self.completion_ids, self.forks, strict=True)
        found = [(i, *piece) for i, (p, c, forks) in enumerate(rows) for piece in pieces_of(p, len(c), forks)]
        mask = self.mask.new_zeros((len(found), max(stop - start for _, start, stop, _ in found)))
        for k, (i, start, stop, _) in enumerate(found):
            own = self.mask[i, start:stop]
            mask[k, : len(own)] = own
        completions = [self.completion_ids[i][start:stop] for i, start, stop, _ in found]
        prompts = [ids for *_, ids in found]
        return TokenBatch(prompts, completions, mask, self.pad, self.attention, nested=True, once=self.once)

    @property
    def tokens(self) -> int:
        """Number of sampled tokens."""
        return len(self.rows)

    def release(self) -> None:
        """Free what attention keeps for the backward, once that is done."""
        pieces = vars(self).get("pieces", self)
        if "packed" in vars(pieces):
            pieces.packed[0].release()

    @property
    def positions(self) -> int:
        """Number of tokens that pass through the trunk, padding included."""
        pieces = self.pieces
        input_ids = pieces.padded[0] if self.attention == "padded" else pieces.packed[0].input_ids
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
        layout = kind(self.prompt_ids, self.completion_ids, used, self.device, self.nested, self.once)
        lengths = torch.tensor([len(p) for p in self.prompt_ids], dtype=torch.long)
        return layout, layout.places(rows, lengths[rows] + columns - 1).to(self.device)

    def states(self, trunk: nn.Module, routers: list[Tensor] | None = None) -> Tensor:
        """Return the trunk's last hidden states (n, H) at the token before each sampled one.

        The logits (n, L, E) of its L routers there are added to `routers`, if it is given.
        """
        more = {} if routers is None else {"output_router_logits": True}
        if self.attention != "padded" and packs(trunk, self.attention):
            layout, before = self.pieces.packed
            with attend(trunk, layout) as keywords:
                output = trunk(
                    input_ids=layout.input_ids, position_ids=layout.position_ids, use_cache=False, **keywords, **more
                )
        else:
            input_ids, before = self.pieces.padded
            output = trunk(input_ids=input_ids, use_cache=False, **more)
        if routers is not None:
            routers.append(router_logits(trunk, output, before))
        hidden: Tensor = output.last_hidden_state
        return hidden.flatten(0, 1).index_select(0, before)

    def logits(self, model: Any, routers: list[Tensor] | None = None) -> Tensor:
        """Return the model's own logits (n, V) in float32 or better, for models that are more than trunk and head; `routers` as
        in `states`."""
        input_ids, before = self.pieces.padded
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


def exchanged(own: Sequence[int], new: Sequence[int], ids: list[int]) -> list[int]:
    """Return tokens that begin with the prompt `own` with `new` in its place; others as they are."""
    return [*new, *ids[len(own) :]] if ids[: len(own)] == list(own) else ids


def _accepts(model: Any, argument: str) -> bool:
    return argument in inspect.signature(_inner(model).forward).parameters


def _inner(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


_PACKS: WeakKeyDictionary[nn.Module, dict[Attention, str | None]] = WeakKeyDictionary()


@contextmanager
def _probing(model: Any, autocast: bool = False) -> Iterator[None]:
    """Run a model in evaluation mode without gradients, then restore its modes. `autocast`: leave it as it is, else off."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    kind = model.device.type
    try:
        with torch.no_grad(), torch.autocast(kind, enabled=autocast and torch.is_autocast_enabled(kind)):
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
    """Return why the trunk does not support a layout: its configuration, an error of its layers or of a compiler, or states or
    gradients that differ from those of padded rows.

    On an accelerator the rows span several blocks of FlexAttention, gradients are compared too, and FlexAttention is compiled
    under the autocast that is on, so that a kernel that cannot be built there is found before the run begins.
    """
    if (reason := attention_refusal(trunk)) is not None:
        return reason
    if drops_attention(trunk):
        return "its attention has dropout (model.dropout)"
    accelerated = _accelerated(trunk)
    rows = _probe(trunk, attention, 270 if accelerated else 9)
    (layout, before), (input_ids, places) = rows.packed, rows.padded
    noting = RecordingLayout(layout)

    def packed() -> Tensor:
        with attend(trunk, noting) as keywords:
            output = trunk(input_ids=layout.input_ids, position_ids=layout.position_ids, use_cache=False, **keywords)
        states: Tensor = output.last_hidden_state[0, before]
        return states

    def padded() -> Tensor:
        states: Tensor = trunk(input_ids=input_ids, use_cache=False).last_hidden_state
        return states.flatten(0, 1)[places]

    with _probing(trunk, autocast=attention == "flex"):
        pairs = {"states": (packed, padded)}
        if accelerated:
            size = int(input_ids.max()) + 1
            pairs["gradients"] = (
                lambda: _gradient(trunk, packed, layout.input_ids, size),
                lambda: _gradient(trunk, padded, input_ids, size),
            )
        for what, (run, plain) in pairs.items():
            try:
                found = run()
            except Exception as error:  # whatever the model's own code or a compiler raises
                words = str(error).strip().splitlines() or ["no message"]
                return f"its layers cannot ({type(error).__name__}: {words[0]})"
            if (reason := hidden_window(trunk, noting.windows)) is not None:
                return reason
            due = plain()
            gap = ((found - due).abs().max() / due.abs().max()).item()
            if not gap < _rounding(due) * (3 if what == "gradients" else 1):
                return f"its {what} differ from those of padded rows by {gap:.1e} of the largest"
    return None


def _accelerated(trunk: Any) -> bool:
    return bool(trunk.device.type != "cpu")


def _probe(trunk: Any, attention: Attention, longest: int) -> TokenBatch:
    """Return three rows, two of them with one prompt, and the longest completion of about `longest` tokens."""
    vocabulary, lengths = len(trunk.get_input_embeddings().weight), (5, 3, 6, 1, 9)
    room = getattr(trunk.config, "max_position_embeddings", None) or longest
    times = max(1, min(longest // 9, room // 12))
    draw = [[(7 * i + 3 * j + 1) % vocabulary for j in range(n * times)] for i, n in enumerate(lengths)]
    mask = _ones([len(ids) for ids in draw[2:]]).to(trunk.device)
    return TokenBatch([draw[0], draw[0], draw[1]], draw[2:], mask, 0, attention)


def _gradient(trunk: Any, states: Callable[[], Tensor], input_ids: Tensor, size: int) -> Tensor:
    """Return the gradient of a weighted sum of states by the embeddings, summed over the places of each token (size, H)."""
    embedded: list[Tensor] = []

    def leaf(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[0]

    with torch.enable_grad(), trunk.get_input_embeddings().register_forward_hook(leaf):
        out = states()
        weights = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=out.dtype).view_as(out)
        (found,) = torch.autograd.grad((out * weights).sum(), embedded)
    return found.new_zeros(size, found.size(-1)).index_add_(0, input_ids.flatten(), found.flatten(0, 1))


def _rounding(states: Tensor) -> float:
    """Return how far apart two ways to compute them may be, relative to the largest."""
    kind = states.device.type
    halved = states.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled(kind)
    matmul = getattr(getattr(torch.backends, kind, None), "matmul", None)
    return 0.1 if halved or getattr(matmul, "fp32_precision", "") == "tf32" else 1e-4


def _ones(lengths: Sequence[int]) -> Tensor:
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).float()
