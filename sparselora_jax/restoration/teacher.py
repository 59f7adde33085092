"""A teacher's likeliest tokens on disk, batch by batch, so that the dense model need not run while another learns."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from sparselora_jax.checkpoints.trees import load_safetensors, save_safetensors
from sparselora_jax.restoration.losses import TopK, top_k
from sparselora_jax.runtime import processes
from sparselora_jax.runtime.files import StorageError


def keep(
    folder: str | Path,
    logits: Callable[[Any, dict], Array],
    weights: Any,
    batches: Any,
    *,
    steps: int,
    k: int,
    temperature: float,
    progress: Callable[[int], None] = lambda done: None,
) -> int:
    """Writes `top_k` of each batch's logits, a file a step; those that are there are not computed again.

    Args:
      logits: `logits(weights, batch)`, as `make_train_step` takes them.

    Returns:
      Bytes on disk.
    """
    kept = jax.jit(lambda weights, batch: top_k(logits(weights, batch), k, temperature=temperature))
    for step in range(steps):
        if not processes.agreed(_file(folder, step).exists):
            save_safetensors(_file(folder, step), kept(weights, batches[step])._asdict())
            progress(step + 1)
    return sum(_file(folder, step).stat().st_size for step in range(steps))


def read(folder: str | Path, step: int, rows: Sequence[int] | None = None) -> TopK:
    """What was kept of a step's batch, or of some rows of it.

    Raises:
      StorageError: the file is missing or damaged.
    """
    arrays, _ = load_safetensors(_file(folder, step))
    if arrays.keys() != set(TopK._fields):
        raise StorageError(f'{_file(folder, step)}: holds {sorted(arrays)}, expected {", ".join(TopK._fields)}')
    return TopK(**{name: np.asarray(array)[... if rows is None else rows] for name, array in arrays.items()})


def _file(folder: str | Path, step: int) -> Path:
    return Path(folder) / f'{step:06d}.safetensors'
