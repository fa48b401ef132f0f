"""Time of discounting, GAE and group statistics on a large rollout, against plain loops.

`python -m benchmarks.estimators [--rows 4096] [--tokens 2048] [--loop-rows 64] [--json PATH]`

Each plugin runs on the same random rollout (groups of 8 rows, completions of all lengths, a fifth of their tokens from
tools), in float32 on one thread; the least processor time of five runs counts, which other work on the machine changes
little. The plain loop goes over rows and tokens on Python floats, tensors to lists and back included, on the first
`loop-rows` rows alone; its time is extrapolated to all rows. Where there is one, the loop over time goes over columns of
whole tensors. The result goes to benchmarks/results/estimators.json and, as a table, to benchmarks/results/estimators.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import keep
from hf_rlhf import load_plugin
from hf_rlhf.batch import Credit, Scored

RESULTS = Path(__file__).parent / "results"
GROUP, GAMMA, LAM, EPS = 8, 0.99, 0.95, 1e-4

Lists = list[list[float]]


def rollout(rows: int, tokens: int) -> Scored:
    """Random; rewards on the last token of each row and a little on every other."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    lengths = (1 + draw(rows) * tokens).long().clamp(max=tokens)
    mask = ((torch.arange(tokens) < lengths[:, None]) & (draw(rows, tokens) > 0.2)).float()
    mask[:, 0] = 1
    probs = draw(rows, tokens).clamp(min=1e-3)
    return Scored(
        mask=mask,
        token_rewards=0.01 * draw(rows, tokens) * mask,
        group_ids=torch.arange(rows) // GROUP,
        values=draw(rows, tokens) * mask,
        old_logps=probs.log(),
        sum_sq_probs=probs**2,
    )


# Plain loops


def gae_of_rows(rewards: Lists, values: Lists, mask: Lists, gamma: float, lam: float) -> Lists:
    advantages = [[0.0] * len(row) for row in rewards]
    for i, row in enumerate(rewards):
        later = next_value = 0.0
        for t in range(len(row) - 1, -1, -1):
            if mask[i][t]:
                later = row[t] + gamma * next_value - values[i][t] + gamma * lam * later
                next_value = values[i][t]
                advantages[i][t] = later
    return advantages


def norm_of_rows(rewards: Lists, mask: Lists) -> Lists:
    returns = [sum(x * m for x, m in zip(row, on, strict=True)) for row, on in zip(rewards, mask, strict=True)]
    advantages = []
    for first in range(0, len(returns), GROUP):
        group = returns[first : first + GROUP]
        mean = sum(group) / len(group)
        std = (sum((x - mean) ** 2 for x in group) / (len(group) - 1)) ** 0.5
        advantages += [[(x - mean) / (std + EPS) * m for m in mask[first + i]] for i, x in enumerate(group)]
    return advantages


def gae_of_columns(batch: Scored, values: Tensor, gamma: float, lam: float) -> Tensor:
    advantages = torch.zeros_like(batch.mask)
    later = next_value = batch.mask.new_zeros(len(batch.mask))
    sampled = batch.mask > 0
    for t in reversed(range(batch.mask.size(1))):
        delta = batch.token_rewards[:, t] + gamma * next_value - values[:, t]
        later = (delta + gamma * lam * later).where(sampled[:, t], later)
        next_value = values[:, t].where(sampled[:, t], next_value)
        advantages[:, t] = later
    return advantages * batch.mask


# Measurement


def best_of(run: Callable[[], Any], times: int = 5) -> tuple[float, Any]:
    """Return the minimum processor time of a few runs in seconds, and the last result."""
    seconds, result = [], None
    for _ in range(times):
        started = time.process_time()
        result = run()
        seconds.append(time.process_time() - started)
    return min(seconds), result


def advantages(name: str, batch: Scored, **settings: Any) -> Tensor:
    credit = load_plugin("advantages", name, **settings)(batch)
    return credit.advantages if isinstance(credit, Credit) else credit


