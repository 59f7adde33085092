"""Chips that are not here, as JAX's compilers take them: slices of TPUs, and GPUs of one machine."""

import re
from typing import Any

from jax.experimental import topologies

from sparselora_jax.planning.chips import GPUS, KIB, TPUS, Chip, Gpu
from sparselora_jax.recipe import ConfigError


def find(topology: str) -> tuple[Chip, list[Any]]:
    """The chip of a topology, `v5e:4x4` or `h100:8`, and its devices, which programs can be compiled for.

    Raises:
      ConfigError: no such chip or slice, or its compiler is not installed.
    """
    kind, _, shape = topology.partition(':')
    if kind in GPUS:
        return GPUS[kind].chip, _gpus(topology, GPUS[kind], shape)
    if kind not in TPUS:
        known = f'one of {", ".join(TPUS)}, then :4x4 or the like, or of {", ".join(GPUS)}, then :8 or fewer'
        raise ConfigError(f'--topology={topology}: expected {known}')
    return TPUS[kind], _devices(topology, 'tpu', topology_name=topology)


def compiler_options(chip: Chip, effort: float) -> dict[str, Any]:
    """How a program is compiled for chips that are not here.

    Args:
      effort: see `launch/compile.py`; of TPUs.
    """
    if chip in (gpu.chip for gpu in GPUS.values()):
        # A GPU's compiler tries its own products on the GPU; without one it may choose tiles that do not fit and fail.
        return {'xla_gpu_enable_triton_gemm': False}
    return {'exec_time_optimization_effort': effort} if effort else {}


def _gpus(topology: str, gpu: Gpu, count: str) -> list[Any]:
    if not re.fullmatch('[1-8]', count):
        raise ConfigError(f'--topology={topology}: expected 1 to 8 GPUs, of one machine')
    return _devices(topology, 'cuda', topology=f'1x1x{count}', target_config=description(gpu))


def _devices(topology: str, platform: str, /, **what: str) -> list[Any]:
    needed = {'tpu': 'requirements-tpu.txt', 'cuda': 'requirements-gpu.txt'}[platform]
    try:
        return topologies.get_topology_desc(platform=platform, **what).devices
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f'--topology={topology}: {error}; is {needed} installed?') from None


def description(gpu: Gpu) -> str:
    """A GPU in XLA's words, a text of `stream_executor.GpuTargetConfigProto`."""
    return f"""
platform_name: "CUDA"
device_description_str: "{gpu.chip.name}"
dnn_version_info {{ major: 9 minor: 12 }}
gpu_device_info {{
  name: "{gpu.chip.name}"
  cuda_compute_capability {{ major: {gpu.capability} }}
  core_count: {gpu.cores}
  fpus_per_core: {gpu.lanes}
  clock_rate_ghz: {gpu.hertz / 1e9}
  device_memory_size: {gpu.chip.memory}
  memory_bandwidth: {int(gpu.chip.bytes_s)}
  l2_cache_size: {gpu.cache}
  shared_memory_per_core: {gpu.shared}
  shared_memory_per_block: {48 * KIB}
  shared_memory_per_block_optin: {gpu.shared - KIB}
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
