"""Accelerators by what their makers publish: what a program's time is estimated with where there is no chip.

Rates are dense bf16, per chip. Links are what one chip can send to its neighbours, all links together. Prices are list
prices of Google Cloud on demand (us-central and us-east, early 2026), in dollars an hour: set your own. There is none
for GPUs, whose prices differ by several times from one cloud to another.
"""

from typing import NamedTuple

GB, KIB, MIB = 10**9, 2**10, 2**20


class Chip(NamedTuple):
    """One accelerator."""

    name: str
    memory: int  # bytes
    bytes_s: float
    flops_s: float
    links_s: float  # bytes
    dollars_hour: float | None


TPUS = {
    'v5e': Chip('TPU v5e', 16 * 2**30, 0.819e12, 197e12, 200e9, 1.20),
    'v5p': Chip('TPU v5p', 95 * GB, 2.765e12, 459e12, 600e9, 4.20),
    'v6e': Chip('TPU v6e', 32 * GB, 1.64e12, 918e12, 448e9, 2.70),
}


class Gpu(NamedTuple):
    """A GPU, and what XLA's compiler asks about its multiprocessors.

    Attributes:
      capability: the first number of the compute capability.
      cores: multiprocessors, of `lanes` fp32 units and `shared` bytes of shared memory each.
      cache: bytes, the last level.
    """

    chip: Chip
    capability: int
    cores: int
    hertz: float
    lanes: int
    shared: int
    cache: int


AMPERE = {'capability': 8, 'cores': 108, 'hertz': 1.41e9, 'lanes': 64, 'shared': 164 * KIB, 'cache': 40 * MIB}
HOPPER = {'capability': 9, 'cores': 132, 'hertz': 1.83e9, 'lanes': 128, 'shared': 228 * KIB, 'cache': 50 * MIB}
BLACKWELL = {'capability': 10, 'cores': 148, 'hertz': 1.85e9, 'lanes': 128, 'shared': 228 * KIB, 'cache': 126 * MIB}

GPUS = {  # memory is what the driver leaves, links are NVLink's
    'a100': Gpu(Chip('NVIDIA A100 80 GB', 85_100_068_864, 2.04e12, 312e12, 300e9, None), **AMPERE),
    'h100': Gpu(Chip('NVIDIA H100 SXM', 84_942_979_072, 3.35e12, 989e12, 450e9, None), **HOPPER),
    'h200': Gpu(Chip('NVIDIA H200', 151_397_597_184, 4.8e12, 989e12, 450e9, None), **HOPPER),
    'b200': Gpu(Chip('NVIDIA B200', 191_514_411_008, 8.0e12, 2250e12, 900e9, None), **BLACKWELL),
}
