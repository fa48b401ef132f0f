"""Explanation of a recipe on a small example, or of the differences of two in settings and numbers (`hf-rlhf explain`)."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_rlhf.registry.settings_schema import plain_text
from hf_rlhf.runtime.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from hf_rlhf.config.algorithm import Algorithm
    from hf_rlhf.config.recipe import Recipe
    from hf_rlhf.lab.worked_example import WorkedExample

SAME = 1e-9
"""Relative difference below which numbers count as equal up to rounding."""

EXAMPLE = (
    "The example: two prompts with four completions each, of one to four tokens. The policy has been updated once since "
    "the rollout, so that its ratio to the rollout policy is not 1."
)
ONE_STEP = (
    "{name} takes one optimizer step per rollout, where the ratio is 1: its effects below do not occur in training."
)


def explain(names: Sequence[str], overrides: Sequence[str] = ()) -> None:
    """Print one recipe step by step, or two side by side. Overrides apply to both.

    Raises `UserError` for an unknown recipe and for one with errors.
    """
    from hf_rlhf.config.recipe import load_recipe

    recipes = [load_recipe(name, overrides) for name in names]
    page = Page(sys.stdout.isatty())
    algorithms = [_accepted(recipe) for recipe in recipes]
    if len(recipes) == 1:
        _one(page, recipes[0], algorithms[0])
    else:
        _two(page, recipes, algorithms)


def as_plain(names: Sequence[str], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return the same as plain data: the recipes, their differences, and each recipe's numbers for the example's rows.

    Raises `UserError` as `explain` does.
    """
    from hf_rlhf.config.recipe import load_recipe
    from hf_rlhf.lab.worked_example import work

    recipes = [load_recipe(name, overrides) for name in names]
    found: dict[str, Any] = {"recipes": []}
    for recipe in recipes:
        one = work(_accepted(recipe))
        rows = [
            {"prompt": i // 4 + 1}
            | ({} if one.score is None else {"score": one.score[i].item()})
            | {name: getattr(one, name)[i][one.mask[i] > 0].tolist() for name in ("ratio", *NUMBERS)}
            for i in range(len(one.mask))
        ]
        found["recipes"].append({"name": recipe.name, "settings": recipe.raw, "rows": rows, "terms": dict(one.terms)})
    if len(recipes) == 2:
        keys = ("setting", "left", "right")
        rows = [dict(zip(keys, row, strict=True)) for row in differences(*(recipe.raw for recipe in recipes))]
        found["differences"] = rows
    return found


def _accepted(recipe: Recipe) -> Algorithm:
    algorithm = recipe.algorithm()
    if problems := algorithm.problems():
        raise UserError("\n  ".join([f"recipe {recipe.name} is rejected:", *problems]))
    return algorithm


# One recipe


def _one(page: Page, recipe: Recipe, a: Algorithm) -> None:
    from hf_rlhf.lab.worked_example import work

    worked = work(a)

    def choose(axis: str, place: str | None = None) -> None:
        """Show the plugins of an axis (of `kl` those at `place`) with their descriptions."""
        written, made = recipe.raw[axis], getattr(a, axis)
        pairs = zip(written, made, strict=True) if isinstance(made, list) else [(written, made)]
        for text, plugin in pairs:
            if place is None or place in plugin.places:
                page.title(f"{axis}: {_written(text)}")
                page.text((inspect.getdoc(type(plugin)) or "").partition("\n\n")[0].replace("\n", " "))

    def show(attribute: str, what: str) -> None:
        _table(page, [worked], [what], attribute)

    page.title(recipe.name)
    page.text(*_introduction([(recipe, a)]))
    if a.sampler.name != a.sampler.axis.default:
        choose("sampler")
    show("ratio", "p / p_old of each token")
    choose("kl", "reward")
    if a.rewards:
        page.title(f"rewards, from scores of {', '.join(a.labels())} at the last token")
    elif a.kl_in("reward"):
        page.title("rewards, from the KL alone")
    if a.rewards or a.kl_in("reward"):
        show("rewards", "reward of each token")
    choose("filters")
    choose("advantages")
    choose("kl", "advantage")
    show("advantages", "advantage")
    choose("policy_loss")
    if "sampler_logps" in a.rollout_correction.needs:
        choose("rollout_correction")
    show("losses", "loss of each token")
    choose("aggregation")
    show("weights", "weight of each token")
    choose("kl", "loss")
    choose("loss_terms")
    page.title("the loss: the sum over tokens of loss times weight, plus additional terms")
    _terms(page, [worked], [recipe.name])
    page.title("its negative gradient in each token's log-prob: above 0 the token becomes more likely")
    show("gradient", "negative gradient")


def _introduction(pairs: Sequence[tuple[Recipe, Algorithm]]) -> Iterator[str]:
    yield EXAMPLE
    for recipe, a in pairs:
        if a.steps_per_rollout == 1:
            yield ONE_STEP.format(name=recipe.name)


# Two recipes


def _two(page: Page, recipes: Sequence[Recipe], algorithms: Sequence[Algorithm]) -> None:
    from hf_rlhf.lab.worked_example import work

    names = [recipe.name for recipe in recipes]
    page.title("settings that differ")
    rows = list(differences(*(recipe.raw for recipe in recipes)))
    if rows:
        page.table(["setting", *names], [[path, left, right] for path, left, right in rows])
    else:
        page.text("None.")
    left, right = (work(a) for a in algorithms)
    page.text("", *_introduction(list(zip(recipes, algorithms, strict=True))))
    for attribute, what in NUMBERS.items():
        if _equal(getattr(left, attribute), getattr(right, attribute)):
            page.title(f"{what}: the same")
        else:
            page.title(what)
            _table(page, [left, right], names, attribute)
    page.title("the loss")
    _terms(page, [left, right], names)


NUMBERS = {
    "rewards": "reward of each token, minus the KL in the reward",
    "advantages": "advantage",
    "weights": "weight of each token",
    "losses": "policy loss of each token, before its weight",
    "gradient": "negative gradient of the loss in each token's log-prob",
}
"""Titles of the compared attributes of `WorkedExample`, in the order of the step."""


def differences(left: Mapping[str, Any], right: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield (path, left value, right value) for the settings in which two resolved recipes differ.

    A plugin that only one of them has is formatted as a whole.
    """
    for key in [*left, *(key for key in right if key not in left)]:
        yield from _differences(key, left.get(key), right.get(key))


def _differences(path: str, left: Any, right: Any) -> Iterator[tuple[str, str, str]]:
    if left == right:
        return
    if isinstance(left, list) and isinstance(right, list) and (_are_plugins(left) or _are_plugins(right)):
        for place in range(max(len(left), len(right))):
            pair = (x[place] if place < len(x) else None for x in (left, right))
            yield from _differences(f"{path}.{place}", *pair)
    elif isinstance(left, Mapping) and isinstance(right, Mapping) and left.get("use") == right.get("use"):
        yield from ((f"{path}.{inner}", one, other) for inner, one, other in differences(left, right))
    else:
        yield path, _written(left), _written(right)


def _are_plugins(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(value, Mapping) and "use" in value for value in values)


def _written(value: Any) -> str:
    """Format a plugin as `group_norm eps 0.0001 ddof 1`, a value as in a recipe, and None as `-`."""
    if value is None:
        return "-"
    if isinstance(value, Mapping) and "use" in value:
        settings = [f"{name} {_inside(x)}" for name, x in value.items() if name != "use"]
        return " ".join([str(value["use"]), *settings])
    return str(value) if isinstance(value, str) else plain_text(value)


def _inside(value: Any) -> str:
    text = _written(value)
    return f"({text})" if isinstance(value, Mapping) and " " in text else text


# Numbers


def number(x: float) -> str:
    """Format a number with five digits: 1.4997, -0.0025, 0."""
    return f"{x:.5g}" if abs(x) > 1e-12 else "0"


def _row(values: Tensor, mask: Tensor) -> str:
    """Format the numbers of a row's tokens; one number if all are equal."""
    on = values[mask > 0]
    if bool(on.isnan().all()):
        return "dropped"
    texts = [number(x) for x in on.tolist()]
    return texts[0] if len(set(texts)) == 1 else "  ".join(texts)


def _table(page: Page, worked: Sequence[WorkedExample], titles: Sequence[str], attribute: str) -> None:
    """Show a table with a line per completion and a column per recipe."""
    mask, rows, marks = worked[0].mask, [], []
    scored = [one.score for one in worked if one.score is not None]
    for i in range(len(mask)):
        sides = [getattr(one, attribute)[i] for one in worked]
        scores = [" or ".join(sorted({number(score[i].item()) for score in scored}))] if scored else []
        facts = [str(i // 4 + 1), *scores, str(int(mask[i].sum()))]
        rows.append([*facts, *(_row(side, mask[i]) for side in sides)])
        marks.append(len(sides) > 1 and not _equal(*sides))
    page.table(["prompt", *(["score"] if scored else []), "tokens", *titles], rows, marks)


def _terms(page: Page, worked: Sequence[WorkedExample], names: Sequence[str]) -> None:
    keys = [key for key in dict.fromkeys(key for one in worked for key in one.terms) if key != "loss"]
    rows, marks = [], []
    for key in [*keys, "loss"]:
        values = [one.terms.get(key) for one in worked]
        rows.append([key, *("-" if x is None else number(x) for x in values)])
        marks.append(len(set(rows[-1][1:])) > 1)
    page.table(["term", *names], rows, marks)


def _equal(left: Tensor, right: Tensor) -> bool:
    if not bool((left.isnan() == right.isnan()).all()):
        return False
    left, right = left.nan_to_num(), right.nan_to_num()
    return bool(((left - right).abs() <= SAME * left.abs().maximum(right.abs())).all())


# The page


@dataclass
class Page:
    """Output of titles, paragraphs and tables: with colors on a terminal, otherwise plain with `*` at differing lines."""

    terminal: bool

    def title(self, text: str) -> None:
        if self.terminal:
            self._print(f"\n{text}", "bold")
        else:
            print(f"\n{text}")

    def text(self, *lines: str) -> None:
        for line in lines:
            self._print(line, "") if self.terminal else print(line)

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]], marks: Sequence[bool] = ()) -> None:
        """Print a table; `marks` are True for rows that differ."""
        marked = list(marks) or [False] * len(rows)
        if self.terminal:
            self._rich_table(header, rows, marked)
            return
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        for line, mark in zip([header, *rows], [False, *marked], strict=True):
            cells = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            print(f"  {cells}  {'*' if mark else ''}".rstrip())

    def _rich_table(self, header: Sequence[str], rows: Sequence[Sequence[str]], marks: Sequence[bool]) -> None:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table: Any = Table(*header, box=None, header_style="dim", pad_edge=True)
        for row, mark in zip(rows, marks, strict=True):
            table.add_row(*(Text(cell, style="bold yellow" if mark and i else "") for i, cell in enumerate(row)))
        Console(highlight=False).print(table)

    def _print(self, text: str, style: str) -> None:
        from rich.console import Console
        from rich.text import Text

        Console(highlight=False).print(Text(text, style=style))
