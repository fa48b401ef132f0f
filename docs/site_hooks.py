"""Hooks of mkdocs: the parts of pages that are made from the code, pages and files outside of docs/, and links to them.

README.md is the site's front page; CHANGELOG.md, SECURITY.md and the READMEs of the examples are pages. Source files that a
page links to are copied as text to `source/`. A link to a folder becomes its name.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))
from generate import PART, filled
from generators import lab

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    **{name: name for name in ("CONTRIBUTING.md", "CODE_OF_CONDUCT.md", "CHANGELOG.md", "SECURITY.md")},
    **{str(file.relative_to(ROOT)): str(file.relative_to(ROOT)) for file in (ROOT / "examples").glob("*/README.md")},
}
"""File of the repository -> page of the site, where it is not docs/ -> the same."""
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"(^ *```.*?^ *```[^\n]*$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Fill in generated parts; add the pages from outside of docs/, and every source that a page links to."""
    for file in list(files):
        if file.src_uri.endswith(".md") and PART.search(file.content_string):
            files.remove(file)
            files.append(File.generated(config, file.src_uri, content=filled(file.content_string, site=True)))
    if lab.PICTURE.is_file():
        files.append(File.generated(config, lab.PICTURE.name, abs_src_path=str(lab.PICTURE)))
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    linked: set[Path] = set()
    for file in list(files):
        if file.src_uri.endswith(".md"):
            linked |= {target for target in _targets(file) if target.is_file() and _page(target) is None}
    for target in sorted(linked):
        files.append(File.generated(config, _copied(target), content=target.read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Leads links to where their targets are on the site; `no-run` is for the tests alone."""
    markdown = re.sub(r"^( *```\w+) no-run$", r"\1", markdown, flags=re.MULTILINE)
    origin, here = _origin(page.file), page.file.src_uri

    def lead(match: re.Match[str]) -> str:
        mark, text, target = match.groups()
        if re.match(r"\w+:|#", target):
            return match[0]
        path, hash_, anchor = target.partition("#")
        file = (origin.parent / path).resolve()
        if file.is_dir():
            return text
        there = _page(file) or _copied(file)
        return f"{mark}[{text}]({os.path.relpath(there, os.path.dirname(here) or '.')}{hash_}{anchor})"

    parts = FENCE.split(markdown)
    return "".join(part if i % 2 else LINK.sub(lead, part) for i, part in enumerate(_joined(parts)))


def _joined(parts: list[str]) -> list[str]:
    """Yield text, fence, text, ...; inline code is part of the text, because it may be inside a link."""
    joined = [""]
    for i, part in enumerate(parts):
        if i % 2 and part.lstrip().startswith("```"):
            joined += [part, ""]
        else:
            joined[-1] += part
    return joined


def _targets(file: File) -> set[Path]:
    text = FENCE.sub(lambda match: "" if match[0].lstrip().startswith("```") else match[0], file.content_string)
    found = (match[3].partition("#")[0] for match in LINK.finditer(text) if not re.match(r"\w+:|#", match[3]))
    return {(_origin(file).parent / path).resolve() for path in found}


def _origin(file: File) -> Path:
    """Return the file in the repository of a page of the site."""
    back = {page: source for source, page in PAGES.items()}
    return ROOT / back[file.src_uri] if file.src_uri in back else ROOT / "docs" / file.src_uri


def _page(file: Path) -> str | None:
    """Return the page or file of the site for a file of the repository, or None."""
    name = file.relative_to(ROOT).as_posix()
    if name in PAGES:
        return PAGES[name]
    inside = name.startswith("docs/") and not name.endswith(".py")
    return name.removeprefix("docs/") if inside else None


def _copied(file: Path) -> str:
    return f"source/{file.relative_to(ROOT).as_posix()}.txt"
