"""Lookup of reward sources by name, without a policy: those of a recipe, a plugin with settings, or a function."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NoReturn

from hf_rlhf.config.sections import Dataset
from hf_rlhf.contract.model_settings import Model
from hf_rlhf.runtime.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hf_rlhf.contract.reward_source import RewardSource
    from hf_rlhf.scoring.scorer import Scorer

NO_TOKENS = "token ids are not available here"


@dataclass(kw_only=True)
class NamedRewards:
    """Reward sources by label, and the dataset and model settings of their recipe."""

    sources: list[tuple[str, RewardSource]]
    dataset: Dataset = field(default_factory=Dataset)
    model: Model = field(default_factory=Model)
    """The recipe's `model`, of which its chat template is used."""

    def columns(self) -> set[str]:
        """Return the dataset columns that the sources read."""
        return {name for _, source in self.sources for name in columns_of(source)}


def columns_of(source: RewardSource) -> set[str]:
    """Return the dataset columns that a source reads, including those of its `when`. Raises `UserError` if it fails."""
    try:
        return source.columns() | set(source.when or ())
    except ValueError as error:
        raise UserError(str(error)) from error


def named_rewards(name: str, words: Sequence[str] = ()) -> NamedRewards:
    """Return the reward sources of a recipe, a reward plugin, or a function `file.py:name` or `module:name`.

    A recipe is a name or a YAML file, which may hold `rewards` alone, and `words` override its keys; for plugins and functions
    they are settings. Raises `UserError` naming the choices.
    """
    from hf_rlhf.registry.host import get_host

    wrong = [word for word in words if "=" not in word]
    if wrong:
        raise UserError(f"settings must be KEY=VALUE, such as column=answer, got {wrong[0]!r}")
    host = get_host()
    if name.endswith((".yaml", ".yml")):
        return _of_recipe(name, words)
    if ":" in name:
        return _of_plugin("function", [f"function={name}", *words])
    if name.endswith(".py"):
        raise UserError(
            f"{name} is a file. Name a function in it as {name}:FUNCTION, or add its plugins with -p {name}"
        )
    bare = name.rpartition("/")[2]
    rewards, recipes = set(host.names("rewards")), {recipe.name for recipe in host.recipes() if not recipe.problem}
    if bare in rewards and bare in recipes:
        raise UserError(
            f"{name!r} is both a recipe and a reward plugin. Name the recipe's YAML file, or write a recipe"
        )
    if bare in rewards:
        return _of_plugin(name, words)
    if bare in recipes:
        return _of_recipe(name, words)
    raise UserError(
        f"no recipe and no reward plugin named {name!r}.{did_you_mean(bare, rewards | recipes)} Reward plugins: "
        f"{', '.join(sorted(rewards))}. `hf-rlhf recipes` lists the recipes; functions have the form file.py:name"
    )


def _of_recipe(name: str, words: Sequence[str]) -> NamedRewards:
    from hf_rlhf.config.recipe import load_recipe, read_recipe
    from hf_rlhf.config.recipe_yaml import TOP_AXES

    written = read_recipe(name)
    if written.keys() & set(TOP_AXES) == {"rewards"}:
        rewards, dataset, model = _alone(name, written, words)
    else:
        recipe = load_recipe(name, words)
        if "rewards" not in recipe.plugins:
            raise UserError(f"recipe {name} trains on a dataset and has no rewards. Name a recipe with `rewards`")
        rewards, dataset, model = recipe.plugins["rewards"], recipe.dataset, recipe.model
    sources = [(source.label or source.name, source) for source in rewards]
    labels = [label for label, _ in sources]
    if not sources:
        raise UserError(f"recipe {name} has no reward source. Set 'rewards=[{{use: exact_match}}]'")
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise UserError(f"{name} has several reward sources labelled {twice[0]!r}. Set a distinct `label` for each")
    return NamedRewards(sources=sources, dataset=dataset, model=model)


