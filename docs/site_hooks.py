"""Hooks of mkdocs: the parts of pages that are made from the code, pages and files outside of docs/, and links to them.

README.md is the site's front page; CHANGELOG.md, SECURITY.md and the READMEs of the examples are pages. Source files that a
page links to are copied as text to `source/`. A link to a folder becomes its name. Of a long page, each section between
`<!-- pages -->` and `<!-- end pages -->` is a page of its own.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from pymdownx.slugs import slugify

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
SPLIT = re.compile(r"<!-- pages -->\n(.*?)<!-- end pages -->\n", re.DOTALL)
SECTION = re.compile(r"^## (.+)\n((?:(?!## ).*\n)*)", re.MULTILINE)
slug = slugify(case="lower")
parts: dict[str, str] = {}
"""Page of a section -> page that has it in the repository."""
moved: dict[tuple[str, str], str] = {}
"""Page of the repository and anchor -> page of the section."""
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"(^ *```.*?^ *```[^\n]*$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Fill in generated parts; add the pages from outside of docs/, and every source that a page links to."""
    for file in list(files):
        if file.src_uri.endswith(".md") and (PART.search(file.content_string) or SPLIT.search(file.content_string)):
            files.remove(file)
            text, sections = _split(file.src_uri, filled(file.content_string, site=True))
            files.append(File.generated(config, file.src_uri, content=text))
            for page, content in sections.items():
                files.append(File.generated(config, page, content=content))
            if sections:
                config.nav = _with_sections(config.nav, file.src_uri, list(sections))
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


def _split(page: str, text: str) -> tuple[str, dict[str, str]]:
    """Return a page with links in place of the sections to split off, and these by their pages."""
    sections: dict[str, str] = {}

    def links(match: re.Match[str]) -> str:
        for title, body in SECTION.findall(match[1]):
            name = f"{page.removesuffix('.md')}/{slug(title, '-')}.md"
            raised = re.sub(r"^##(#+ )", r"#\1", FENCE.sub(_kept, body), flags=re.MULTILINE)
            sections[name] = sections.get(name, f"# {title}\n") + raised.replace("\0", "#")
            parts[name] = page
            for heading in (title, *re.findall(r"^#+ (.+)", body, re.MULTILINE)):
                moved[page, slug(heading.replace("`", ""), "-")] = name
        names = {name: text.partition("\n")[0].removeprefix("# ") for name, text in sections.items()}
        return (
            " · ".join(
                f"[{title}]({os.path.relpath(name, os.path.dirname(page) or '.')})" for name, title in names.items()
            )
            + "\n"
        )

    return SPLIT.sub(links, text), sections


def _kept(fence: re.Match[str]) -> str:
    """Return a block of code whose comments are not taken for headings."""
    return fence[0].replace("#", "\0")


def _with_sections(nav: Any, page: str, sections: list[str]) -> Any:
    """Return the navigation with a page's sections below it."""
    if isinstance(nav, list):
        return [_with_sections(item, page, sections) for item in nav]
    if isinstance(nav, dict):
        return {
            title: [page, *sections] if item == page else _with_sections(item, page, sections)
            for title, item in nav.items()
        }
    return nav


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Leads links to where their targets are on the site; `no-run` is for the tests alone."""
    markdown = re.sub(r"^( *```\w+) no-run$", r"\1", markdown, flags=re.MULTILINE).replace(" ± ", "\u00a0±\u00a0")
    origin, here = _origin(page.file), page.file.src_uri

    def lead(match: re.Match[str]) -> str:
        mark, text, target = match.groups()
        if re.match(r"\w+:", target):
            return match[0]
        path, hash_, anchor = target.partition("#")
        file = (origin.parent / path).resolve() if path else origin
        if file.is_dir():
            return text
        there = _page(file) or _copied(file)
        there = moved.get((there, anchor), there)
        if there == here and not path:
            return match[0]
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
    page = parts.get(file.src_uri, file.src_uri)
    return ROOT / back[page] if page in back else ROOT / "docs" / page


def _page(file: Path) -> str | None:
    """Return the page or file of the site for a file of the repository, or None."""
    name = file.relative_to(ROOT).as_posix()
    if name in PAGES:
        return PAGES[name]
    inside = name.startswith("docs/") and not name.endswith(".py")
    return name.removeprefix("docs/") if inside else None


def _copied(file: Path) -> str:
    return f"source/{file.relative_to(ROOT).as_posix()}.txt"
