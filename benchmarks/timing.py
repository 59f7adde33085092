"""What the benchmarks that compare with torch share: one call's time, and the matmul rate of each library."""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch


def seconds(run: Callable[[], object]) -> float:
    """Wall-clock time of one call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def matmul_runs(shape: tuple[int, int, int]) -> dict[str, tuple[Callable[[], object], float]]:
    """For each library: a function that repeats one `x @ W`, and the FLOPs of a call (about 20 G)."""
    m, k, n = shape
    rng = np.random.default_rng(0)
    x, w = (rng.normal(size=size).astype(np.float32) for size in ((m, k), (k, n)))
    repeats = max(1, round(2e10 / (2 * m * k * n)))
    jx, jw, tx, tw, dot = jnp.asarray(x), jnp.asarray(w), torch.tensor(x), torch.tensor(w), jax.jit(jnp.matmul)
    flops = repeats * 2 * m * k * n
    return {
        'jax': (lambda: jax.block_until_ready([dot(jx, jw) for _ in range(repeats)]), flops),
        'torch': (lambda: [tx @ tw for _ in range(repeats)], flops),
    }
