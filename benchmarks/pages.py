"""docs/learning.md and docs/learning.svg from the results of `benchmarks.learning`."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.fits import COMPLETIONS, GROUP, LONGEST, MARGIN, RECIPES

T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""The 97.5% quantile of Student's t by degrees of freedom."""
SAME = 1e-3
"""Own rewards within this of the share of right answers are that share."""
COLUMNS, PANEL, GAP, LEFT, TOP = 4, 168, 34, 44, 30
"""The picture: panels in a row, their size, the space between them, and the margins, in pixels."""


def by_recipe(runs: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Recipe -> its runs by seed; the recipes in the order of `RECIPES`, others behind."""
    names = sorted({row["recipe"] for row in runs}, key=lambda n: (*RECIPES, n).index(n))
    return {name: sorted((r for r in runs if r["recipe"] == name), key=lambda r: r["seed"]) for name in names}


def interval(numbers: list[float]) -> str:
    """Mean and half the width of its 95% interval."""
    if len(numbers) < 2:
        return f"{mean(numbers):.3f}"
    half = T_975[len(numbers) - 1] * stdev(numbers) / len(numbers) ** 0.5
    return f"{mean(numbers):.3f} ± {half:.3f}"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *rows])


def table(runs: list[dict[str, Any]]) -> str:
    """One line per recipe: right answers and reward of the first and last tenth, KL, time."""
    rows = []
    for name, found in by_recipe(runs).items():
        first, last = ([row["right"][i] for row in found] for i in (0, 1))
        gains = [b - a for a, b in zip(first, last, strict=True)]
        own = [mean(row["reward"][i] for row in found) for i in (0, 1)]
        same = max(abs(own[0] - mean(first)), abs(own[1] - mean(last))) < SAME
        rows.append(
            [
                f"`{name}`",
                f"{mean(first):.3f}",
                interval(last),
                interval(gains),
                f"{min(gains):.3f}",
                "same" if same else f"{own[0]:.2f} → {own[1]:.2f}",
                interval([row["kl"] for row in found]),
                f"{found[0]['rollouts']}",
                f"{found[0]['learning_rate']:g}",
                f"{mean(row['seconds'] for row in found):.0f}",
                f"{len(found)}",
            ]
        )
    header = ["recipe", "right, first tenth", "right, last tenth", "gain", "least gain", "own reward", "KL in nats"]
    return markdown([*header, "rollouts", "learning rate", "seconds", "seeds"], rows)


def beta_table(rows: list[dict[str, Any]]) -> str:
    """KL and right answers by beta, one line per penalty."""
    betas = sorted({row["beta"] for row in rows})
    penalties = list(dict.fromkeys(row["penalty"] for row in rows))
    found = {(row["penalty"], row["beta"]): row for row in rows}

    def cell(penalty: str, beta: float) -> str:
        row = found.get((penalty, beta))
        return "" if row is None else f"{row['kl']:.3f} ({row['right'][1]:.2f})"

    lines = [[f"`{penalty}`", *(cell(penalty, beta) for beta in betas)] for penalty in penalties]
    return markdown(["penalty", *(f"beta {beta:g}" for beta in betas)], lines)


def page(found: dict[str, Any]) -> str:
    """docs/learning.md."""
    lengths = " or ".join(sorted({str(row["rollouts"]) for row in found["beta"]})) or "no"
    versions = ", ".join(f"{name} {found['versions'][name]}" for name in ("torch", "transformers", "hf_rlhf"))
    unseen = [f"`{name}`" for name in RECIPES if name not in {row["recipe"] for row in found["runs"]}]
    all_of_them = f"Every recipe but {', '.join(unseen)}, which have not been measured," if unseen else "Every recipe"
    return f"""# What learns

<!-- Made by `{found["command"]}` from benchmarks/results/learning.json. -->

{all_of_them} learns two-digit addition from the [quickstart](../README.md)'s warmed-up model, in short runs on one core
({versions}). `make test-learning` runs them again: the share of right
answers over the last tenth of the rollouts exceeds that over the first tenth by {MARGIN:g} or more, for each recipe and each
of three seeds.

Choices of plugins are the recipe's. Changed on the task: {COMPLETIONS} completions of at most {LONGEST} tokens per rollout in
groups of at most {GROUP}, at most 4 mini-batches, a linear schedule without warm-up from the learning rate in the table, and
settings in units of long runs or long completions ([benchmarks/fits.py](../benchmarks/fits.py)). Rules for mathematics become
a rule for the sum. Recipes with a reward model get one that was fitted to the task beforehand
([benchmarks/judges.py](../benchmarks/judges.py)): they never see whether an answer is right, the table says whether it is.
`prm` learns a variant with two lines per answer, the units' sum and the sum.

{table(found["runs"])}

*right*: share of right answers in the rollouts. *gain*: last tenth less first tenth. *own reward*: what the recipe is
rewarded for, first → last tenth, where that is not the share of right answers. *KL*: of the trained policy to the start, on
held-out problems, exact in each visited state, per completion. *seconds*: of one core, models and measurements not counted.
±: half of the 95% interval of the mean over seeds (Student's t).

## Reward against KL

One panel per recipe: the share of right answers on held-out problems against the KL to the start, measured during the run
and averaged over seeds; all other recipes in grey.

![right answers against KL, one panel per recipe](learning.svg)

## beta controls the KL

`rloo` with another penalty, {lengths} rollouts from one seed: final KL to the start in nats per completion, and in
parentheses the share of right answers over the last tenth of the rollouts.

{beta_table(found["beta"])}
"""


def picture(runs: list[dict[str, Any]]) -> str:
    """docs/learning.svg: small multiples of right answers against KL."""
    curves = {name: _mean_curve(found) for name, found in by_recipe(runs).items()}
    top = max((kl for curve in curves.values() for kl, _ in curve), default=1.0) * 1.05 or 1.0
    height = -(-len(curves) // COLUMNS)
    size = (LEFT + COLUMNS * (PANEL + GAP), TOP + height * (PANEL + GAP) + 14)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]}" font-family="sans-serif" font-size="11">',
        f'<rect width="{size[0]}" height="{size[1]}" fill="white"/>',
        '<defs><g id="all" fill="none" stroke="#d4d4d4">',
        *(f'<polyline points="{_points(curve, top)}"/>' for curve in curves.values()),
        "</g></defs>",
    ]
    for place, (name, curve) in enumerate(curves.items()):
        x, y = LEFT + place % COLUMNS * (PANEL + GAP), TOP + place // COLUMNS * (PANEL + GAP)
        parts += [
            f'<g transform="translate({x} {y})">',
            f'<rect width="{PANEL}" height="{PANEL}" fill="none" stroke="#999"/>',
            '<use href="#all"/>',
            f'<polyline points="{_points(curve, top)}" fill="none" stroke="#1f5fa8" stroke-width="2"/>',
            f'<text x="4" y="-6" font-weight="bold">{name}</text>',
            f'<text x="0" y="{PANEL + 13}">0</text>',
            f'<text x="{PANEL}" y="{PANEL + 13}" text-anchor="end">KL {top:.1f}</text>',
            f'<text x="-4" y="{PANEL}" text-anchor="end">0</text>',
            '<text x="-4" y="10" text-anchor="end">1</text>',
            "</g>",
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _mean_curve(found: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """(KL, right) at each measurement, averaged over seeds."""
    return [
        (mean(point["kl"] for point in points), mean(point["right"] for point in points))
        for points in zip(*(row["curve"] for row in found), strict=True)
    ]


def _points(curve: list[tuple[float, float]], top: float) -> str:
    return " ".join(f"{PANEL * kl / top:.1f},{PANEL * (1 - right):.1f}" for kl, right in curve)


def write(found: dict[str, Any], folder: Path) -> None:
    """The page and its picture."""
    (folder / "learning.md").write_text(page(found), encoding="utf-8")
    (folder / "learning.svg").write_text(picture(found["runs"]), encoding="utf-8")
