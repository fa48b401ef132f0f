"""The picture of a run in the terminal shows what a run shows today, and asks for nothing from elsewhere."""

from __future__ import annotations

import re
from html import unescape

import pytest

from hf_rlhf.config.plan_in_words import algorithm_in_words
from hf_rlhf.config.recipe import load_recipe
from hf_rlhf.metrics.live_view import SHOWN
from tests.helpers.paths import ROOT

SVG = (ROOT / "docs" / "pictures" / "terminal.svg").read_text()
LINES = [unescape(line).replace("\xa0", " ") for line in re.findall(r"<text [^>]*>([^<]*)</text>", SVG)]
TEXT = re.sub(r"\s+", " ", " ".join(LINES))


def test_it_has_the_five_lines_of_the_plan() -> None:
    for title in ("model", "data", "algorithm", "batch", "memory"):
        assert title in TEXT
    assert algorithm_in_words(load_recipe("quickstart").algorithm()) in TEXT


@pytest.mark.parametrize("label", sorted(set(SHOWN) - {"value loss", "held-out reward"}))
def test_it_has_the_labels_of_the_live_view(label: str) -> None:
    assert label in TEXT


def test_it_loads_nothing() -> None:
    assert not re.search(r"@import|@font-face|url\((?!#)|href=.http", SVG)
