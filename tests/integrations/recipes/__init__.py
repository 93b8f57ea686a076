"""Recipes: their laws first, then short runs."""
