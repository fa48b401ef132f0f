"""docs/guides/reading_the_dashboard.md: every metric with what an unhealthy value means and what people change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from hf_rlhf.contract.metric import Metric
from hf_rlhf.metrics import CORE, EVAL, EVALUATION, SECTIONS, declared_by
from hf_rlhf.registry.host import Host

Table = Callable[[Iterable[str], Iterable[Iterable[str]]], str]

INTRODUCTION = """
A run writes its numbers to `metrics.jsonl` in its output folder and to every tracker of `training.report_to`, under the same
names. `hf-rlhf dashboard` arranges them in Weights & Biases by the sections below: [dashboards](../dashboards.md).
[Metrics](../metrics.md) says exactly what each number is; this page says what to do about it.

## In which order to look

1. **Does the reward move?** `reward/total/mean`. Flat: look at `reward/zero_std_frac`; where all completions of a prompt get
   the same reward there is nothing to learn from.
2. **Is it the reward that you meant?** `eval_accuracy` or another number that is not trained on, and the completions
   themselves, in `completions/` or the table `samples/completions`. A reward that rises while these fall is being gamed.
3. **Is the policy still the one it came from?** `kl/ref`, in nats per completion, and `policy/entropy`.
4. **Is the update sound?** `policy/approx_kl`, `policy/clip_frac/`, `policy/grad_norm`: an update that goes too far shows here
   first.
5. **Are the rows whole?** `rollout/length/mean` and `rollout/truncated_frac`: completions that are cut off are often scored 0
   for no fault of theirs.
6. **Is there a critic?** `value/explained_var`, before anything else about it.
7. **Where does the time go?** `time/`: rollout, rewards, update.

## A check in ten lines

What a run's newest numbers say about themselves, by the ranges of this page:

```bash
hf-rlhf train quickstart --max-steps 4 --output-dir run
```

```python
# unhealthy.py
import json
from hf_rlhf import load_recipe
from hf_rlhf.metrics import metrics_of, pattern

entries = [json.loads(line) for line in open("run/metrics.jsonl")]
newest = {name: value for entry in entries for name, value in entry.items()}
for named in metrics_of(load_recipe("run/recipe.yaml").algorithm()):
    low, high = named.metric.healthy or (None, None)
    for name, value in newest.items():
        if pattern(named.name).fullmatch(name):
            if (low is not None and value < low) or (high is not None and value > high):
                print(f"{name} = {value:.4g}: {named.metric.unhealthy}")
```

```bash
python unhealthy.py
```

A range holds for most runs, not for all: a first rollout, a tiny model or an odd reward may leave it and learn well. What
counts is a number that leaves its range and stays out, or one that turns.
"""


def dashboard_page(table: Table, host: Host, package: str) -> Iterator[str]:
    """What stands below the title."""
    yield _flowing(INTRODUCTION)
    header = ("metric", "what it means", "healthy", "what unhealthy looks like, and what people change")
    for section in SECTIONS:
        rows = [_row(metric.name, metric) for metric in CORE if metric.section == section]
        yield f"## {section}\n\n{table(header, rows)}"
    yield "## Held-out prompts\n\n" + table(header, [_row(f"{EVAL}{metric.name}", metric) for metric in EVALUATION])
    yield "## Plugins\n\nWhat the plugins of this package log of their own; others declare theirs in the same way."
    yield table(("plugin", *header), list(_plugin_rows(host, package)))


def _plugin_rows(host: Host, package: str) -> Iterator[list[str]]:
    for offer in host.offers():
        if offer.package == package and not offer.problem:
            for name, metric in declared_by(host.get(offer.axis, f"{package}/{offer.name}"), offer.axis).items():
                yield [f"`{offer.axis}.{offer.name}`", *_row(name, metric)]


def _row(name: str, metric: Metric) -> list[str]:
    low, high = metric.healthy or (None, None)
    bounds = [f"{word} {bound:g}" for word, bound in (("at least", low), ("at most", high)) if bound is not None]
    return [f"`{name}`", f"{metric.meaning} ({metric.unit})", ", ".join(bounds), metric.unhealthy]


def _flowing(text: str) -> str:
    """Paragraphs on one line each; code, lists and headings as they are."""
    fenced, blocks = False, []
    for block in text.strip().split("\n\n"):
        whole = fenced or block.startswith(("```", "#", "1."))
        fenced ^= block.count("```") % 2 == 1
        blocks.append(block if whole else " ".join(block.split()))
    return "\n\n".join(blocks)
