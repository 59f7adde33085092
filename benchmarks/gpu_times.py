"""Seconds of a GPU's kernels, without the gaps between them: CUPTI, by the extension of JAX's own Pallas profiler."""

import itertools
import statistics
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu


def kernel_seconds(calls: Sequence[Callable[[], object]]) -> list[float]:
    """Of each call, once, in turn; after all were called once. Of kernels of one name in a call the median counts."""
    from jax._src.lib import mosaic_gpu

    profiler = mosaic_gpu._mosaic_gpu_ext
    jax.block_until_ready([call() for call in [*calls, separator]])
    profiler._cupti_init()
    try:
        for call in calls:
            jax.block_until_ready(call())
            jax.block_until_ready(separator())
    finally:
        records = profiler._cupti_get_timings(True)
    groups = itertools.groupby(records, key=lambda record: record[0] == 'separator')
    found = [_seconds(list(group)) for separates, group in groups if not separates]
    if len(found) != len(calls):
        raise RuntimeError(f'{len(found)} runs of kernels were recorded for {len(calls)} calls')
    return found


def _seconds(records: list[tuple[str, float]]) -> float:
    times = {}
    for name, milliseconds in records:
        times.setdefault(name, []).append(milliseconds / 1e3)
    return sum(statistics.median(of_name) * len(of_name) for of_name in times.values())


@jax.jit
def separator() -> jax.Array:
    """A kernel with a name of its own."""

    def body(out_ref):
        out_ref[...] = jnp.zeros(out_ref.shape, out_ref.dtype)

    out = jax.ShapeDtypeStruct((32,), jnp.float32)
    return pl.pallas_call(body, name='separator', out_shape=out, compiler_params=plgpu.CompilerParams())()
