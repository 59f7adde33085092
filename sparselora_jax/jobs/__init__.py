"""Runs a recipe in a working directory, runs sweeps of recipes, writes reports."""
