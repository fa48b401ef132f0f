"""Attention in a rollout: prompts packed into one row, then completions that share the keys and values of their prompt.

Dimensions: U prompts, P tokens of the longest prompt, N tokens of all prompts, B live rows, T tokens of each row so far,
H heads, K key-value heads, R = H / K, d head size. No padding enters a linear layer; both layouts store the state of each
attention layer in the order in which the layers run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Heads = tuple[Tensor, Tensor]
"""Keys and values of one layer."""

PADDED = 2
"""Maximum ratio of padded to actual tokens for prompts attended to together."""
GROWTH = 32
"""Minimum tokens by which the buffer for completions grows; it doubles from there."""


class Prefill:
    """Layout of prompts packed into one row (1, N), shortest first; each token attends to its own prompt up to itself."""

    def __init__(self, lengths: Sequence[int], device: torch.device):
        self.layers: list[Heads] = []
        self.last = torch.tensor(lengths, device=device).cumsum(0) - 1
        self.positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
        self._device = device
        self._buckets = [self._bucket(lengths, start, stop) for start, stop in buckets(lengths)]

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """Attend as described in `hf_rlhf.modeling.attention.Layout`, with B = 1."""
        key, value = stored_heads(key), stored_heads(value)
        self.layers.append((key[0], value[0]))
        groups = query.size(1) // key.size(1)
        parts = []
        for first, stop, padded, flat in self._buckets:
            one = padded is None
            q, k, v = (x[:, :, first:stop] if one else x[0][:, padded].transpose(0, 1) for x in (query, key, value))
            out = causal(q, repeated(k, groups), repeated(v, groups), scaling, window, softcap).transpose(1, 2)
            parts.append(out.flatten(0, 1) if flat is None else out.flatten(0, 1).index_select(0, flat))
        return torch.cat(parts).unsqueeze(0)

    def _bucket(self, lengths: Sequence[int], start: int, stop: int) -> tuple[int, int, Tensor | None, Tensor | None]:
        """Return the token range of prompts start:stop, their indices in (u, P) and those of the tokens in u * P.

        The indices are None for a single prompt.
        """
        first = sum(lengths[:start])
        sizes = lengths[start:stop]
        if len(sizes) == 1:
            return first, first + sizes[0], None, None
        columns = torch.arange(sizes[-1])
        begins = first + torch.tensor([0, *sizes[:-1]]).cumsum(0)
        inside = columns < torch.tensor(sizes)[:, None]
        padded = torch.where(inside, begins[:, None] + columns, first)
        flat = inside.flatten().nonzero().squeeze(1)
        return first, first + sum(sizes), padded.to(self._device), flat.to(self._device)


def buckets(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Split ascending lengths into ranges start:stop with bounded padding."""
    runs, start, tokens = [], 0, 0
    for i, length in enumerate(lengths):
        if i > start and length * (i + 1 - start) > PADDED * (tokens + length):
            runs.append((start, i))
            start, tokens = i, 0
        tokens += length
    return [*runs, (start, len(lengths))]


def causal(q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int | None, softcap: float | None) -> Tensor:
    """Causal attention over (u, H, P, d) tensors; each token attends to at most `window` tokens up to itself."""
    length = q.size(2)
    plain = window is None or window >= length
    if softcap is None and plain:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
    places = torch.arange(length, device=q.device)
    return masked(q, k, v, scaling, within(places, window), softcap)


def within(places: Tensor, window: int | None, columns: Tensor | None = None) -> Tensor:
    """Return which of `columns` (P,), by default `places`, tokens at `places` (..., n) attend to: (..., n, P)."""
    distance = places.unsqueeze(-1) - (places if columns is None else columns)
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def masked(q: Tensor, k: Tensor, v: Tensor, scaling: float, seen: Tensor, softcap: float | None) -> Tensor:
    """Attention of (u, H, n, d) to (u, H, P, d) where `seen`, which broadcasts to (u, H, n, P)."""
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scaling)
    scores = _capped(torch.matmul(q, k.transpose(2, 3)) * scaling, softcap)
    return torch.matmul(_weights(scores.masked_fill(~seen, -torch.inf), v.dtype), v)


def repeated(heads: Tensor, times: int) -> Tensor:
    """Repeat each head `times` times: (u, K, P, d) -> (u, K * times, P, d)."""
    return heads if times == 1 else heads.repeat_interleave(times, 1)


