"""The check of a recipe of either kind, without its model."""

from __future__ import annotations

from transformers import TrainingArguments

from hf_rlhf.config.plan import Plan
from hf_rlhf.config.recipe import OfflineRecipe, Recipe
from hf_rlhf.runtime.errors import UserError
from hf_rlhf.training import setup
from hf_rlhf.training.offline import setup as offline


def checked(recipe: Recipe, args: TrainingArguments) -> Plan:
    """Return the plan of a recipe. Raises `UserError` where it is refused."""
    try:
        return (
            offline.check_recipe(recipe, args)
            if isinstance(recipe, OfflineRecipe)
            else setup.check_recipe(recipe, args)
        )
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error
