"""A recipe: YAML and overrides become checked settings, and these an `Algorithm`.

A recipe is one flat mapping: an axis holds `{use: name, setting: value, ...}` or just a name (list axes hold lists of
these), a section holds its settings, and `training` holds keywords of `transformers.TrainingArguments`. A recipe with a
`trainer` has no other axis: it trains on a dataset, without rollouts (`OfflineRecipe`).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_rlhf.axes import AXES, LISTS, NESTED, Plugin
from hf_rlhf.config.offline_sections import OFFLINE_SECTIONS, OfflineDataset
from hf_rlhf.config.overrides import apply_overrides
from hf_rlhf.config.recipe_yaml import (
    ALGORITHM_AXES,
    DEFAULTS,
    KEYS,
    OFFLINE,
    OFFLINE_KEYS,
    STAGES,
    RecipeError,
    read_yaml,
    unnamed,
    write_yaml,
)
from hf_rlhf.config.sections import SECTIONS, Dataset, Evaluation, Logging, Update
from hf_rlhf.contract.model_settings import Model
from hf_rlhf.contract.offline_trainer import OfflineTrainer
from hf_rlhf.registry.host import Host, get_host
from hf_rlhf.registry.settings_schema import (
    MISSING,
    Nested,
    checked,
    nested,
    plain,
    plain_text,
    setting_types,
    settings_of,
    type_text,
)
from hf_rlhf.registry.settings_schema import describe as describe
from hf_rlhf.runtime.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from hf_rlhf.config.algorithm import Algorithm


@dataclass(kw_only=True)
class Recipe:
    """A recipe with every plugin made and every setting checked."""

    name: str
    raw: dict[str, Any]
    """The whole recipe with all defaults written out; reading it again gives the same recipe."""
    plugins: dict[str, Any]
    """Axis -> plugin, or list of plugins."""
    model: Model
    dataset: Dataset
    update: Update
    evaluation: Evaluation
    logging: Logging
    training: dict[str, Any]
    """Keywords of `transformers.TrainingArguments`."""
    notes: list[str] = field(default_factory=list)
    """What the overrides dropped."""
    given: list[Plugin] = field(default_factory=list)
    """Plugins that were given as instances: every algorithm gets these themselves, and copies of the others."""

    @property
    def sections(self) -> dict[str, Any]:
        """Section -> its settings."""
        return {name: getattr(self, name) for name in SECTIONS}

    def algorithm(self) -> Algorithm:
        """The chosen plugins as one algorithm."""
        from hf_rlhf.config.algorithm import Algorithm

        plugins = copy.deepcopy(self.plugins, {id(plugin): plugin for plugin in self.given})
        return Algorithm(**plugins, update=self.update)

    def dump(self) -> str:
        """The whole recipe as YAML."""
        return write_yaml(self.raw)


@dataclass(kw_only=True)
class OfflineRecipe(Recipe):
    """A recipe that trains on a dataset, without rollouts: `update`, `evaluation` and `logging` are not read."""

    rows: OfflineDataset
    """The recipe's `dataset`; `Recipe.dataset` holds what any recipe has of it."""

    @property
    def sections(self) -> dict[str, Any]:
        """Section -> its settings."""
        return {"model": self.model, "dataset": self.rows}

    def trainer(self) -> OfflineTrainer:
        """The chosen trainer: the one that was given as an instance, else a new one each time."""
        made: OfflineTrainer = self.plugins[OFFLINE]
        return made if self.given else copy.deepcopy(made)

    def algorithm(self) -> Algorithm:
        """Raises `UserError`: there is none."""
        raise UserError(
            f"the recipe {self.name} trains on a dataset (trainer={self.plugins[OFFLINE].name}) and has no algorithm: "
            "`hf-rlhf check` and `hf-rlhf train` are for it"
        )


