"""The site of the documentation builds without a warning, and everything that it links to is there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest

from tests.helpers.browser import browser
from tests.helpers.paths import ROOT
from tests.helpers.waits import until


class Links(HTMLParser):
    """The ids of a page, and what it links to and shows."""

    def __init__(self, text: str):
        super().__init__()
        self.ids: set[str] = set()
        self.targets: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value and name in ("id", "name"):
                self.ids.add(value)
            elif value and ((tag == "a" and name == "href") or (tag in ("img", "script") and name == "src")):
                self.targets.append(value)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The site's folder, and what its making said."""
    pytest.importorskip("mkdocs", reason="the site needs `pip install hf_rlhf[docs]`")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout + done.stderr


@pytest.fixture(scope="module")
def pages(built):
    """Every page by its file."""
    return {file: Links(file.read_text()) for file in built[0].rglob("*.html") if file.name != "404.html"}


def test_it_builds_without_a_warning(built):
    assert "Documentation built" in built[1]
    assert not re.search(r"warn|not found|not included", built[1], re.IGNORECASE), built[1]


def test_every_page_is_in_the_navigation(built, pages):
    """mkdocs says so of pages of docs/ by a warning; of those from outside by nothing."""
    listed = {unquote(target).partition("#")[0] for target in pages[built[0] / "index.html"].targets}
    assert {str(file.relative_to(built[0])) for file in pages} <= listed


def test_every_link_and_picture_leads_to_a_file_of_the_site_and_a_heading_in_it(built, pages):
    missing = []
    for file, page in pages.items():
        for target in page.targets:
            if re.match(r"\w+:|//", target):
                continue
            path, _, anchor = unquote(target).partition("#")
            there = (file.parent / path).resolve() if path else file
            there = there / "index.html" if there.is_dir() else there
            known = pages[there].ids if there in pages else set()
            if not there.is_file() or (anchor and there in pages and anchor not in known):
                missing.append(f"{file.relative_to(built[0])}: {target}")
    assert not missing


def test_what_makes_the_pages_is_not_published(built):
    published = {str(file.relative_to(built[0])) for file in built[0].rglob("*") if file.is_file()}
    assert not {name for name in published if name.endswith(".py")}
    assert "source/plugins/advantages/gae.py.txt" in published
    text = (built[0] / "guides" / "first_run.html").read_text()
    assert "no-run" not in text


def test_no_block_is_left_as_markdown(pages):
    assert not [file.name for file in pages if "```" in file.read_text()]


def test_nothing_is_loaded_from_elsewhere(pages):
    """Pages are read behind a firewall, too."""
    for file in pages:
        for tag in re.findall(r"<(?:script|link|img)\b[^>]*>", file.read_text()):
            assert not re.search(r'(?:src|href)="(?:https?:)?//', tag) or 'rel="canonical"' in tag, (
                f"{file.name}: {tag}"
            )


@pytest.mark.slow
def test_every_page_is_short_fits_its_window_and_logs_no_error(built, pages):
    """At 1400 and 400 pixels, light and dark; wide tables and code scroll inside themselves."""
    wrong = []
    with browser() as page:
        for file in pages:
            page.view(1400, 900)
            page.open(file)
            screens = page.evaluate("document.documentElement.scrollHeight") / 900
            widths = [page.overflow()]
            page.view(400, 900, dark=True)
            widths.append(page.overflow())
            outside = [address for address in page.requests if not address.startswith("file:")]
            if screens > 15 or any(widths) or page.errors or outside:
                wrong.append((str(file.relative_to(built[0])), round(screens, 1), widths, page.errors, outside))
    assert not wrong


def test_pictures_are_small():
    pictures = list((ROOT / "docs" / "pictures").glob("*.*"))
    assert len(pictures) >= 5
    assert not [file.name for file in pictures if file.stat().st_size > 150_000]


def test_the_search_finds_a_word_from_disk(built):
    ask = "[...document.querySelectorAll('.md-search-result__link')].map(link => link.href)"
    with browser() as page:
        page.open(built[0] / "index.html")
        page.type(".md-search__input", "group_norm")
        until(lambda: page.evaluate(ask), 20, pause=0.2, what="no result of the search")
        found = page.evaluate(ask)
    assert any(link.endswith("#advantagesgroup_norm") for link in found), found
    assert all(link.startswith("file:") for link in found)
