"""A pipeline: a recipe with stages, each an ordinary recipe that may read the output of earlier ones.

    stages:
      sft: {recipe: sft, set: {training.max_steps: 100}}
      rl: {recipe: grpo, set: {model.path: stage:sft}}

`set` holds overrides by dotted key, as on the command line. A value `stage:NAME` is the output folder of an earlier stage, and
`stage:NAME/part` a place in it. All stages are checked before any model is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_rlhf.config.overrides import apply_overrides, value_at
from hf_rlhf.config.recipe import OfflineRecipe, Recipe, read_recipe, resolve
from hf_rlhf.config.recipe_yaml import STAGES, RecipeError, write_yaml
from hf_rlhf.registry.host import Host, get_host
from hf_rlhf.registry.settings_schema import plain_text
from hf_rlhf.runtime.errors import UserError, did_you_mean

OUTPUT_OF = "stage:"
"""Prefix of a stage's name in a value that stands for its output folder."""
SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 0.1, "save_total_limit": 1}
"""Default checkpoints of a stage: ten, of which the newest is kept."""
STAGE_KEYS = ("recipe", "set")


@dataclass(frozen=True, kw_only=True)
class PipelineStage:
    """One stage of a pipeline."""

    name: str
    source: str
    """Name, package/name or file of its recipe."""
    title: str
    """Name of its run: PIPELINE/STAGE."""
    given: dict[str, Any]
    """Overrides of the pipeline and the command line, by dotted key."""
    recipe: Recipe
    """Checked; its values contain `stage:` as written."""

    @property
    def reads(self) -> dict[str, tuple[str, str]]:
        """Map each dotted key to the stage that it reads and the place in that stage's output folder."""
        return dict(_references(self.recipe.raw))

    def placed(self, root: Path) -> Recipe:
        """Return the recipe with every `stage:` replaced by the absolute path of its folder below `root`.

        Absolute paths let a checkpoint be recognized from any working directory.
        """
        made = resolve(_placed(self.recipe.raw, root.absolute()), name=self.title)
        made.notes = self.recipe.notes
        return made


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """A recipe with stages, each checked by itself and against the others."""

    name: str
    stages: list[PipelineStage]

    def dump(self) -> str:
        """Return the pipeline with the command line's overrides, as YAML."""
        return write_yaml({STAGES: {stage.name: {"recipe": stage.source, "set": stage.given} for stage in self.stages}})

    def stage(self, name: str) -> PipelineStage:
        """Return the stage of a name."""
        return next(stage for stage in self.stages if stage.name == name)


def is_pipeline(name_or_path: str | Path | None, host: Host | None = None) -> bool:
    """Return whether there is such a recipe and it has stages."""
    if name_or_path is None:
        return False
    try:
        return STAGES in read_recipe(name_or_path, host)
    except UserError:
        return False  # loading it reports why


def load_pipeline(name_or_path: str | Path, words: Iterable[str] = (), seed: int | None = None) -> Pipeline:
    """Load the pipeline of a name, `package/name` or path, with overrides `stage.key=value` and one seed for all stages.

    Raises `RecipeError` or `UserError` naming the stage.
    """
    host = get_host()
    raw, path = read_recipe(name_or_path, host), Path(name_or_path)
    name = path.absolute().parent.name if path.name == "recipe.yaml" else path.stem
    if STAGES not in raw:
        raise UserError(f"{name_or_path} has no stages: use `hf-rlhf train {name_or_path}`")
    written = _written(raw, name)
    for stage, key, value in _by_stage(words, written):
        if key == "recipe":
            written[stage]["recipe"] = value
        else:
            written[stage].setdefault("words", []).append(f"{key}={value}")
    stages = [_stage(name, stage, parts, seed, host) for stage, parts in written.items()]
    problems = [problem for place, stage in enumerate(stages) for problem in _misfits(stage, stages[:place], stages)]
    if problems:
        raise RecipeError(f"the pipeline {name}", problems)
    return Pipeline(name=name, stages=stages)


def _written(raw: Mapping[str, Any], name: str) -> dict[str, dict[str, Any]]:
    """Return recipe and set of each stage, as written in the file."""
    problems = [(key, f"a recipe with stages has only the key {STAGES}") for key in raw if key != STAGES]
    given = raw[STAGES]
    if not isinstance(given, Mapping) or not given:
        raise RecipeError(
            f"the pipeline {name}",
            [*problems, (STAGES, f"must be a mapping `{{NAME: {{recipe: RECIPE}}}}`, got {plain_text(given)}")],
        )
    written = {}
    for stage, parts in given.items():
        path = f"{STAGES}.{stage}"
        parts = {"recipe": parts} if isinstance(parts, str) else parts
        if not stage.isidentifier():
            problems.append(
                (path, "a stage's name must consist of letters, digits and underscores and not start with a digit")
            )
        elif not isinstance(parts, Mapping) or not isinstance(parts.get("recipe"), str):
            problems.append((path, f"must be `{{recipe: RECIPE, set: {{KEY: VALUE}}}}`, got {plain_text(parts)}"))
        elif not isinstance(parts.get("set", {}), Mapping):
            problems.append((f"{path}.set", f"must be a mapping of dotted keys, got {plain_text(parts['set'])}"))
        else:
            unknown = [key for key in parts if key not in STAGE_KEYS]
            problems += [(f"{path}.{key}", f"unknown key; a stage has {', '.join(STAGE_KEYS)}") for key in unknown]
            written[stage] = {"recipe": parts["recipe"], "set": dict(parts.get("set", {}))}
    if problems:
        raise RecipeError(f"the pipeline {name}", problems)
    return written


