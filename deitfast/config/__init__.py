"""Recipes: every setting of a run, validated, loaded, overridden and written."""
