"""Packing without padding: completions follow a single copy of their prompt and share its keys and values.

    p p p p a a a b b c c c c | q q d d d d e e        p, q prompts; a-c, d-e their completions
    positions: prompt from 0, every completion from the prompt's length on

Linear layers see each token once. A completion attends to its prompt and to itself; gradients of all completions of a
prompt add up in it. Equal completions enter once. Completions are truncated after the last token that predicts a
sampled one. `nested` rows, which belong to conversations, share whatever they begin with: a tree, each branch behind the
one that it grows from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

MASK_ELEMENTS = 2**23
"""Largest mask of a bucket of several rows, in elements (32 MiB in float32)."""
SPREAD = 0.7
"""Shortest row of a bucket as a share of its longest; limits the padding inside attention."""
BLOCK = 128
"""Tokens of a block of FlexAttention's masks."""
BRANCH = 8
"""Fewest tokens that nested rows share in a branch of their own."""


def by_prompt(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Group rows by distinct prompt, prompts in order of appearance."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(tuple(prompt), []).append(row)
    return list(groups.values())


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the number of leading tokens that are equal, by comparing halves: lists are compared faster than tokens."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


@dataclass
class Span:
    """Tokens `start` to `stop` of the packed row, which follow those of `before` (None: they begin rows)."""

    start: int
    stop: int
    before: Span | None = None

    def __post_init__(self) -> None:
        self.depth: int = 0 if self.before is None else self.before.depth + self.before.size
        """Number of tokens before it."""

    @property
    def size(self) -> int:
        return self.stop - self.start

    def path(self) -> Iterator[Span]:
        """Yield what it follows, the nearest first."""
        span = self.before
        while span is not None:
            yield span
            span = span.before


class Packed:
    """Pack rows of prompts and completions into one row of N tokens; a `Layout` of `hf_rlhf.modeling.attention`.

    `used[row]` is the number of completion tokens that enter; a row with `used` None is left out, with its prompt if no
    other row needs it. `once`: rows of which the same tokens enter do so once. Spans lie in the order of a walk through the
    tree: what follows a span comes right after it.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        used: Sequence[int | None],
        device: torch.device,
        nested: bool = False,
        once: bool = True,
    ):
        self._ids: list[int] = []
        self._positions: list[int] = []
        self._tails: list[Span] = [Span(0, 0)] * len(prompts)
        """The last span of each row."""
        self.prompts: list[Span] = []
        self.completions: list[Span] = []
        first = self._first(prompts, completions, used) if once else range(len(used))
        used = [n if first[row] == row else None for row, n in enumerate(used)]
        if nested:
            wholes = {i: [*prompts[i], *completions[i][:n]] for i, n in enumerate(used) if n is not None}
            self._grow(sorted(wholes.items(), key=lambda row: row[1]), None)
        else:
            self._by_prompt(prompts, completions, used)
        self._tails = [self._tails[row] for row in first]
        self.device = device
        self.input_ids = torch.tensor([self._ids], device=device)
        self.position_ids = torch.tensor([self._positions], device=device)

    @staticmethod
    def _first(
        prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], used: Sequence[int | None]
    ) -> list[int]:
        """Return for each row the first one with the same prompt and the same tokens that enter; itself if none enter."""
        known: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
        rows = enumerate(zip(prompts, completions, used, strict=True))
        return [i if n is None else known.setdefault((tuple(p), tuple(c[:n])), i) for i, (p, c, n) in rows]

    def _add(self, ids: Sequence[int], before: Span | None) -> Span:
        span = Span(len(self._ids), len(self._ids) + len(ids), before)
        self._ids += ids
        self._positions += range(span.depth, span.depth + span.size)
        (self.prompts if before is None else self.completions).append(span)
        return span

    def _by_prompt(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], used: Sequence[int | None]
    ) -> None:
        for rows in by_prompt(prompts):
            rows = [row for row in rows if used[row] is not None]
            if not rows:
                continue
            prompt = self._add(prompts[rows[0]], None)
            for row in rows:
                count = used[row] or 0
                self._tails[row] = self._add(completions[row][:count], prompt) if count else prompt

    def _grow(self, rows: list[tuple[int, list[int]]], before: Span | None) -> None:
        """Add sorted rows (number, tokens) behind the span that all of them begin with."""
        depth = 0 if before is None else before.depth + before.size
        shared = [common_length(one, other) for (_, one), (_, other) in pairwise(rows)]
        starts = [0, *(i for i, size in enumerate(shared, 1) if size < depth + BRANCH), len(rows)]
        for start, stop in pairwise(starts):
            number, ids = rows[start]
            if stop == start + 1:
                self._tails[number] = self._add(ids[depth:], before) if len(ids) > depth or not before else before
                continue
            branch = self._add(ids[depth : min(shared[start : stop - 1])], before)
            self._grow(rows[start:stop], branch)

    def places(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Return the index (n,) of the tokens at `positions` (n,) of rows (n,)."""
        starts = torch.tensor([tail.start for tail in self._tails], dtype=torch.long)
        depths = torch.tensor([tail.depth for tail in self._tails], dtype=torch.long)
        lasts = torch.tensor(
            [0 if tail.before is None else tail.before.stop - 1 for tail in self._tails], dtype=torch.long
        )
        beyond = positions - depths[rows]
        found = torch.where(beyond == -1, lasts[rows], starts[rows] + beyond)
        early = (beyond < -1).nonzero().flatten()
        if len(early):  # a token of an earlier branch
            above = [
                next(span.start - span.depth for span in self._tails[row].path() if at >= span.depth)
                for row, at in zip(rows[early].tolist(), positions[early].tolist(), strict=True)
            ]
            found[early] = positions[early] + torch.tensor(above, dtype=torch.long)
        return found

    def release(self) -> None:
        """Free the masks; they are built again if needed."""
        for name in ("_blocks", "_block_masks"):
            vars(self).pop(name, None)

    @cached_property
    def _blocks(self) -> list[_Block]:
        blocks = [_Block(spans, self.device) for spans in _buckets(self.prompts)]
        return blocks + [_Block(spans, self.device) for spans in _buckets(self.completions)]

    @cached_property
    def _order(self) -> Tensor:
        """Index of each token (N,) in the concatenated outputs of the blocks."""
        order = torch.empty(self.input_ids.size(1) + 1, dtype=torch.long)  # the last for padding
        offset = 0
        for block in self._blocks:
            order[block.tokens] = offset + torch.arange(len(block.tokens))
            offset += len(block.tokens)
        return order[:-1].to(self.device)

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
        """See `Layout`. Every completion of a prompt reads its keys; its queries are computed once."""
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, heads, d)
        outs = [block.attend(query, key, value, scaling, window, softcap) for block in self._blocks]
        flat = [x.transpose(1, 2).reshape(-1, *x.shape[1::2]) for x in outs]
        return torch.cat(flat).index_select(0, self._order).unsqueeze(0)


