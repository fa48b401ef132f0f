"""Packing without padding: completions follow a single copy of their prompt and share its keys and values.

    p p p p a a a b b c c c c | q q d d d d e e        p, q prompts; a-c, d-e their completions
    positions: prompt from 0, every completion from the prompt's length on

Linear layers see each token once. A completion attends to its prompt and to itself; gradients of all completions of a
prompt add up in it. Completions are truncated after the last token that predicts a sampled one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional

MASK_ELEMENTS = 2**23
"""Largest mask of a bucket of several rows, in elements (32 MiB in float32)."""
SPREAD = 0.7
"""Shortest row of a bucket as a share of its longest; limits the padding inside attention."""


def by_prompt(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Group rows by distinct prompt, prompts in order of appearance."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(tuple(prompt), []).append(row)
    return list(groups.values())


@dataclass
class Span:
    """Tokens `start` to `stop` of the packed row, after the prompt `before` (None: they are a prompt)."""

    start: int
    stop: int
    before: Span | None = None

    @property
    def size(self) -> int:
        return self.stop - self.start


class Packed:
    """Pack rows of prompts and completions into one row of N tokens; a `Layout` of `hf_rlhf.modeling.attention`.

    `used[row]` is the number of completion tokens that enter; a row with `used` None is left out, with its prompt if no
    other row needs it.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        used: Sequence[int | None],
        device: torch.device,
    ):
        ids: list[int] = []
        positions: list[int] = []
        self.starts, self.lasts = [0] * len(prompts), [0] * len(prompts)
        """Per row: index of its first completion token, and of its prompt's last token."""
        self.prompts: list[Span] = []
        self.completions: list[Span] = []
        for rows in by_prompt(prompts):
            rows = [row for row in rows if used[row] is not None]
            if not rows:
                continue
            prompt = Span(len(ids), len(ids) + len(prompts[rows[0]]))
            self.prompts.append(prompt)
            ids += prompts[rows[0]]
            positions += range(prompt.size)
            for row in rows:
                count = used[row] or 0
                self.starts[row], self.lasts[row] = len(ids), prompt.stop - 1
                if count:
                    self.completions.append(Span(len(ids), len(ids) + count, prompt))
                ids += completions[row][:count]
                positions += range(prompt.size, prompt.size + count)
        self.device = device
        self.input_ids = torch.tensor([ids], device=device)
        self.position_ids = torch.tensor([positions], device=device)

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
        order = torch.empty(self.input_ids.size(1), dtype=torch.long)
        offset = 0
        for block in self._blocks:
            for i, span in enumerate(block.spans):
                order[span.start : span.stop] = offset + i * block.longest + torch.arange(span.size)
            offset += len(block.spans) * block.longest
        return order.to(self.device)

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
    """Packed rows through FlexAttention: one call over the packed row, with a block mask."""

    @cached_property
    def _segments(self) -> tuple[Tensor, Tensor]:
        """Prompt of each token (N,) and its completion (N,), 0 in prompts."""
        prompt, completion = torch.zeros(2, self.input_ids.size(1), dtype=torch.long)
        for i, span in enumerate(self.prompts):
            prompt[span.start :] = i
        for i, span in enumerate(self.completions, 1):
            completion[span.start : span.stop] = i
        return prompt.to(self.device), completion.to(self.device)

    def _block_mask(self, window: int | None) -> object:
        from torch.nn.attention.flex_attention import create_block_mask

        masks = self.__dict__.setdefault("_block_masks", {})
        if window not in masks:
            prompt, completion = self._segments
            position, tokens = self.position_ids[0], self.input_ids.size(1)

            def sees(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
                own = (completion[k] == 0) | (completion[k] == completion[q])
                near = (prompt[q] == prompt[k]) & (q >= k) & own
                return near if window is None else near & (position[q] - position[k] < window)

            masks[window] = create_block_mask(sees, None, None, tokens, tokens, device=self.device)
        return masks[window]

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
        own = span.before.size if span.before else 0
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
    """Pad spans to one length inside attention: queries (B, L), keys (B, P + L), where P is the longest prompt before
    them, padded on the left."""

    def __init__(self, spans: list[Span], device: torch.device):
        self.spans, self.longest = spans, max(span.size for span in spans)
        self.before = max(span.before.size if span.before else 0 for span in spans)
        self.device = device
        rows, columns = len(spans), self.before + self.longest
        queries = torch.zeros(rows, self.longest, dtype=torch.long)
        keys = torch.zeros(rows, columns, dtype=torch.long)
        for i, span in enumerate(spans):
            own = torch.arange(span.start, span.stop)
            queries[i, : span.size] = own
            keys[i, self.before : self.before + span.size] = own
            if span.before:
                keys[i, self.before - span.before.size : self.before] = torch.arange(
                    span.before.start, span.before.stop
                )
        self.queries, self.keys = queries.flatten().to(device), keys.flatten().to(device)
        self.prompts = [span.before.size if span.before else 0 for span in spans]
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
            starts = torch.tensor([self.before - size for size in self.prompts], device=self.device)
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
