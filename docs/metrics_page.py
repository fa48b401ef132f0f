"""The page of metrics, from what the core and the plugins declare."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from hf_rlhf.contract.metric import Metric
from hf_rlhf.contract.metric_namespaces import AREAS
from hf_rlhf.metrics import CORE, EVAL, EVALUATION, GIVEN, OFFLINE, OFFLINE_EVALUATION, CoreMetric
from hf_rlhf.metrics.catalog import CRITIC, HEALTH, KL, POLICY, REWARDS, ROLLOUTS, THROUGHPUT, TRAINER
from hf_rlhf.metrics.names import under
from hf_rlhf.registry.host import Host

Table = Callable[[Iterable[str], Iterable[Iterable[str]]], str]

INTRODUCTION = """
Every number that a run logs. `metrics.jsonl` holds one JSON object per log entry, with `step` (optimizer steps so far) and
the names below. Trackers get the same names: Weights & Biases shows them under `train/` and, where they begin with `eval_`,
under `eval/`. Names without a finite number are left out of an entry.

An entry covers `logging_steps` optimizer steps. Numbers in between are averaged; those under `health/` are added up, and of
`memory/` the largest is kept. Everything is over all processes, except `time/`, which is process 0's; `memory/` is that of
the process with most. `<label>` is a reward source's label (its plugin's name by default), `<kl>`, `<estimator>`, `<term>`
and `<filter>` are plugin names; the second KL, loss term or filter of a kind is called `<name>_2`, the third `<name>_3`. A
row is a completion; a token is one that the policy sampled.

*When*: "rollout" means entries in which at least one rollout was collected, "step" every entry. With several optimizer steps
per rollout and `logging_steps: 1`, "rollout" numbers appear in the first entry of each rollout. "Healthy" is a range that
needs no look, as far as one holds for most runs; [reading the dashboard](guides/reading_the_dashboard.md) says what a value
outside of it means and what people change.

Every metric is declared: the core's in [hf_rlhf/metrics](../hf_rlhf/metrics), a plugin's beside its settings
(`metrics`), and this page is made from both. A plugin logs under the place of its axis alone.
"""

NOTES = {
    REWARDS: """
A reward source's own metrics are logged as `reward/<label>/` and their name, averaged over what was given. What an
estimator returns in `Credit.metrics` is logged as `advantage/` and its name there.
""",
    POLICY: """
A policy loss of your own logs what it returns as `policy/<its name for it>`, averaged over tokens.
""",
    THROUGHPUT: """
Memory is what a process holds on the device it trains on. On CUDA these are bytes in tensors, as PyTorch's allocator counts
them: without the context, without what the allocator keeps in reserve. On CPU it is the resident set of the process,
libraries included, of which the C library keeps some after tensors are freed; workers of reward sources are processes of
their own and not in it. The high-water mark is set back when a phase begins and ends, so whoever reads
`torch.cuda.max_memory_allocated` or the kernel's `VmHWM` besides sees the newest phase alone. `hf-rlhf check` prints a
forecast of the tensors of each phase before the model loads: the largest that can happen, with every completion as long as
it may become. benchmarks/results/memory.md compares the two.

A resampling filter makes several rounds in one rollout. Numbers of a round are then averaged over the rounds.
""",
    TRAINER: """
`skip_memory_metrics: false` adds Trainer's memory numbers.
""",
}

AXES_OF = {
    REWARDS: ("rewards", "advantages"),
    KL: ("kl",),
    POLICY: ("policy_loss", "loss_terms", "optimizer"),
    CRITIC: ("critic",),
    ROLLOUTS: ("rollout", "rollout_correction", "filters"),
}
"""Axes whose plugins' own metrics stand in a section of the core's."""

EVALUATION_TEXT = """
Held-out prompts are rolled out as the recipe's `evaluation` says, with the same random numbers each time. Log entries have
these names with `eval_` in front, `summary.json` without it. `hf-rlhf train` evaluates before and after training;
`eval_strategy` adds evaluations in between.
"""

REST = """
## Completions

