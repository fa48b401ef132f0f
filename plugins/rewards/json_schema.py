"""1 if the completion is JSON that is valid under a JSON Schema (json-schema.org), else 0."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from hf_rlhf import hookimpl
from hf_rlhf.axes import Fraction, RewardSource
from hf_rlhf.batch import Rollouts

from ._json import NoJson, last_block, loads, validator


@dataclass(kw_only=True)
class JsonSchema(RewardSource):
    """1.0 if the completion's JSON is valid under the schema, `partial` if it is other JSON, else 0.0.

    The JSON is the last fenced JSON block, or else the whole completion. No score if the row's schema is missing.
    """

    name = "json_schema"
    verifier = True
    rowwise = True

    schema: dict[str, Any] | None = None
    """Schema, of any draft that jsonschema supports, 2020-12 by default; alternatively set `column`."""
    column: str | None = None
    """Dataset column with each row's schema, as an object or as JSON text."""
    partial: Fraction = 0.0
    """Score of JSON that is invalid under the schema."""

    def __post_init__(self) -> None:
        if (self.schema is None) == (self.column is None):
            raise ValueError(
                "exactly one of schema, a JSON schema, and column, a dataset column of schemas, must be set"
            )
        if self.schema is not None:
            validator(json.dumps(self.schema))

    def prepare(self) -> None:
        validator(json.dumps({} if self.schema is None else self.schema))

    def __call__(self, rollouts: Rollouts) -> list[float | None]:
        schemas = rollouts.column(self.column) if self.column else [self.schema] * len(rollouts)
        return [self._score(*row) for row in zip(rollouts.completions, schemas, strict=True)]

    def answer(self, completion: str) -> str | None:
        """Return the JSON with sorted keys and no whitespace."""
        try:
            value = loads(last_block(completion))
            return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
        except (NoJson, ValueError, RecursionError):
            return None

    def columns(self) -> set[str]:
        return {self.column} if self.column else set()

    def _score(self, completion: str, schema: Any) -> float | None:
        if schema is None:
            return None
        valid = validator(schema if isinstance(schema, str) else json.dumps(schema)).is_valid
        try:
            value = loads(last_block(completion))
        except NoJson:
            return 0.0
        return 1.0 if valid(value) else self.partial


@hookimpl
def rewards() -> list[type[RewardSource]]:
    return [JsonSchema]
