"""Run a recipe, or several stages, from the command line."""
