"""Findings of the run doctor in the terminal: live, and with the commands to type at the end."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from hf_rlhf.contract.pattern import Finding
from hf_rlhf.runtime.plain_text import escaped


def show_finding(out: Console) -> Callable[[Finding], None]:
    """Return a function that prints a finding during the run: the step, the problem and the overrides to type."""

    def show(finding: Finding) -> None:
        out.print(Text.assemble(("doctor ", "bold yellow"), escaped(_headline(finding))), soft_wrap=not out.is_terminal)
        if finding.overrides:
            out.print(Text(escaped(f"  try {shlex.join(finding.overrides)}")), soft_wrap=True)

    return show


def show_findings(findings: Sequence[Finding], recipe: Sequence[str], out: Console) -> None:
    """Print all findings of a run, each with the command that checks its overrides; `recipe`: its file, and options."""
    for finding in findings:
        text = Padding(Text(escaped(_headline(finding))), (0, 0, 0, 2), expand=False)
        out.print(text, soft_wrap=not out.is_terminal)
        if finding.overrides:
            out.print(Text(escaped(f"      {command(finding, recipe)}")), soft_wrap=True)


def command(finding: Finding, recipe: Sequence[str]) -> str:
    """Return the command line that shows what a finding's overrides would do."""
    return shlex.join(["hf-rlhf", "check", *recipe, *finding.overrides])


def _headline(finding: Finding) -> str:
    return f"{finding.pattern}, since step {finding.step}: {finding.text}"
