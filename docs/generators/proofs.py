"""Which test proves which plugin, read from the tests' decorators without importing them.

    @pytest.mark.proves("axis.name", ..., how="closed form", tolerance="1e-12")
    def test_...

All arguments are text as it stands. A test may have several of these decorators.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from generators.markdown import code, own_host, own_plugins, table
from hf_rlhf.axes import AXES

HOW = {
    "closed form": "against the formula, worked out by hand or written down a second time",
    "exact enumeration": "every sequence of a small tabular policy, in float64: expected gradients to rounding",
    "invariance": "what must not matter is changed: padding, order, splits, processes",
    "parity": "against the numbers of another implementation",
    "end to end": "in runs of the trainer",
}
"""Kinds of proof, with their meaning."""


@dataclass(frozen=True, order=True, kw_only=True)
class Proof:
    """One test as the proof of one plugin."""

    plugin: str
    """`axis.name`"""
    file: str
    """Below the folder of the tests."""
    test: str
    how: str
    tolerance: str


TESTS = Path(__file__).parents[2] / "tests"


def kinds() -> Iterator[str]:
    """Return a table of the kinds of proof."""
    yield table(["how", "means"], [[how, f"{means[0].upper()}{means[1:]}."] for how, means in HOW.items()])


def proofs() -> Iterator[str]:
    """Every plugin of this package with the tests that prove it."""
    found = read(TESTS)
    for axis in AXES:
        rows = [
            [code(offer.name), f"[{proof.file}](../tests/{proof.file}): {code(proof.test)}", proof.how, proof.tolerance]
            for offer in own_plugins(own_host(), axis)
            for proof in found
            if proof.plugin == f"{axis}.{offer.name}"
        ]
        yield f"## {axis}\n\n" + table(["plugin", "test", "how", "tolerance"], rows)


def read(folder: Path) -> list[Proof]:
    """Every proof in the tests of a folder. Raises `ValueError` where a decorator is not written as it should be."""
    return sorted(proof for file in sorted(folder.rglob("test_*.py")) for proof in _of_file(file, folder))


def _of_file(file: Path, folder: Path) -> Iterator[Proof]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        for mark in node.decorator_list:
            if "mark.proves" in ast.unparse(mark):
                yield from _of_mark(file.relative_to(folder).as_posix(), node, mark)


def _of_mark(file: str, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, mark: ast.expr) -> Iterator[Proof]:
    place = f"{file}, line {mark.lineno}"
    if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test_"):
        raise ValueError(f"{place}: {node.name} is no test function, so it proves nothing")
    if not isinstance(mark, ast.Call) or not mark.args:
        raise ValueError(f"{place}: proves(...) needs the plugins that it is about, each written axis.name")
    names = [_text(place, x) for x in mark.args]
    said = {str(x.arg): _text(place, x.value) for x in mark.keywords}
    if said.keys() != {"how", "tolerance"}:
        raise ValueError(
            f"{place}: proves(...) needs how=... and tolerance=..., and nothing else; it has {sorted(said)}"
        )
    if said["how"] not in HOW:
        raise ValueError(f"{place}: how={said['how']!r}; choose from {', '.join(HOW)}")
    for name in names:
        yield Proof(plugin=name, file=file, test=node.name, how=said["how"], tolerance=said["tolerance"])


def _text(place: str, node: ast.expr) -> str:
    if not isinstance(node, ast.Constant) or not isinstance(node.value, str) or not node.value:
        raise ValueError(f"{place}: {ast.unparse(node)} must be a text, written out: nothing is imported to read it")
    return node.value
