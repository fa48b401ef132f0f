"""Verifiable instructions of IFEval (arXiv:2311.07911), by their ids and keyword arguments.

Departures: a missing argument is an error, where IFEval draws one at random; keywords are matched literally, not as
regular expressions; sentences are counted by rule; languages are identified by py3langid, among those of IFEval and the
expected one. All checks run in time linear in the text.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from hf_rlhf.axes import did_you_mean

from ._json import NoJson, loads
from ._languages import probabilities
from ._sentences import count_sentences

Check = Callable[[str], bool]

LANGUAGES = frozenset(
    (
        "en",
        "es",
        "pt",
        "ar",
        "hi",
        "fr",
        "ru",
        "de",
        "ja",
        "it",
        "bn",
        "uk",
        "th",
        "ur",
        "ta",
        "te",
        "bg",
        "ko",
        "pl",
        "he",
        "fa",
        "vi",
        "ne",
        "sw",
        "kn",
        "mr",
        "gu",
        "pa",
        "ml",
        "fi",
    )
)
"""Languages that IFEval asks for."""
ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
"""Answers that `detectable_format:constrained_response` allows."""

CHECKS: dict[str, Callable[..., bool]] = {}
"""Check of each instruction id; an instruction's keyword arguments are the function's."""


def instruction(name: str, arguments: Mapping[str, Any]) -> Check:
    """Return the check of an instruction; arguments that are None count as omitted.

    Raises `ValueError` for an unknown instruction or wrong arguments.
    """
    if name not in CHECKS:
        raise ValueError(f"no instruction named {name!r}.{did_you_mean(name, CHECKS)} Available: {', '.join(CHECKS)}")
    given = {key: value for key, value in arguments.items() if value is not None}
    try:
        inspect.signature(CHECKS[name]).bind("", **given)
    except TypeError as error:
        due = ", ".join(list(inspect.signature(CHECKS[name]).parameters)[1:])
        raise ValueError(f"instruction {name!r}: {error}; it takes: {due or 'nothing'}") from error
    for key in ("relation", "let_relation", "capital_relation"):
        if given.get(key) not in (None, "less than", "at least"):
            raise ValueError(f"instruction {name!r}: {key} must be 'less than' or 'at least', got {given[key]!r}")
    return partial(CHECKS[name], **given)


def follows(text: str, check: Check, loose: bool) -> bool:
    """Return True if a text follows an instruction; a blank text follows none.

    With `loose` it may do so without its first line, its last line, or asterisks, in any combination.
    """
    texts = [text]
    if loose:
        lines = text.split("\n")
        texts += ["\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])]
        texts = list(dict.fromkeys(x for t in texts for x in (t, t.replace("*", ""))))
    return any(x.strip() and check(x) for x in texts)


def _named(name: str) -> Callable[[Callable[..., bool]], Callable[..., bool]]:
    def register(check: Callable[..., bool]) -> Callable[..., bool]:
        CHECKS[name] = check
        return check

    return register


def _holds(count: int, relation: str, threshold: int) -> bool:
    return count < threshold if relation == "less than" else count >= threshold


# Keywords


@_named("keywords:existence")
def _existence(text: str, keywords: list[str]) -> bool:
    return all(keyword.lower() in text.lower() for keyword in keywords)


@_named("keywords:frequency")
def _frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return _holds(text.lower().count(keyword.strip().lower()), relation, frequency)


@_named("keywords:forbidden_words")
def _forbidden_words(text: str, forbidden_words: list[str]) -> bool:
    words = "|".join(map(re.escape, forbidden_words))
    return re.search(rf"(?<!\w)(?:{words})(?!\w)", text, re.IGNORECASE) is None


@_named("keywords:letter_frequency")
def _letter_frequency(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _holds(text.lower().count(letter.strip().lower()), let_relation, let_frequency)


# Length


@_named("length_constraints:number_words")
def _number_words(text: str, num_words: int, relation: str) -> bool:
    return _holds(len(re.findall(r"\w+", text)), relation, num_words)


@_named("length_constraints:number_sentences")
def _number_sentences(text: str, num_sentences: int, relation: str) -> bool:
    return _holds(count_sentences(text), relation, num_sentences)


@_named("length_constraints:number_paragraphs")
def _number_paragraphs(text: str, num_paragraphs: int) -> bool:
    """Compare the number of paragraphs between `***`; none may be blank, except before the first or after the last `***`."""
    first, *inner = (bool(part.strip()) for part in text.split("***"))
    if not inner:
        return num_paragraphs == first
    return all(inner[:-1]) and first + sum(inner) == num_paragraphs


@_named("length_constraints:nth_paragraph_first_word")
def _nth_paragraph_first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Check the number of nonblank paragraphs between blank lines, and the first word of the n-th, from 1."""
    paragraphs = text.split("\n\n")
    filled = sum(1 for paragraph in paragraphs if paragraph.strip())
    if nth_paragraph > filled or not paragraphs[nth_paragraph - 1].strip():
        return False
    word = paragraphs[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
    return filled == num_paragraphs and re.split(r"[.,?!'\"]", word.lower())[0] == first_word.lower()


# Content and format


@_named("detectable_content:number_placeholders")
def _number_placeholders(text: str, num_placeholders: int) -> bool:
    """Compare the number of pairs of square brackets, each within one line."""
    found = 0
    for line in text.split("\n"):
        opening = line.find("[")
        while opening >= 0 and (closing := line.find("]", opening)) >= 0:
            found += 1
            opening = line.find("[", closing)
    return found >= num_placeholders


@_named("detectable_content:postscript")
def _postscript(text: str, postscript_marker: str) -> bool:
    usual = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    marker = postscript_marker.strip()
    return re.search(usual.get(marker) or re.escape(marker.lower()), text.lower()) is not None


@_named("detectable_format:number_bullet_lists")
def _number_bullet_lists(text: str, num_bullets: int) -> bool:
    """Compare the number of lines that start with a single `*`, or with `-`."""
    lines = [line.lstrip() for line in text.split("\n")]
    return num_bullets == sum(line.startswith("-") or bool(re.match(r"\*[^*]", line)) for line in lines)


@_named("detectable_format:constrained_response")
def _constrained_response(text: str) -> bool:
    return any(answer in text for answer in ANSWERS)


@_named("detectable_format:number_highlighted_sections")
def _number_highlighted_sections(text: str, num_highlights: int) -> bool:
    """Compare the number of nonblank texts between `*`, plus those between `**`."""
    once = [part for part in re.findall(r"\*([^\n*]*)\*", text) if part.strip()]
    twice = [part for part in re.findall(r"\*\*([^\n*]*)\*\*", text) if part.strip()]
    return len(once) + len(twice) >= num_highlights


@_named("detectable_format:multiple_sections")
def _multiple_sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(re.escape(section_spliter.strip()) + r"\s?[0-9]", text)) >= num_sections