def _by_stage(words: Iterable[str], stages: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield stage, key and value of each `stage.key=value`."""
    problems = []
    for word in words:
        path, equals, value = word.partition("=")
        stage, dot, key = path.partition(".")
        first = next(iter(stages))
        if not equals or not dot or not key:
            problems.append((word, f"write STAGE.KEY=VALUE, for instance {first}.training.seed=1"))
        elif stage not in stages:
            there = f"{did_you_mean(stage, stages)} The stages are: {', '.join(stages)}"
            problems.append((path, f"there is no stage {stage!r}.{there}"))
        elif key.partition(".")[0] == "set":
            problems.append((path, f"write {stage}.KEY=VALUE without set"))
        else:
            yield stage, key, value
    if problems:
        raise RecipeError("the command line", problems)


def _stage(staged: str, name: str, parts: dict[str, Any], seed: int | None, host: Host) -> PipelineStage:
    source, given = parts["recipe"], dict(parts["set"])
    words = [] if seed is None else [f"training.seed={seed}"]
    words += parts.get("words", [])
    try:
        raw = read_recipe(source, host)
        if STAGES in raw:
            raise UserError(f"its recipe {source} has stages itself: list its stages instead")
        whole, notes = apply_overrides(raw, [*given.items(), *words], host)
        training = whole.get("training") or {}
        if isinstance(training, Mapping) and "save_strategy" not in training:
            whole["training"] = {**SAVING, **training}
        recipe = resolve(whole, host, name=f"{staged}/{name}")
    except UserError as error:
        raise UserError(f"stage {name}: {error}") from error
    recipe.notes = notes
    given |= {key: value_at(whole, key.split(".")) for key in (word.partition("=")[0] for word in words)}
    return PipelineStage(name=name, source=source, title=recipe.name, given=given, recipe=recipe)


def _references(value: Any, path: str = "") -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield (dotted key, (stage, place in its folder)) of every `stage:` in plain data."""
    if isinstance(value, str) and value.startswith(OUTPUT_OF):
        stage, _, rest = value.removeprefix(OUTPUT_OF).partition("/")
        yield path, (stage, rest)
    elif isinstance(value, Mapping | list):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, inner in items:
            yield from _references(inner, f"{path}.{key}" if path else str(key))


def _placed(value: Any, root: Path) -> Any:
    """Return plain data with folders in place of `stage:`."""
    if isinstance(value, str) and value.startswith(OUTPUT_OF):
        return str(root / value.removeprefix(OUTPUT_OF))
    if isinstance(value, Mapping):
        return {key: _placed(inner, root) for key, inner in value.items()}
    return [_placed(inner, root) for inner in value] if isinstance(value, list) else value


def _misfits(
    stage: PipelineStage, earlier: list[PipelineStage], stages: list[PipelineStage]
) -> Iterator[tuple[str, str]]:
    """Yield (stage.key, problem) of each reference to another stage that is wrong."""
    names, before = [s.name for s in stages], {s.name: s for s in earlier}
    for key, (wanted, rest) in stage.reads.items():
        path, said = f"{stage.name}.{key}", f"{OUTPUT_OF}{wanted}"
        if wanted not in names:
            yield path, f"there is no stage {wanted!r}.{did_you_mean(wanted, names)} The stages are: {', '.join(names)}"
        elif wanted not in before:
            what = "is this stage itself" if wanted == stage.name else "comes later"
            yield path, f"{said} {what}; a stage can read earlier ones: {', '.join(before) or 'there are none'}"
        elif key.startswith("dataset."):
            yield path, f"{said} is a model's folder, and a dataset is checked before anything runs: name a dataset"
        elif not rest:
            wrong = _misfit(stage, key, before[wanted])
            if wrong:
                yield path, wrong


def _misfit(stage: PipelineStage, key: str, source: PipelineStage) -> str | None:
    """Return why the output of `source` cannot be read at a key; None where it can."""
    trains, reads = source.recipe, stage.recipe
    head = trains.trainer().head if isinstance(trains, OfflineRecipe) else "causal"
    reward = trains.trainer().reward if isinstance(trains, OfflineRecipe) else ""
    wanted = reads.trainer().head if isinstance(reads, OfflineRecipe) else "causal"
    axis, _, rest = key.partition(".")
    if key == "model.path":
        if wanted == "causal" != head:
            return f"{OUTPUT_OF}{source.name} is a {head} classifier, and a language model is trained here"
        if _leaves_adapter(trains) and (
            isinstance(reads, OfflineRecipe) or reads.model.load_in_4bit or reads.model.load_in_8bit
        ):
            who = "a trainer" if isinstance(reads, OfflineRecipe) else "model.load_in_4bit or load_in_8bit"
            return f"{OUTPUT_OF}{source.name} leaves only an adapter, and {who} needs a whole model: {_merging(source)}"
    place, _, setting = rest.partition(".")
    if axis == "rewards" and setting == "model" and "reward_model" in reads.plugins[axis][int(place)].provides:
        name = reads.plugins[axis][int(place)].name
        if reward != name:
            left = f"a model for rewards.{reward}" if reward else "no reward model"
            return f"{OUTPUT_OF}{source.name} leaves {left}, and rewards.{name} reads it"
        if _leaves_adapter(trains):
            return f"{OUTPUT_OF}{source.name} leaves only an adapter, and rewards.{name} reads a whole model: {_merging(source)}"
    return None


def _merging(source: PipelineStage) -> str:
    return f"set {source.name}.model.save_merged=true"


def _leaves_adapter(recipe: Recipe) -> bool:
    """Return whether a recipe's run leaves an adapter without its base."""
    merges = isinstance(recipe, OfflineRecipe) if recipe.model.save_merged is None else recipe.model.save_merged
    return recipe.model.lora is not None and not merges
