"""Recipes: YAML and overrides become checked settings, and these an `Algorithm`.

A recipe is one flat mapping. An axis is `{use: name, setting: value, ...}` or just a name (list axes are lists of these), a
section is a mapping of its settings, and `training` holds keywords of `transformers.TrainingArguments`. A recipe with a
`trainer` has no other axis: it trains on a dataset, without rollouts (`OfflineRecipe`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_rlhf.axes import AXES, NESTED, Plugin
from hf_rlhf.config.offline_sections import OFFLINE_SECTIONS, OfflineDataset
from hf_rlhf.config.overrides import apply_overrides
from hf_rlhf.config.recipe_reader import RecipeReader
from hf_rlhf.config.recipe_yaml import (
    ALGORITHM_AXES,
    DEFAULTS,
    KEYS,
    OFFLINE,
    OFFLINE_KEYS,
    STAGES,
    RecipeError,
    read_yaml,
    unknown_key,
    write_yaml,
)
from hf_rlhf.config.sections import SECTIONS, Dataset, Evaluation, Logging, Update
from hf_rlhf.contract.model_settings import Model
from hf_rlhf.contract.offline_trainer import OfflineTrainer
from hf_rlhf.registry.host import Host, get_host
from hf_rlhf.registry.settings_schema import MISSING
from hf_rlhf.runtime.errors import UserError

if TYPE_CHECKING:
    from transformers import TrainingArguments

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
    """Settings that the overrides dropped."""
    given: list[Plugin] = field(default_factory=list)
    """Plugins given as instances: every algorithm gets these themselves, and copies of the others."""

    @property
    def sections(self) -> dict[str, Any]:
        """Map each section to its settings."""
        return {name: getattr(self, name) for name in SECTIONS}

    def algorithm(self) -> Algorithm:
        """Return the chosen plugins as one algorithm."""
        from hf_rlhf.config.algorithm import Algorithm

        plugins = copy.deepcopy(self.plugins, {id(plugin): plugin for plugin in self.given})
        return Algorithm(**plugins, update=self.update)

    def training_arguments(self, output_dir: str | None = None, **own: Any) -> TrainingArguments:
        """Return TrainingArguments with the recipe's `training` and the command line's defaults; `own` wins over both.

        The output folder is `outputs/NAME` by default. Raises `UserError` where transformers rejects the arguments.
        """
        from hf_rlhf.config.training_arguments import training_arguments

        return training_arguments(self.name, self.training, output_dir or f"outputs/{self.name}", own)

    def training_keywords(self, output_dir: str | None = None, **own: Any) -> dict[str, Any]:
        """Return the keywords of `training_arguments`, for subclasses of TrainingArguments."""
        from hf_rlhf.config.training_arguments import training_keywords

        return training_keywords(self.name, self.training, output_dir or f"outputs/{self.name}", own)

    def dump(self) -> str:
        """Return the whole recipe as YAML."""
        return write_yaml(self.raw)


@dataclass(kw_only=True)
class OfflineRecipe(Recipe):
    """A recipe that trains on a dataset, without rollouts: `update`, `evaluation` and `logging` are not read."""

    rows: OfflineDataset
    """The recipe's `dataset`; `Recipe.dataset` holds the settings that all recipes share."""

    @property
    def sections(self) -> dict[str, Any]:
        """Map each section to its settings."""
        return {"model": self.model, "dataset": self.rows}

    def trainer(self) -> OfflineTrainer:
        """Return the chosen trainer: the instance that was given, else a new one each time."""
        made: OfflineTrainer = self.plugins[OFFLINE]
        return made if self.given else copy.deepcopy(made)

    def algorithm(self) -> Algorithm:
        """Raise `UserError`: there is no algorithm."""
        raise UserError(
            f"the recipe {self.name} trains on a dataset (trainer={self.plugins[OFFLINE].name}) and has no algorithm: "
            "check and train it"
        )


