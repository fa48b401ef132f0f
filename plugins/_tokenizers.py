"""Comparison of tokenizers: whether another model can read the policy's token ids."""

from __future__ import annotations

from typing import Any

PROBE = "The 2nd of 30 words isn't one:\n\n\tx = f(1.50) + [y_i];  naïve, Größe, 你好 — END"
"""Text that tokenizers with the same vocabulary but different rules split differently."""


def tokenizer_of(path: str | None, revision: str | None) -> Any:
    """Load the tokenizer that is saved with a model; None if there is none."""
    from transformers import AutoTokenizer

    try:
        found: Any = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
        if not set(found.get_vocab()) - set(found.all_special_tokens):  # some classes load without any files
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return found


def split_difference(own: Any, theirs: Any) -> str | None:
    """Describe the first place where two tokenizers split a text differently; None if they do not."""
    mine, other = (list(x(PROBE, add_special_tokens=False)["input_ids"]) for x in (own, theirs))
    if mine == other:
        return None
    place = next((i for i, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b), min(len(mine), len(other)))
    names = [
        x.convert_ids_to_tokens(ids[place]) if place < len(ids) else "nothing"
        for x, ids in ((own, mine), (theirs, other))
    ]
    return f"token {place} of {PROBE!r} is {names[0]!r} in the policy's and {names[1]!r} there"


def common_tokens(own: Any, theirs: Any) -> tuple[int | None, str | None]:
    """Return the number of token ids, from 0, that both tokenizers have, None if `theirs` has all, and why they cannot be used
    together, None if they can: an id that both have stands for the same token.

    Ids that only one of them has must follow all the others, as added tokens do; rows of a model that stand for no token are
    not compared.
    """
    ours, its = ({place: token for token, place in x.get_vocab().items()} for x in (own, theirs))
    both = sorted(ours.keys() & its.keys())
    for place in both:
        if ours[place] != its[place]:
            return None, f"token {place} is {ours[place]!r} in the policy's and {its[place]!r} there"
    missing = sorted(ours.keys() - its.keys())
    if missing and any(place > missing[0] for place in both):
        return None, f"token {missing[0]}, {ours[missing[0]]!r} in the policy's, is none there, and later ones are"
    return (missing[0] if missing else None), split_difference(own, theirs)
