"""Cost of rule-based verifiers, their scaling with processes, and their agreement with graded solutions.

`python -m benchmarks.verifiers [--data ../shared/data/gsm8k] [--page]`

The rows are the solutions of two models to the test problems of GSM8K (arXiv:2110.14168) with the published grades. Times
per row are processor time on one thread, the least of five runs; throughput is wall-clock time, the best of seven runs with
workers that are up. The result goes to benchmarks/results/verifiers.json and docs/verifiers.md; `--page` makes the page of
what is in the former and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.record import write
from hf_rlhf import load_plugin
from hf_rlhf.batch import Rollouts
from hf_rlhf.scoring.scorer import Scorer

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "verifiers.md"
DATA = ROOT.parent / "shared" / "data" / "gsm8k"
COMMAND = "python -m benchmarks.verifiers"
MARKER = "A:"
ROUNDS = 7
"""Number of throughput measurements, which cycle through the numbers of processes; the best counts."""
AGREEMENT: list[tuple[str, dict[str, Any]]] = [
    ("numeric", {"answer_after": MARKER}),
    ("numeric", {}),
    ("math_answer", {"answer_after": MARKER}),
    ("math_answer", {}),
]
COSTS: list[tuple[str, dict[str, Any]]] = [
    ("exact_match", {}),
    ("numeric", {"answer_after": MARKER}),
    ("numeric", {}),
    ("choice", {"column": "label"}),
    ("regex", {"pattern": r"A:\s*(\d+)"}),
    ("format", {"tags": ("think", "answer")}),
    ("json_schema", {"schema": {"type": "object"}}),
    ("length", {"unit": "words"}),
    ("repetition", {"unit": "words"}),
    (
        "constraints",
        {"instructions": [{"id": "length_constraints:number_words", "relation": "at least", "num_words": 9}]},
    ),
    ("language", {"language": "en"}),
    ("math_answer", {"answer_after": MARKER, "workers": "inline"}),
]


def graded(folder: Path) -> tuple[Rollouts, list[float], list[str]]:
    """Solutions with their references, the published grades (1: correct), and whose solution it is."""
    with open(folder / "example_model_solutions.jsonl", encoding="utf-8") as file:
        problems = [json.loads(line) for line in file]
    found = [
        (solution["solution"], problem["ground_truth"], float(solution["is_correct"]), f"{number}, {model}")
        for number, problem in enumerate(problems)
        for model, solution in problem.items()
        if isinstance(solution, dict)
    ]
    texts, references, correct, names = (list(part) for part in zip(*found, strict=True))
    return rows_of(texts, references), correct, names


def rows_of(texts: list[str], references: list[str]) -> Rollouts:
    """Completions with their references."""
    count = len(texts)
    return Rollouts(
        prompts=[""] * count,
        completions=texts,
        prompt_ids=[[0]] * count,
        completion_ids=[[0]] * count,
        masks=[[1]] * count,
        finish_reasons=["stop"] * count,
        columns={"answer": references, "label": ["A"] * count},
        group_ids=list(range(count)),
    )


def agreement(batch: Rollouts, correct: list[float], names: list[str]) -> list[dict[str, Any]]:
    """One entry per verifier: how often it gives the published grade, and each row where it does not."""
    entries = []
    for name, settings in AGREEMENT:
        with Scorer([(name, load_plugin("rewards", name, **settings))]) as scorer:
            answers: list[Any] = list(scorer.ask(batch)[name].answers)
        apart = [row for row, grade in enumerate(correct) if answers[row] != grade]
        disagreements = []
        for row in apart:
            solution, reference = (
                text.rpartition(MARKER)[2].strip() for text in (batch.completions[row], batch.columns["answer"][row])
            )
            same = solution.replace(",", "") == reference.replace(",", "")
            disagreements.append(
                {
                    "row": names[row],
                    "solution": solution,
                    "reference": reference,
                    "published": correct[row],
                    "verdict": None if answers[row] != answers[row] else answers[row],
                    "right": "published" if same == bool(correct[row]) else name,
                }
            )
        entries.append(
            {"verifier": name, "settings": settings, "rows": len(correct), "disagreements": disagreements},
        )
    return entries


def counted(cases: list[tuple[str, str, float]], name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Count the (completion, reference, due score) that a verifier gets right, of right and of wrong completions."""
    source = load_plugin("rewards", name, **settings)
    entry: dict[str, Any] = {"verifier": name, "settings": settings}
    for kind, due in (("right", 1.0), ("wrong", 0.0)):
        chosen = [case for case in cases if case[2] == due]
        with Scorer([(name, source)]) as scorer:
            answers = scorer.ask(rows_of([case[0] for case in chosen], [case[1] for case in chosen]))[name].answers
        entry[kind] = [sum(answer == due for answer in answers), len(chosen)]
    return entry


