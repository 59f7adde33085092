"""Reads the official files of benchmarks of questions about images and of captions: `load.load(name, folder)`."""
