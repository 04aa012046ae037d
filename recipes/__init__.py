"""Recipes: one plain Python file per training run, meant to be read, run and copied."""
