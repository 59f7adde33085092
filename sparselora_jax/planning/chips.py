"""Published figures of accelerators, used to estimate a program's time on a chip that is not here.

Rates are per chip, for dense bf16. The rate of the links is what one chip can send to its neighbours over all its links
together. Prices are on-demand list prices of Google Cloud (us-central and us-east, early 2026); set your own. GPUs have
no price here: their prices differ by several times between clouds.
"""

from typing import NamedTuple

GB = 10**9
KIB = 2**10
MIB = 2**20
GIB = 2**30


class Chip(NamedTuple):
    """One accelerator.

    Attributes:
      name: name of the product.
      memory: bytes of memory.
      bytes_s: memory bandwidth in bytes per second.
      flops_s: FLOPs per second, dense bf16.
      links_s: bytes per second to its neighbours.
      dollars_hour: price per hour in dollars; None: not known.
    """

    name: str
    memory: int
    bytes_s: float
    flops_s: float
    links_s: float
    dollars_hour: float | None


TPUS = {
    'v5e': Chip('TPU v5e', 16 * GIB, bytes_s=0.819e12, flops_s=197e12, links_s=200e9, dollars_hour=1.20),
    'v5p': Chip('TPU v5p', 95 * GB, bytes_s=2.765e12, flops_s=459e12, links_s=600e9, dollars_hour=4.20),
    'v6e': Chip('TPU v6e', 32 * GB, bytes_s=1.64e12, flops_s=918e12, links_s=448e9, dollars_hour=2.70),
}


class Architecture(NamedTuple):
    """What XLA's compiler asks about the multiprocessors of a generation of GPUs.

    Attributes:
      capability: the first number of the compute capability.
      cores: number of multiprocessors.
      hertz: clock rate of the multiprocessors.
      lanes: number of fp32 units of each multiprocessor.
      shared: bytes of shared memory of each multiprocessor.
      cache: bytes of the last-level cache.
    """

    capability: int
    cores: int
    hertz: float
    lanes: int
    shared: int
    cache: int


class Gpu(NamedTuple):
    """A GPU.

    Attributes:
      chip: its memory and rates.
      architecture: what XLA's compiler asks about it.
    """

    chip: Chip
    architecture: Architecture


AMPERE = Architecture(8, cores=108, hertz=1.41e9, lanes=64, shared=164 * KIB, cache=40 * MIB)
HOPPER = Architecture(9, cores=132, hertz=1.83e9, lanes=128, shared=228 * KIB, cache=50 * MIB)
BLACKWELL = Architecture(10, cores=148, hertz=1.85e9, lanes=128, shared=228 * KIB, cache=126 * MIB)

# Memory is what the driver leaves to programs; the links are NVLink.
GPUS = {
    'a100': Gpu(Chip('NVIDIA A100 80 GB', 85_100_068_864, 2.04e12, 312e12, 300e9, None), AMPERE),
    'h100': Gpu(Chip('NVIDIA H100 SXM', 84_942_979_072, 3.35e12, 989e12, 450e9, None), HOPPER),
    'h200': Gpu(Chip('NVIDIA H200', 151_397_597_184, 4.8e12, 989e12, 450e9, None), HOPPER),
    'b200': Gpu(Chip('NVIDIA B200', 191_514_411_008, 8.0e12, 2250e12, 900e9, None), BLACKWELL),
}
