"""Reads data to restore and to calibrate with, one file for each layout: `catalog.open_source(name)`."""
