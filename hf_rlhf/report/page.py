"""The HTML of a report. Whatever a run holds is text: escaped here, or packed for the script, which makes text nodes of it."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from hf_rlhf.metrics.live_view import number
from hf_rlhf.report.run_data import RunData
from hf_rlhf.runtime.plain_text import escaped

STATIC = files("hf_rlhf.report") / "static"
SECTIONS = (
    ("doctor", "Doctor"),
    ("results", "Results"),
    ("curves", "Curves"),
    ("completions", "Completions"),
    ("plan", "Plan"),
    ("recipe", "Recipe"),
)


def text(value: Any) -> str:
    """Return text from outside as HTML: no markup, no control characters, no lone surrogates."""
    return escape(escaped(str(value), "\n\t"))


def prose(value: Any) -> str:
    """Return words of this package as HTML, with what is between backticks as code."""
    return re.sub(r"`([^`\n]+)`", r"<code>\1</code>", text(value))


def plain(value: Any) -> Any:
    """Return JSON with every text in it plain."""
    if isinstance(value, str):
        return escaped(value, "\n\t")
    if isinstance(value, dict):
        return {escaped(str(key), "\n\t"): plain(inner) for key, inner in value.items()}
    return [plain(x) for x in value] if isinstance(value, list | tuple) else value


def packed(data: Any) -> str:
    """Return JSON as base64 of gzip, which no markup can be in. Equal data give equal text."""
    content = json.dumps(plain(data), separators=(",", ":"), allow_nan=False).encode()
    return base64.b64encode(gzip.compress(content, 9, mtime=0)).decode()


def page(title: str, sections: dict[str, str], data: str, rollouts: str) -> str:
    """Return the whole file; `data` and `rollouts` are packed.

    Its own scripts and styles alone may run, and nothing may be requested.
    """
    script = (STATIC / "uplot.js").read_text("utf-8") + "\n" + (STATIC / "report.js").read_text("utf-8")
    style = (STATIC / "uplot.css").read_text("utf-8") + "\n" + (STATIC / "report.css").read_text("utf-8")
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; base-uri 'none'; form-action 'none'"
    )
    shown = [(name, heading) for name, heading in SECTIONS if sections.get(name)]
    links = "".join(f'<a href="#{name}">{heading}</a>' for name, heading in shown)
    bodies = "\n".join(
        f'<section id="{name}"><h2>{heading}</h2>\n{sections[name]}</section>' for name, heading in shown
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{text(title)}</title>
<style>{style}</style>
</head>
<body>
<header>{sections["head"]}</header>
<nav>{links}</nav>
<main>
{bodies}
</main>
<script type="text/plain" id="data">{data}</script>
<script type="text/plain" id="rollout-data">{rollouts}</script>
<script>{script}</script>
</body>
</html>
"""


