"""JSON schema of recipes, for editors and other readers: installed plugins, sections and TrainingArguments, with their docs."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, Union

from hf_rlhf._version import __version__
from hf_rlhf.axes import LISTS
from hf_rlhf.config.offline_sections import OFFLINE_SECTIONS
from hf_rlhf.config.recipe_yaml import ALGORITHM_AXES, DEFAULTS, OFFLINE, STAGES, TOP_AXES
from hf_rlhf.config.sections import SECTIONS
from hf_rlhf.config.training_arguments import FORCED, OFFLINE_REFUSED, REFUSED, WITHOUT_EFFECT
from hf_rlhf.registry import hookspecs
from hf_rlhf.registry.discovery import PluginEntry
from hf_rlhf.registry.host import Host, get_host
from hf_rlhf.registry.settings_schema import MISSING, nested, plain, setting_docs, setting_types, settings_of

Schema = dict[str, Any]
DIALECT = "http://json-schema.org/draft-07/schema#"
"""The version that editors support; there, keywords beside `$ref` are ignored."""
FILE = "recipe.schema.json"
HEADER = f"# yaml-language-server: $schema={FILE}\n"
"""First line of a recipe whose schema is in the same folder."""
UNSET: tuple[Any, ...] = (None, False, "no", [], "")
"""Values that a refused argument may have besides its default."""


def recipe_schema(host: Host | None = None) -> Schema:
    """Return the JSON schema of recipes with rollouts, without, and with stages. Imports every installed plugin."""
    made = _Schemas(host or get_host())
    defs = {"rollouts": made.rollouts(), "offline": made.offline(), "pipeline": made.pipeline(), **made.defs}
    packages = sorted({offer.source for offer in made.host.offers() if not offer.problem})
    kinds = {
        STAGES: "Stages of a pipeline, in their order; a recipe with stages has no other key.",
        OFFLINE: f"{hookspecs.summary(OFFLINE)} A recipe with a trainer has no rollouts.",
    }
    return {
        "$schema": DIALECT,
        "title": f"Recipe of hf_rlhf {__version__}",
        "description": f"Made by `hf-rlhf schema` with the plugins of {', '.join(packages)}.",
        "type": "object",
        "properties": {key: {"description": text} for key, text in kinds.items()},
        "if": {"required": [STAGES]},
        "then": _ref("pipeline"),
        "else": {"if": {"required": [OFFLINE]}, "then": _ref("offline"), "else": _ref("rollouts")},
        "$defs": defs,
    }


class _Schemas:
    """Write schemas, and collect those that others refer to in `defs`."""

    def __init__(self, host: Host):
        self.host = host
        self.defs: dict[str, Schema] = {}

    def rollouts(self) -> Schema:
        """Write the schema of a recipe with rollouts."""
        axes = {axis: self.top(axis) for axis in ALGORITHM_AXES}
        required = [axis for axis in axes if axis not in DEFAULTS and axis != "reference"]
        return _mapping({**axes, **self.sections(SECTIONS), "training": self.training(REFUSED)}, required)

    def offline(self) -> Schema:
        """Write the schema of a recipe with a trainer."""
        training = self.training(OFFLINE_REFUSED)
        return _mapping(
            {OFFLINE: self.top(OFFLINE), **self.sections(OFFLINE_SECTIONS), "training": training}, [OFFLINE]
        )

    def pipeline(self) -> Schema:
        """Write the schema of a recipe with stages, whose `set` has dotted keys."""
        from transformers import TrainingArguments

        arguments = _arguments({})["properties"]
        settings = {
            key: [*setting_types(cls), *setting_types(OFFLINE_SECTIONS.get(key, cls))] for key, cls in SECTIONS.items()
        }
        settings["training"] = [*setting_types(TrainingArguments)]
        keys = [
            rf"({'|'.join(TOP_AXES)})(\..+)?",
            *(rf"{key}(\.({'|'.join(names)})(\..+)?)?" for key, names in settings.items()),
        ]
        dotted = {
            "type": "object",
            "description": "Overrides by dotted key. `stage:NAME` is the output folder of an earlier stage.",
            "properties": {f"training.{name}": schema for name, schema in arguments.items()},
            "propertyNames": {"pattern": f"^({'|'.join(keys)})$"},
        }
        recipe = {"type": "string", "description": "Name, package/name or file of the stage's recipe."}
        whole = _mapping({"recipe": recipe, "set": dotted}, ["recipe"])
        stages = {
            "type": "object",
            "minProperties": 1,
            "propertyNames": {"pattern": r"^[^\W\d]\w*$"},
            "additionalProperties": {"if": {"type": "string"}, "then": {}, "else": whole},
        }
        return _mapping({STAGES: stages}, [STAGES])

    def top(self, axis: str) -> Schema:
        """Write the schema of an axis that is a key of recipes."""
        if axis in LISTS:
            many = {"type": "array", "items": self.plugin(axis)}
            one_or_many = {"if": {"type": "array"}, "then": many, "else": self.plugin(axis)}
            return {**one_or_many, "description": hookspecs.summary(axis)}
        default = DEFAULTS.get(axis)
        return _described(self.plugin(axis, default), hookspecs.summary(axis), default)

    def sections(self, sections: Mapping[str, type]) -> dict[str, Schema]:
        """Write the schemas of sections."""
        return {name: self.group(cls) for name, cls in sections.items()}

    def plugin(self, axis: str, default: str | None = None) -> Schema:
        """Write a plugin of an axis: its name, or a mapping whose `use` may be left out for the default."""
        key = f"{axis}={default}" if default else axis
        if key not in self.defs:
            offers = [offer for offer in self.host.offers(axis) if not offer.problem]
            bare = [offer.name for offer in offers]
            names = {
                "anyOf": [
                    {"enum": sorted({name for name in bare if bare.count(name) == 1})},
                    {"pattern": "|".join(f"^{_package(offer)}/{re.escape(offer.name)}$" for offer in offers) or "(?!)"},
                ],
                "description": f"Name of a plugin of the axis {axis}, or package/name.",
            }
            self.defs[key] = {  # before its plugins: one may hold another of its axis
                "type": ["string", "object"],
                "if": {"type": "string"},
                "then": names,
                "else": {"properties": {"use": names}, "required": [] if default else ["use"]},
            }
            self.defs[key]["allOf"] = [
                {
                    "if": {
                        "type": "object",
                        "properties": {"use": {"pattern": _called(offer, bare.count(offer.name) > 1)}},
                        "required": [] if offer.name == default else ["use"],
                    },
                    "then": self.settings(offer),
                }
                for offer in offers
            ]
        return _ref(key)

    def settings(self, offer: PluginEntry) -> Schema:
        """Write the mapping of one plugin's settings."""
        key = re.sub(r"\W+", "_", f"{offer.axis}_{offer.file or offer.package}_{offer.name}")
        if key not in self.defs:
            self.defs[key] = {}
            cls = self.host.get(offer.axis, f"{offer.file.name if offer.file else offer.package}/{offer.name}")
            self.defs[key] = self.group(cls)
            self.defs[key]["properties"]["use"] = {}
        return _ref(key)

    def group(self, cls: type) -> Schema:
        """Write the mapping of a dataclass' settings."""
        hints, docs = setting_types(cls), setting_docs(cls)
        properties = {
            field.name: _described(self.value(hints[field.name], field), docs.get(field.name, ""), _default(cls, field))
            for field in settings_of(cls)
        }
        required = [field.name for field in settings_of(cls) if _is_required(field)]
        return _mapping(properties, required, inspect.getdoc(cls) or "")

    def value(self, hint: Any, field: dataclasses.Field[Any]) -> Schema:
        """Write a setting's values."""
        held = nested(hint)
        if held is None:
            return _of_type(hint)
        if held.group:
            made = self.group(held.group)
        else:
            assert held.axis
            made = self.plugin(held.axis, field.metadata.get("use"))
        if held.many:
            made = {"type": "array", "items": made}
        return {"anyOf": [made, {"type": "null"}]} if held.optional else made

    def training(self, refused: Mapping[str, str]) -> Schema:
        """Write the keywords of TrainingArguments."""
        key = "training" if refused is REFUSED else "offline_training"
        self.defs[key] = _arguments(refused)
        return _ref(key)


