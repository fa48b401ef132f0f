"""Minimum cost of a cycle: counted operations and bytes, at the rates that this machine reaches for such shapes.

Counted is what every exact implementation does: each prompt once per group, no padding, the head only where a completion
token is predicted, no second forward for log-probs that sampling knew, nothing for rows without signal. Attention counts
its two products over the pairs that see each other. The update counts three times the forward. A decoding step takes as
long as its products at the measured rate of such small batches, or as reading weights and cache, whichever is more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from benchmarks.work import Line

FLOAT = 4
"""Bytes of a number."""
ADAM = 7
"""Numbers that AdamW moves per parameter: parameter, gradient and two moments read, parameter and moments written."""
POSITIONS = 1024
"""Rows of the products at which the update's rate is measured."""
LOGITS = 2**24
"""Most logits in a measured product with the head."""
PHASES = ("rollout", "forward", "update", "optimizer")


# Counting


def layer_shapes(line: Line) -> list[tuple[int, int]]:
    """Return (inputs, outputs) of the matrices of one layer: query, key, value, output, gate, up, down."""
    h, kv, wide = line.hidden, line.kv_width, line.intermediate
    return [(h, h), (h, kv), (h, kv), (h, h), (h, wide), (h, wide), (wide, h)]


def trunk_weights(line: Line) -> int:
    """Numbers in the matrices that each position is multiplied with."""
    return line.layers * sum(a * b for a, b in layer_shapes(line))


def head_weights(line: Line) -> int:
    """Numbers in the head, which is the embedding too."""
    return line.vocabulary * line.hidden


def trunk_flops(line: Line, positions: int) -> int:
    """Operations of one forward through the layers' matrices."""
    return 2 * trunk_weights(line) * positions


def head_flops(line: Line, positions: int) -> int:
    """Operations of one forward through the head."""
    return 2 * head_weights(line) * positions


def attention_flops(line: Line, pairs: int) -> int:
    """Operations of scores and weighted sums over `pairs` of tokens that see each other."""
    return 4 * line.layers * line.hidden * pairs


def triangle(n: int) -> int:
    """Pairs among n tokens, each of which sees itself and those before it."""
    return n * (n + 1) // 2


@dataclass(frozen=True)
class Counts:
    """Work of one rollout, in positions, pairs and rows."""

    prompts: int
    """Tokens of all prompts, each once."""
    groups: int
    completions: int
    """Tokens of all completions: as many are predicted."""
    fed: int
    """Completion tokens that predict another one: all but each completion's last."""
    prompt_pairs: int
    completion_pairs: int
    """Pairs of a fed completion token with its prompt's tokens and its own completion's."""
    rows_at: tuple[int, ...]
    """Rows in each decoding step after the first token, which the prompts' forward gives."""
    cached: tuple[int, ...]
    """Tokens in the cache that each of these steps reads, a prompt's once for its group."""


def count(prompts: Sequence[int], lengths: Sequence[Sequence[int]]) -> Counts:
    """`prompts` gives each prompt's tokens, `lengths` those of each of its completions, the end of sequence included."""
    own = [n for group in lengths for n in group]
    pairs = sum((n - 1) * p + triangle(n - 1) for p, group in zip(prompts, lengths, strict=True) for n in group)
    rows_at, cached = [], []
    for step in range(1, max(own, default=1)):  # feeds the token number `step` of the rows that go on after it
        alive = [[n for n in group if n > step] for group in lengths]
        rows_at.append(sum(map(len, alive)))
        cached.append(sum(p + step * len(group) for p, group in zip(prompts, alive, strict=True) if group))
    return Counts(
        prompts=sum(prompts),
        groups=len(prompts),
        completions=sum(own),
        fed=sum(n - 1 for n in own),
        prompt_pairs=sum(map(triangle, prompts)),
        completion_pairs=pairs,
        rows_at=tuple(rows_at),
        cached=tuple(cached),
    )


def live(line: Line, prompts: Sequence[int], lengths: Sequence[Sequence[int]]) -> Counts:
    """Count the work of the update, without groups that have no signal, unless a KL acts on them."""
    dead = 0 if line.beta else round(line.dead * line.prompts)
    return count(prompts[dead:], lengths[dead:])


# The machine


@dataclass(frozen=True)
class Rates:
    """Operations and bytes per second of processor time, on one thread, in float32."""

    forward: float
    """The layers' products of `POSITIONS` rows."""
    update: float
    """The same with both products of the backward."""
    head_forward: float
    head_update: float
    decode: float
    """All products of a decoding step of the whole rollout's rows."""
    read: float
    """Bytes per second over as much memory as the model's weights hold: the best of a sum, a copy and an addition."""

    def better(self, other: Rates) -> Rates:
        """Return the higher of each rate."""
        both = zip(asdict(self).items(), asdict(other).values(), strict=True)
        return Rates(**{name: max(a, b) for (name, a), b in both})


