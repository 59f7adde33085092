"""Generates answers and scores them: decoding, metrics, densities and perplexity."""