def _arguments(refused: Mapping[str, str]) -> Schema:
    from transformers import TrainingArguments

    hints, properties = setting_types(TrainingArguments), {}
    for field in settings_of(TrainingArguments):
        schema, text = _of_type(hints[field.name]), " ".join(str(field.metadata.get("help", "")).split())
        default = _default(TrainingArguments, field)
        if field.name in refused:
            schema, text = {"enum": [default, *(x for x in UNSET if x != default)]}, f"Refused: {refused[field.name]}."
        elif field.name in FORCED and refused is REFUSED:
            text = f"Always {FORCED[field.name][0]}: {FORCED[field.name][1]}."
        elif field.name in WITHOUT_EFFECT and refused is REFUSED:
            text = f"Without effect: {WITHOUT_EFFECT[field.name]}."
        properties[field.name] = _described(schema, text, default)
    return _mapping(properties, [], "Keywords of transformers.TrainingArguments.")


def _of_type(hint: Any) -> Schema:
    """Return pydantic's schema of a type without titles and references; of a type that it does not know, any value."""
    from pydantic import ConfigDict, TypeAdapter
    from pydantic.errors import PydanticInvalidForJsonSchema, PydanticSchemaGenerationError

    parts = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else ()
    enums = [part for part in parts if isinstance(part, type) and issubclass(part, enum.Enum)]
    if enums and str in parts:  # TrainingArguments makes the enum of the text
        hint = Union[tuple(part for part in parts if part is not str)]  # noqa: UP007
    try:
        made = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)).json_schema()
    except (PydanticInvalidForJsonSchema, PydanticSchemaGenerationError):
        return {}
    defs = made.pop("$defs", {})
    return dict(_inlined(made, defs))


