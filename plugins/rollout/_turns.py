"""Decoding of conversations: keys and values of live rows are kept between their turns, so that each token is prefilled once.

A row's turn prefills the tokens that its conversation has gained (those of the environment, and the last sampled one), which
attend to what is kept. A row that is new takes what it has in common with another one, as a fork does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ._layouts import Heads, Shared, buckets, masked, repeated, stored_heads, within


class Segment(NamedTuple):
    """Keys and values (K, N, d) of each layer, of which a row has the first `length` from `start` on."""

    layers: Sequence[Heads]
    start: int
    length: int


@dataclass
class KeptRow:
    """The tokens of a row, and the keys and values of all of them but the last."""

    ids: list[int]
    segments: list[Segment]

    def first(self, length: int) -> list[Segment]:
        """Return the segments of the first `length` tokens."""
        found = []
        for segment in self.segments:
            if length > 0:
                found.append(segment._replace(length=min(length, segment.length)))
                length -= segment.length
        return found


class Kept:
    """Keys and values of live rows, by row number. Each call of the decoder names its rows first, with `ask`."""

    def __init__(self) -> None:
        self.rows: dict[int, KeptRow] = {}
        self.prefilled = 0
        """Number of tokens that were prefilled."""

    def ask(self, rows: Sequence[int]) -> Kept:
        """Name the rows of the next call, in their order."""
        self._asked = list(rows)
        return self

    def begin(self, distinct: Sequence[Sequence[int]], of_row: Sequence[int]) -> list[list[Segment]]:
        """Return what is kept of the distinct prompts, at most all tokens but the last; empty if there is nothing of any."""
        number = {u: row for row, u in zip(reversed(self._asked), reversed(of_row), strict=True)}
        found = [self._longest(number[u], ids) for u, ids in enumerate(distinct)]
        self.prefilled += sum(len(ids) - length_of(segments) for ids, segments in zip(distinct, found, strict=True))
        return found if any(found) else []

    def _longest(self, row: int, ids: Sequence[int]) -> list[Segment]:
        """Return what is kept of the row, or of the one that has most in common with it if the row is new."""
        ids = list(ids)
        candidates = [self.rows[row]] if row in self.rows else list(self.rows.values())
        lengths = [min(_common(kept.ids, ids), length_of(kept.segments), len(ids) - 1) for kept in candidates]
        best = max(range(len(lengths)), key=lengths.__getitem__, default=None)
        return [] if best is None else candidates[best].first(lengths[best])

    def prompts(self, heads: Sequence[Heads], distinct: Sequence[Sequence[int]], of_row: Sequence[int]) -> None:
        """Keep the keys and values (K, N, d) by layer of the distinct prompts."""
        starts = [0, *accumulate(map(len, distinct))]
        for row, u in zip(self._asked, of_row, strict=True):
            self.rows[row] = KeptRow(list(distinct[u]), [Segment(heads, starts[u], len(distinct[u]))])

    def end(self, sampled: Sequence[Sequence[int]], recorded: Mapping[int, Segment]) -> None:
        """Keep the keys and values of the sampled tokens but the last of each row."""
        for i, (row, ids) in enumerate(zip(self._asked, sampled, strict=True)):
            kept = self.rows[row]
            kept.ids += ids
            if len(ids) > 1:
                kept.segments.append(recorded[i]._replace(length=len(ids) - 1))


def length_of(segments: Sequence[Segment]) -> int:
    return sum(segment.length for segment in segments)


def _common(first: list[int], second: list[int]) -> int:
    """Return the number of leading tokens that are equal, by comparing halves: lists are compared faster than tokens."""
    low, high = 0, min(len(first), len(second))
    if first[:high] == second[:high]:
        return high
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


class Continued:
    """Layout of the new tokens of rows, packed into one row (1, N); each attends to what is kept of its row and to the new tokens
    up to itself. Rows are sorted by their length, new tokens included."""

    def __init__(self, kept: Sequence[Sequence[Segment]], lengths: Sequence[int], device: torch.device):
        """`lengths` are those of the rows, new tokens included."""
        self.layers: list[Heads] = []
        """Keys and values (K, N, d) of all tokens of the rows, by layer."""
        self._kept, self._device = kept, device
        self._old = [length_of(segments) for segments in kept]
        self._lengths = list(lengths)
        self._new = [length - old for length, old in zip(lengths, self._old, strict=True)]
        self.last = torch.tensor(self._new, device=device).cumsum(0) - 1
        self._buckets = [self._bucket(start, stop) for start, stop in buckets(self._lengths)]

    @property
    def positions(self) -> Tensor:
        """Positions (1, N) of the new tokens in their rows."""
        return torch.cat([torch.arange(old, end) for old, end in zip(self._old, self._lengths, strict=True)])[None]

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
        keys, values = (self._whole(i, stored_heads(new)[0]) for i, new in enumerate((key, value)))
        self.layers.append((keys, values))
        groups = query.size(1) // keys.size(0)
        parts = []
        for asked, attended, places, flat in self._buckets:
            q = query[0][:, asked].transpose(0, 1)
            k, v = (repeated(x[:, attended].transpose(0, 1), groups) for x in (keys, values))
            columns = torch.arange(attended.size(1), device=self._device)
            out = masked(q, k, v, scaling, within(places, window, columns).unsqueeze(1), softcap)
            parts.append(out.transpose(1, 2).flatten(0, 1).index_select(0, flat))
        return torch.cat(parts).unsqueeze(0)

    def _whole(self, which: int, new: Tensor) -> Tensor:
        """Return keys (`which` 0) or values of all tokens of the rows, (K, N, d), from those of the new ones."""
        layer, pieces = len(self.layers), []
        for segments, own in zip(self._kept, new.split(self._new, 1), strict=True):
            pieces += [s.layers[layer][which].narrow(1, s.start, s.length) for s in segments]
            pieces.append(own)
        return torch.cat(pieces, 1)

    def _bucket(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the indices of rows start:stop among the new tokens (u, n) and among all tokens (u, P), the positions (u, n) of
        the new tokens in their rows, and the indices of the new tokens in u * n. Padding repeats the row's last token."""
        new, whole = torch.tensor(self._new), torch.tensor(self._lengths)
        rows = slice(start, stop)
        within_new = torch.arange(int(new[rows].max())).expand(stop - start, -1)
        columns = torch.arange(int(whole[rows].max())).expand(stop - start, -1)
        real = within_new < new[rows, None]
        within_new = torch.minimum(within_new, new[rows, None] - 1)
        asked = (new.cumsum(0) - new)[rows, None] + within_new
        attended = (whole.cumsum(0) - whole)[rows, None] + torch.minimum(columns, whole[rows, None] - 1)
        places = torch.tensor(self._old)[rows, None] + within_new
        flat = real.flatten().nonzero().squeeze(1)
        return tuple(x.to(self._device) for x in (asked, attended, places, flat))  # type: ignore[return-value]


