"""Kinds of weights and how they are multiplied: rules, masks, packed formats, kernels, sharding."""
