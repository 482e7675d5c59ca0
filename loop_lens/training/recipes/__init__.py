"""Recipes of the shipped models, one file each."""

from loop_lens.training.recipes.hops import HOPS
from loop_lens.training.recipes.hops_no_injection import HOPS_NO_INJECTION
from loop_lens.training.recipes.hops_ouro import HOPS_OURO
from loop_lens.training.recipes.recipe import Recipe
from loop_lens.training.recipes.run import build
from loop_lens.training.recipes.words import WORDS

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (HOPS, HOPS_NO_INJECTION, HOPS_OURO, WORDS)}
"""By name."""

__all__ = ["RECIPES", "Recipe", "build"]
