"""The lab's results in plain text: the table of one combination, and the cells that the page shares."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from hf_rlhf.lab.distillation import Form, Gap
from hf_rlhf.lab.staleness import Aged
from hf_rlhf.lab.study import Row
from hf_rlhf.lab.trust_region import Move
from hf_rlhf.lab.world import World

EXACT = 1e-9
"""Error below which numbers are rounding errors, shown as 0."""


def number(x: float | None, digits: int = 3) -> str:
    """Format with three digits; rounding errors as 0, None as empty."""
    if x is None:
        return ""
    return f"{0.0 if abs(x) < EXACT else x:.{digits}g}"


def cosine(x: float | None) -> str:
    """Format with three decimals; 1 only if it is 1 up to rounding."""
    if x is None:
        return ""
    if abs(x) > 1 - EXACT:
        return f"{x:.0f}"
    return f"{max(-0.9999, min(0.9999, x)):.4f}" if abs(x) > 0.9995 else f"{x + 0.0:.3f}"


def yes(x: bool | None) -> str:
    """Format as yes, no, or empty."""
    return "" if x is None else "yes" if x else "no"


def of_kl(row: Row) -> str:
    """Format a row's KL as `in_reward k1 token`."""
    return " ".join(filter(None, [row.kl, row.estimator, row.level])) if row.beta is not None else "none"


def of_estimator(row: Row) -> str:
    """Format a row's estimator as `gae(lam=1.0)`."""
    changed = ", ".join(f"{name}={_short(value)}" for name, value in row.settings.items())
    return f"{row.advantages}({changed})" if changed else row.advantages


def _short(value: object) -> str:
    return "[" + ", ".join(map(_short, value)) + "]" if isinstance(value, list) else str(value)


COLUMNS: dict[str, Callable[[Row], str]] = {
    "aggregation": lambda row: row.aggregation,
    "expected gradient of": lambda row: row.objective or "",
    "error": lambda row: number(row.relative_error, 2),
    "cosine": lambda row: cosine(row.cosine),
    "bias": lambda row: number(row.bias),
    "variance": lambda row: number(row.variance),
    "pi* stationary": lambda row: yes(row.stationary),
    "a gradient": lambda row: yes(row.is_gradient),
}
"""Columns of the table of one combination."""


def describe_world(world: World) -> str:
    """Describe the enumeration in one sentence."""
    rollouts, orders = world.rollouts
    turns = "" if world.turns == 1 else f" in each of up to {world.turns} turns"
    return (
        f"{world.tokens} tokens, at most {world.length} of them{turns}, {len(world.sequences)} completions, "
        f"{len(rollouts)} rollouts ({int(orders.sum())} with their order) of {world.prompts} x {world.group} rows"
    )


def lines(rows: Sequence[Row], world: World) -> Iterator[str]:
    """Yield the table of one combination in plain text."""
    first = rows[0]
    chosen = f"advantages {of_estimator(first)}, KL {of_kl(first)}, policy loss {first.policy_loss}"
    if first.beta is not None:
        chosen += f", beta {first.beta:g}"
    if first.values:
        chosen += f", {first.values} values"
    yield chosen + (", rollouts of an older policy" if first.off_policy else "")
    yield f"world: {describe_world(world)}, {'no' if world.rewards == 'none' else world.rewards} rewards"
    yield ""
    cells = [[column(row) for column in COLUMNS.values()] for row in rows]
    yield from aligned(list(COLUMNS), cells)
    unknown = [row for row in rows if row.objective == "none"]
    if unknown:
        yield "\nNearest candidates of unrecognized gradients:"
        yield from (f"  {row.aggregation}: {row.nearest}" for row in unknown)
    reasons = dict.fromkeys(reason for row in rows for reason in row.refused)
    if reasons:
        yield "\nA trainer rejects it:"
        yield from (f"  {reason}" for reason in reasons)


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Align columns in plain text."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for line in (header, *rows):
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()


def of_moves(moves: Sequence[Move]) -> Iterator[str]:
    """Yield the table of a trust region in plain text, with a legend."""
    yield "the studied policy moves along the gradient of its return: p -> p'"
    columns: dict[str, Callable[[Move], float]] = {
        "logits": lambda move: move.step,
        "total variation": lambda move: move.total_variation,
        "J(p') - J(p)": lambda move: move.gain,
        "L(p') - J(p)": lambda move: move.surrogate,
        "|J - L|": lambda move: abs(move.gain - move.surrogate),
        "its bound": lambda move: move.bound,
        "L - J(p) - penalty": lambda move: move.penalized,
    }
    yield "  ".join(columns)
    for move in moves:
        yield "  ".join(number(of(move), 2).rjust(len(name)) for name, of in columns.items())
    yield (
        "L: the surrogate, which takes the states of p. Its bound: 2 eps T(T-1) alpha^2, with the largest total variation alpha "
        "and |advantage| eps of any state. The penalty of TRPO: eps T(T-1) KL(p || p'); where L less the penalty is above 0, "
        "the return is sure to rise."
    )


def of_ages(ages: Sequence[int], far: Sequence[float], found: Sequence[Aged]) -> Iterator[str]:
    """Yield the table of older samples in plain text, with a legend."""
    yield "cosine of the expected gradient with grad E[r]; bias in brackets"

    def line(title: str, cells: Iterable[str]) -> str:
        return title.ljust(32) + "".join(cell.rjust(15) for cell in cells)

    yield line("age of the samples in steps", map(str, ages))
    yield line("total variation", (number(x, 2) for x in far))
    for aged in found:
        title = f"{aged.policy_loss}, {aged.correction}" if aged.correction else aged.policy_loss
        cells = zip(aged.cosine, aged.bias, strict=True)
        yield line(title, (f"{cosine(x)} ({number(bias, 2)})" for x, bias in cells))
    yield (
        "reinforce with a rollout correction: old log-probs of the policy itself. The other losses: those of the sampler, to "
        "which their ratio is. Advantages leave_one_out, aggregation seq_mean_token_sum, default settings."
    )


def of_distillation(forms: Iterable[Form], gaps: Iterable[Gap]) -> Iterator[str]:
    """Yield the tables of distillation in plain text, with a legend."""
    header = ["distillation", "expected gradient of", "cosine", "bias", "cosine to KL(ref||pi)", "variance"]
    numbers = [
        [x.title, x.objective, cosine(x.cosine), number(x.bias), cosine(x.forward), number(x.variance)] for x in forms
    ]
    yield from aligned(header, numbers)
    yield (
        "cosine and bias: to the gradient of KL(pi||ref) of completions. per-state: the visited states are held fixed. variance: "
        "of one completion's gradient, over the squared norm of that of KL(pi||ref). Advantages reinforce, aggregation "
        "seq_mean_token_sum.\n"
    )
    header = ["in the loss", "top k", "nats per completion", "gap to the whole vocabulary", "cosine of the gradients"]
    rows = [[x.estimator, str(x.top_k), number(x.value), number(x.gap), cosine(x.cosine)] for x in gaps]
    yield from aligned(header, rows)
    yield (
        "The divergence between the probabilities of the reference's k most likely tokens and of all others as one event: a "
        "lower bound."
    )