def _inlined(schema: Any, defs: Mapping[str, Any], within: tuple[str, ...] = ()) -> Any:
    if isinstance(schema, list):
        return [_inlined(item, defs, within) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return {} if name in within else _inlined(defs[name], defs, (*within, name))
    renamed = {"prefixItems": "items"}  # draft 7's name
    return {
        renamed.get(key, key): _inlined(value, defs, within)
        for key, value in schema.items()
        if not (key in ("title", "description") and isinstance(value, str))
    }


def _mapping(properties: Schema, required: list[str], text: str = "") -> Schema:
    made: Schema = {"type": "object", "description": text} if text else {"type": "object"}
    return {**made, "properties": properties, "required": required, "additionalProperties": False}


def _ref(key: str) -> Schema:
    return {"$ref": f"#/$defs/{key}"}


def _described(schema: Schema, text: str, default: Any = MISSING) -> Schema:
    said = {"description": text} if text else {}
    said |= {} if default is MISSING or (default is None and "$ref" in schema) else {"default": default}
    return {"allOf": [schema], **said} if "$ref" in schema else {**schema, **said}


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING and "use" not in field.metadata


def _default(cls: type, field: dataclasses.Field[Any]) -> Any:
    """Return a setting's default as a recipe would write it, or MISSING."""
    if "use" in field.metadata:
        return field.metadata["use"]
    if field.default is MISSING and field.default_factory is MISSING:
        return MISSING
    value = field.default if field.default_factory is MISSING else field.default_factory()
    return MISSING if nested(setting_types(cls)[field.name]) and value is not None else plain(cls, field.name, value)


def _package(offer: PluginEntry) -> str:
    """Return a pattern of the name of an entry's package or file."""
    return re.escape(offer.file.name) if offer.file else re.sub(r"[-_.]+", "[-_.]+", offer.package)


def _called(offer: PluginEntry, is_ambiguous: bool) -> str:
    """Return a pattern of the names that a recipe may call a plugin by."""
    prefix = f"{_package(offer)}/"
    return f"^{prefix if is_ambiguous else f'({prefix})?'}{re.escape(offer.name)}$"