`completions/step_*.parquet` holds the first `logging.completions` rows of process 0 of the newest rollout of an entry.
Weights & Biases gets the same rows as the table `samples/completions`. Columns: `step`, `prompt`, `completion`,
`finish_reason`, `reward/<label>` (before its weight), `reward/total`, `advantage` (mean over the row's tokens), `tokens`, and
what a reward source logged itself (`log_extra`, `take_logs`) as `<label>/` and its name. Rows that a filter dropped are not
among them.

## summary.json

Written by `hf-rlhf train` at the end.
"""


SUMMARY = {
    "recipe": "name of the recipe",
    "model": "`model.path`",
    "dataset": "`dataset.path`",
    "before": "the evaluation before the first step, names as above without `eval_`; null without held-out prompts",
    "after": "the evaluation after the last step",
    "steps": "optimizer steps",
    "seconds": "of the whole command, loading and evaluations included; after a resume, since the resume",
    "train_seconds": "of training; after a resume, since the resume",
    "peak_memory_mib": "MiB that a process held at most since it started, the largest of all processes, measured as "
    "under `memory/`",
    "output_dir": "where the run wrote",
    "plan": "plugins (axis, name, package, version, module, SHA-256 of its file), models, forwards, skipped, "
    "remarks, arithmetic, and the memory forecast: MiB by phase and part",
    "versions": "of Python and of the packages that the numbers depend on",
}

TRAINERS_TEXT = """
What recipes without rollouts log (`sft`, `dpo`, `rm`, ...): every trainer's own first, then what some trainers log besides.
"""


def flowing(text: str) -> str:
    """Paragraphs on one line each; tables and headings as they are."""
    blocks = text.strip().split("\n\n")
    return "\n\n".join(b if b.startswith(("|", "#", "-")) else " ".join(b.split()) for b in blocks)


def metrics_page(table: Table, host: Host, package: str) -> Iterator[str]:
    """What stands below the title."""
    yield flowing(INTRODUCTION)
    header = ("metric", "unit", "meaning", "healthy", "when")
    for section in (REWARDS, KL, POLICY, CRITIC, ROLLOUTS, THROUGHPUT, HEALTH, TRAINER):
        rows = [_row(f"`{m.name}`", m, GIVEN[m.given].words) for m in CORE if m.section == section]
        rows += [row for axis in AXES_OF.get(section, ()) for row in _plugin_rows(host, axis, package)]
        yield f"## {section}\n\n{table(header, rows)}"
        if section in NOTES:
            yield flowing(NOTES[section])
    known = {"trainer", *(a for axes in AXES_OF.values() for a in axes)}
    others = [axis for axis in AREAS if axis not in known]
    rows = [row for axis in others for row in _plugin_rows(host, axis, package)]
    if rows:
        yield f"## Other plugins\n\n{table(header, rows)}"
    yield f"## Evaluation\n\n{flowing(EVALUATION_TEXT)}"
    yield table(header, [_row(f"`{EVAL}{m.name}`", m, GIVEN[m.given].words) for m in EVALUATION])
    every = [_row(f"`{m.name}`", m, "") for m in OFFLINE] + [
        _row(f"`{EVAL}{m.name}`", m, "") for m in OFFLINE_EVALUATION
    ]
    yield f"## Recipes with a trainer\n\n{flowing(TRAINERS_TEXT)}"
    yield table(header, every + _plugin_rows(host, "trainer", package))
    yield flowing(REST)
    yield table(["key", "what it holds"], [[f"`{key}`", text] for key, text in SUMMARY.items()])


def _plugin_rows(host: Host, axis: str, package: str) -> list[list[str]]:
    """One row per name on an axis, with the plugins that log it."""
    found: dict[tuple[str, str], tuple[Metric, list[str]]] = {}
    for offer in host.offers(axis):
        if offer.package != package or offer.problem:
            continue
        for metric in host.get(axis, f"{package}/{offer.name}").metrics:
            name = under(AREAS[axis], metric)
            shown = name.replace("<label>", offer.name) if axis != "rewards" else name
            found.setdefault((shown, metric.meaning), (metric, []))[1].append(offer.name)
    return [_row(f"`{name}`", m, f"`{axis}`: {', '.join(whose)}") for (name, _), (m, whose) in found.items()]


def _row(name: str, metric: Metric | CoreMetric, given: str) -> list[str]:
    when = {"end": "last entry", "evaluation": "evaluation"}.get(metric.when, metric.when)
    if metric.setting:
        given = f"{given}, with `{metric.setting}`" if given else f"with `{metric.setting}`"
    where = ", ".join(filter(None, (when, given, "not in every run" if metric.optional and not given else "")))
    return [name, metric.unit, metric.meaning, _range(metric), where]


def _range(metric: Metric) -> str:
    low, high = metric.healthy or (None, None)
    if low is not None and high is not None:
        return f"{low:g} to {high:g}"
    return f"at least {low:g}" if low is not None else f"at most {high:g}" if high is not None else ""
