"""Guides as a reader follows them: each page is one shell session in an empty folder, block after block."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.paths import ROOT
from tests.helpers.processes import warm
from tests.helpers.wheels import Environment

GUIDES = ROOT / "docs" / "guides"
BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"(?:#|//) ([\w./-]+\.\w+)\n")


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


def follow(page: Path, environment: Environment, folder: Path) -> None:
    """Run every block of a page in one shell that stops at the first error; `hf-rlhf` starts warm.

    Raises `AssertionError` with the block's output.
    """
    started = shlex.join(warm("hf_rlhf", str(environment.folder / "bin" / "python")))
    parts = [f'set -euo pipefail\nhf-rlhf() {{ PYTHONSAFEPATH=1 {started} "$@"; }}\n']
    for number, block in enumerate(blocks(page)):
        if block.runs:
            parts.append(f"echo '== block {number}'\n{block.as_shell()}\n")
    script = folder.parent / f"{page.stem}.sh"
    script.write_text("".join(parts))
    done = environment.run("bash", str(script), cwd=folder, check=False)
    assert done.returncode == 0, f"{page.name}: {done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    assert "== block" in done.stdout