def math_answers(folder: Path) -> dict[str, Any]:
    """Answers of MATH as bare references: the answer in a box, and each number or square root that is only a part of it."""
    with open(folder / "answers.jsonl", encoding="utf-8") as file:
        answers = [json.loads(line)["answer"] for line in file]
    cases = [(rf"So it is $\boxed{{{answer}}}$.", answer, 1.0) for answer in answers]
    for answer in answers:
        bare = re.sub(r"\\text\{[^}]*\}", "", answer).replace(r"\!", "").replace(r"\$", "").strip()
        for part in sorted({*re.findall(r"\d+", answer), *re.findall(r"\\sqrt\{\d+\}", answer)}):
            if bare not in (part, rf"\frac{{{part}}}"):
                cases.append((rf"So it is $\boxed{{{part}}}$.", answer, 0.0))
    return counted(cases, "math_answer", {})


def r1_shaped(folder: Path) -> list[dict[str, Any]]:
    """GSM8K's first 600 test solutions as thoughts, before the right answer in <answer> and before a wrong one."""
    with open(folder / "test.jsonl", encoding="utf-8") as file:
        solutions = [json.loads(line)["answer"].rpartition("####") for line in file][:600]
    cases = []
    for thoughts, _, answer in solutions:
        number = answer.strip().replace(",", "")
        for said, due in ((number, 1.0), (str(int(number) + 2), 0.0)):
            cases.append((f"<think>{thoughts}</think> <answer>{said}</answer>", number, due))
    return [counted(cases, name, {"answer_tag": "answer"}) for name in ("math_answer", "numeric")]


def least(run: Callable[[], Any], repeats: int) -> float:
    """Seconds of processor time of one of `repeats` calls in a row, the least of five times."""
    run()
    seconds = []
    for _ in range(5):
        started = time.process_time()
        for _ in range(repeats):
            run()
        seconds.append((time.process_time() - started) / repeats)
    return min(seconds)


def costs(batch: Rollouts) -> list[dict[str, Any]]:
    """Microseconds per row: of the plugin called with one row and with 64, and of 64 rows through the core, inline."""
    one, many = batch.select([0]), batch.select(range(64))
    entries = []
    for name, settings in COSTS:
        source = load_plugin("rewards", name, **settings)
        slow = name in ("math_answer", "language")
        entry: dict[str, Any] = {"verifier": name, "settings": settings}
        entry["one"] = 1e6 * least(lambda s=source: s(one), 20 if slow else 500)  # type: ignore[misc]
        entry["many"] = 1e6 / 64 * least(lambda s=source: s(many), 1 if slow else 20)  # type: ignore[misc]
        with Scorer([(name, source)]) as scorer:
            entry["core"] = 1e6 / 64 * least(lambda s=scorer: s.ask(many), 1 if slow else 20)  # type: ignore[misc]
        entries.append(entry)
    return entries