def _alone(name: str, written: dict[str, Any], words: Sequence[str]) -> tuple[list[RewardSource], Dataset, Model]:
    """Return the rewards of a file without an algorithm, and its sections `dataset` and `model`."""
    from hf_rlhf.config.overrides import apply_overrides
    from hf_rlhf.config.recipe_reader import RecipeReader
    from hf_rlhf.config.recipe_yaml import RecipeError
    from hf_rlhf.registry.host import get_host

    raw, _ = apply_overrides(written, words)
    reader, keys = RecipeReader(get_host()), ("rewards", "dataset", "model")
    for key in raw.keys() - {*keys}:
        reader.refuse(key, f"a file of rewards has no such key.{did_you_mean(key, keys)} It has: {', '.join(keys)}")
    rewards, _ = reader.axis("rewards", raw["rewards"])
    dataset, _ = reader.group(Dataset, raw.get("dataset", {}), "dataset")
    model, _ = reader.group(Model, raw.get("model", {}), "model")
    if reader.problems:
        raise RecipeError(f"the file {name}", reader.problems)
    return rewards, dataset, model


def _of_plugin(name: str, words: Sequence[str]) -> NamedRewards:
    from hf_rlhf.config.overrides import apply_overrides
    from hf_rlhf.config.recipe import load_plugin

    raw, _ = apply_overrides({"rewards": [{"use": name}]}, [f"rewards.0.{word}" for word in words])
    source: RewardSource = load_plugin("rewards", **_renamed(raw["rewards"][0]))
    return NamedRewards(sources=[(source.label or source.name, source)])


def _renamed(settings: dict[str, Any]) -> dict[str, Any]:
    """Rename `use` to `name`, the argument of `load_plugin`."""
    return {"name" if key == "use" else key: value for key, value in settings.items()}


def tokenizer_of(rewards: NamedRewards, path: str | None) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer in a folder or on the Hub, with the recipe's chat template; None for None. Raises `UserError`."""
    if path is None:
        return None
    from hf_rlhf.data.model_loading import load_tokenizer

    return load_tokenizer(replace(rewards.model, tokenizer=path))


def scorer_of(
    sources: list[tuple[str, RewardSource]],
    tokenizer: PreTrainedTokenizerBase | None,
    kwargs: dict[str, Any],
    requests: int = 1,
) -> Scorer:
    """Set up the sources without a policy, with `kwargs` for chat templates, ready to score so many requests at a time.

    Failures of rows are reported and never raised, even with `on_error: raise`. Raises `UserError` if a source cannot be set up.
    """
    import torch

    from hf_rlhf.batch import Context
    from hf_rlhf.config.hub_names import check_hub_names
    from hf_rlhf.config.plugin_tree import walk
    from hf_rlhf.scoring.scorer import Scorer

    check_hub_names(walk({"rewards": [source for _, source in sources]}))
    for _, source in sources:
        source.on_error = "none" if source.on_error == "raise" else source.on_error
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    try:
        device = device or torch.device("cpu")
        context = Context(device=device, tokenizer=tokenizer, policy=None, chat_template_kwargs=kwargs)
        scorer = Scorer(sources, context, requests=requests)
        scorer.wait()
        return scorer
    except (ValueError, OSError, ImportError) as error:
        raise UserError(str(error)) from error


class NoTokens(Sequence[int]):
    """Placeholder for the tokens or the mask of a row of which only the text is known; raises an error on any access."""

    def _refuse(self) -> NoReturn:
        raise UserError(f"this source reads token ids or masks, but {NO_TOKENS}")

    def __len__(self) -> int:
        self._refuse()

    def __getitem__(self, index: Any) -> Any:
        self._refuse()

    def __iter__(self) -> Iterator[int]:
        self._refuse()

    def __contains__(self, value: object) -> bool:
        self._refuse()

    def __bool__(self) -> bool:
        self._refuse()

    def __copy__(self) -> NoTokens:
        return self

    def __deepcopy__(self, memo: Any) -> NoTokens:
        return self

    def __reduce__(self) -> Any:
        return NoTokens, ()
