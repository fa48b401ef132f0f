"""JSON in completions, and validators of JSON schemas."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any, NoReturn


class NoJson(ValueError):
    """Error for a text that is not JSON."""


def last_block(text: str) -> str:
    """Return the content of the last code block in JSON (or without a language); the whole text if there is none."""
    if "```" not in text:
        return text
    block: str | None = None
    lines: list[str] | None = None
    language = ""
    for line in text.split("\n"):
        mark = line.strip()
        if lines is None:
            if mark.startswith("```"):
                lines, language = [], mark[3:].strip().lower()
        elif mark == "```":
            block = "\n".join(lines) if language in ("", "json") else block
            lines = None
        else:
            lines.append(line)
    return text if block is None else block


def loads(text: str) -> Any:
    """Parse a JSON text (RFC 8259: no NaN or Infinity). Raises `NoJson`."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise NoJson(str(error)) from None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


@lru_cache(maxsize=1000)
def validator(schema: str) -> Any:
    """Return a validator, with `is_valid(value)`, for a schema given as JSON text.

    References resolve within the schema and the specification; nothing is fetched. Raises `ValueError` for an invalid
    schema.
    """
    import jsonschema
    from referencing.jsonschema import EMPTY_REGISTRY

    parsed = json.loads(schema)
    kind = jsonschema.validators.validator_for(parsed, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(parsed)
    except jsonschema.SchemaError as error:
        raise ValueError(f"schema must be a JSON schema: {error.message} (at {error.json_path})") from error
    return kind(parsed, registry=EMPTY_REGISTRY)
