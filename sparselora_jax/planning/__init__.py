"""Estimates memory, FLOPs, communication and cost of a recipe, from shapes alone."""
