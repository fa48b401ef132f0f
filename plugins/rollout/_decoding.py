"""Decode loop: each distinct prompt is prefilled once, its keys and values are shared, and finished rows are dropped.

A decode step is one forward over the last tokens (B, 1) of the B live rows. Finished rows are detected every `CHECK`
steps, the only synchronization with the device; tokens sampled after a row's end are discarded.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_rlhf.axes import at_least_float32, attend

from ._kernels import Lean, Reordered
from ._layouts import Heads, Prefill, Shared
from ._sampling import Sampler
from ._turns import Continued, Kept, Recorded, Segment, length_of

CHECK = 4
"""Steps between two checks for finished rows."""
PREFILL = 16384
"""Maximum prompt tokens per prefill forward, unless one prompt is longer."""

Drawn = tuple[list[list[int]], list[list[float]] | None]
"""Tokens of each row up to its end, and their log-probs."""


@dataclass(kw_only=True)
class Decoder:
    """Decoder that completes prompts with `model`, until a token in `eos` or for `steps` tokens."""

    model: Any
    eos: Collection[int]
    steps: int
    device: torch.device
    kernel: Lean | Reordered | None = None
    """Runs the steps after the prefill; None: the model as it is."""

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        group: int,
        sampler: Sampler,
        first_row: int = 0,
        kept: Kept | None = None,
    ) -> Drawn:
        """Sample `group` adjacent rows per prompt; the sampler gets them as rows `first_row`, `first_row` + 1, ...

        With `kept`, keys and values of the rows are taken from it, and stay there.
        """
        with torch.inference_mode(), _kept_for_training(self.model):
            return self._decode(prompts, group, sampler, first_row, kept)

    def _decode(
        self, prompts: Sequence[Sequence[int]], group: int, sampler: Sampler, first_row: int, kept: Kept | None
    ) -> Drawn:
        distinct = sorted(dict.fromkeys(map(tuple, prompts)), key=len)
        place = {ids: u for u, ids in enumerate(distinct)}
        of_row = [place[tuple(ids)] for ids in prompts for _ in range(group)]
        lengths = [len(ids) for ids in distinct]
        heads, logits = self._prefill(distinct, kept.begin(distinct, of_row) if kept else [])
        live = _Live(of_row, lengths, self.steps, first_row, self.device)
        layout = (Recorded if kept else Shared)(heads, lengths, of_row)
        if kept:
            kept.prompts(heads, distinct, of_row)
        del heads
        ends = torch.tensor(sorted(self.eos), device=self.device, dtype=torch.long)
        logits = logits.index_select(0, torch.tensor(of_row, device=self.device))
        live.take(sampler(logits, live.rows, 0))
        with self._steps(layout) as after:
            while live.step < self.steps:
                if live.step % CHECK == 0 and (order := live.look(ends)) is not None:
                    if not order:
                        break
                    layout.keep(order)
                layout.start()
                live.take(sampler(after(live.tokens, live.positions), live.rows, live.step))
        drawn = live.finish(ends)
        if isinstance(layout, Recorded) and kept:
            kept.end(drawn[0], layout.finish())
        return drawn

    @contextmanager
    def _steps(self, layout: Shared) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
        """Give the function that returns logits (B, V) after tokens (B,) at positions (B,)."""
        if isinstance(self.kernel, Lean):
            yield partial(self.kernel, layout=layout)
            return
        with attend(self.model, layout) as keywords, self.kernel.active() if self.kernel else nullcontext():
            yield lambda tokens, places: self._logits(tokens[:, None], places[:, None], 1, **keywords)[:, -1]

    def _prefill(
        self, prompts: Sequence[Sequence[int]], kept: Sequence[Sequence[Segment]]
    ) -> tuple[list[Heads], Tensor]:
        """Return keys and values of each layer, (K, N, d) over all prompts, and the logits (U, V) after each prompt.

        `kept` has the keys and values of the first tokens of each prompt, or of none.
        """
        layers: list[list[Heads]] = []
        logits = []
        new = [ids[length_of(kept[u]) if kept else 0 :] for u, ids in enumerate(prompts)]
        for part in _parts(new):
            lengths = [len(ids) for ids in prompts[part]]
            layout = Continued(kept[part], lengths, self.device) if kept else Prefill(lengths, self.device)
            ids = torch.tensor([[token for prompt in new[part] for token in prompt]], device=self.device)
            with attend(self.model, layout) as keywords:
                logits.append(self._logits(ids, layout.positions.to(self.device), layout.last, **keywords)[0])
            if not layout.layers:
                raise RuntimeError("its attention does not go through transformers' attention registry")
            layers.append(layout.layers)
        if len(layers) == 1:
            return layers[0], logits[0]
        merged = [
            (torch.cat([k for k, _ in same], 1), torch.cat([v for _, v in same], 1))
            for same in zip(*layers, strict=True)
        ]
        return merged, torch.cat(logits)

    def _logits(self, ids: Tensor, positions: Tensor, keep: int | Tensor, **keywords: Any) -> Tensor:
        """Return logits (rows, kept, V), in float32 or better, of the last `keep` columns or of the columns in `keep`."""
        few = self._takes_few
        kwargs = {"logits_to_keep": keep} if few else {}
        out = self.model(input_ids=ids, position_ids=positions, use_cache=False, **kwargs, **keywords).logits
        if not few:
            out = out[:, -keep:] if isinstance(keep, int) else out.index_select(1, keep)
        return at_least_float32(out)

    def __post_init__(self) -> None:
        inner = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        self._takes_few = "logits_to_keep" in inspect.signature(inner.forward).parameters


@contextmanager
def _kept_for_training(model: Any) -> Iterator[None]:
    """Convert tensors that the model caches in inference mode to ordinary ones afterwards, so that it can be trained."""
    stored = [(module, name, x) for module in model.modules() for name, x in module._buffers.items()]
    try:
        yield
    finally:
        for module, name, x in stored:
            now = module._buffers.get(name)
            if now is not x and now is not None and now.is_inference():
                with torch.inference_mode(False):
                    module._buffers[name] = now.clone()


class _Live:
    """Unfinished rows, and the tokens that all rows have sampled."""

    def __init__(self, of_row: list[int], lengths: list[int], steps: int, first_row: int, device: torch.device):
        count = len(of_row)
        self.step = 0
        self.rows = torch.arange(first_row, first_row + count, device=device)
        self.tokens: Tensor
        self._first_row, self._device = first_row, device
        self._next = torch.tensor([lengths[u] for u in of_row], device=device) - 1
        self._ids = torch.zeros(steps, count, dtype=torch.long, device=device)
        self._logps: Tensor | None = None
        self._pending: list[tuple[Tensor, Tensor | None]] = []

    @property
    def positions(self) -> Tensor:
        """Positions (B,) of `tokens` in their rows."""
        return self._next + self.step

    def take(self, drawn: tuple[Tensor, Tensor | None]) -> None:
        """Append the next token of each row."""
        self.tokens = drawn[0]
        self._pending.append(drawn)
        self.step += 1

    def look(self, ends: Tensor) -> list[int] | None:
        """Return the rows that remain, each at the index of the row that it replaces; None if no row has finished."""
        ended = torch.isin(self._write(), ends).any(0).tolist()
        if not any(ended):
            return None
        count = ended.count(False)
        late = (row for row in range(count, len(ended)) if not ended[row])
        order = [next(late) if ended[row] else row for row in range(count)]
        chosen = torch.tensor(order, device=self._device, dtype=torch.long)
        self.rows, self.tokens, self._next = (x.index_select(0, chosen) for x in (self.rows, self.tokens, self._next))
        return order

    def _write(self) -> Tensor:
        """Store the tokens sampled since the last call and return them (steps, B)."""
        tokens = torch.stack([tokens for tokens, _ in self._pending])
        logps = [logps for _, logps in self._pending if logps is not None]
        begin, rows = self.step - len(tokens), self.rows - self._first_row
        self._ids[begin : self.step].index_copy_(1, rows, tokens)
        if logps:
            if self._logps is None:
                self._logps = logps[0].new_zeros(self._ids.shape)
            self._logps[begin : self.step].index_copy_(1, rows, torch.stack(logps))
        self._pending = []
        return tokens

    def finish(self, ends: Tensor) -> Drawn:
        if self._pending:
            self._write()
        ended = torch.isin(self._ids, ends)
        first = torch.where(ended.any(0), ended.int().argmax(0) + 1, self.step).tolist()
        ids = [row[:length] for row, length in zip(self._ids.T.tolist(), first, strict=True)]
        if self._logps is None:
            return ids, None
        if bool(self._logps.isnan().any()):
            raise ValueError("the policy's logits are NaN or all -inf: its weights have diverged")
        return ids, [row[:length] for row, length in zip(self._logps.T.tolist(), first, strict=True)]


def _parts(prompts: Sequence[Sequence[int]]) -> Iterator[slice]:
    """Split prompts into batches of at most `PREFILL` tokens, or of one prompt."""
    start = tokens = 0
    for i, ids in enumerate(prompts):
        if i > start and tokens + len(ids) > PREFILL:
            yield slice(start, i)
            start, tokens = i, 0
        tokens += len(ids)
    yield slice(start, len(prompts))


def copy_of(model: Any, dtype: torch.dtype) -> Any:
    """Copy the model with its weights in `dtype`, sharing buffers such as rotary frequencies."""
    same: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for weight in model.parameters():
        data = weight.detach().to(dtype) if weight.is_floating_point() else weight.detach()
        same[id(weight)] = torch.nn.Parameter(data, requires_grad=False)
    return copy.deepcopy(model, same)
