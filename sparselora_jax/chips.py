"""Accelerators by what their makers publish: what a program's time is estimated with where there is no chip.

Rates are dense bf16, per chip. Links are what one chip can send to its neighbours, all links together. Prices are list
prices of Google Cloud on demand (us-central and us-east, early 2026), in dollars an hour: set your own.
"""

from typing import NamedTuple

GB = 10**9


class Chip(NamedTuple):
    """One accelerator."""

    name: str
    memory: int  # bytes
    bytes_s: float
    flops_s: float
    links_s: float  # bytes
    dollars_hour: float


TPUS = {
    'v5e': Chip('TPU v5e', 16 * 2**30, 0.819e12, 197e12, 200e9, 1.20),
    'v5p': Chip('TPU v5p', 95 * GB, 2.765e12, 459e12, 600e9, 4.20),
    'v6e': Chip('TPU v6e', 32 * GB, 1.64e12, 918e12, 448e9, 2.70),
}
