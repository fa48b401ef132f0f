"""Training rows for reward models from graded solutions of GSM8K problems.

    python examples/gsm8k_pairs.py example_model_solutions.jsonl OUTPUT [--with-reference] [--test-share 0.2]

reads the graded solutions that are part of GSM8K (a problem, its reference solution, and models' solutions with their
correctness), and writes

    OUTPUT/pairs_train.jsonl, pairs_test.jsonl    prompt, chosen, rejected: each correct solution of a problem against each
                                                  incorrect one. Only models' solutions, unless --with-reference adds the
                                                  reference solution as a correct one, which gives more pairs, but people's
                                                  style then distinguishes the two.
    OUTPUT/steps_train.jsonl, steps_test.jsonl    prompt, completions (the lines), labels. Lines of the reference and of correct
                                                  solutions are good. An incorrect solution's lines are good up to the first one
                                                  that computes a result (`<<48/2=24>>`) which neither the reference computes nor
                                                  the problem states, or that gives the wrong answer; from there on they are bad.
                                                  These labels are not verified: another correct approach counts as wrong.

Each problem is in either train or test, by a hash of its text. Prompts are the question and a line break: for a policy set
`dataset.prompt_template="{question}\\n"`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

RESULT = re.compile(r"<<[^<>]*=([^<>=]*)>>")
NUMBER = re.compile(r"-?\d[\d,]*\.?\d*")


def graded(problem: dict[str, Any]) -> list[tuple[str, bool]]:
    """Return the models' solutions with their correctness."""
    found = [value for value in problem.values() if isinstance(value, dict)]
    return [(solution["solution"].strip(), bool(solution["is_correct"])) for solution in found]


def pairs(problem: dict[str, Any], with_reference: bool) -> Iterator[dict[str, str]]:
    """Yield a row for each pair of a correct and an incorrect solution of the problem, without duplicate texts."""
    solutions = dict(graded(problem))
    good = [text for text, correct in solutions.items() if correct]
    good += [problem["ground_truth"].strip()] if with_reference else []
    bad = [text for text, correct in solutions.items() if not correct]
    for chosen, rejected in product(dict.fromkeys(good), bad):
        yield {"prompt": problem["question"] + "\n", "chosen": chosen, "rejected": rejected}


def steps(problem: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a row for the reference and for each model's solution."""
    reference = problem["ground_truth"].strip()
    for text, correct in dict([(reference, True), *graded(problem)]).items():
        lines = [line for line in text.split("\n") if line.strip()]
        labels = [True] * len(lines) if correct else good_lines(lines, reference, problem["question"])
        yield {"prompt": problem["question"] + "\n", "completions": lines, "labels": labels}


def good_lines(lines: list[str], reference: str, question: str) -> list[bool]:
    """Label an incorrect solution's lines: True up to the first one with a result that is not the reference's."""
    known = {number(x) for x in RESULT.findall(reference)} | {number(x) for x in NUMBER.findall(question)}
    labels: list[bool] = []
    for line in lines:
        fits = not line.startswith("A:") and all(number(x) in known for x in RESULT.findall(line))
        labels.append(fits and all(labels))
    return labels


def number(text: str) -> float | str:
    """Parse a number in any spelling, so that 1,000 equals 1000.0."""
    try:
        return round(float(text.replace(",", "").strip(" $%.")), 6)
    except ValueError:
        return text.strip()


def in_test(question: str, share: float) -> bool:
    """Return True if a problem is in the test set, which is the same for every file and grows with the share."""
    return int.from_bytes(hashlib.sha256(question.encode()).digest()[:8], "big") < share * 2**64


def write(source: Path, output: Path, with_reference: bool, test_share: float) -> dict[str, int]:
    """Write the four files and return the number of rows by file name."""
    problems = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    output.mkdir(parents=True, exist_ok=True)
    counts = {}
    for side in ("train", "test"):
        own = [p for p in problems if in_test(p["question"], test_share) == (side == "test")]
        for kind, rows in (
            ("pairs", [row for problem in own for row in pairs(problem, with_reference)]),
            ("steps", [row for problem in own for row in steps(problem)]),
        ):
            name = f"{kind}_{side}.jsonl"
            (output / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            counts[name] = len(rows)
    return counts


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", type=Path, help="example_model_solutions.jsonl")
    parser.add_argument("output", type=Path, help="output folder")
    parser.add_argument("--with-reference", action="store_true", help="use the reference as a correct solution too")
    parser.add_argument("--test-share", type=float, default=0.2, help="share of held-out problems")
    options = parser.parse_args()
    for name, rows in write(options.source, options.output, options.with_reference, options.test_share).items():
        print(f"{options.output / name}: {rows} rows")


if __name__ == "__main__":
    main()