def _hash(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool = False) -> str:
    """Return a table of cells that are HTML; `numbers`: all columns but the first hold numbers."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>\n" for row in rows)
    kind = ' class="numbers"' if numbers else ""
    return f'<div class="wide"><table{kind}><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'


def head(runs: list[RunData]) -> str:
    """Return title and facts of the runs."""
    if len(runs) == 1:
        run = runs[0]
        return f"<h1>{text(run.name)}</h1>{_facts(run)}"
    parts = [
        f'<p class="run"><i class="run-{i % 8}"></i><b>{text(run.name)}</b></p>{_facts(run)}'
        for i, run in enumerate(runs)
    ]
    return f"<h1>{len(runs)} runs</h1>" + "".join(parts)


def _facts(run: RunData) -> str:
    s = run.summary
    steps = s.get("steps") or max((entry["step"] for entry in run.entries), default=0)
    found = {"recipe": s.get("recipe"), "model": s.get("model"), "dataset": s.get("dataset"), "steps": f"{steps:,}"}
    if s.get("seconds"):
        found["time"] = _duration(s["seconds"])
    if s.get("peak_memory_mib"):
        found["peak memory"] = f"{s['peak_memory_mib']:,.0f} MiB"
    if rows := s.get("rows"):
        found["rows"] = ", ".join(f"{count:,} {name}" for name, count in rows.items() if count)
    facts = "".join(f"<div><dt>{name}</dt><dd>{text(value)}</dd></div>" for name, value in found.items() if value)
    unfinished = "" if s else '<p class="note">The run has no summary.json: it has not finished.</p>'
    return f'<dl class="facts">{facts}</dl>{unfinished}'


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def doctor(runs: list[RunData]) -> str:
    """Return what the doctor found in each run."""
    return "".join(_named(runs, i, _findings(run)) for i, run in enumerate(runs))


def _findings(run: RunData) -> str:
    if not run.findings:
        return '<p class="good">No pattern of a failing run was found in the log.</p>'
    items = []
    for finding in run.findings:
        words = " ".join(f"<code>{text(x)}</code>" for x in finding.overrides)
        fix = f"<p>Try {words}</p>" if words else ""
        items.append(
            f'<li><p><b>{text(finding.pattern)}</b> <span class="note">since step {finding.step}</span></p>'
            f"<p>{prose(finding.text)}</p>{fix}</li>"
        )
    return f'<ul class="findings">{"".join(items)}</ul>'


def _named(runs: list[RunData], i: int, body: str) -> str:
    """Return the part of one run, under its name where there are several."""
    if len(runs) == 1 or not body:
        return body
    return f'<h3><i class="run-{i % 8}"></i>{text(runs[i].name)}</h3>{body}'


def results(runs: list[RunData]) -> str:
    """Return held-out metrics with their intervals, before and after or run by run, and pairs of samples."""
    columns = [(run, when) for run in runs for when in ("before", "after") if run.summary.get(when)]
    names = list(dict.fromkeys(name for run, when in columns for name in _listed(run.summary[when])))
    heads = [when if len(runs) == 1 else f"{text(run.name)}, {when}" for run, when in columns]
    rows = [[text(name), *(_with_interval(run.summary[when], name) for run, when in columns)] for name in names]
    found = table(["held-out rows", *heads], rows, numbers=True) if rows else ""
    if len(runs) > 1:
        final = [{name: entry[name] for entry in run.entries for name in entry} for run in runs]
        shared = [x for x in dict.fromkeys(name for each in final for name in each) if x in _FINAL]
        cells = [[text(x), *(number(each[x]) if x in each else "-" for each in final)] for x in shared]
        found += (
            table(["last value in training", *(text(run.name) for run in runs)], cells, numbers=True) if cells else ""
        )
    if any(f"{name}_low" in run.summary[when] for run, when in columns for name in names):
        found += '<p class="note">In brackets: 95 % intervals over held-out prompts.</p>'
    return found + "".join(_named(runs, i, _pairs(run)) for i, run in enumerate(runs))


_FINAL = frozenset(
    (
        "loss",
        "reward/total/mean",
        "kl/ref",
        "policy/entropy",
        "policy/grad_norm",
        "rollout/length/mean",
        "rollout/truncated_frac",
    )
)
"""Metrics whose last values are compared between runs."""


def _listed(metrics: dict[str, Any]) -> list[str]:
    ends = {f"{name}{end}" for name in metrics for end in ("_low", "_high")}
    return sorted((name for name in metrics if name not in ends), key=lambda name: "/" in name)


def _with_interval(metrics: dict[str, Any], name: str) -> str:
    if metrics.get(name) is None:
        return "-"
    low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
    known = low is not None and high is not None
    return number(metrics[name]) + (f' <span class="note">({number(low)} to {number(high)})</span>' if known else "")


def _pairs(run: RunData) -> str:
    if not run.pairs:
        return ""
    first, last = run.pairs[0]
    scored = "reward" in first
    header = ["prompt", *(["reference"] if "reference" in first else [])]
    header += [cell for when in ("before", "after") for cell in (when, *(["reward"] if scored else []))]
    rows = []
    for first, last in run.pairs:
        cells = [_long(first["prompt"]), *([_long(first["reference"])] if "reference" in first else [])]
        for row in (first, last):
            cells += [
                _long(row["completion"]),
                *(["-" if row["reward"] is None else number(row["reward"])] if scored else []),
            ]
        rows.append(cells)
    return table(header, rows)


def _long(value: Any) -> str:
    return f'<div class="long">{text("" if value is None else value)}</div>'


def plan(runs: list[RunData]) -> str:
    """Return plan and versions of each run."""
    return "".join(_named(runs, i, _plan(run)) for i, run in enumerate(runs))


def _plan(run: RunData) -> str:
    plan = run.summary.get("plan")
    if not plan:
        return ""
    parts = []
    for topic in ("models", "forwards", "skipped", "remarks", "memory_notes"):
        if lines := plan.get(topic):
            items = "".join(f"<li>{prose(line)}</li>" for line in lines)
            parts.append(f"<h4>{topic.replace('_', ' ')}</h4><ul>{items}</ul>")
    if rows := plan.get("arithmetic"):
        parts.append(
            "<h4>batches</h4>" + table(["quantity", "value", "elsewhere"], ([text(x) for x in row] for row in rows))
        )
    if memory := plan.get("memory"):
        rows = [[text(phase), f"{sum(sizes.values()):,.0f}"] for phase, sizes in memory.items()]
        parts.append("<h4>memory</h4>" + table(["phase", "MiB"], rows, numbers=True))
    plugins = [
        [text(f"{x['axis']}.{x['name']}"), text(f"{x['package']} {x['version']}")] for x in plan.get("plugins", ())
    ]
    versions = [[text(name), text(version)] for name, version in run.summary.get("versions", {}).items()]
    parts.append("<h4>plugins</h4>" + table(["plugin", "package"], plugins))
    parts.append("<h4>versions</h4>" + table(["package", "version"], versions))
    topic = "What the run loads, computes and skips; its batches, plugins and versions"
    return f"<details><summary>{topic}</summary>{''.join(parts)}</details>"


def recipe(runs: list[RunData]) -> str:
    """Return recipe.yaml of each run; of several, first a table of the settings that differ."""
    found = "".join(_named(runs, i, _yaml(run)) for i, run in enumerate(runs))
    return _differences(runs) + found if len(runs) > 1 else found


def _yaml(run: RunData) -> str:
    if not run.recipe_text:
        return ""
    return f"<details><summary>recipe.yaml, every setting spelled out</summary><pre>{text(run.recipe_text)}</pre></details>"


def _differences(runs: list[RunData]) -> str:
    flat = [dict(_settings(run.raw_recipe)) for run in runs]
    names = [
        x for x in dict.fromkeys(name for each in flat for name in each) if len({each.get(x, "-") for each in flat}) > 1
    ]
    if not names:
        return '<p class="note">The recipes are the same.</p>'
    rows = [[f"<code>{text(x)}</code>", *(text(each.get(x, "-")) for each in flat)] for x in names]
    return table(["setting that differs", *(text(run.name) for run in runs)], rows)


def _settings(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted path, value as JSON) of every setting."""
    inner: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        inner = value.items()
    elif isinstance(value, list) and any(isinstance(x, dict) for x in value):
        inner = enumerate(value)
    else:
        yield path, json.dumps(value, ensure_ascii=False, default=str)
    for key, each in inner:
        yield from _settings(each, f"{path}.{key}" if path else str(key))