class FlexPacked(Packed):
    """Packed rows through FlexAttention: one call over the packed row, with a block mask.

    The mask is made from blocks of tokens, never from pairs of tokens.
    """

    @cached_property
    def _ends(self) -> Tensor:
        """Index (N,) behind the last token that sees each token: the end of what grows from its span."""
        ends = torch.zeros(self.input_ids.size(1), dtype=torch.long)
        spans = sorted([*self.prompts, *self.completions], key=lambda span: span.start)
        last = {id(span): span.stop for span in spans}
        for span in reversed(spans):
            ends[span.start : span.stop] = last[id(span)]
            if span.before is not None:
                last[id(span.before)] = max(last[id(span.before)], last[id(span)])
        return ends.to(self.device)

    def _block_mask(self, window: int | None) -> object:
        from torch.nn.attention.flex_attention import BlockMask

        masks = self.__dict__.setdefault("_block_masks", {})
        if window not in masks:
            ends, position, tokens = self._ends, self.position_ids[0], self.input_ids.size(1)
            partly, fully = self._seen_blocks(window)

            def sees(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
                near = (q >= k) & (q < ends[k])
                return near if window is None else near & (position[q] - position[k] < window)

            masks[window] = BlockMask.from_kv_blocks(
                *_listed(partly), *_listed(fully), mask_mod=sees, BLOCK_SIZE=BLOCK, seq_lengths=(tokens, tokens)
            )
        return masks[window]

    def _seen_blocks(self, window: int | None) -> tuple[Tensor, Tensor]:
        """Return which blocks of keys a block of queries sees in part, and which whole: (blocks, blocks) each.

        With a window, a block of which nothing is seen may count as seen in part.
        """
        tokens, edge = self.input_ids.size(1), BLOCK - 1
        blocks = torch.arange(-(-tokens // BLOCK), device=self.device)
        missing = len(blocks) * BLOCK - tokens

        def least_most(x: Tensor) -> tuple[Tensor, Tensor]:
            low = functional.pad(x, (0, missing), value=x.max().item()).view(-1, BLOCK).amin(1)
            return low, functional.pad(x, (0, missing), value=x.min().item()).view(-1, BLOCK).amax(1)

        first, (soonest, latest) = blocks * BLOCK, least_most(self._ends)
        last = (first + edge)[:, None]
        seen = (blocks[:, None] >= blocks) & (latest > first[:, None])
        fully = (blocks[:, None] > blocks) & (soonest > last)
        if window is not None:
            low, high = least_most(self.position_ids[0])
            seen &= low[:, None] - high < window
            fully &= high[:, None] - low < window
        return seen & ~fully, fully

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
        """See `Layout`."""
        capped = None
        if softcap is not None:

            def capped(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
                return softcap * torch.tanh(score / softcap)

        query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast, norms of queries give float32
        out = _flex(query.is_cuda)(
            query, key, value, score_mod=capped, block_mask=self._block_mask(window), scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2)


def _listed(seen: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of blocks seen by each and their places, as FlexAttention takes them: (1, 1, blocks) and one more."""
    places = seen.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return seen.sum(1, dtype=torch.int32)[None, None], places.to(torch.int32)[None, None]


def _flex(compiled: bool) -> Callable[..., Tensor]:
    from torch.nn.attention import flex_attention as module

    if not compiled:
        return module.flex_attention
    if not hasattr(_flex, "compiled"):
        _flex.compiled = torch.compile(module.flex_attention, dynamic=True)  # type: ignore[attr-defined]
    return _flex.compiled  # type: ignore[attr-defined]


def _buckets(spans: Sequence[Span]) -> list[list[Span]]:
    """Group spans of similar length, longest first, within the largest mask."""
    buckets: list[list[Span]] = []
    before = 0
    for span in sorted(spans, key=lambda span: -span.size):
        own = span.depth
        if buckets:
            longest, before = buckets[-1][0].size, max(before, own)
            similar = span.size >= SPREAD * longest or span.size + 16 >= longest
            if similar and (len(buckets[-1]) + 1) * longest * (before + longest) <= MASK_ELEMENTS:
                buckets[-1].append(span)
                continue
        buckets.append([span])
        before = own
    return buckets


class _Block:
    """Pad spans to one length inside attention: queries (B, L), keys (B, P + L), where P is the most tokens before
    one of them, padded on the left."""

    def __init__(self, spans: list[Span], device: torch.device):
        self.spans, self.longest = spans, max(span.size for span in spans)
        self.before = max(span.depth for span in spans)
        self.device = device
        self.depths = [span.depth for span in spans]
        places = torch.arange(self.longest)
        starts, sizes = torch.tensor([[span.start for span in spans], [span.size for span in spans]]).unsqueeze(-1)
        inside = places < sizes
        self.tokens = torch.where(inside, starts + places, -1).flatten()
        """The token of each padded place (B L), -1 for padding; on the host."""
        queries = torch.where(inside, starts + places, 0)
        at = (
            torch.arange(self.before) - self.before + torch.tensor(self.depths).unsqueeze(-1)
        )  # of a row, from its first token
        before = torch.zeros(len(spans), self.before, dtype=torch.long)
        above = [span.before for span in spans]
        while any(above):
            known = [(x.start, x.depth, x.size) if x else (0, 0, 0) for x in above]
            start, depth, size = torch.tensor(known).T.unsqueeze(-1)
            before = torch.where((at >= depth) & (at < depth + size), start + at - depth, before)
            above = [x.before if x else None for x in above]
        self.queries = queries.flatten().to(device)
        self.keys = torch.cat([before, queries], 1).flatten().to(device)
        self._masks: dict[tuple[int | None, torch.dtype], Tensor] = {}

    @property
    def _causal(self) -> bool:
        return self.before == 0

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """Return the additive mask (B, 1, L, P + L). Padding attends to itself, so that no row is empty."""
        if (window, dtype) not in self._masks:
            q = torch.arange(self.longest, device=self.device)[:, None] + self.before
            k = torch.arange(self.before + self.longest, device=self.device)[None]
            sees = (k <= q) if window is None else (k <= q) & (q - k < window)
            starts = torch.tensor([self.before - size for size in self.depths], device=self.device)
            allowed = sees[None] & (k[None] >= starts[:, None, None])
            bias = torch.zeros(allowed.shape, dtype=dtype, device=self.device).masked_fill_(~allowed, float("-inf"))
            self._masks[window, dtype] = bias.unsqueeze(1)
        return self._masks[window, dtype]

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None, softcap: float | None
    ) -> Tensor:
        """Attend with queries (N, heads, d) to keys and values (N, kv_heads, d); returns (B, heads, L, d)."""
        rows, repeats = len(self.spans), query.size(1) // key.size(1)
        if window is not None and window >= self.before + self.longest:
            window = None
        q = query.index_select(0, self.queries).view(rows, self.longest, *query.shape[1:]).transpose(1, 2)
        k, v = (
            x.index_select(0, self.keys).view(rows, -1, *x.shape[1:]).transpose(1, 2).repeat_interleave(repeats, 1)
            for x in (key, value)
        )
        if softcap is not None:
            scores = softcap * torch.tanh(q @ k.transpose(2, 3) * (scaling / softcap))
            return (scores + self.mask(window, q.dtype)).softmax(-1, dtype=torch.float32).to(v.dtype) @ v
        if self._causal and window is None:
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=self.mask(window, q.dtype), scale=scaling)