def measure(rows: int, tokens: int, loop_rows: int) -> list[dict[str, Any]]:
    """One entry per plugin: seconds of the plugin, of the loops, and how far they are apart."""
    batch = rollout(rows, tokens)
    assert batch.values is not None
    zeros = torch.zeros_like(batch.mask)
    rewards, values, mask, none = (x[:loop_rows] for x in (batch.token_rewards, batch.values, batch.mask, zeros))
    plain: dict[str, Callable[[], Lists]] = {
        "gae": lambda: gae_of_rows(rewards.tolist(), values.tolist(), mask.tolist(), GAMMA, LAM),
        "reward_to_go": lambda: gae_of_rows(rewards.tolist(), none.tolist(), mask.tolist(), GAMMA, 1.0),
        "group_norm": lambda: norm_of_rows(rewards.tolist(), mask.tolist()),
    }
    columns: dict[str, Callable[[], Tensor]] = {
        "gae": lambda: gae_of_columns(batch, batch.values, GAMMA, LAM),  # type: ignore[arg-type]
        "reward_to_go": lambda: gae_of_columns(batch, zeros, GAMMA, 1.0),
    }
    chosen: list[tuple[str, dict[str, Any]]] = [
        ("gae", {"gamma": GAMMA, "lam": LAM}),
        ("reward_to_go", {"gamma": GAMMA}),
        ("group_norm", {"eps": EPS}),
        ("group_norm", {"statistics": "others"}),
        ("opo", {"leave_one_out": True}),
        ("pass_at_k", {}),
        ("reinforce_plus_plus", {"gamma": GAMMA}),
        ("optimal_token_baseline", {"leave_one_out": True}),
    ]
    entries = []
    for name, settings in chosen:
        seconds, got = best_of(lambda n=name, s=settings: advantages(n, batch, **s))  # type: ignore[misc]
        entry: dict[str, Any] = {"plugin": name, "settings": settings, "seconds": seconds}
        if name in plain and "statistics" not in settings:
            loop, want = best_of(lambda n=name: torch.tensor(plain[n](), dtype=torch.float64))  # type: ignore[misc]
            entry["loop_seconds"] = loop * rows / loop_rows
            entry["apart"] = (got[:loop_rows].double() - want).abs().max().item()
        if name in columns:
            entry["column_seconds"], _ = best_of(columns[name])
        entries.append(entry)
    return entries


def table(entries: list[dict[str, Any]]) -> str:
    """Format the entries in Markdown, in milliseconds."""
    lines = [
        "| plugin | ms | plain loop, ms | times faster | loop over columns, ms | apart by |",
        "|---|---|---|---|---|---|",
    ]
    for entry in entries:
        title = " ".join([f"`{entry['plugin']}`", *(f"{key}={value}" for key, value in entry["settings"].items())])
        loop, column = entry.get("loop_seconds"), entry.get("column_seconds")
        cells = [
            title,
            f"{1e3 * entry['seconds']:.0f}",
            f"{1e3 * loop:.0f}" if loop else "",
            f"{loop / entry['seconds']:.0f}" if loop else "",
            f"{1e3 * column:.0f}" if column else "",
            f"{entry['apart']:.1e}" if loop else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measures and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--loop-rows", type=int, default=64, help=f"rows of the plain loop, a multiple of {GROUP}")
    parser.add_argument("--json", type=Path, default=RESULTS / "estimators.json")
    options = parser.parse_args()
    if options.loop_rows % GROUP or not 0 < options.loop_rows <= options.rows:
        parser.error(f"--loop-rows must be a multiple of {GROUP} from {GROUP} to --rows")
    torch.set_num_threads(1)
    entries = measure(options.rows, options.tokens, options.loop_rows)
    command = "python -m benchmarks.estimators"
    text = (
        f"# Estimators\n\n`{command}`: a rollout of [{options.rows} x {options.tokens}] in float32, processor time on "
        f"one thread. The plain loop ran on {options.loop_rows} rows and is extrapolated to all; it computes in float64, and "
        f"the last column is how far the plugin is from it.\n\n{table(entries)}\n"
    )
    shape = {"shape": [options.rows, options.tokens], "loop_rows": options.loop_rows}
    keep(options.json, command, {**shape, "entries": entries}, text)
    print(table(entries))


if __name__ == "__main__":
    main()
