"""Guides as a reader follows them: each page is one shell session in an empty folder, block after block."""

from __future__ import annotations

import re
import resource
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from tests.helpers.paths import ROOT
from tests.helpers.wheels import Environment

GUIDES = ROOT / "docs" / "guides"
BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"(?:#|//) ([\w./-]+\.\w+)\n")
RUN = {"bash", "python", "yaml", "toml"}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str
    runs: bool

    @property
    def file(self) -> str | None:
        """The file that the reader saves it as: named in its first line."""
        named = FILE.match(self.text)
        return named[1] if named and self.language != "bash" else None

    def as_shell(self) -> str:
        """What the reader does with it."""
        if self.file:
            folder = str(Path(self.file).parent)
            return f"mkdir -p {folder}\ncat > {self.file} <<'END_OF_FILE'\n{self.text}END_OF_FILE\n"
        if self.language == "python":
            return f"python - <<'END_OF_FILE'\n{self.text}END_OF_FILE\n"
        assert self.language == "bash", f"a block of {self.language} names its file in its first line"
        return self.text


def blocks(page: Path) -> list[Block]:
    """The blocks of a page; only `no-run` may stand behind a language."""
    found = []
    for language, info, text in BLOCK.findall(page.read_text()):
        assert info.strip() in ("", "no-run"), f"{page.name}: ```{language}{info}"
        found.append(Block(language, text, info.strip() != "no-run"))
    return found


@dataclass
class Session:
    """How following a page went."""

    folder: Path
    seconds: float
    """By the clock."""
    work: float
    """Of processors, the session's processes together."""
    by_block: list[float] = field(default_factory=list)
    output: str = ""


def follow(page: Path, environment: Environment, folder: Path) -> Session:
    """Every block that runs, in one shell that stops at the first error. Raises `AssertionError` with the block's output."""
    parts = ["set -euo pipefail\n"]
    for number, block in enumerate(blocks(page)):
        if block.runs:
            parts.append(f"echo '== block {number}' $EPOCHREALTIME\n{block.as_shell()}\n")
    parts.append("echo '== end' $EPOCHREALTIME\n")
    (folder.parent / f"{page.stem}.sh").write_text("".join(parts))
    began, worked = time.perf_counter(), _work()
    done = environment.run("bash", str(folder.parent / f"{page.stem}.sh"), cwd=folder, check=False)
    seconds, work = time.perf_counter() - began, _work() - worked
    assert done.returncode == 0, f"{page.name}: {done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    marks = [float(mark) for mark in re.findall(r"^== (?:block \d+|end) ([\d.]+)$", done.stdout, re.MULTILINE)]
    return Session(folder, seconds, work, [b - a for a, b in pairwise(marks)], done.stdout)


def _work() -> float:
    """Seconds of processors that the processes which this one started and saw end have used."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