def throughput(batch: Rollouts) -> list[dict[str, Any]]:
    """Rows per second of math_answer in the caller's thread and in 1, 2, 4, ... processes, up to the number of cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    counts = sorted({1, cores, *(2**i for i in range(8) if 2**i <= cores)})
    kinds = [("inline", 1), *(("processes", count) for count in counts)]
    best = [0.0] * len(kinds)
    with ExitStack() as stack:
        scorers = []
        for workers, count in kinds:
            source = load_plugin("rewards", "math_answer", answer_after=MARKER, workers=workers, num_workers=count)
            scorers.append(stack.enter_context(Scorer([("math", source)])))
            scorers[-1].ask(batch)
        for _ in range(ROUNDS):
            for place, scorer in enumerate(scorers):
                started = time.perf_counter()
                scorer.ask(batch)
                best[place] = max(best[place], len(batch) / (time.perf_counter() - started))
    return [
        {"workers": workers, "count": count, "rows_per_second": rate}
        for (workers, count), rate in zip(kinds, best, strict=True)
    ]


def table(header: list[str], lines: list[list[str]]) -> str:
    """Format a table in Markdown."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *lines])


def titled(entry: dict[str, Any]) -> str:
    shown = {key: value for key, value in entry["settings"].items() if key in ("answer_after", "answer_tag", "unit")}
    return " ".join([f"`{entry['verifier']}`", *(f'{key}="{value}"' for key, value in shown.items())])


def agreement_table(found: dict[str, Any]) -> str:
    lines = []
    for entry in found["agreement"]:
        same = entry["rows"] - len(entry["disagreements"])
        wrong = sum(one["right"] == "published" for one in entry["disagreements"])
        lines.append([titled(entry), f"{same} of {entry['rows']}", f"{100 * same / entry['rows']:.2f} %", str(wrong)])
    return table(["verifier", "agrees", "share", "wrong where it does not"], lines)


def disagreement_table(found: dict[str, Any]) -> str:
    lines = [
        [
            titled(entry),
            one["row"],
            one["reference"],
            one["solution"],
            f"{one['published']:g}",
            f"{one['verdict']}",
            one["right"],
        ]
        for entry in found["agreement"]
        for one in entry["disagreements"]
    ]
    header = ["verifier", "problem, model", "reference", "solution", "published", "verdict", "who is right"]
    return table(header, lines) if lines else "There are none."


def shapes_table(found: dict[str, Any]) -> str:
    lines = [
        [what, titled(entry), *(f"{entry[kind][0]} of {entry[kind][1]}" for kind in ("right", "wrong"))]
        for what, entry in [("MATH", found["math"]), *(("R1-shaped", entry) for entry in found["r1"])]
    ]
    return table(["texts", "verifier", "right ones scored 1", "wrong ones scored 0"], lines)


def cost_table(found: dict[str, Any]) -> str:
    unit = found["costs"][0]["many"]
    lines = [
        [titled(entry), *(f"{entry[key] / unit:.1f}" for key in ("one", "many", "core")), f"{entry['core']:.1f}"]
        for entry in found["costs"]
    ]
    return table(["verifier", "called with one row", "with 64", "64 through the core", "the same, microseconds"], lines)


def throughput_table(found: dict[str, Any]) -> str:
    inline = found["throughput"][0]["rows_per_second"]
    lines = [
        [
            "in the caller's thread" if one["workers"] == "inline" else f"{one['count']}",
            f"{one['rows_per_second'] / inline:.2f}",
        ]
        for one in found["throughput"]
    ]
    return table(["processes", "rows per second, as a multiple of the first line"], lines)