def load_recipe(name_or_path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe of a name, `package/name` or path, with overrides such as `kl.0.beta=0.1`, checked as a whole.

    Raises `RecipeError` naming every problem, `UserError` where there is no such recipe or its YAML cannot be read.
    """
    host = get_host()
    written = read_recipe(name_or_path, host)
    _refuse_stages(written, str(name_or_path))
    raw, notes = apply_overrides(written, overrides, host)
    path = Path(name_or_path)
    # A run leaves OUTPUT_DIR/recipe.yaml: it keeps the name of its folder.
    recipe = resolve(raw, host, name=path.absolute().parent.name if path.name == "recipe.yaml" else path.stem)
    recipe.notes = notes
    return recipe


def load_plugin(axis: str, name: str, **settings: Any) -> Any:
    """The plugin `name` (or `package/name`) of an axis, its settings checked.

    A nested plugin is given as its name, as `{"use": name, ...}` or as an instance. Raises `RecipeError` naming every
    wrong setting, `UserError` where there is no such plugin.
    """
    host = get_host()
    host.get(axis, name)
    reader = _Reader(host)
    plugin, _ = reader.plugin(axis, {"use": name, **settings}, axis)
    if reader.problems:
        raise RecipeError(f"{axis} plugin {name!r}", reader.problems)
    return plugin


def read_recipe(name_or_path: str | Path, host: Host | None = None) -> dict[str, Any]:
    """The recipe of a name, `package/name` or path, as it is written."""
    text = str(name_or_path)
    path = Path(text).expanduser()
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UserError(f"there is no recipe file {text}")
    else:
        path = (host or get_host()).find_recipe(text).file
    try:
        raw = read_yaml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path}: a recipe is a mapping with the keys {', '.join(KEYS)}")
    return raw


def make(cls: type, settings: Mapping[str, Any], host: Host | None = None) -> tuple[Any, list[tuple[str, str]]]:
    """A plugin (or a section) from settings as a recipe writes them, or None, and (path, problem) of each that is wrong."""
    reader = _Reader(host or get_host())
    made, _ = reader.group(cls, settings, getattr(cls, "name", cls.__name__))
    return made, reader.problems


def resolve(raw: Mapping[str, Any], host: Host | None = None, name: str = "recipe") -> Recipe:
    """Makes every plugin and section of a recipe. Raises `RecipeError` with all problems at once."""
    _refuse_stages(raw, name)
    reader = _Reader(host or get_host())
    if OFFLINE in raw:
        return _resolve_offline(raw, reader, name)
    for key in raw:
        if key in NESTED:
            reader.refuse(key, f"a {key} is a setting of another plugin: `{AXES[key].axis.nested}`")
        elif key not in KEYS:
            reader.refuse(key, f"a recipe has no such key.{did_you_mean(key, KEYS)} It has: {', '.join(KEYS)}")
    plugins: dict[str, Any] = {}
    plain_plugins: dict[str, Any] = {}
    for axis in sorted(ALGORITHM_AXES, key="reference".__eq__):  # which depends on the others
        given, meant = raw.get(axis, DEFAULTS.get(axis, MISSING)), DEFAULTS.get(axis)
        if axis == "reference":
            lora = isinstance(raw.get("model"), dict) and raw["model"].get("lora") is not None
            meant = reader.reference(plugins, lora)
            given = raw.get(axis, meant)
        plugins[axis], plain_plugins[axis] = reader.axis(axis, given, meant)
    sections, plain_sections = {}, {}
    for section, cls in SECTIONS.items():
        sections[section], plain_sections[section] = reader.group(cls, raw.get(section, {}), section)
    training = reader.training(raw.get("training", {}))
    if reader.problems:
        raise RecipeError(f"the recipe {name}", reader.problems)
    whole = {**{axis: plain_plugins[axis] for axis in ALGORITHM_AXES}, **plain_sections, "training": training}
    return Recipe(
        name=name,
        raw=whole,
        plugins={axis: plugins[axis] for axis in ALGORITHM_AXES},
        training=dict(training),
        given=reader.given,
        **sections,
    )


def _refuse_stages(raw: Mapping[str, Any], name: str) -> None:
    if STAGES in raw:
        raise UserError(
            f"{name} has stages ({', '.join(raw[STAGES] or ())}), each with a recipe of its own: `hf-rlhf run {name}` runs "
            f"them, and `hf-rlhf check {name}` checks them"
        )


def _resolve_offline(raw: Mapping[str, Any], reader: _Reader, name: str) -> OfflineRecipe:
    """A recipe that names a trainer."""
    misplaced = [key for key in raw if key not in OFFLINE_KEYS and (key in KEYS or key in NESTED)]
    if misplaced:
        reader.refuse(
            OFFLINE,
            f"a recipe with a trainer learns from a dataset, without rollouts, and has only {', '.join(OFFLINE_KEYS)}: leave "
            f"{', '.join(misplaced)} out, or {OFFLINE}",
        )
    for key in raw.keys() - {*OFFLINE_KEYS, *misplaced}:
        has = f"A recipe with a trainer has: {', '.join(OFFLINE_KEYS)}"
        reader.refuse(key, f"a recipe has no such key.{did_you_mean(key, OFFLINE_KEYS)} {has}")
    plugin, plain_plugin = reader.axis(OFFLINE, raw[OFFLINE])
    sections, plain_sections = {}, {}
    for section, cls in OFFLINE_SECTIONS.items():
        sections[section], plain_sections[section] = reader.group(cls, raw.get(section, {}), section)
    training = reader.training(raw.get("training", {}))
    if reader.problems:
        raise RecipeError(f"the recipe {name}", reader.problems)
    rows: OfflineDataset = sections["dataset"]
    return OfflineRecipe(
        name=name,
        raw={OFFLINE: plain_plugin, **plain_sections, "training": training},
        plugins={OFFLINE: plugin},
        model=sections["model"],
        rows=rows,
        dataset=rows.as_dataset(),
        update=Update(),
        evaluation=Evaluation(),
        logging=Logging(),
        training=dict(training),
        given=reader.given,
    )


class _Reader:
    """Makes plugins and sections out of plain data and collects what is wrong.

    Each method gives what it made, or None, and the plain data from which it can be made again.
    """

    def __init__(self, host: Host):
        self.host = host
        self.problems: list[tuple[str, str]] = []
        self.given: list[Plugin] = []

    def refuse(self, path: str, text: str) -> tuple[None, None]:
        """Note a problem."""
        self.problems.append((path, text))
        return None, None

    def axis(self, axis: str, given: Any, meant: Any = None) -> tuple[Any, Any]:
        """The plugin or plugins at the top of a recipe; `meant` by leaving it out."""
        names = ", ".join(self.host.names(axis))
        if given is MISSING:
            way = f"`{axis}: [{{use: NAME}}]`" if axis in LISTS else f"`{axis}: {{use: NAME}}`"
            return self.refuse(axis, f"is missing; write {way}. There are: {names}")
        if axis in LISTS:
            return self.plugins(axis, given, axis)
        before = len(self.problems)
        made, text = self.plugin(axis, given, axis, DEFAULTS.get(axis))
        if meant and isinstance(given, Mapping) and "use" not in given and len(self.problems) > before:
            path, problem = self.problems[-1]
            self.problems[-1] = path, problem + unnamed(axis, meant, given, self.host)
        return made, text

    def plugins(self, axis: str, given: Any, path: str) -> tuple[Any, Any]:
        """A list of plugins."""
        if not isinstance(given, list):
            return self.refuse(
                path, f"takes a list, `[]` for none and `[{{use: NAME}}]` for one; got {plain_text(given)}"
            )
        made = [self.plugin(axis, item, f"{path}.{place}") for place, item in enumerate(given)]
        return [plugin for plugin, _ in made], [text for _, text in made]

    def plugin(self, axis: str, given: Any, path: str, default: str | None = None) -> tuple[Any, Any]:
        """One plugin, from `{use: name, ...}`, a name, or an instance."""
        if isinstance(given, Plugin):
            if isinstance(given, AXES[axis]):
                self.given.append(given)
                return given, _as_plain(given)
            return self.refuse(path, f"takes a {axis} plugin; got {given!r}")
        if isinstance(given, str):
            given = {"use": given}
        use = given.get("use", default) if isinstance(given, Mapping) else None
        if not isinstance(use, str):
            names = ", ".join(self.host.names(axis))
            return self.refuse(
                path, f"takes `{{use: NAME, ...}}` or just a name; got {plain_text(given)}. There are: {names}"
            )
        try:
            cls = self.host.get(axis, use)
        except UserError as error:
            return self.refuse(path, str(error))
        made, text = self.group(cls, {key: value for key, value in given.items() if key != "use"}, path)
        return made, {"use": use, **(text or {})}

    def group(self, cls: type, given: Any, path: str) -> tuple[Any, Any]:
        """A dataclass: a section, a group of settings inside one, or a plugin's settings."""
        if not isinstance(given, Mapping):
            names = ", ".join(setting_types(cls))
            return self.refuse(path, f"takes a mapping with the settings {names}; got {plain_text(given)}")
        before = len(self.problems)
        hints = setting_types(cls)
        owner = f"{path}={cls.name}" if issubclass(cls, Plugin) else path
        for key in given:
            if key not in hints:
                has = f"It has: {', '.join(hints)}" if hints else "It has none"
                self.refuse(f"{path}.{key}", f"{owner} has no such setting.{did_you_mean(key, hints)} {has}")
        values: dict[str, Any] = {}
        texts: dict[str, Any] = {}
        for setting in settings_of(cls):
            value = given.get(setting.name, MISSING)
            held = nested(hints[setting.name])
            place = f"{path}.{setting.name}"
            if held and (value is not MISSING or "use" in setting.metadata):
                values[setting.name], texts[setting.name] = self.nested(held, setting, value, place)
            elif value is not MISSING:
                try:
                    values[setting.name] = checked(cls, setting.name, value)
                except ValueError as error:
                    self.refuse(place, str(error))
            elif setting.default is MISSING and setting.default_factory is MISSING:
                self.refuse(place, f"{owner} needs it; it takes {type_text(hints[setting.name])}")
        if len(self.problems) > before:
            return None, None
        try:
            made = cls(**values)
        except (ValueError, TypeError) as error:
            return self.refuse(path, str(error))
        return made, {**settings_as_plain(made), **texts}

    def nested(self, held: Nested, setting: dataclasses.Field[Any], value: Any, path: str) -> tuple[Any, Any]:
        """A setting that is a plugin, a list of plugins or a group of settings."""
        if value is None and held.optional:
            return None, None
        if held.group:
            return (value, _as_plain(value)) if isinstance(value, held.group) else self.group(held.group, value, path)
        assert held.axis
        if held.many:
            return self.plugins(held.axis, value, path)
        default = setting.metadata.get("use")
        return self.plugin(held.axis, {} if value is MISSING else value, path, default)

    def reference(self, plugins: Mapping[str, Any], lora: bool) -> str:
        """The reference where a recipe names none: the policy before training if anything is measured to it."""
        made = [x for value in plugins.values() for x in (value if isinstance(value, list) else [value])]
        if not any("ref_logps" in plugin.needs for plugin in made if plugin is not None):
            return "none"
        return "adapter_off" if lora else "frozen"

    def training(self, given: Any) -> dict[str, Any]:
        """Keywords of TrainingArguments: names and types are checked, values stay as they are written."""
        if not isinstance(given, Mapping):
            self.refuse("training", f"takes keywords of transformers.TrainingArguments; got {plain_text(given)}")
            return {}
        if not given:
            return {}
        from transformers import TrainingArguments

        names = setting_types(TrainingArguments)
        kept = {}
        for key, value in given.items():
            if key not in names:
                text = f"transformers.TrainingArguments has no such setting.{did_you_mean(key, names)}"
                self.refuse(f"training.{key}", text)
                continue
            try:
                number = checked(TrainingArguments, key, value)
            except ValueError as error:
                self.refuse(f"training.{key}", str(error))
            else:
                # Text that is a number reaches TrainingArguments as one: it would compare or add it.
                kept[key] = number if isinstance(number, int | float) else value
        return kept


def settings_as_plain(made: Any) -> dict[str, Any]:
    """The settings of a plugin or a section as a recipe would write them, nested plugins included."""
    held = {name: nested(hint) for name, hint in setting_types(type(made)).items()}
    return {
        name: _as_plain(getattr(made, name)) if holds else plain(type(made), name, getattr(made, name))
        for name, holds in held.items()
    }


def _as_plain(made: Any) -> Any:
    """A plugin, a group of settings, a list of them or None, as a recipe would write it."""
    if made is None:
        return None
    if isinstance(made, list):
        return [_as_plain(item) for item in made]
    name = {"use": made.name} if isinstance(made, Plugin) else {}
    return {**name, **settings_as_plain(made)}