def least(run: Callable[[], object], times: int = 5) -> float:
    """Return the minimum processor time of a few runs in seconds, after a warm-up."""
    run()
    seconds = []
    for _ in range(times):
        started = time.process_time()
        run()
        seconds.append(time.process_time() - started)
    return max(min(seconds), 1e-9)


def measure(line: Line, positions: int = POSITIONS) -> Rates:
    """Measure the rates for the shapes of a line's model."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        shapes = layer_shapes(line)
        each = [_product_seconds(shape, positions) for shape in sorted(set(shapes))]
        seconds = dict(zip(sorted(set(shapes)), each, strict=True))
        flops = 2 * positions * sum(a * b for a, b in shapes)
        few = max(16, min(positions, LOGITS // line.vocabulary))
        head = _product_seconds((line.hidden, line.vocabulary), few)
        return Rates(
            forward=flops / sum(seconds[shape][0] for shape in shapes),
            update=3 * flops / sum(sum(seconds[shape]) for shape in shapes),
            head_forward=head_flops(line, few) / head[0],
            head_update=3 * head_flops(line, few) / sum(head),
            decode=_decode_rate(line),
            read=_read_rate(line),
        )


def _product_seconds(shape: tuple[int, int], rows: int) -> tuple[float, float]:
    """Return the seconds of the forward product, and of both backward ones."""
    x, w, g = torch.randn(rows, shape[0]), torch.randn(shape[1], shape[0]), torch.randn(rows, shape[1])
    y, by_x, by_w = torch.empty_like(g), torch.empty_like(x), torch.empty_like(w)
    forward = least(lambda: torch.mm(x, w.t(), out=y))
    return forward, least(lambda: torch.mm(g, w, out=by_x)) + least(lambda: torch.mm(g.t(), x, out=by_w))


def _decode_rate(line: Line) -> float:
    weights = [torch.randn(b, a) for _ in range(line.layers) for a, b in layer_shapes(line)]
    weights.append(torch.randn(line.vocabulary, line.hidden))
    inputs: dict[int, Tensor] = {w.size(1): torch.randn(line.rows, w.size(1)) for w in weights}

    def step() -> None:
        for w in weights:
            torch.nn.functional.linear(inputs[w.size(1)], w)

    return 2 * line.rows * sum(w.numel() for w in weights) / least(step)


def _read_rate(line: Line) -> float:
    x = torch.randn(trunk_weights(line) + head_weights(line))
    y = torch.empty_like(x)
    size = x.numel() * FLOAT
    return max(size / least(x.sum), 2 * size / least(lambda: y.copy_(x)), 3 * size / least(lambda: y.add_(x)))


# The floor


def seconds(line: Line, whole: Counts, learned: Counts, rates: Rates) -> dict[str, float]:
    """Least seconds of processor time of each phase of a cycle, and `total`."""

    def forward(c: Counts) -> float:
        inner = trunk_flops(line, c.prompts + c.fed) + attention_flops(line, c.prompt_pairs + c.completion_pairs)
        return inner / rates.forward + head_flops(line, c.completions) / rates.head_forward

    def update(c: Counts) -> float:
        inner = trunk_flops(line, c.prompts + c.fed) + attention_flops(line, c.prompt_pairs + c.completion_pairs)
        return 3 * inner / rates.update + 3 * head_flops(line, c.completions) / rates.head_update

    parameters = trunk_weights(line) + head_weights(line)
    found = {
        "rollout": _rollout(line, whole, rates),
        "forward": forward(whole) if line.beta else 0.0,
        "update": line.epochs * update(learned),
        "optimizer": line.epochs * ADAM * FLOAT * parameters / rates.read,
    }
    return {**found, "total": sum(found.values())}


def _rollout(line: Line, c: Counts, rates: Rates) -> float:
    prefill = (trunk_flops(line, c.prompts) + attention_flops(line, c.prompt_pairs)) / rates.forward
    prefill += head_flops(line, c.groups) / rates.decode
    weights, per_token = trunk_weights(line) + head_weights(line), 2 * line.layers * line.kv_width
    steps = [
        max(2 * weights * rows / rates.decode, FLOAT * (weights + per_token * cached) / rates.read)
        for rows, cached in zip(c.rows_at, c.cached, strict=True)
    ]
    return prefill + sum(steps)
