"""Describe absent devices to JAX's compilers: slices of TPUs, and GPUs of one machine."""

import re
from typing import Any

from jax.experimental import topologies

from sparselora_jax.planning.chips import GPUS, KIB, TPUS, Chip, Gpu
from sparselora_jax.recipe import ConfigError


def find(topology: str) -> tuple[Chip, list[Any]]:
    """Return the chip of a topology and its devices, for which programs can be compiled.

    Args:
      topology: e.g. `v5e:4x4` or `h100:8`.

    Raises:
      ConfigError: the chip or slice does not exist, or its compiler is not installed.
    """
    kind, _, shape = topology.partition(':')
    if kind in GPUS:
        return GPUS[kind].chip, _gpus(topology, GPUS[kind], shape)
    if kind not in TPUS:
        known = f'one of {", ".join(TPUS)}, then :4x4 or the like, or of {", ".join(GPUS)}, then :8 or fewer'
        raise ConfigError(f'--topology={topology}: expected {known}')
    return TPUS[kind], _devices(topology, 'tpu', 'requirements-tpu.txt', topology_name=topology)


def compiler_options(chip: Chip, effort: float) -> dict[str, bool | float]:
    """Return the compiler options for compiling a program for an absent chip.

    Args:
      chip: a chip from `find`.
      effort: effort of the TPU compiler, from -1 to 1; see `launch/compile.py`.
    """
    if chip in (gpu.chip for gpu in GPUS.values()):
        # XLA tunes its Triton matmuls by timing them on the GPU. Without a GPU it may choose tiles that do not fit, and
        # fail.
        return {'xla_gpu_enable_triton_gemm': False}
    # 0 is the default; only other values are passed on.
    return {'exec_time_optimization_effort': effort} if effort else {}


def _gpus(topology: str, gpu: Gpu, count: str) -> list[Any]:
    if not re.fullmatch('[1-8]', count):
        raise ConfigError(f'--topology={topology}: expected 1 to 8 GPUs, of one machine')
    # Slices x machines in a slice x GPUs in a machine.
    shape = f'1x1x{count}'
    return _devices(topology, 'cuda', 'requirements-gpu.txt', topology=shape, target_config=description(gpu))


def _devices(asked: str, platform: str, requirements: str, /, **what: str) -> list[Any]:
    """Return the devices of a platform.

    Args:
      asked: the topology as the user gave it, for the error.
      platform: name of JAX's platform.
      requirements: the requirements file that installs its compiler.
      what: arguments of JAX's `get_topology_desc`, which depend on the platform.

    Raises:
      ConfigError: the platform's own error.
    """
    try:
        return topologies.get_topology_desc(platform=platform, **what).devices
    except (RuntimeError, ValueError) as error:
        # A wrong shape and a missing JAX plugin both raise these errors.
        raise ConfigError(f'--topology={asked}: {error}; is {requirements} installed?') from None


def description(gpu: Gpu) -> str:
    """Return XLA's description of a GPU: a `stream_executor.GpuTargetConfigProto` as text.

    Limits that are the same for all GPUs of these generations are constants.

    Args:
      gpu: an entry of `chips.GPUS`.
    """
    own = gpu.architecture
    return f"""
platform_name: "CUDA"
device_description_str: "{gpu.chip.name}"
dnn_version_info {{ major: 9 minor: 12 }}
gpu_device_info {{
  name: "{gpu.chip.name}"
  cuda_compute_capability {{ major: {own.capability} }}
  core_count: {own.cores}
  fpus_per_core: {own.lanes}
  clock_rate_ghz: {own.hertz / 1e9}
  device_memory_size: {gpu.chip.memory}
  memory_bandwidth: {int(gpu.chip.bytes_s)}
  l2_cache_size: {own.cache}
  shared_memory_per_core: {own.shared}
  shared_memory_per_block: {48 * KIB}
  shared_memory_per_block_optin: {own.shared - KIB}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}}
"""