@_named("detectable_format:json_format")
def _json_format(text: str) -> bool:
    """Check that the whole text is JSON, with or without a code fence."""
    bare = re.sub(r"\A```(?:json|Json|JSON)?", "", text.strip()).removesuffix("```")
    try:
        loads(bare.strip())
    except NoJson:
        return False
    return True


@_named("detectable_format:title")
def _title(text: str) -> bool:
    """Check for a line with text between `<<` and `>>`."""
    for line in text.split("\n"):
        start, end = line.find("<<"), line.rfind(">>")
        if start >= 0 and end > start + 2 and line[start:end].lstrip("<").rstrip(">").strip():
            return True
    return False


# Combination, start and end


@_named("combination:two_responses")
def _two_responses(text: str) -> bool:
    """Check for two different texts separated by `******`."""
    parts = [part.strip() for part in text.split("******")]
    filled = [part for part in parts if part]
    return all(parts[1:-1]) and len(filled) == 2 and filled[0] != filled[1]


@_named("combination:repeat_prompt")
def _repeat_prompt(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


@_named("multi-turn:constrained_start")
def _constrained_start(text: str, starter: str) -> bool:
    """Check that a line starts with `starter`."""
    return any(line.lstrip().startswith(starter.strip()) for line in text.split("\n"))


@_named("startend:end_checker")
def _end_checker(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


@_named("startend:quotation")
def _quotation(text: str) -> bool:
    whole = text.strip()
    return len(whole) > 1 and whole.startswith('"') and whole.endswith('"')


# Case, punctuation and language


@_named("change_case:capital_word_frequency")
def _capital_word_frequency(text: str, capital_frequency: int, capital_relation: str) -> bool:
    """Compare the number of words in capitals; a hyphenated word counts once."""
    words = re.findall(r"\w[\w./&-]*", text)
    return _holds(sum(map(str.isupper, words)), capital_relation, capital_frequency)


@_named("change_case:english_capital")
def _english_capital(text: str) -> bool:
    return text.isupper() and _response_language(text, "en")


@_named("change_case:english_lowercase")
def _english_lowercase(text: str) -> bool:
    return text.islower() and _response_language(text, "en")


@_named("punctuation:no_comma")
def _no_comma(text: str) -> bool:
    return "," not in text


@_named("language:response_language")
def _response_language(text: str, language: str) -> bool:
    """Check the language; a text without letters passes for any."""
    if not any(map(str.isalpha, text)):
        return True
    found = probabilities(text, LANGUAGES | {language})
    return max(found, key=found.__getitem__) == language
