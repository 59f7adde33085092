"""What the benchmarks share: times of calls, and the matmul rates of JAX and torch."""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


def seconds(run: Callable[[], object]) -> float:
    """Wall-clock time of one call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def in_turn(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each round's call of each; every round takes them in turn, after a call of each that is not timed."""
    for run in runs.values():
        run()
    times = [{name: seconds(run) for name, run in runs.items()} for _ in range(rounds)]
    return {name: [of_round[name] for of_round in times] for name in runs}


def matmul_runs(shape: tuple[int, int, int]) -> dict[str, tuple[Callable[[], object], float]]:
    """For each library: a function that repeats one `x @ W`, and the FLOPs of a call (about 20 G)."""
    import torch

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
