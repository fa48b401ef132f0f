"""The model card of a run: what was trained on what, how, with which plugins, and how well it did.

`README.md` of a run's folder is this card, with the metadata that the Hub reads.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_rlhf.metrics.live_view import OFFLINE_SHOWN, SHOWN, number
from hf_rlhf.runtime.hub import is_hub_name

ROWS = 9
"""Most rows in the table of curves."""
MEASURED = ("accuracy", "pass@", "maj@", "reward/total/mean", "pairs/accuracy", "tokens/perplexity", "loss")
"""Beginnings of the metrics of an evaluation that go into the metadata."""


@dataclass(kw_only=True)
class Card:
    """Facts for a model card."""

    name: str
    """Name of the model: the run's folder, or the repository."""
    summary: Mapping[str, Any]
    """As in summary.json; before training has ended, without `steps` and `after`."""
    recipe: str | None
    """The recipe as YAML; None for an algorithm that was made in Python."""
    history: Sequence[Mapping[str, Any]]
    """Trainer's log entries."""
    adapter: bool = False
    trainer: str | None = None
    """The trainer of a recipe without rollouts."""
    task: str | None = "text-generation"
    plugin_files: Sequence[str] = ()
    """Files that plugins come from."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Metadata that the caller gives: language, license, tags, datasets."""

    def __str__(self) -> str:
        parts = [self.metadata(), f"# {self.name}", self._what(), *self._evaluation(), *self._curves()]
        return "\n\n".join([*parts, *self._plan(), *self._recipe(), *self._versions()]) + "\n"

    def metadata(self) -> str:
        """Return the YAML between dashes that the Hub reads."""
        from huggingface_hub import EvalResult, ModelCardData

        model, dataset, found = self.summary.get("model"), self.summary.get("dataset"), self.summary.get("after") or {}
        known = is_hub_name(dataset)
        results = [
            EvalResult(
                task_type=self.task or "other",
                dataset_type=str(dataset) if known else "custom",
                dataset_name=str(dataset).rpartition("/")[2] if dataset else "custom",
                metric_type=metric,
                metric_value=round(found[metric], 6),
                metric_name=metric + _brackets(found, metric),
            )
            for metric in found
            if metric.startswith(MEASURED) and not metric.endswith(("_low", "_high"))
        ]
        recipe = self.summary.get("recipe")
        tags = ["hf_rlhf", self.trainer or "reinforcement-learning", *(["lora"] * self.adapter)]
        tags += [str(recipe)] if recipe and "/" not in str(recipe) else []
        options = {name: value for name, value in self.options.items() if value}
        tags = list(dict.fromkeys([*tags, *_listed(options.pop("tags", ()))]))
        if known:
            options.setdefault("datasets", [dataset])
        if is_hub_name(model):
            options.setdefault("base_model", model)
        made = ModelCardData(
            library_name="peft" if self.adapter else "transformers",
            pipeline_tag=self.task,
            tags=tags,
            model_name=self.name,
            eval_results=results or None,
            ignore_metadata_errors=True,
            **options,
        )
        return f"---\n{made.to_yaml().strip()}\n---"

    def _what(self) -> str:
        summary = self.summary
        of = _linked(summary.get("model")) if summary.get("model") else "a model that was given in Python"
        text = f"{'An adapter for' if self.adapter else 'Trained from'} {of}"
        if recipe := summary.get("recipe"):
            text += f" with the recipe `{recipe}` of hf_rlhf"
        if (steps := summary.get("steps")) is not None:
            text += f", {steps:,} optimizer steps"
        dataset = summary.get("dataset")
        return text + (f" on {_linked(dataset, 'datasets/')}." if dataset else " on data that was given in Python.")

    def _evaluation(self) -> Iterator[str]:
        before, after = self.summary.get("before") or {}, self.summary.get("after") or {}
        named = [
            name
            for name in after or before
            if not name.endswith(("_low", "_high")) and not (name.startswith("health/") and not after.get(name))
        ]
        if not named:
            return
        held_out = (self.summary.get("rows") or {}).get("evaluation")
        of = f"{held_out:,} held-out rows" if held_out else "held-out rows"
        yield f"## Evaluation\n\nOn {of}, with 95 % intervals where there are any."
        rows = [[name, *(_cell(found, name) for found in (before, after))] for name in sorted(named, key=_last)]
        yield _table(["", "before", "after"], rows)

    def _curves(self) -> Iterator[str]:
        entries = [entry for entry in self.history if "loss" in entry]
        shown = {title: key for title, key in (OFFLINE_SHOWN if self.trainer else SHOWN).items() if title != "tokens/s"}
        shown = {title: key for title, key in shown.items() if any(key in entry for entry in entries)}
        if not entries or not shown:
            return
        places = sorted({round(i * (len(entries) - 1) / (ROWS - 1)) for i in range(ROWS)})
        rows = [[f"{entries[i]['step']:,}", *(number(entries[i].get(key)) for key in shown.values())] for i in places]
        yield "## Curves"
        yield _table(["step", *shown], rows)

    def _plan(self) -> Iterator[str]:
        lines = (self.summary.get("plan") or {}).get("in_words") or {}
        if lines:
            yield "## How it was trained\n\n" + "\n".join(f"- {title}: {_plain(text)}" for title, text in lines.items())

    def _recipe(self) -> Iterator[str]:
        if self.recipe is None:
            return
        files = [word for file in self.plugin_files for word in ("-p", Path(file).name)]
        command = shlex.join(["hf-rlhf", "train", "recipe.yaml", "--output-dir", "again", *files])
        yield f"## Repeat it\n\n```sh\n{command}\n```"
        yield f"<details><summary>recipe.yaml</summary>\n\n```yaml\n{self.recipe.strip()}\n```\n\n</details>"

    def _versions(self) -> Iterator[str]:
        packages = self.summary.get("versions") or {}
        plugins = (self.summary.get("plan") or {}).get("plugins") or ()
        if packages:
            yield (
                "## Versions\n\n"
                + ", ".join(f"{name} {version}" for name, version in packages.items() if name != "torch_build")
                + "."
            )
        if plugins:
            rows = [[row["axis"], f"`{row['name']}`", f"{row['package']} {row['version']}"] for row in plugins]
            yield _table(["axis", "plugin", "package"], rows, numbers=False)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool = True) -> str:
    lines = [head, ["---", *(["---:" if numbers else "---"] * (len(head) - 1))], *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _cell(found: Mapping[str, float], name: str) -> str:
    return number(found[name]) + _brackets(found, name) if name in found else "-"


def _brackets(found: Mapping[str, float], name: str) -> str:
    low, high = found.get(f"{name}_low"), found.get(f"{name}_high")
    return "" if low is None or high is None else f" ({number(low)} to {number(high)})"


def _last(name: str) -> bool:
    """Sort accuracy, pass@k and maj@k first."""
    return "/" in name


def _linked(name: Any, kind: str = "") -> str:
    return f"[{name}](https://huggingface.co/{kind}{name})" if is_hub_name(name) else f"`{_plain(name)}`"


def _plain(text: Any) -> str:
    return " ".join(str(text).split())


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value)
