"""Runs a recipe in a working directory, runs sweeps of recipes, and writes reports."""