DESCRIPTION = r"""
Reward sources that need no model. A row without a reference gets no score rather than 0. The settings are described in
[plugins.md](plugins.md).

| verifier | 1 if | reads |
| --- | --- | --- |
| `exact_match` | the completion is the reference, or one of a list of them | `answer` |
| `numeric` | its number is the reference, within a tolerance: after a marker, in the last box, or the last one | `answer` |
| `math_answer` | its answer is mathematically equal to the reference, by Math-Verify | `answer` |
| `choice` | it picks the right one of several choices | `answer`, choices |
| `regex` | it matches a regular expression; or the fraction of the required matches | |
| `format` | it has the tags in order, has a box, or matches a pattern completely | |
| `json_schema` | its last JSON block satisfies a JSON Schema | a schema |
| `constraints` | it follows its instructions (IFEval, arXiv:2311.07911); or their share | `instruction_id_list`, `kwargs` |
| `language` | it is in the required language: a probability, or the fraction of its lines | a code |

`length` and `repetition` return penalties, 0 or less.

`math_answer`, `numeric` and `choice` search the answer in the last `<answer>...</answer>`, then after the marker
`answer_after`, or `####` at the end of the text (GSM8K), then in the last `\boxed{}`; only a text without any of these is
read as prose. Thoughts (`<think>`, `<thinking>`, `<thought>`, `<reasoning>`, `[THINK]`) are never read, also if the template
has opened the tag or the completion ends in one. With `answer_tag: answer`, as in `r1_zero` and `gdpo`, `<answer>` alone
counts, and a completion without it scores 0.

A reference of `math_answer` without delimiters is one LaTeX expression: `3\sqrt{13}` is not 3. Units are not compared,
words (`\text{Monday}`) are compared as text, `25_6` needs its base, and `$` before an amount is no delimiter. Several
labels ("C or D") are no `choice`. A reference inside a mapping is read by a dotted name,
`column=reward_model.ground_truth`; a mapping as a reference is an error.

Use `numeric` for numbers and `math_answer` for anything else. SymPy evaluates whatever the model writes, including
`\boxed{9^{9^{9^9}}}`, so `math_answer` runs in processes that are killed after `timeout` (5 s), with at most `memory_mib`;
such a row has no score. Other verifiers take time linear in the length of the text and run in the caller's thread.
Regular expressions of a recipe are abandoned after `timeout`.
"""
"""First part of the page, without figures."""


def page(found: dict[str, Any]) -> str:
    """docs/verifiers.md."""
    versions = ", ".join(f"{name} {found['versions'][name]}" for name in ("math-verify", "sympy"))
    return f"""# Rule-based verifiers

<!-- Made by `{COMMAND} --page` from benchmarks/results/verifiers.json. -->
{DESCRIPTION}
## Agreement with graded solutions

Solutions of two models to the test problems of GSM8K, compared with their published grades. The reference is the whole
worked solution; the marker is the `A:` in front of the answers ({versions}).

{agreement_table(found)}

All disagreements. Comparing the texts after the marker shows who is right.

{disagreement_table(found)}

## References in LaTeX, answers in tags

Answers of MATH (arXiv:2103.03874) as its data has them, without delimiters: right is the answer in a box, wrong each
number or square root that is a part of it. R1-shaped texts are worked solutions of GSM8K as `<think>...</think>` before an
`<answer>` that is right or wrong.

{shapes_table(found)}

## Cost

CPU time per row on these solutions, on one thread, as a multiple of `exact_match` with 64 rows. "Through the core" is the
time of `Scorer.ask`, row by row, in the caller's thread.

{cost_table(found)}

## Scaling with processes

`math_answer` on all {found["agreement"][0]["rows"]} rows, on a machine with {found["machine"]["cores"]} cores that it
shared with other work; the best of {ROUNDS} runs.

{throughput_table(found)}
"""


def measure(folder: Path) -> dict[str, Any]:
    """All figures."""
    from importlib.metadata import version

    batch, correct, names = graded(folder)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "command": COMMAND,
        "machine": {"processor": platform.machine(), "system": platform.system(), "cores": cores},
        "versions": {name: version(name) for name in ("math-verify", "sympy", "py3langid", "jsonschema")},
        "agreement": agreement(batch, correct, names),
        "math": math_answers(folder.parent / "math"),
        "r1": r1_shaped(folder),
        "costs": costs(batch),
        "throughput": throughput(batch),
    }


def main() -> None:
    """Measures and writes the figures, or makes the page of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of GSM8K; ../math has answers.jsonl")
    parser.add_argument("--page", action="store_true", help="make docs/verifiers.md of the figures that are there")
    options = parser.parse_args()
    results = RESULTS / "verifiers.json"
    if options.page:
        PAGE.write_text(page(json.loads(results.read_text())), encoding="utf-8")
        return
    found = measure(options.data)
    write(results, found)
    tables = [
        agreement_table(found),
        disagreement_table(found),
        shapes_table(found),
        cost_table(found),
        throughput_table(found),
    ]
    PAGE.write_text(page(found), encoding="utf-8")
    print("\n\n".join(tables))


if __name__ == "__main__":
    main()
