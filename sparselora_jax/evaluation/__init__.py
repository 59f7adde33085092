"""Generate answers and score them: decoding, metrics, densities and perplexity."""
