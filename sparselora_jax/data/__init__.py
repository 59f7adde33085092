"""Turns records into batches."""
