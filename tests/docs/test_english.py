"""Docstrings, messages and pages keep to the field's English; `make check` runs the same list."""

import pytest

from tests.helpers.english import BANNED, CODE, FIRST, PAGES, ROOT, in_code, in_page, problems


@pytest.mark.parametrize("place", [place for place in dict.fromkeys((*CODE, *PAGES)) if (ROOT / place).exists()])
def test_no_banned_turn_is_left(place: str) -> None:
    assert problems(place) == []


@pytest.mark.parametrize(
    "text",
    [
        "margin is 'x'; a number is due",
        "the message says what to mend",
        "another --output-dir starts anew",
        "--resume goes on with it",
        "resumes with equal bits",
        "the default stands in the recipe",
        "'rm' is no model: give policy or reward",
        "version 1 of the protocol is spoken here",
    ],
)
def test_the_list_finds(text: str) -> None:
    assert BANNED.search(text)
    assert list(in_code(f"raise ValueError({text!r})"))
    assert list(in_page(f"A page.\n\n{text}\n"))
    assert not list(in_page(f"```\n{text}\n```\n"))


@pytest.mark.parametrize(
    "text", ["there is no model: none is loaded", "this is no longer, read", "recommended; amend it"]
)
def test_the_list_leaves_alone(text: str) -> None:
    assert not BANNED.search(text)


def test_first_words_count_in_every_kind_of_docstring() -> None:
    module = '"""What it is."""\nx = 1\n"""How many."""\nclass A:\n    """Whether."""\n'
    module += '    def f(self):\n        """Its name."""\n'
    assert [line for line, _ in in_code(module)] == [1, 3, 5, 7]
    assert not FIRST.match("Whatever happens")
    assert not FIRST.match("Offset of a token")
