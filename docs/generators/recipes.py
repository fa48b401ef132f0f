"""Recipes: tables of what they choose, and every recipe with its plan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from generators.markdown import code, folded, own_host, table
from generators.plugins import papers
from hf_rlhf.config.pipeline import is_pipeline, load_pipeline
from hf_rlhf.config.plan import make_plan
from hf_rlhf.config.recipe import OfflineRecipe, Recipe, load_recipe, read_recipe
from hf_rlhf.config.recipe_yaml import FAMILIES, family
from hf_rlhf.config.training_arguments import DEFAULTS
from hf_rlhf.registry.discovery import RecipeEntry
from hf_rlhf.registry.host import OWN_PACKAGE, use_host

PLACES = {
    "in_loss": "in the loss",
    "in_reward": "in the reward",
    "in_advantage": "in the advantage",
    "monitor": "measured only",
}
DIALECTS = "Dialects of other libraries"
HEADER = ("recipe", "advantages", "KL", "critic", "policy loss", "aggregation", "rewards", "and", "paper")


def index() -> Iterator[str]:
    """Return a line for each recipe with rollouts."""
    yield _table(offer for offer in own_recipes() if "@" not in offer.name)


def dialects() -> Iterator[str]:
    """Return a line for each dialect of a recipe."""
    yield _table(offer for offer in own_recipes() if "@" in offer.name)


def _table(offers: Iterable[RecipeEntry]) -> str:
    rows = []
    with use_host(own_host()):
        for offer in offers:
            recipe = None if is_pipeline(offer.name) else load_recipe(offer.name)
            if recipe is not None and not isinstance(recipe, OfflineRecipe):
                rows.append([code(offer.name), *choices(recipe), papers(offer.file.read_text(encoding="utf-8"))])
    return table(HEADER, rows)


def choices(recipe: Recipe) -> list[str]:
    """Return the choices of a recipe with rollouts on the axes that distinguish recipes."""
    algorithm = recipe.algorithm()
    one = {axis: getattr(algorithm, axis) for axis in ("advantages", "critic", "policy_loss", "aggregation")}
    inner = getattr(one["advantages"], "baseline", None)
    kls = [f"{PLACES[kl.name]} (`{kl.estimator.name}`)" for kl in algorithm.kl]
    others = [plugin.name for plugin in (*algorithm.loss_terms, *algorithm.filters)]
    others += [algorithm.optimizer.name] if algorithm.optimizer.name != "trainer" else []
    return [
        code(one["advantages"].name) + (f" of `{inner.name}`" if inner else ""),
        ", ".join(kls) or "none",
        "none" if one["critic"].name == "none" else code(one["critic"].name),
        code(one["policy_loss"].name),
        code(one["aggregation"].name),
        ", ".join(code(source.name) for source in algorithm.rewards),
        ", ".join(map(code, others)),
    ]


def reference() -> Iterator[str]:
    """Every recipe by family with its paper and departures, what it loads and computes, and its text."""
    with use_host(own_host()):
        titles = {
            offer.name: DIALECTS if "@" in offer.name else FAMILIES[family(read_recipe(offer.name))]
            for offer in own_recipes()
        }
        for title in (*FAMILIES.values(), DIALECTS):
            yield f"## {title}"
            for offer in own_recipes():
                if titles[offer.name] == title:
                    yield from _recipe(offer)


def _recipe(offer: RecipeEntry) -> Iterator[str]:
    lines = offer.file.read_text(encoding="utf-8").splitlines()
    yield f"### {offer.name}\n\n" + "\n".join(line.lstrip("# ") for line in lines if line.startswith("#"))
    yield from _explained(offer.name)
    yield "```yaml\n" + "\n".join(line for line in lines if not line.startswith("#")) + "\n```"
    yield f"File: [recipes/{offer.file.name}](../recipes/{offer.file.name})."


def _explained(name: str) -> Iterator[str]:
    """Describe the stages of a recipe, its trainer, or its plugins and its plan for one process."""
    if is_pipeline(name):
        stages = (f"`{stage.name}` ([{stage.source}](#{stage.source}))" for stage in load_pipeline(name).stages)
        yield f"**Stages.** {', '.join(stages)}: [pipelines.md](pipelines.md)."
        return
    recipe = load_recipe(name)
    if isinstance(recipe, OfflineRecipe):
        yield f"**Trainer.** `{recipe.trainer().name}`: [plugins.md](plugins.md#trainer{recipe.trainer().name})."
        return
    algorithm = recipe.algorithm()
    rows = {**DEFAULTS, **recipe.training}["per_device_train_batch_size"]
    plan = make_plan(algorithm, [], rows_per_micro_batch=rows)
    yield f"**Plugins.** {', '.join(f'`{path}={plugin.name}`' for path, plugin in algorithm.plugins())}."
    named = {"Models": plan.models, "Forward passes per rollout": plan.forwards, "Skipped": plan.skipped}
    said = [
        f"**{title}.**\n\n" + "\n".join(f"- {line}" for line in lines)
        for title, lines in {**named, "Remarks": plan.remarks}.items()
        if lines
    ]
    yield folded("Plan", said)


def own_recipes() -> list[RecipeEntry]:
    return [offer for offer in own_host().recipes() if offer.package == OWN_PACKAGE]
