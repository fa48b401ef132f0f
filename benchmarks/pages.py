"""docs/learning.md and docs/learning.png from the results of `benchmarks.learning`."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from benchmarks.fits import COMPLETIONS, GROUP, LONGEST, MARGIN, RECIPES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""The 97.5% quantile of Student's t by degrees of freedom."""
SAME = 1e-3
"""Own rewards within this of the share of right answers are that share."""
COLUMNS = 4
"""Panels in a row of the picture."""


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
    """Format a table."""
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
    return f"""# Learning curves

<!-- Made by `{found["command"]}` from benchmarks/results/learning.json. -->

{all_of_them} learns two-digit addition from the [quickstart](../README.md)'s warmed-up model, in short runs on one core
({versions}). `make test-learning` repeats them and requires that the
fraction of correct answers over the last tenth of the rollouts exceeds that over the first tenth by at least {MARGIN:g}, for
each recipe and each of three seeds.

The plugins are those of the recipe. Adapted to the task: {COMPLETIONS} completions of at most {LONGEST} tokens per rollout in
groups of at most {GROUP}, at most 4 mini-batches, a linear schedule without warm-up from the learning rate in the table, and
settings that are meant for long runs or long completions ([benchmarks/fits.py](../benchmarks/fits.py)). Rules for mathematics
are replaced by a rule for the sum. Recipes with a reward model get one that was trained on the task beforehand
([benchmarks/judges.py](../benchmarks/judges.py)): they never see whether an answer is correct; the table shows whether it is.
`prm` learns a variant with two lines per answer, the sum of the units and the sum.

{table(found["runs"])}

*right*: fraction of correct answers in the rollouts, of `gkd`, whose rollouts hold answers of the dataset, on held-out
problems before and after the run. *gain*: last tenth minus first tenth. *own reward*: the recipe's reward,
first → last tenth, if it is not the fraction of correct answers. *KL*: from the trained policy to the initial one on held-out
problems, exact in each visited state, per completion. *seconds*: on one core, without models and measurements.
±: half of the 95% confidence interval of the mean over seeds (Student's t).

## Reward against KL

One panel per recipe: the fraction of correct answers on held-out problems against the KL to the initial policy, measured
during the run and averaged over seeds; all other recipes in gray.

![right answers against KL, one panel per recipe](learning.png)

## beta controls the KL

`rloo` with different penalties, {lengths} rollouts from one seed: final KL to the initial policy in nats per completion, and
in parentheses the fraction of correct answers over the last tenth of the rollouts.

{beta_table(found["beta"])}
"""


def picture(curves: dict[str, list[list[float]]]) -> Figure:
    """Small multiples of right answers against KL, all other recipes in grey; `curves` holds the points of each."""
    from matplotlib.figure import Figure

    names = sorted(curves, key=lambda name: (*RECIPES, name).index(name))
    rows = -(-len(names) // COLUMNS)
    figure = Figure(figsize=(1.7 * COLUMNS, 1.75 * rows), layout="constrained")
    panels = list(figure.subplots(rows, COLUMNS, sharex=True, sharey=True, squeeze=False).flat)
    for panel in panels:
        panel.set_axis_off()
    for name, panel in zip(names, panels, strict=False):
        panel.set_axis_on()
        for other in names:
            panel.plot(*zip(*curves[other], strict=True), color="0.85", linewidth=0.8)
        panel.plot(*zip(*curves[name], strict=True), color="C0", linewidth=2)
        panel.set_title(name, fontsize=8)
        panel.set(xlim=(0, None), ylim=(0, 1))
        panel.tick_params(labelsize=7)
    figure.supxlabel("KL to the start, nats per completion", fontsize=9)
    figure.supylabel("right answers on held-out problems", fontsize=9)
    return figure


def write_page(found: dict[str, Any], folder: Path) -> None:
    """Write the page and its picture."""
    (folder / "learning.md").write_text(page(found), encoding="utf-8")
    save(picture(found["curves"]), folder / "learning.png")


def save(figure: Figure, path: Path) -> None:
    """Save a picture with few colors, small enough to be committed."""
    from io import BytesIO

    from PIL import Image

    drawn = BytesIO()
    figure.savefig(drawn, dpi=114)
    Image.open(drawn).convert("RGB").quantize(8).save(path, optimize=True)
