"""Recipes: one plain Python file a model, meant to be read, run and copied."""
