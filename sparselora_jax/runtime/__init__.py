"""Utilities that all other packages use: processes, files, progress, registries, errors."""