class Recorded(Shared):
    """Shared layout that records the keys and values of the tokens that were sampled."""

    def __init__(self, prompts: Sequence[Heads], lengths: Sequence[int], prompt_of_row: Sequence[int]):
        """Store the prompts; rows are numbered in their order."""
        super().__init__(prompts, lengths, prompt_of_row)
        self._names = list(range(len(prompt_of_row)))
        self._segments: dict[int, Segment] = {}

    def keep(self, order: Sequence[int]) -> None:
        """Record the rows that leave, then drop them as `Shared` does."""
        staying = set(order)
        self._record([row for row in range(len(self._names)) if row not in staying])
        super().keep(order)
        self._names = [self._names[row] for row in order]

    def finish(self) -> Mapping[int, Segment]:
        """Return what was recorded of each row, by number: all its sampled tokens but the last."""
        self._record(range(len(self._names)))
        self._names = []
        return self._segments

    def _record(self, rows: Sequence[int]) -> None:
        if not rows or not self.steps:
            return
        chosen = torch.tensor(rows, device=self._device, dtype=torch.long)
        layers = []
        for stored in self._rows:
            keys, values = (
                room.unflatten(0, (len(self._names), -1))[:, :, : self.steps].index_select(0, chosen) for room in stored
            )
            layers.append((keys.transpose(0, 1).flatten(1, 2), values.transpose(0, 1).flatten(1, 2)))
        for i, row in enumerate(rows):
            self._segments[self._names[row]] = Segment(layers, i * self.steps, self.steps)
