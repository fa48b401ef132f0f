"""Reward sources by name, without a policy: those of a recipe, a plugin with its settings, or a function in a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from hf_rlhf.config.sections import Dataset
from hf_rlhf.contract.model_settings import Model
from hf_rlhf.runtime.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hf_rlhf.contract.reward_source import RewardSource
    from hf_rlhf.scoring.scorer import Scorer

NO_TOKENS = "token ids are not known here"


@dataclass(kw_only=True)
class NamedRewards:
    """Reward sources under their labels, and how the recipe that they come from makes prompts of rows."""

    sources: list[tuple[str, RewardSource]]
    dataset: Dataset = field(default_factory=Dataset)

    def columns(self) -> set[str]:
        """Dataset columns that the sources read."""
        return {name for _, source in self.sources for name in columns_of(source)}


def columns_of(source: RewardSource) -> set[str]:
    """Dataset columns that a source reads, those of its `when` included. Raises `UserError` where it cannot say."""
    try:
        return source.columns() | set(source.when or ())
    except ValueError as error:
        raise UserError(str(error)) from error


def named_rewards(name: str, words: Sequence[str] = ()) -> NamedRewards:
    """The reward sources of a recipe (a name or a YAML file; `words` override its keys), of one reward plugin, or of a function
    `file.py:name` or `module:name` (`words` are their settings). Raises `UserError` saying what there is."""
    from hf_rlhf.registry.host import get_host

    wrong = [word for word in words if "=" not in word]
    if wrong:
        raise UserError(f"{wrong[0]!r}: write KEY=VALUE, for instance column=answer")
    host = get_host()
    if name.endswith((".yaml", ".yml")):
        return _of_recipe(name, words)
    if ":" in name:
        return _of_plugin("function", [f"function={name}", *words])
    if name.endswith(".py"):
        raise UserError(f"{name}: name a function in it as {name}:FUNCTION, or add its plugins with -p {name}")
    bare = name.rpartition("/")[2]
    rewards, recipes = set(host.names("rewards")), {recipe.name for recipe in host.recipes() if not recipe.problem}
    if bare in rewards and bare in recipes:
        raise UserError(f"{name!r} is a recipe and a reward plugin: name the recipe's YAML file, or write a recipe")
    if bare in rewards:
        return _of_plugin(name, words)
    if bare in recipes:
        return _of_recipe(name, words)
    raise UserError(
        f"no recipe and no reward plugin named {name!r}.{did_you_mean(bare, rewards | recipes)} Reward plugins: "
        f"{', '.join(sorted(rewards))}; `hf-rlhf recipes` lists the recipes; a function is named file.py:name"
    )


def _of_recipe(name: str, words: Sequence[str]) -> NamedRewards:
    from hf_rlhf.config.recipe import load_recipe

    recipe = load_recipe(name, words)
    if "rewards" not in recipe.plugins:
        raise UserError(f"the recipe {name} trains on a dataset and has no rewards: name a recipe with `rewards`")
    sources = [(source.label or source.name, source) for source in recipe.plugins["rewards"]]
    labels = [label for label, _ in sources]
    if not sources:
        raise UserError(f"the recipe {name} has no reward source: give it one with 'rewards=[{{use: NAME}}]'")
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise UserError(f"{name} has several reward sources called {twice[0]!r}: give each a `label` of its own")
    return NamedRewards(sources=sources, dataset=recipe.dataset)


def _of_plugin(name: str, words: Sequence[str]) -> NamedRewards:
    from hf_rlhf.config.overrides import apply_overrides
    from hf_rlhf.config.recipe import load_plugin

    raw, _ = apply_overrides({"rewards": [{"use": name}]}, [f"rewards.0.{word}" for word in words])
    source: RewardSource = load_plugin("rewards", **_renamed(raw["rewards"][0]))
    return NamedRewards(sources=[(source.label or source.name, source)])


def _renamed(settings: dict[str, Any]) -> dict[str, Any]:
    """`use` as the argument of `load_plugin`."""
    return {"name" if key == "use" else key: value for key, value in settings.items()}


def tokenizer_of(path: str | None) -> PreTrainedTokenizerBase | None:
    """The tokenizer in a folder or on the Hub, None for None. Raises `UserError` where there is none."""
    if path is None:
        return None
    from hf_rlhf.data.model_loading import load_tokenizer

    return load_tokenizer(Model(tokenizer=path))


def scorer_of(sources: list[tuple[str, RewardSource]], tokenizer: PreTrainedTokenizerBase | None) -> Scorer:
    """The sources set up, without a policy; failures of rows are reported and end nothing, `on_error: raise` or not. Raises
    `UserError` where a source cannot be set up."""
    import torch

    from hf_rlhf.batch import Context
    from hf_rlhf.scoring.scorer import Scorer

    for _, source in sources:
        source.on_error = "none" if source.on_error == "raise" else source.on_error
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    try:
        return Scorer(sources, Context(device=device or torch.device("cpu"), tokenizer=tokenizer, policy=None))
    except (ValueError, OSError, ImportError) as error:
        raise UserError(str(error)) from error


class NoTokens(Sequence[int]):
    """Stands for the tokens or the mask of a row where only its text is known: whoever looks at it is told so."""

    def _refuse(self) -> NoReturn:
        raise UserError(f"this source reads token ids or masks, and {NO_TOKENS}")

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
