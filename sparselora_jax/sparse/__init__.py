"""Kinds of weights and their matmuls: rules, masks, packed formats, kernels, sharding."""