def load_recipe(name_or_path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Load the recipe of a name, `package/name` or path, with overrides such as `kl.0.beta=0.1`.

    Raises `RecipeError` with every problem, and `UserError` where there is no such recipe or its YAML cannot be read.
    """
    host = get_host()
    written = read_recipe(name_or_path, host)
    _refuse_stages(written, str(name_or_path))
    raw, notes = apply_overrides(written, overrides, host)
    path = Path(name_or_path)
    # OUTPUT_DIR/recipe.yaml, which a run writes, is named after its folder.
    recipe = resolve(raw, host, name=path.absolute().parent.name if path.name == "recipe.yaml" else path.stem)
    recipe.notes = notes
    return recipe


def load_plugin(axis: str, name: str, **settings: Any) -> Any:
    """Return the plugin `name` (or `package/name`) of an axis, with its settings checked.

    A nested plugin is given as its name, as `{"use": name, ...}` or as an instance. Raises `RecipeError` with every wrong
    setting, and `UserError` where there is no such plugin.
    """
    host = get_host()
    host.get(axis, name)
    reader = RecipeReader(host)
    plugin, _ = reader.plugin(axis, {"use": name, **settings}, axis)
    if reader.problems:
        raise RecipeError(f"{axis} plugin {name!r}", reader.problems)
    return plugin


def read_recipe(name_or_path: str | Path, host: Host | None = None) -> dict[str, Any]:
    """Return the recipe of a name, `package/name` or path as written."""
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
        raise UserError(f"{path}: a recipe must be a mapping with the keys {', '.join(KEYS)}")
    return raw


def make(cls: type, settings: Mapping[str, Any], host: Host | None = None) -> tuple[Any, list[tuple[str, str]]]:
    """Return a plugin or section made from a recipe's settings, or None, and (path, problem) of each wrong setting."""
    reader = RecipeReader(host or get_host())
    made, _ = reader.group(cls, settings, getattr(cls, "name", cls.__name__))
    return made, reader.problems


def resolve(raw: Mapping[str, Any], host: Host | None = None, name: str = "recipe") -> Recipe:
    """Make every plugin and section of a recipe. Raises `RecipeError` with all problems at once."""
    _refuse_stages(raw, name)
    reader = RecipeReader(host or get_host())
    if OFFLINE in raw:
        return _resolve_offline(raw, reader, name)
    for key in raw:
        if key in NESTED:
            reader.refuse(key, f"a {key} is a setting of another plugin: `{AXES[key].axis.nested}`")
        elif key not in KEYS:
            reader.refuse(key, f"a recipe has no such key.{unknown_key(key)} It has: {', '.join(KEYS)}")
    plugins: dict[str, Any] = {}
    plain_plugins: dict[str, Any] = {}
    for axis in sorted(ALGORITHM_AXES, key="reference".__eq__):  # depends on the others
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
            f"{name} has stages ({', '.join(raw[STAGES] or ())}), each with a recipe of its own: run them with "
            f"`hf-rlhf pipeline {name}`, or check them with `hf-rlhf check {name}`"
        )


def _resolve_offline(raw: Mapping[str, Any], reader: RecipeReader, name: str) -> OfflineRecipe:
    """Make a recipe that names a trainer."""
    misplaced = [key for key in raw if key not in OFFLINE_KEYS and (key in KEYS or key in NESTED)]
    if misplaced:
        reader.refuse(
            OFFLINE,
            f"a recipe with a trainer learns from a dataset, without rollouts, and has only {', '.join(OFFLINE_KEYS)}: leave "
            f"{', '.join(misplaced)} out, or {OFFLINE}",
        )
    for key in raw.keys() - {*OFFLINE_KEYS, *misplaced}:
        has = f"A recipe with a trainer has: {', '.join(OFFLINE_KEYS)}"
        reader.refuse(key, f"a recipe has no such key.{unknown_key(key, OFFLINE_KEYS)} {has}")
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
