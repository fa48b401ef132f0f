"""Panels of a recipe's dashboard, from the metrics its plugins declare: sections, titles, units, ranges, reference lines.

`hf_rlhf.metrics.wandb_workspace` writes them in the format of Weights & Biases.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf.axes import AXES
from hf_rlhf.config.recipe import OfflineRecipe
from hf_rlhf.metrics import Named, metrics_of, metrics_of_trainer
from hf_rlhf.metrics.catalog import EVAL
from hf_rlhf.metrics.names import ONCE, TABLE, is_open, tracked

if TYPE_CHECKING:
    from hf_rlhf.config.pipeline import Pipeline
    from hf_rlhf.config.recipe import Recipe
    from hf_rlhf.config.sections import Dataset

Bounds = tuple[float | None, float | None]
NONE: Bounds = (None, None)

OVERVIEW, EVALUATION, SAMPLES = "Overview", "Evaluation", "Samples"
THROUGHPUT, HEALTH = "Throughput", "Health"
ORDER = tuple(
    dict.fromkeys(
        (
            OVERVIEW,
            EVALUATION,
            *(b.axis.section for b in AXES.values() if not b.axis.watches),
            THROUGHPUT,
            HEALTH,
            SAMPLES,
        )
    )
)
OF_AREA = {
    **{base.axis.metric_prefix.partition("/")[0]: base.axis.section for base in reversed(AXES.values())},
    **dict.fromkeys(("time", "memory", "perf"), THROUGHPUT),
    "health": HEALTH,
}
"""First part of a name of the core -> its section; of names without one, Optimizer, or Training without rollouts."""
HEADLINES = (
    "eval_accuracy",
    "eval_reward/total/mean",
    "reward/total/mean",
    "kl/ref",
    "policy/entropy",
    "rollout/length/mean",
    "policy/grad_norm",
    "perf/tokens_per_s",
    "loss",
    "eval_loss",
    "eval_pairs/accuracy",
    "eval_steps/accuracy",
    "eval_tokens/accuracy",
    "eval_tokens/log_loss",
    "learning_rate",
)
"""Metrics of the overview, as far as they are logged."""
MOST_HEADLINES = 9
HIDDEN = re.compile(
    r"epoch|(eval_)?(num_tokens|model_preparation_time|samples_per_second|steps_per_second)|eval_.*/count"
)
"""Logged without a panel: counts of rows and Trainer's clocks."""
PHASES = re.compile(r"time/(rollout|forward|reward_wait|update)_s")
TOGETHER: tuple[tuple[re.Pattern[str], str], ...] = (
    (PHASES, "time by phase"),
    (re.compile(r"time/reward(_s|/.*)"), "time of rewards"),
    (re.compile(r"memory/.*/(peak|above)"), r"memory, \1"),
    (re.compile(r"(.*)/(?:mean|min|max)"), r"\1"),
    (re.compile(r"(.*/clip_frac)/.*"), r"\1"),
    (re.compile(r"kl/(?!rollout/).*/loss"), "kl in the loss"),
    (re.compile(r"kl/(?!rollout/).*/beta"), "kl coefficients"),
    (re.compile(r"kl/(?!rollout/).*/clamp_frac"), "kl that is clamped"),
    (re.compile(r"kl/(?!rollout/).*/.*"), "kl by placement"),
    (re.compile(r"filter/.*/kept_frac"), "rows that filters keep"),
    (re.compile(r"((?:eval_)?.*)/(?:chosen|rejected)"), r"\1"),
    (re.compile(r"(eval_.*/accuracy)(?:_low|_high)?"), r"\1"),
    (re.compile(r"(eval_.*)/(?:longer|shorter)_wins"), r"\1, rules of thumb"),
    (re.compile(r"(eval_.*)/all_(?:good|bad)"), r"\1, rules of thumb"),
    (re.compile(r"(eval_(?:.*/)?(?:pass|maj))@.*"), r"\1@k"),
)
"""Metrics whose names match, with the same unit and healthy range, share a panel of this title."""
FROM_ZERO = {"count", "seconds", "tokens", "rows", "MiB", "tokens/s", "norm", "prompts", "steps/s"}
"""Units whose axis starts at 0."""
CALM = ("evaluation", "end")


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A line plot over optimizer steps."""

    title: str
    metrics: tuple[str, ...]
    """Names in Weights & Biases: `train/kl/ref`."""
    unit: str
    healthy: Bounds = NONE
    """Bounds drawn as reference lines."""
    axis: Bounds = NONE
    smoothed: bool = False
    stacked: bool = False

    @property
    def lines(self) -> tuple[float, ...]:
        """Reference lines: the healthy bounds that are not an end of the axis."""
        return tuple(x for x in self.healthy if x is not None and x not in self.axis)


@dataclass(frozen=True, kw_only=True)
class Section:
    """Panels under a heading, or the table of completions."""

    name: str
    panels: tuple[Panel, ...] = ()
    table: str | None = None
    is_open: bool = False


@dataclass(frozen=True, kw_only=True)
class Dashboard:
    """A whole dashboard."""

    name: str
    sections: tuple[Section, ...]

    @property
    def metrics(self) -> set[str]:
        """Metrics that a panel shows."""
        return {name for section in self.sections for panel in section.panels for name in panel.metrics}


def dashboard_of(recipe: Recipe) -> Dashboard:
    """Return the dashboard of a recipe."""
    return Dashboard(name=f"hf_rlhf {recipe.name}", sections=tuple(sections_of(recipe)))


def dashboard_of_stages(staged: Pipeline) -> Dashboard:
    """Return one dashboard for all stages, with sections called `STAGE: SECTION`."""
    sections = [
        Section(name=f"{stage.name}: {part.name}", panels=part.panels, table=part.table, is_open=part.is_open)
        for stage in staged.stages
        for part in sections_of(stage.recipe)
    ]
    return Dashboard(name=f"hf_rlhf {staged.name}", sections=tuple(sections))


def sections_of(recipe: Recipe) -> Iterator[Section]:
    """Yield the non-empty sections, in the order of ORDER."""
    offline = isinstance(recipe, OfflineRecipe)
    twice = () if offline else ("grad_norm",)  # it is policy/grad_norm
    shown = [named for named in declared(recipe) if not HIDDEN.fullmatch(named.name) and named.name not in twice]
    stacked = not offline and recipe.update.mini_batches * recipe.update.epochs == 1
    found: dict[str, list[Named]] = {OVERVIEW: headlines(shown)}
    for named in shown:
        found.setdefault(section_of(named, offline), []).append(named)
    for name in ORDER:
        if name == SAMPLES and not offline and recipe.logging.completions:
            yield Section(name=name, table=TABLE, is_open=True)
        elif found.get(name):
            panels = tuple(panels_of(found[name], stacked=stacked, alone=name == OVERVIEW))
            yield Section(name=name, panels=panels, is_open=name in (OVERVIEW, EVALUATION))


def declared(recipe: Recipe) -> list[Named]:
    """Return what a run of the recipe logs at steps, named by its evaluation settings; names known only during the run are left
    out."""
    if isinstance(recipe, OfflineRecipe):
        found = metrics_of_trainer(recipe.trainer())
    else:
        algorithm = recipe.algorithm()
        sources = zip(algorithm.labels(), algorithm.rewards, strict=True)
        verifiers = [label for label, source in sources if source.verifier]
        found = [each for named in metrics_of(algorithm) for each in _by_evaluation(named, recipe, verifiers[1:])]
    if not is_evaluated(recipe.dataset):
        found = [named for named in found if not named.name.startswith(EVAL)]
    return [named for named in found if named.name not in ONCE and not is_open(named.name) and not _rare(named)]


def is_evaluated(dataset: Dataset) -> bool:
    """Return whether there are held-out rows."""
    return dataset.held_out > 0 or dataset.eval_path is not None or dataset.eval_split is not None


def _rare(named: Named) -> bool:
    """Return whether only some models log the metric, or only runs without a right answer."""
    return named.metric.optional and named.name.endswith(("aux_loss", "answered_frac"))


def _by_evaluation(named: Named, recipe: Recipe, labels: list[str]) -> Iterator[Named]:
    """Yield the names of a metric under a recipe's evaluation settings: none, one, or one per k.

    `labels`: those of all verifiers but the first, whose metrics carry no label.
    """
    bare = named.name.removeprefix(EVAL)
    if bare == named.name:
        yield named
        return
    settings, own = recipe.evaluation, bare.removeprefix("ema/")
    if own != bare and not settings.ema:
        return
    label, _, last = own.rpartition("/")
    if last in ("accuracy", "pass@<k>", "maj@<k>") and label and label not in labels:
        return
    n = settings.num_generations
    powers = [2**i for i in range(1, n.bit_length())]
    for k in {"pass@<k>": powers, "maj@<k>": [n] if n > 1 else []}.get(last, [1]):
        yield Named(named.name.replace("<k>", str(k)), named.metric, named.section, named.plugin)


def headlines(shown: Iterable[Named]) -> list[Named]:
    """Return the metrics of the overview."""
    by_name = {named.name: named for named in shown}
    return [by_name[name] for name in HEADLINES if name in by_name][:MOST_HEADLINES]


def section_of(named: Named, offline: bool) -> str:
    """Return the section of a metric."""
    if named.name.startswith(EVAL):
        return EVALUATION
    if named.plugin:
        return AXES[named.plugin.partition(".")[0]].axis.section
    if named.name.startswith(("rollout/is_ratio", "rollout/sampler_gap")):
        return AXES["rollout_correction"].axis.section
    area, slash, _ = named.name.partition("/")
    return OF_AREA[area] if slash else AXES["trainer" if offline else "optimizer"].axis.section


def panels_of(shown: Iterable[Named], *, stacked: bool, alone: bool = False) -> Iterator[Panel]:
    """Yield panels of metrics, related ones in one; with `alone`, one for each."""
    groups: dict[tuple[str, str, object], list[Named]] = {}
    for named in shown:
        title = named.name if alone else _title(named.name)
        groups.setdefault((title, named.metric.unit, named.metric.healthy), []).append(named)
    for (title, unit, _), members in groups.items():
        name = members[0].name if len(members) == 1 else title
        yield _panel(name, unit, members, stacked=stacked and all(PHASES.fullmatch(m.name) for m in members))


def _title(name: str) -> str:
    for found, title in TOGETHER:
        if match := found.fullmatch(name):
            return match.expand(title)
    return name


def _panel(name: str, unit: str, members: list[Named], stacked: bool) -> Panel:
    metric = members[0].metric
    healthy = metric.healthy or NONE
    name = name.replace(EVAL, "eval/", 1) if name.startswith(EVAL) else name
    title = f"{name} ({unit})" if unit not in ("", name) else name
    if healthy != NONE:
        title = f"{title}, healthy {_range(*healthy)}"
    calm = metric.when in CALM or unit == "count" or name.startswith(("learning_rate", "kl coefficients"))
    return Panel(
        title=title,
        metrics=tuple(tracked(member.name) for member in members),
        unit=unit,
        healthy=healthy,
        axis=_axis(unit),
        smoothed=not calm and not stacked,
        stacked=stacked and len(members) > 1,
    )


def _axis(unit: str) -> Bounds:
    """Return the ends of the axis: 0 and 1 for shares, 0 for what cannot be negative."""
    if unit.startswith("share of ") or unit == "probability":
        return (0.0, 1.0)
    return (0.0, None) if unit in FROM_ZERO else NONE


def _range(low: float | None, high: float | None) -> str:
    if low is None:
        return f"up to {high:g}"
    return f"from {low:g}" if high is None else f"from {low:g} to {high:g}"