def _capped(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else softcap * (scores / softcap).tanh()


def _weights(scores: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the softmax of scores, computed in float32 or better."""
    return scores.softmax(-1) if scores.dtype == dtype else scores.softmax(-1).to(dtype)


def stored_heads(heads: Tensor) -> Tensor:
    """Convert to the dtype in which autocast multiplies, so that each number is cast once."""
    kind = heads.device.type
    return heads.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else heads


class Shared:
    """Layout of one token of each of B live rows, where rows of a prompt share its keys and values.

    Prompts end in the same column, so that a window excludes the same columns for all of them. Completions are stored by
    row; a finished row is replaced by the last one, to copy little.
    """

    def __init__(self, prompts: Sequence[Heads], lengths: Sequence[int], prompt_of_row: Sequence[int]):
        """Store `prompts`, (K, N, d) per layer, of these `lengths`; `prompt_of_row` has B indices in 0..U-1."""
        self.steps = 0
        """Number of tokens stored per row."""
        self._device = prompts[0][0].device
        self._lengths = list(lengths)
        self._prompt_of_row = list(prompt_of_row)
        width = max(lengths)
        begins = torch.tensor([0, *lengths[:-1]]).cumsum(0)
        columns = torch.arange(width) - (width - torch.tensor(lengths))[:, None]
        places = (begins[:, None] + columns.clamp(min=0)).flatten().to(self._device)
        self._prompts = [(_by_prompt(k, places, len(lengths)), _by_prompt(v, places, len(lengths))) for k, v in prompts]
        self._rows: list[list[Tensor]] = [[] for _ in prompts]
        self._index()

    def start(self) -> None:
        """Prepare for a forward; call before each."""
        self._layer = 0
        self.steps += 1

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """Attend as described in `hf_rlhf.modeling.attention.Layout`, with L = 1."""
        layer, self._layer = self._layer, self._layer + 1
        rows, heads, _, size = query.shape
        shared = key.size(1)
        keys, values = self._append(layer, key, value)
        first = 0 if window is None else max(0, self.steps - window)
        keys, values = keys[:, first : self.steps], values[:, first : self.steps]
        query = (query * scaling).reshape(rows * shared, heads // shared, size)
        scores = torch.bmm(query, keys.transpose(1, 2))
        seen = self._width if window is None else min(self._width, window - self.steps)
        if seen <= 0:
            out = torch.bmm(_weights(_capped(scores, softcap), values.dtype), values)
            return out.view(rows, 1, heads, -1)
        index = self._indices(shared)
        scores = torch.cat((self._asked(layer, query, index, seen, softcap), _capped(scores, softcap)), -1)
        weights = _weights(scores, values.dtype)
        out = self._given(layer, weights[..., :seen], index)
        return out.baddbmm_(weights[..., seen:], values).view(rows, 1, heads, -1)

    def _asked(self, layer: int, query: Tensor, index: Index, seen: int, softcap: float | None) -> Tensor:
        """Return the scores (B * K, R, seen) of queries (B * K, R, d) for the last `seen` columns of the row's prompt."""
        keys = self._prompts[layer][0][:, self._width - seen :].transpose(1, 2)
        asked = query.view(len(query), -1).index_select(0, index.rows).view(len(keys), -1, query.size(2))
        if index.bias is None:
            scores = _capped(torch.bmm(asked, keys), softcap)
        elif softcap is None:
            scores = torch.baddbmm(index.bias[..., self._width - seen :], asked, keys)
        else:
            scores = _capped(torch.bmm(asked, keys), softcap) + index.bias[..., self._width - seen :]
        return scores.view(len(index.rows), -1).index_select(0, index.slots).view(*query.shape[:2], seen)

    def _given(self, layer: int, weights: Tensor, index: Index) -> Tensor:
        """Return the weighted values (B * K, R, d) of the row's prompt, from weights (B * K, R, seen)."""
        values = self._prompts[layer][1][:, self._width - weights.size(2) :]
        given = weights.reshape(len(weights), -1).index_select(0, index.rows)
        out = torch.bmm(given.view(len(values), -1, weights.size(2)), values)
        return out.view(len(index.rows), -1).index_select(0, index.slots).view(*weights.shape[:2], -1)

    def _append(self, layer: int, key: Tensor, value: Tensor) -> list[Tensor]:
        """Append key and value, (B, K, 1, d) each, and return the layer's buffers (B * K, room, d)."""
        stored = self._rows[layer]
        if not stored or stored[0].size(1) < self.steps:
            stored = self._rows[layer] = [
                self._room(stored_heads(new), stored[i] if stored else None) for i, new in enumerate((key, value))
            ]
        for room, new in zip(stored, (key, value), strict=True):
            room[:, self.steps - 1].copy_(new.reshape(len(room), -1))
        return stored

    def _room(self, new: Tensor, old: Tensor | None) -> Tensor:
        used = 0 if old is None else old.size(1)
        room = new.new_empty(new.size(0) * new.size(1), max(GROWTH, 2 * used), new.size(3))
        if old is not None:
            room[:, :used] = old
        return room

    def keep(self, order: Sequence[int]) -> None:
        """Move row `order[i]` to row i and drop the other rows, and prompts without rows."""
        holes = [i for i, row in enumerate(order) if i != row]
        into = torch.tensor(holes, device=self._device, dtype=torch.long)
        out_of = torch.tensor([order[i] for i in holes], device=self._device, dtype=torch.long)
        for stored in self._rows:
            for i, room in enumerate(stored):
                by_row = room.unflatten(0, (len(self._prompt_of_row), -1))[:, :, : self.steps]
                by_row.index_copy_(0, into, by_row.index_select(0, out_of))
                stored[i] = room[: len(order) * by_row.size(1)]
        self._prompt_of_row = [self._prompt_of_row[row] for row in order]
        self._drop_prompts()
        self._index()

    def _drop_prompts(self) -> None:
        used = sorted(set(self._prompt_of_row))
        if len(used) == len(self._lengths):
            return
        kept, before = torch.tensor(used, device=self._device), len(self._lengths)
        self._lengths = [self._lengths[u] for u in used]
        self._prompt_of_row = [used.index(u) for u in self._prompt_of_row]
        width = max(self._lengths)

        def trimmed(heads: Tensor) -> Tensor:
            by_prompt = heads.unflatten(0, (before, -1))[:, :, self._width - width :]
            return by_prompt.index_select(0, kept).flatten(0, 1)

        self._prompts = [(trimmed(k), trimmed(v)) for k, v in self._prompts]

    def _index(self) -> None:
        """Assign indices to the rows of each prompt."""
        counts = [0] * len(self._lengths)
        numbers = []
        for u in self._prompt_of_row:
            numbers.append(counts[u])
            counts[u] += 1
        self._width, self._most, self._numbers = max(self._lengths), max(counts), numbers
        self._by_heads: dict[int, Index] = {}

    def _indices(self, shared: int) -> Index:
        if shared not in self._by_heads:
            prompts, numbers, head = (
                torch.tensor(self._prompt_of_row),
                torch.tensor(self._numbers),
                torch.arange(shared),
            )
            slots = ((prompts[:, None] * shared + head) * self._most + numbers[:, None]).flatten()
            rows = torch.zeros(len(self._lengths) * shared * self._most, dtype=torch.long)
            rows[slots] = torch.arange(len(slots))
            self._by_heads[shared] = Index(rows.to(self._device), slots.to(self._device), self._bias(shared))
        return self._by_heads[shared]

    def _bias(self, shared: int) -> Tensor | None:
        """Return (U * K, 1, P) with -inf on the columns before a prompt; None if all prompts have the same length."""
        if min(self._lengths) == self._width:
            return None
        outside = torch.arange(self._width) < self._width - torch.tensor(self._lengths)[:, None]
        bias = torch.zeros(outside.shape, dtype=self._prompts[0][0].dtype).masked_fill_(outside, -torch.inf)
        return bias.repeat_interleave(shared, 0).unsqueeze(1).to(self._device)


class Index(NamedTuple):
    """Positions of rows among those of their prompt, for each of K key-value heads."""

    rows: Tensor
    """Row and head (of B * K) in each slot, (U * K * G,), arbitrary for empty slots; G is the maximum rows per prompt."""
    slots: Tensor
    """Slot of each row and head, (B * K,)."""
    bias: Tensor | None
    """(U * K, 1, P)."""


def _by_prompt(heads: Tensor, places: Tensor, prompts: int) -> Tensor:
    """Unpack prompts, (K, N, d) -> (U * K, P, d); `places` (U * P,) are the indices in N of the prompts' columns."""
    chosen = heads.index_select(1, places).unflatten(1, (prompts, -1))
    return chosen.transpose(0, 1).flatten(0, 1).contiguous()
